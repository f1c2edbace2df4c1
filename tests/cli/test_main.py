import gzip
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cli_runs import Terminal, assert_one_line, command, run

from embax import train
from embax.cli import _display
from embax.vectors import Vectors

TEXT = "The king holds the crown.\nThe queen wears the crown.\n\nThe dog eats the bone. The cat eats the bone.\n" * 20
WORDS = ["the", "bone", "crown", "eats", "cat", "dog", "holds", "king", "queen", "wears"]
TEXT_WORDS = len(TEXT.replace(".", "").split())
SMALL = ["--dim", "4", "--epochs", "1"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "v.safetensors"
    Vectors(WORDS, np.random.default_rng(0).normal(size=(len(WORDS), 5)).astype(np.float32)).save(path)
    return str(path)


def test_train_writes_vectors_of_the_words(text, tmp_path):
    status, out, _ = run("train", text, "-o", tmp_path / "v", *SMALL)
    assert (status, out) == (0, "")
    vectors = Vectors.load(tmp_path / "v")
    assert sorted(vectors.vocabulary) == sorted(WORDS)
    assert vectors.counts[vectors.vocabulary.ids("the")] == 160
    assert vectors.weight.shape == (10, 4)
    assert sorted(os.listdir(tmp_path)) == ["text.txt", "v"]


def test_train_gives_the_same_bytes_for_every_kind_of_input(text, tmp_path, monkeypatch):
    (tmp_path / "gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "xz").write_bytes(lzma.compress(TEXT.encode()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    for name in (text, tmp_path / "gz", tmp_path / "xz", "-"):
        assert run("train", name, "-o", tmp_path / "v", *SMALL)[0] == 0
        data = (tmp_path / "v").read_bytes()
        assert data == (tmp_path / "first").read_bytes() if (tmp_path / "first").exists() else True
        (tmp_path / "first").write_bytes(data)


def test_train_passes_its_options_on(text, tmp_path, monkeypatch):
    given = {}

    def skipgram(sequences, progress, **options):
        given.update(options)
        return Vectors(["a"], [[1.0]], metadata={"engine": "xla"})

    monkeypatch.setattr(train, "skipgram", skipgram)
    monkeypatch.setattr(train, "cbow", lambda *args, **options: skipgram(*args, **options, is_cbow=True))
    assert run("train", text, "-o", tmp_path / "v")[0] == 0
    defaults = {
        "dim": None,
        "engine": "auto",
        "threads": 1,
        "window": 5,
        "negative": 5,
        "epochs": 5,
        "min_count": 5,
        "max_vocabulary": 5_000_000,
        "sample": 1e-3,
        "seed": 0,
    }
    assert given == defaults | {"learning_rate": 0.025}
    options = {name: number for number, name in enumerate(given, 2)} | {"sample": 0.5, "learning_rate": 0.25}
    options |= {"engine": "xla"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert run("train", text, "-o", tmp_path / "v", *flags)[0] == 0
    assert given == options
    assert run("train", text, "-o", tmp_path / "v", *flags, "--model", "cbow")[0] == 0
    assert given == options | {"is_cbow": True}


def test_train_prints_lines_without_a_terminal(text, tmp_path, monkeypatch):
    monkeypatch.setattr(_display, "_LINE", 0.0)
    status, _, err = run("train", text, "-o", tmp_path / "v", "--dim", 4, "--epochs", 3)
    assert status == 0
    lines = err.splitlines()
    assert lines[0].startswith("embax: read ")
    wrote = re.escape(f"embax: wrote {tmp_path / 'v'}: 10 words, 4 dimensions, trained by ")
    assert re.fullmatch(wrote + r"(native|xla) at [\d,]+ words/s \(\d+% of the time waiting for text\)", lines[-1])
    steps = [line for line in lines if "epoch" in line]
    pattern = r"embax: +\d+%, epoch [123]/3, loss \d+\.\d{3}, [\d,]+ words/s, \d+:\d\d left"
    assert len(steps) >= 3
    assert all(re.fullmatch(pattern, line) for line in steps), steps
    assert steps[-1].startswith("embax: 100%, epoch 3/3")


def test_train_draws_a_bar_on_a_terminal(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    status, out, drawn = run("train", text, "-o", tmp_path / "v", *SMALL, err=Terminal())
    assert (status, out) == (0, "")
    assert "\x1b[" in drawn
    assert re.search(r"100%.*epoch 1/1, loss \d\.\d{3}, [\d,]+ words/s, 0:00 left", drawn)


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
def test_train_errors_name_the_text(tmp_path, content, parts):
    path = tmp_path / "text"
    path.write_bytes(content)
    (tmp_path / "v").write_bytes(b"old")
    assert_one_line(*run("train", path, "-o", tmp_path / "v"), f"{path}: ", *parts)
    assert (tmp_path / "v").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["text", "v"]


def test_train_of_a_closed_standard_input_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(*run("train", "-", "-o", tmp_path / "v"), "standard input: it is closed")


def test_train_names_standard_input(tmp_path, monkeypatch):
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
def test_train_checks_paths_before_it_trains(text, tmp_path, monkeypatch, source, output, parts):
    monkeypatch.setattr(train._word2vec, "train", None)
    assert_one_line(*run("train", os.path.join(tmp_path, source), "-o", os.path.join(tmp_path, output)), *parts)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_train_names_an_output_without_permission(text, tmp_path, monkeypatch):
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
def test_train_refuses_option_values_outside_their_range(text, tmp_path, option, value):
    assert_one_line(*run("train", text, "-o", tmp_path / "v", option, value), option, f"got {value}")


@pytest.mark.parametrize("value", ["1.5", "many", ""])
def test_train_refuses_option_values_of_another_type(text, tmp_path, value):
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
def test_usage_errors_are_one_line(arguments, part):
    assert_one_line(*run(*arguments), part)


def test_train_reports_lack_of_memory(text, tmp_path):
    assert_one_line(
        *run("train", text, "-o", tmp_path / "v", "--dim", 2**31 - 1, "--negative", 2**31 - 1), "not enough memory"
    )


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="interrupts are ignored here, as in a background job"
)
def test_train_ended_by_an_interrupt_writes_its_vectors_and_has_loaded_no_framework(text, tmp_path):
    at_the_end = "print([module for module in ('brainstate', 'flax', 'equinox', 'optax') if module in sys.modules])"
    code = "import atexit, sys, embax.cli; from embax.cli import _display; _display._LINE = 0\n"
    code += f"atexit.register(lambda: {at_the_end}); embax.cli.main()"
    arguments = ["train", text, "-o", str(tmp_path / "v"), "--dim", "4", "--epochs", "1000000"]
    # Of as many devices as here, for which the program is already compiled.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.local_device_count())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, env=environment, **pipes)
    assert any("epoch" in line for line in child.stderr)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["text.txt", "v"]
    assert len(Vectors.load(tmp_path / "v")) == 10
    assert out == "[]\n"


def test_neighbors_prints_a_table_of_cosines(vectors):
    status, out, err = run("neighbors", vectors, "king", "crown", "-k", 3)
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["king", "cosine", "crown", "cosine"]
    known = Vectors.load(vectors)
    pairs = zip(known.most_similar("king", k=3), known.most_similar("crown", k=3), strict=True)
    assert lines[1:4] == [[a, f"{x:.3f}", b, f"{y:.3f}"] for (a, x), (b, y) in pairs]
    assert len(lines) == 4


def test_neighbors_prints_all_words_if_k_is_larger(vectors):
    assert len(run("neighbors", vectors, "king", "-k", 1000)[1].splitlines()) == len(WORDS)


def test_neighbors_offers_the_closest_spellings(vectors):
    assert_one_line(*run("neighbors", vectors, "king", "Quean"), '"Quean" is not in the vocabulary', '"queen"')


def test_neighbors_spells_out_control_characters(tmp_path):
    Vectors(["a", "[red]b", "\x1b[2J", "c\nd"], np.eye(4)).save(tmp_path / "v")
    status, out, _ = run("neighbors", tmp_path / "v", "a")
    assert status == 0
    assert "[red]b" in out
    assert r"\x1b[2J" in out
    assert "\x1b" not in out
    assert r"c\nd" in out


@pytest.mark.parametrize("content", [None, b"", b"not vectors", "truncated", "directory"])
def test_neighbors_errors_name_the_file(vectors, tmp_path, content):
    path = tmp_path / "bad"
    if content == "truncated":
        with open(vectors, "rb") as file:
            path.write_bytes(file.read()[:-1])
    elif content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert_one_line(*run("neighbors", path, "king"), f"{path}: ")


def test_printing_to_a_closed_pipe_is_quiet(vectors):
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run(command("info", vectors), stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert child.stderr == b""
    assert child.returncode == 1


def test_version_and_help():
    assert run("--version") == (0, "embax 0.2.0\n", "")
    status, out, _ = run("--help")
    assert status == 0
    assert "neighbors" in out
    assert run()[1] == out
    assert "0.025" in run("train", "--help")[1]


def test_command_line_imports_jax_only_when_needed():
    heavy = (
        "jax",
        "numpy",
        "rich.progress",
        "pyarrow",
        "scipy",
        "matplotlib",
        "brainstate",
        "flax",
        "equinox",
        "optax",
    )
    code = f"import sys, embax.cli; print([module for module in {heavy} if module in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "[]\n"


def test_train_prints_json(text, tmp_path):
    status, out, _ = run("train", text, "-o", tmp_path / "v", *SMALL, "--json")
    assert status == 0
    # "the" 160 times, "eats" and "crown" 40 times, and so on.
    expected = {"output": str(tmp_path / "v"), "words": 10, "dim": 4, "occurrences": TEXT_WORDS, "seed": 0}
    found = json.loads(out)
    assert found.pop("words_per_second") > 0
    assert found.pop("engine") in ("native", "xla")
    assert 0 <= found.pop("waited") <= 1
    assert found == expected | {"model": "skipgram", "interrupted": False}


def test_train_writes_subwords_and_continues_from_them(text, tmp_path):
    flags = ["--subwords", "--max-ngram", 4, "--buckets", 100, "--dim", 4, "--epochs", 1]
    assert run("train", text, "-o", tmp_path / "v.bin", *flags)[0] == 0
    vectors = Vectors.load(tmp_path / "v.bin")
    ngrams = vectors.subwords.ngrams
    assert (ngrams.minimum, ngrams.maximum, ngrams.buckets) == (3, 4, 100)
    assert "kings" not in vectors
    assert np.abs(vectors["kings"]).max() > 0
    assert run("train", text, "-o", tmp_path / "v", *flags)[0] == 0
    assert run("convert", tmp_path / "v", tmp_path / "w.bin", "--to", "fasttext")[0] == 0
    assert (tmp_path / "w.bin").read_bytes() == (tmp_path / "v.bin").read_bytes()
    status, out, _ = run("neighbors", tmp_path / "v", "kings", "--json")
    assert (status, "kings" in out) == (0, True)
    assert run("train", text, "-o", tmp_path / "u", *flags, "--from", tmp_path / "v.bin")[0] == 0
    result = run("train", text, "-o", tmp_path / "u", *flags, "--buckets", 9, "--from", tmp_path / "v.bin")
    assert_one_line(*result, "v.bin: must have n-grams as the arguments say, of 3 to 4 characters in 9 buckets, got")
    result = run("train", text, "-o", tmp_path / "v.txt", *flags)
    assert_one_line(*result, "v.txt: must be of safetensors or fasttext with --subwords, which word2vec does not keep.")
    assert_one_line(*run("train", text, "-o", tmp_path / "v.bin", *flags, "--min-ngram", 5), "the shorter first")


def test_train_continues_from_vectors(text, tmp_path):
    Vectors(["the", "unseen"], np.eye(2, 3), [7, 9]).save(tmp_path / "old.txt")
    status, out, _ = run("train", text, "-o", tmp_path / "v", "--from", tmp_path / "old.txt", "--epochs", 1, "--json")
    assert (status, json.loads(out)["dim"]) == (0, 3)
    vectors = Vectors.load(tmp_path / "v")
    assert len(vectors) == 11
    np.testing.assert_array_equal(vectors["unseen"], [0, 1, 0])
    result = run("train", text, "-o", tmp_path / "v", "--from", tmp_path / "old.txt", "--dim", 4)
    assert_one_line(*result, "old.txt: must have vectors of the size dim=4, got 3. Leave dim out.")
    assert_one_line(*run("train", text, "-o", tmp_path / "v", "--from", tmp_path / "no"), "no: No such file")


def test_train_writes_and_continues_from_the_second_table(text, tmp_path):
    v, u = tmp_path / "v", tmp_path / "u.npy"
    assert run("train", text, "-o", v, "--second", u, "--dim", 4, "--epochs", 9)[0] == 0
    vectors, second = Vectors.load(v), Vectors.load(u)
    assert second.vocabulary.tokens() == vectors.vocabulary.tokens()
    slow = ["--epochs", 1, "--learning-rate", 1e-9]
    assert run("train", text, "-o", tmp_path / "w", "--from", v, "--from-second", u, "--second", u, *slow)[0] == 0
    np.testing.assert_allclose(Vectors.load(u).weight, second.weight, rtol=1e-4, atol=1e-6)  # float32
    assert np.abs(second.weight).max() > 0.01
    assert_one_line(*run("train", text, "-o", v, "--from-second", u), "--from-second needs --from")
    assert_one_line(*run("train", text, "-o", v, "--second", v), "v: must not be the file of the vectors")
    assert_one_line(*run("train", text, "-o", v, "--second", tmp_path / "u.png"), "u.png")
    assert_one_line(*run("train", text, "-o", v, "--second", text), "text itself")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_is_of_the_shell_asked_for(shell):
    status, out, err = run("--show-completion", shell)
    assert (status, err) == (0, "")
    assert f"complete_{shell}" in out
    assert "_EMBAX_COMPLETE" in out
    assert "_EMBAX_COMPLETE" not in os.environ


def test_completion_needs_no_terminal():
    environment = {name: value for name, value in os.environ.items() if name not in ("SHELL", "TERM")}
    script = subprocess.run(
        command("--show-completion", "zsh"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=True,
    )
    assert script.stderr == ""
    assert "complete_zsh" in script.stdout
    assert "_EMBAX_COMPLETE" in script.stdout


def test_completion_of_an_unknown_shell_is_an_error():
    assert_one_line(*run("--show-completion", "tcl\nsh"), "bash, zsh, fish, powershell", r"tcl\nsh")


def completing(line):
    """Return the environment in which bash asks for the words that may end a line."""
    return {"_EMBAX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("embax e", ["evaluate"]),
        ("embax neighbors --fo", ["--format"]),
        ("embax info --format word2vec", ["word2vec-binary", "word2vec"]),
        ("embax convert --dtype b", ["bfloat16"]),
        ("embax analogy --method m", ["mul"]),
        ("embax map --method u", ["umap"]),
    ],
)
def test_completion_completes(monkeypatch, line, expected):
    for name, value in completing(line).items():
        monkeypatch.setenv(name, value)
    status, out, err = run()
    assert (status, err) == (0, "")
    assert sorted(out.split()) == sorted(expected)


def test_completion_completes_in_a_process_of_its_own():
    environment = os.environ | completing("embax e")
    assert subprocess.check_output(command(), text=True, timeout=60, env=environment).split() == ["evaluate"]
