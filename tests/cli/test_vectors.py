import errno
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from cli_runs import GENSIM, WEIGHT, WORDS, answer, assert_one_line, drawn_on_terminal, lines_of, run

import embax
from embax import files
from embax.cli import _common, _display
from embax.vectors import Vectors

INFO_KEYS = (
    "file format compression bytes rows dim dtype memory norms zero_rows not_finite_rows duplicates_left_out counts "
    "special subwords metadata first_tokens"
).split()


@pytest.fixture
def vectors(tmp_path):
    Vectors(WORDS, WEIGHT).save(tmp_path / "v.safetensors")
    return str(tmp_path / "v.safetensors")


def test_info_describes_a_file(tmp_path):
    vocabulary = embax.Vocabulary(["[PAD]", "a", "b\x1b", "c"], special={"padding": "[PAD]"})
    weight = np.array([[0, 0], [3, 4], [6, 8], [np.nan, 0]], np.float16)
    contents = files.Contents(vocabulary, weight, np.array([0, 5, 2, 1]), metadata={"engine": "xla"})
    files.save(tmp_path / "v", contents)
    found = answer("info", tmp_path / "v")
    assert list(found) == INFO_KEYS
    assert found == {
        "file": str(tmp_path / "v"),
        "format": "safetensors",
        "compression": None,
        "bytes": os.path.getsize(tmp_path / "v"),
        "rows": 4,
        "dim": 2,
        "dtype": "float16",
        "memory": {"weight": 16, "vocabulary": 9 + 5 * 8},
        "norms": {"min": 0.0, "median": 5.0, "max": 10.0},
        "zero_rows": 1,
        "not_finite_rows": 1,
        "duplicates_left_out": 0,
        "counts": {"min": 0, "max": 5, "total": 8},
        "special": {"padding": "[PAD]"},
        "subwords": None,
        "metadata": {"engine": "xla"},
        "first_tokens": ["[PAD]", "a", "b\x1b", "c"],
    }
    table = "\n".join(lines_of("info", tmp_path / "v"))
    for part in (
        "safetensors",
        "2 of float16",
        "0 to 10, median 5",
        "0 to 5, 8 in all",
        "padding [PAD]",
        "engine xla",
        r"b\x1b c",
    ):
        assert part in table
    assert "\x1b" not in table


def test_info_counts_duplicates_and_names_the_compression(tmp_path):
    (tmp_path / "v.gz").write_bytes(gzip.compress(b"4 1\na 1\nb 2\na 3\nb 4\n"))
    found = answer("info", tmp_path / "v.gz")
    assert (found["format"], found["compression"]) == ("word2vec", "gzip")
    assert (found["rows"], found["duplicates_left_out"]) == (2, 2)
    assert any("compressed by gzip" in line for line in lines_of("info", tmp_path / "v.gz"))


def test_info_of_sub_words():
    found = answer("info", GENSIM / "lee_fasttext.bin")
    assert (found["format"], found["rows"], found["dim"]) == ("fasttext", 1762, 10)
    assert found["subwords"] == {"minimum": 3, "maximum": 6, "buckets": 1000}
    assert any("of 3 to 6 characters" in line for line in lines_of("info", GENSIM / "lee_fasttext.bin"))


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_info_of_extreme_norms(tmp_path, scale):
    Vectors(["a"], np.array([[3.0, 4.0]]) * scale).save(tmp_path / "v")
    assert answer("info", tmp_path / "v")["norms"]["max"] == pytest.approx(5 * scale)


def test_info_of_no_rows(tmp_path):
    Vectors([], np.zeros((0, 3))).save(tmp_path / "v")
    found = answer("info", tmp_path / "v")
    assert found["norms"] == {"min": None, "median": None, "max": None}
    assert not any("norms" in line for line in lines_of("info", tmp_path / "v"))


