import gzip
import io
import lzma
import os
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from embax import cli, train
from embax.vectors import Vectors

TEXT = "The king holds the crown.\nThe queen wears the crown.\n\nThe dog eats the bone. The cat eats the bone.\n" * 20
WORDS = ["the", "bone", "crown", "eats", "cat", "dog", "holds", "king", "queen", "wears"]
SMALL = ["--dim", "4", "--epochs", "1"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "v.safetensors"
    Vectors(WORDS, np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)).save(path)
    return str(path)


def command(*arguments):
    return [sys.executable, "-m", "embax.cli", *map(str, arguments)]


def assert_one_line(status, out, err, *parts):
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"embax: error: [^\n]+\n", err), err
    for part in parts:
        assert part in err


def test_train_writes_vectors_of_the_words(run, text, tmp_path):
    status, out, _ = run("train", text, "-o", tmp_path / "v", *SMALL)
    assert (status, out) == (0, "")
    vectors = Vectors.load(tmp_path / "v")
    assert sorted(vectors.tokens) == sorted(WORDS)
    assert vectors.counts[vectors.row("the")] == 160
    assert vectors.weight.shape == (10, 4)
    assert sorted(os.listdir(tmp_path)) == ["text.txt", "v"]


def test_train_gives_the_same_bytes_for_every_kind_of_input(run, text, tmp_path, monkeypatch):
    (tmp_path / "gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "xz").write_bytes(lzma.compress(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    for name in (text, tmp_path / "gz", tmp_path / "xz", "-"):
        assert run("train", name, "-o", tmp_path / "v", *SMALL)[0] == 0
        data = (tmp_path / "v").read_bytes()
        assert data == (tmp_path / "first").read_bytes() if (tmp_path / "first").exists() else True
        (tmp_path / "first").write_bytes(data)


def test_train_passes_its_options_on(run, text, tmp_path, monkeypatch):
    given = {}

    def skipgram(sequences, progress, **options):
        given.update(options)
        return Vectors(["a"], [[1.0]])

    monkeypatch.setattr(train, "skipgram", skipgram)
    assert run("train", text, "-o", tmp_path / "v")[0] == 0
    defaults = {"dim": 100, "window": 5, "negative": 5, "epochs": 5, "min_count": 5, "sample": 1e-3, "seed": 0}
    assert given == defaults | {"learning_rate": 0.025}
    options = {name: number for number, name in enumerate(given, 2)} | {"sample": 0.5, "learning_rate": 0.25}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("train", text, "-o", tmp_path / "v", *flags)[0] == 0
    assert given == options


def test_train_prints_lines_where_there_is_no_terminal(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_LINE", 0.0)
    status, _, err = run("train", text, "-o", tmp_path / "v", "--dim", 4, "--epochs", 3)
    assert status == 0
    lines = err.splitlines()
    assert lines[0].startswith("embax: read ")
    assert lines[-1] == f"embax: wrote {tmp_path / 'v'}: 10 words, 4 dimensions"
    steps = [line for line in lines if "epoch" in line]
    pattern = r"embax: +\d+%, epoch [123]/3, loss \d+\.\d{3}, [\d,]+ words/s, \d+:\d\d left"
    assert len(steps) >= 3
    assert all(re.fullmatch(pattern, line) for line in steps), steps
    assert steps[-1].startswith("embax: 100%, epoch 3/3")


def test_train_draws_a_bar_on_a_terminal(text, tmp_path):
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(command("train", text, "-o", tmp_path / "v", *SMALL), stderr=follower, env=environment)
    os.close(follower)
    drawn = b""
    try:
        while piece := os.read(leader, 1 << 16):
            drawn += piece
    except OSError:  # the other end was closed
        pass
    os.close(leader)
    assert child.wait(timeout=60) == 0
    assert b"\x1b[" in drawn
    assert re.search(rb"100%.*epoch 1/1, loss \d\.\d{3}, [\d,]+ words/s, 0:00 left", drawn)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["it holds no words"]),
        (b"\n ... \n", ["it holds no words"]),
        (b"rare words only", ["none of its 3 words occurs 5 times", "lower minimum count"]),
        (b"the " * 99 + b"\xff", ["byte 396 of the text is not UTF-8"]),
        (gzip.compress(TEXT.encode())[:-9], ["truncated"]),
        (lzma.compress(TEXT.encode())[:-9], ["truncated"]),
    ],
    ids=["empty", "no-words", "rare", "not-utf8", "gz", "xz"],
)
def test_train_tells_what_is_wrong_with_a_text(run, tmp_path, content, parts):
    path = tmp_path / "text"
    path.write_bytes(content)
    (tmp_path / "v").write_bytes(b"old")
    assert_one_line(*run("train", path, "-o", tmp_path / "v"), f"{path}: ", *parts)
    assert (tmp_path / "v").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["text", "v"]


def test_train_of_a_closed_standard_input_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(*run("train", "-", "-o", tmp_path / "v"), "standard input: it is closed")


