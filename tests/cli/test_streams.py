"""The command line in scripts: standard streams, pipes and redirections."""

import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from cli_runs import WEIGHT, WORDS, assert_one_line, command, run

from embax import cli, files
from embax.vectors import Vectors

EMBAX = shlex.join(command())


@pytest.fixture
def vectors(tmp_path):
    Vectors(WORDS, WEIGHT).save(tmp_path / "v.safetensors")
    files.save(tmp_path / "v.txt", files.load(tmp_path / "v.safetensors"))
    return tmp_path


def script(text, folder):
    """Run a script of bash, in which `embax` is the command line."""
    text = f'embax() {{ {EMBAX} "$@"; }}\n{text}'
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=100)


def test_redirected_output_keeps_other_output_of_the_script(vectors):
    done = script(
        """
        { echo before; embax convert v.safetensors /dev/stdout --to word2vec --json; echo after; } >both 2>json
        exec >>more
        echo before
        embax convert v.safetensors - --to word2vec
        echo after
        """,
        vectors,
    )
    assert done.returncode == 0, done.stderr
    text = (vectors / "v.txt").read_text()
    for name in ("both", "more"):
        assert (vectors / name).read_text() == f"before\n{text}after\n"
    assert json.loads((vectors / "json").read_text())["output"] == {
        "path": "/dev/stdout",
        "format": "word2vec",
        "bytes": None,
    }
    assert done.stderr == (
        "embax: wrote standard output: 6 rows of 3, as word2vec, from "
        f"{os.path.getsize(vectors / 'v.safetensors')} bytes as safetensors\n"
    )


def test_pipes_are_read_and_written(vectors):
    done = script(
        """
        set -eo pipefail
        embax convert <(gzip -c v.txt) - --to parquet 2>/dev/null | embax info - --json >info
        mkfifo in
        cat v.safetensors >in &
        embax convert in >(cat >copy) --to word2vec --json >named
        wait
        """,
        vectors,
    )
    assert done.returncode == 0, done.stderr
    info = json.loads((vectors / "info").read_text())
    assert (info["file"], info["format"], info["rows"], info["dim"]) == ("-", "parquet", 6, 3)
    assert info["bytes"] > 100
    named = json.loads((vectors / "named").read_text())
    assert (named["input"]["format"], named["rows"]) == ("safetensors", 6)
    assert (vectors / "copy").read_text() == (vectors / "v.txt").read_text()


def test_closed_pipe_ends_a_command_quietly(vectors):
    Vectors([f"t{row}" for row in range(5000)], np.ones((5000, 9))).save(vectors / "long")
    done = script("embax convert long - --to word2vec | head -n 1; echo ${PIPESTATUS[0]}", vectors)
    assert done.stdout == "5000 9\n1\n"
    assert done.stderr == ""


def test_standard_input_is_read_by_every_command(vectors, monkeypatch):
    data = (vectors / "v.txt").read_bytes()
    pairs = vectors / "pairs.tsv"
    pairs.write_text("man\twoman\t1\nking\tqueen\t2\nboy\tgirl\t3\n")
    for arguments in (
        ["info", "-"],
        ["neighbors", "-", "king"],
        ["analogy", "-", "man", "king", "woman"],
        ["evaluate", "-", "--word-pairs", pairs],
        ["map", "-", "-o", vectors / "map.html"],
        ["convert", "-", vectors / "o.npy"],
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, ""), arguments
        assert "-" in json.dumps(json.loads(out))
    assert len(Vectors.load(vectors / "o.npy")) == 6
    assert "<title>standard input: 6 tokens</title>" in (vectors / "map.html").read_text()
    assert sorted(path.name for path in vectors.iterdir() if path.name.startswith("-")) == []


def written_to_standard_output(monkeypatch, *arguments):
    """Return the bytes that come out, and the report, which goes to standard error."""
    raw, report = io.BytesIO(), io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw))
        patched.setattr(sys, "stderr", report)
        with pytest.raises(SystemExit) as done:
            cli.main([*map(str, arguments), "--json"])
        assert done.value.code == 0, report.getvalue()
        return raw.getvalue(), json.loads(report.getvalue()[report.getvalue().index("{\n") :])


@pytest.mark.parametrize("kind", ["html", "png"])
def test_a_map_is_drawn_into_standard_output(vectors, monkeypatch, kind):
    data, report = written_to_standard_output(monkeypatch, "map", vectors / "v.txt", "-o", "-", "--to", kind)
    assert data.startswith({"html": b"<!doctype html>", "png": b"\x89PNG"}[kind])
    assert data.rstrip().endswith({"html": b"</html>", "png": b"IEND\xaeB`\x82"}[kind])
    assert len(report["points"]) == 6


def test_train_writes_to_standard_output(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("the king and the queen and the king " * 40)
    options = ["-o", "-", "--to", "glove", "--dim", 2, "--epochs", 1, "--min-count", 1]
    data, report = written_to_standard_output(monkeypatch, "train", tmp_path / "text", *options)
    assert sorted(line.split()[0] for line in data.decode().splitlines()) == ["and", "king", "queen", "the"]
    assert report["words"] == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convert", "v.txt", "-"], ["-: must name a format for a stream", "safetensors, npy", "by --to"]),
        (["convert", "v.txt", "/dev/stdout"], ["/dev/stdout: must name a format for a stream"]),
        (["convert", "v.txt", "-", "--to", "npy"], ["-: must have a folder for the format 'npy'"]),
        (["convert", "v.txt", "o", "--to", "tensor"], ["o: must be a format that is written"]),
        (["map", "v.txt", "-o", "-"], ["-: must end in .png or .html. Rename it, or pass --to png or --to html."]),
        (["map", "v.txt", "-o", "-", "--to", "gif"], ["--to", "png or html, got 'gif'"]),
        (["train", "v.txt", "-o", "-"], ["-: must name a format for a stream"]),
        (["train", "v.txt", "-o", "-", "--to", "npy"], ["-: must have a folder for the format 'npy'"]),
        (["train", "v.txt", "-o", "o.xyz"], ["o.xyz: must end in one of"]),
        (["evaluate", "-", "--analogies", "-"], ["standard input can be read only once"]),
        (["neighbors", "v.txt", "king", "--save-index"], ["--save-index needs --approx"]),
        (["convert", "v.txt", "/dev/full", "--to", "glove"], ["/dev/full: No space left on device."]),
    ],
)
def test_stream_errors_name_the_argument(vectors, monkeypatch, arguments, parts):
    monkeypatch.chdir(vectors)
    assert_one_line(*run(*arguments), *parts)


def test_the_file_to_read_is_not_appended_to(vectors):
    before = (vectors / "v.txt").read_bytes()
    done = script("embax convert v.txt - --to glove >>v.txt", vectors)
    assert done.returncode == 2
    assert done.stderr == "embax: error: -: is the file to read itself. Name another file to write.\n"
    assert (vectors / "v.txt").read_bytes() == before


def test_an_index_is_saved_only_when_asked_for(vectors, monkeypatch):
    pytest.importorskip("usearch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(vectors / "cache"))
    file = vectors / "v.safetensors"
    before = sorted(os.listdir(vectors))
    assert run("neighbors", file, "king", "--approx")[0] == 0
    assert sorted(os.listdir(vectors)) == before
    assert run("neighbors", file, "king", "--approx", "--save-index")[0] == 0
    assert sorted(os.listdir(vectors)) == sorted([*before, "cache", "v.safetensors.usearch"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert_one_line(*run("neighbors", "-", "king", "--approx", "--save-index"), "-: must name the file of the vectors")
