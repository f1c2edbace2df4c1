"""`embax train`: what it reads."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from cli_runs import assert_one_line, run

from embax import train
from embax.vectors import Vectors


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function that runs the command, without training; returns the sequences that it read."""

    def trained(sequences, **_):
        found.extend(words for words in map(list, sequences) if words)
        return Vectors(["a"], np.ones((1, 1), np.float32), [1], metadata={"engine": "xla"})

    def call(*arguments):
        found.clear()
        status, out, err = run("train", *arguments, "-o", tmp_path / "v")
        assert (status, out) == (0, ""), err
        return found

    found = []
    monkeypatch.setattr(train, "skipgram", trained)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("To be\nor not.\n\n\n*\n\nbe")
    (tmp_path / "two.txt").write_text("The end")
    pyarrow.parquet.write_table(pa.table({"title": ["A b"], "films": [[7, 9]]}), tmp_path / "rows")
    return call


def test_train_reads_text(read):
    one, two = [["to", "be", "or", "not"], ["be"]], [["the", "end"]]
    assert read("one.txt", "two.txt") == read("*.txt") == one + two
    assert read("one.txt", "--lines") == [["to", "be"], ["or", "not"], ["be"]]
    assert read("two.txt", "one.txt", "--tokenizer", "whitespace")[:2] == [["The", "end"], ["To", "be", "or", "not."]]


def test_train_reads_columns(read):
    assert read("rows", "--column", "films") == [[7, 9]]
    assert read("rows", "--column", "title", "--tokenizer", "whitespace") == [["A", "b"]]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["one.txt", "missing"], ["missing: No such file or directory."]),
        (["*.none"], ["*.none: No file matches."]),
        (["-", "-"], ["-: standard input can be read only once"]),
        (["rows", "--column", "year"], ["rows: must have one column 'year', got 'title' string"]),
        (["one.txt", "--column", "text"], ["one.txt: must be a parquet or Arrow file"]),
        (["rows"], ["rows: must have one column of strings"]),
        (["rows", "--lines"], ["must be False without text"]),
        (["one.txt", "--tokenizer", "word"], ["word: No such file or directory."]),
        (["one.txt", "v"], ["v: is the text itself"]),
        (["one.txt", "two.txt", "--min-count", "9"], ["2 files: none of its 7 words"]),
    ],
)
def test_train_errors_are_one_line(read, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v").write_text("old")
    assert_one_line(*run("train", *arguments, "-o", "v"), *parts)
    assert (tmp_path / "v").read_text() == "old"


def test_train_names_the_missing_library(read, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert_one_line(*run("train", "one.txt", "-o", "v", "--tokenizer", "two.txt"), 'pip install "embax[tokenizers]"')