def test_train_names_standard_input(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert_one_line(*run("train", "-", "-o", tmp_path / "v"), "standard input: it holds no words")


@pytest.mark.parametrize(
    ("source", "output", "parts"),
    [
        ("missing", "v", ["missing: No such file or directory."]),
        (".", "v", ["Is a directory."]),
        ("text.txt", "nowhere/v", ["nowhere: No such directory."]),
        ("text.txt", "", ["Is a directory, not a file to write."]),
        ("text.txt", "text.txt", ["text.txt: is the text itself."]),
        ("text.txt", "text.txt/v", ["text.txt/v: Not a directory."]),
        ("missing\nline", "v", [r"missing\nline"]),
    ],
)
def test_train_checks_paths_before_it_trains(run, text, tmp_path, monkeypatch, source, output, parts):
    monkeypatch.setattr(train._skipgram, "_train", None)
    assert_one_line(*run("train", os.path.join(tmp_path, source), "-o", os.path.join(tmp_path, output)), *parts)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_train_names_an_output_without_permission(run, text, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".v.tmp"))

    monkeypatch.setattr("builtins.open", refuse)
    result = run("train", text, "-o", tmp_path / "v")
    monkeypatch.undo()
    assert_one_line(*result, f"{tmp_path / 'v'}: Permission denied.")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            (option, "0")
            for option in ("--dim", "--window", "--negative", "--epochs", "--min-count", "--learning-rate")
        ),
        *(("--learning-rate", value) for value in ("0.0", "nan", "inf", "-1.0", "25.0")),
        *(("--sample", value) for value in ("nan", "inf", "-1.0", "1.5")),
        ("--seed", "-1"),
        ("--window", str(10**30)),
    ],
)
def test_train_refuses_option_values_outside_their_range(run, text, tmp_path, option, value):
    assert_one_line(*run("train", text, "-o", tmp_path / "v", option, value), option, f"got {value}")


@pytest.mark.parametrize("value", ["1.5", "many", ""])
def test_train_refuses_option_values_of_another_type(run, text, tmp_path, value):
    assert_one_line(*run("train", text, "-o", tmp_path / "v", "--dim", value), "--dim")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "Missing argument"),
        (["train", "text.txt"], "--output"),
        (["train", "text.txt", "-o", "v", "--dims", "3"], "--dims"),
        (["retrain"], "retrain"),
        (["neighbors", "v"], "Missing argument"),
        (["neighbors", "v", "king", "-k", "0"], "-k"),
    ],
)
def test_usage_errors_are_one_line(run, arguments, part):
    assert_one_line(*run(*arguments), part)


def test_train_tells_when_memory_does_not_suffice(run, text, tmp_path):
    assert_one_line(
        *run("train", text, "-o", tmp_path / "v", "--dim", 2**31 - 1, "--negative", 2**31 - 1), "not enough memory"
    )


def test_train_ended_by_an_interrupt_leaves_nothing_behind(text, tmp_path):
    arguments = command("train", text, "-o", tmp_path / "v", "--dim", 4, "--epochs", 1_000_000)
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert "epoch" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["text.txt"]


def test_neighbors_prints_a_table_of_cosines(run, vectors):
    status, out, err = run("neighbors", vectors, "king", "crown", "-k", 3)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["king", "cosine", "crown", "cosine"]
    known = Vectors.load(vectors)
    pairs = zip(known.most_similar("king", k=3), known.most_similar("crown", k=3), strict=True)
    assert lines[1:4] == [[a, f"{x:.3f}", b, f"{y:.3f}"] for (a, x), (b, y) in pairs]
    assert len(lines) == 4


def test_neighbors_prints_all_words_where_k_is_more(run, vectors):
    assert len(run("neighbors", vectors, "king", "-k", 1000)[1].splitlines()) == len(WORDS)


def test_neighbors_offers_the_closest_spellings(run, vectors):
    assert_one_line(*run("neighbors", vectors, "king", "Quean"), '"Quean" is not in the vocabulary', '"queen"')


def test_neighbors_spells_out_control_characters(run, tmp_path):
    Vectors(["a", "[red]b", "\x1b[2J", "c\nd"], np.eye(4)).save(tmp_path / "v")
    status, out, _ = run("neighbors", tmp_path / "v", "a")
    assert status == 0
    assert "[red]b" in out
    assert r"\x1b[2J" in out
    assert "\x1b" not in out
    assert r"c\nd" in out


@pytest.mark.parametrize("content", [None, b"", b"not vectors", "truncated", "directory"])
def test_neighbors_tells_what_is_wrong_with_a_file(run, vectors, tmp_path, content):
    path = tmp_path / "bad"
    if content == "truncated":
        with open(vectors, "rb") as file:
            path.write_bytes(file.read()[:-1])
    elif content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert_one_line(*run("neighbors", path, "king"), f"{path}: ")


def test_neighbors_is_quiet_where_nobody_reads(vectors):
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(command("neighbors", vectors, "king"), stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert child.stderr == b""
    assert child.returncode == 1


def test_version_and_help(run):
    assert run("--version") == (0, "embax 0.1.0\n", "")
    status, out, _ = run("--help")
    assert status == 0
    assert "neighbors" in out
    assert run()[1] == out
    assert "0.025" in run("train", "--help")[1]


def test_the_command_line_loads_no_framework():
    code = "import sys, embax.cli; print([m for m in ('brainstate', 'flax', 'equinox', 'optax') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "[]\n"