@pytest.mark.parametrize("suffix", [".bin", ".txt", ".npy", ".parquet", ".arrow", ""])
def test_convert_round_trip(vectors, tmp_path, suffix):
    status, out, err = run("convert", vectors, tmp_path / f"o{suffix}")
    assert (status, out) == (0, "")
    assert err.startswith(f"embax: wrote {tmp_path / f'o{suffix}'}: 6 rows of 3, ")
    assert run("convert", tmp_path / f"o{suffix}", tmp_path / "back.safetensors")[0] == 0
    back = Vectors.load(tmp_path / "back.safetensors")
    assert back.vocabulary.tokens() == WORDS
    np.testing.assert_array_equal(back.weight, WEIGHT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_convert_converts_numbers_and_reads_the_first_rows(vectors, tmp_path, dtype):
    found = answer("convert", vectors, tmp_path / "o", "--dtype", dtype, "--limit", 2)
    assert found == {
        "input": {"path": vectors, "format": "safetensors", "bytes": os.path.getsize(vectors)},
        "output": {"path": str(tmp_path / "o"), "format": "safetensors", "bytes": os.path.getsize(tmp_path / "o")},
        "rows": 2,
        "dim": 3,
        "dtype": dtype,
    }
    assert str(Vectors.load(tmp_path / "o").weight.dtype) == dtype


def test_convert_writes_the_format_asked_for(vectors, tmp_path):
    assert run("convert", vectors, tmp_path / "o.txt", "--to", "glove")[0] == 0
    assert (tmp_path / "o.txt").read_text().startswith("man 1 0 0\n")


def test_convert_reports_dropped_sub_words(tmp_path):
    status, _, err = run("convert", GENSIM / "lee_fasttext.bin", tmp_path / "o.txt")
    assert status == 0
    assert "note: the sub-words are left out, as only safetensors and fasttext keep them" in err.splitlines()[0]
    assert len(Vectors.load(tmp_path / "o.txt")) == 1762
    status, _, err = run("convert", GENSIM / "lee_fasttext.bin", tmp_path / "o.safetensors")
    assert (status, "note" in err) == (0, False)
    assert Vectors.load(tmp_path / "o.safetensors").subwords is not None


def test_convert_reports_duplicates(tmp_path):
    (tmp_path / "v\x1b.txt").write_text("2 1\na\x1b 1\na\x1b 2\n")
    status, out, err = run("convert", tmp_path / "v\x1b.txt", tmp_path / "o")
    assert (status, out) == (0, "")
    assert "embax: note: " in err.splitlines()[0]
    assert "1 rows are left out" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("output", "options", "parts"),
    [
        ("v.safetensors", [], ["v.safetensors: is the file to read itself"]),
        ("link", [], ["link: is the file to read itself"]),
        ("loop", [], ["loop: Is a symbolic link that leads to itself."]),
        ("folder", [], ["folder: Is a directory, not a file to write."]),
        ("missing/o", [], ["missing: No such directory."]),
        ("o.xyz", [], ["o.xyz: must end in one of .safetensors, "]),
        ("o", ["--to", "excel"], ["--to", "one of safetensors, ", "got 'excel'"]),
        ("o", ["--dtype", "int8"], ["--dtype", "one of float16, ", "got 'int8'"]),
        ("o", ["--limit", "0"], ["--limit", "got 0"]),
        ("o", ["--encoding", "rot13"], ["--encoding", "got 'rot13'"]),
        ("o", ["--encoding", ""], ["--encoding", "got ''"]),
        ("o", ["--format", "excel"], ["--format", "got 'excel'"]),
        ("o", ["--format", "npy"], ["v.safetensors: "]),
        *(("o", ["--max-expansion", value], ["--max-expansion", "above 0"]) for value in ("0", "nan", "inf", "-1")),
    ],
)
def test_convert_errors_name_the_argument(vectors, tmp_path, output, options, parts):
    (tmp_path / "folder").mkdir()
    os.symlink("loop", tmp_path / "loop")
    os.symlink(vectors, tmp_path / "link")
    before = sorted(os.listdir(tmp_path)), Path(vectors).read_bytes()
    assert_one_line(*run("convert", vectors, tmp_path / output, *options), *parts)
    assert (sorted(os.listdir(tmp_path)), Path(vectors).read_bytes()) == before


def test_convert_names_a_token_that_a_format_cannot_hold(tmp_path):
    Vectors(["New York\x1b"], [[1.0]]).save(tmp_path / "v")
    status, out, err = run("convert", tmp_path / "v", tmp_path / "o.txt")
    assert_one_line(
        status, out, err, f"{tmp_path / 'o.txt'}: must have no space", "New York", "Save it as .safetensors."
    )
    assert "embax.files" not in err


def test_commands_explain_how_to_convert_a_pickle(tmp_path):
    (tmp_path / "v.pkl").write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]\x94.")
    status, out, err = run("info", tmp_path / "v.pkl")
    assert (status, out) == (2, "")
    assert err.startswith(f"embax: error: {tmp_path / 'v.pkl'}: is a Python pickle")
    assert "\n  import numpy, pickle\n" in err


@pytest.mark.parametrize("command", ["info", "neighbors", "analogy", "evaluate", "convert", "map"])
def test_every_command_names_a_bad_file(tmp_path, command):
    others = {"neighbors": ["a"], "analogy": ["a", "b", "c"], "convert": ["o"], "map": ["-o", "o.png"]}.get(command, [])
    others = [tmp_path / other if other.startswith("o") else other for other in others]
    assert_one_line(*run(command, tmp_path / "missing", *others), "missing: No such file or directory.")
    (tmp_path / "bad").write_bytes(b"\x00\x01nothing")
    assert_one_line(*run(command, tmp_path / "bad", *others, "--json"), f"{tmp_path / 'bad'}: is of no format")


def test_neighbors_as_json_and_by_an_index(vectors):
    found = answer("neighbors", vectors, "king", "man", "-k", 2)
    known = Vectors.load(vectors).most_similar_batch(["king", "man"], k=2)
    assert found == {
        "file": vectors,
        "neighbors": [
            {"word": word, "nearest": [{"token": token, "cosine": cosine} for token, cosine in nearest]}
            for word, nearest in zip(["king", "man"], known, strict=True)
        ],
    }
    by_index = answer("neighbors", vectors, "king", "-k", 2, "--approx")["neighbors"][0]["nearest"]
    assert [one["token"] for one in by_index] == [token for token, _ in known[0]]


def test_neighbors_reads_the_first_rows(vectors):
    assert len(answer("neighbors", vectors, "king", "--limit", 3)["neighbors"][0]["nearest"]) == 2
    assert_one_line(*run("neighbors", vectors, "queen", "--limit", 3), '"queen" is not in the vocabulary')


def test_neighbors_reads_tokens_of_an_encoding(tmp_path):
    (tmp_path / "v.txt").write_bytes("2 1\ncaf\xe9 1\nt\xe9 2\n".encode("latin-1"))
    assert_one_line(*run("neighbors", tmp_path / "v.txt", "té", "--errors", "strict"), "is not UTF-8")
    found = answer("neighbors", tmp_path / "v.txt", "té", "--encoding", "latin-1")
    assert found["neighbors"][0]["nearest"][0]["token"] == "café"


def test_neighbors_of_vectors_that_are_not_finite(tmp_path):
    Vectors(["a", "b", "c"], [[1.0], [np.nan], [2.0]]).save(tmp_path / "v.npy")
    status, out, err = run("neighbors", tmp_path / "v.npy", "a")
    assert status == 0
    assert out.split() == ["a", "cosine", "c", "1.000"]
    status, out, err = run("neighbors", tmp_path / "v.npy", "b")
    assert (status, out) == (2, "")
    assert 'embax: error: must have finite vectors, got "b"' in err


@pytest.mark.parametrize("method", ["add", "mul"])
def test_analogy_finds_the_fourth_word(vectors, method):
    found = answer("analogy", vectors, "man", "king", "woman", "-k", 3, "--method", method)
    expected = Vectors.load(vectors).analogy("man", "king", "woman", k=3, method=method)
    assert [(one["token"], one["score"]) for one in found.pop("candidates")] == expected
    assert expected[0][0] == "queen"
    assert found == {"file": vectors, "a": "man", "b": "king", "c": "woman", "method": method}
    lines = lines_of("analogy", vectors, "man", "king", "woman", "-k", 3, "--method", method)
    assert lines[0].split() == ["man", ":", "king", "=", "woman", ":", "?", {"add": "cosine", "mul": "3CosMul"}[method]]
    assert [line.split() for line in lines[1:]] == [[token, f"{score:.3f}"] for token, score in expected]


def test_analogy_errors_name_the_argument(vectors):
    assert_one_line(*run("analogy", vectors, "men", "king", "woman"), '"men" is not in the vocabulary', '"man"')
    assert_one_line(*run("analogy", vectors, "king", "man"), "Missing argument")
    assert_one_line(*run("analogy", vectors, "king", "man", "woman", "--method", "x"), "add or mul, got 'x'")


def test_commands_report_lack_of_memory(vectors, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(files, "load_identified", fail)
    assert_one_line(*run("info", vectors), "not enough memory. Pass --limit")


def test_commands_report_system_errors_without_a_file(vectors, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save", fail)
    assert_one_line(*run("convert", vectors, f"{vectors}.bin"), "No space left on device.")


def test_progress_is_shown_on_a_terminal_only(vectors, tmp_path):
    slow = "import time, sys\nfrom embax.cli import _display\n_display._PATIENCE = 0\n"
    slow += "import embax.files\nload = embax.files.load_identified\n"
    slow += "embax.files.load_identified = lambda *a, **k: (time.sleep(0.6), load(*a, **k))[1]\n"
    slow += "from embax.cli import main\nmain(['info', sys.argv[1]])\n"
    (tmp_path / "slow.py").write_text(slow)
    status, drawn = drawn_on_terminal(tmp_path / "slow.py", vectors, program=True)
    assert status == 0
    assert b"loading v.safetensors" in drawn
    assert b"0:00:00" in drawn
    assert run("info", vectors)[2] == ""


def test_waiting_passes_on_exceptions():
    with pytest.raises(ZeroDivisionError), _display.waiting("x"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (89356858, "89.4 MB"), (1.5e9, "1.5 GB"), (2e12, "2 TB")],
)
def test_sizes_in_words(size, words):
    assert _common.bytes_in_words(size) == words
