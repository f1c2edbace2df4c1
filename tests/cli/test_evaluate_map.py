import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import GENSIM, WEIGHT, WORDS, answer, assert_one_line, lines_of, run

import embax
from embax.vectors import Vectors


@pytest.fixture
def vectors(tmp_path):
    Vectors(WORDS, WEIGHT).save(tmp_path / "v.safetensors")
    return str(tmp_path / "v.safetensors")


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "q.txt").write_text(
        ": royals\nman king woman queen\nman woman king queen\n: fruit\nman king apple pear\n"
    )
    (tmp_path / "p.tsv").write_text("man\twoman\t1\nking\tqueen\t5\nman\tboy\t6\nman\tapple\t3\n")
    return str(tmp_path / "q.txt"), str(tmp_path / "p.tsv")


def test_evaluate_reports_sections_and_totals(vectors, questions):
    found = answer("evaluate", vectors, "--analogies", questions[0], "--word-pairs", questions[1])
    report = embax.evaluate.analogies(Vectors.load(vectors), questions[0])
    pairs = embax.evaluate.word_pairs(Vectors.load(vectors), questions[1])
    assert found == {
        "file": vectors,
        "restrict": 300_000,
        "analogies": {
            "path": questions[0],
            "accuracy": report.accuracy,
            "correct": report.correct,
            "total": 2,
            "skipped": 1,
            "sections": [
                {"name": "royals", "correct": report.correct, "total": 2},
                {"name": "fruit", "correct": 0, "total": 0},
            ],
        },
        "word_pairs": [
            {
                "path": questions[1],
                "spearman": pairs.spearman,
                "pearson": pairs.pearson,
                "pairs": 3,
                "missing": 1,
            }
        ],
    }
    lines = [
        line.split()
        for line in lines_of("evaluate", vectors, "--analogies", questions[0], "--word-pairs", questions[1])
    ]
    percent = f"{report.accuracy:.2%}"
    assert lines[:4] == [
        ["q.txt", "correct", "of", "accuracy"],
        ["royals", str(report.correct), "2", percent],
        ["fruit", "0", "0", "-"],
        ["all", str(report.correct), "2", percent],
    ]
    assert lines[-1] == ["p.tsv", f"{pairs.spearman:.4f}", f"{pairs.pearson:.4f}", "3", "1"]


def test_evaluate_uses_the_first_tokens(vectors, questions):
    assert answer("evaluate", vectors, "--analogies", questions[0], "--restrict", 3)["analogies"]["total"] == 0
    found = answer("evaluate", vectors, "--word-pairs", questions[1], "--restrict", 4)
    assert found["analogies"] is None
    assert found["word_pairs"][0]["pairs"] == 2
    assert_one_line(
        *run("evaluate", vectors, "--word-pairs", questions[1], "--restrict", 3),
        f"{questions[1]}: must name at least two pairs of words in the vocabulary, got 1 of 4",
    )


def test_evaluate_takes_the_words_of_gensim(tmp_path):
    words = "Athens Greece Baghdad Iraq old new smart intelligent tiger cat book paper".split()
    Vectors(words, np.random.default_rng(0).normal(size=(12, 5))).save(tmp_path / "v")
    found = answer(
        "evaluate", tmp_path / "v", "--word-pairs", GENSIM / "simlex999.txt", "--word-pairs", GENSIM / "wordsim353.tsv"
    )
    assert [Path(pairs["path"]).name for pairs in found["word_pairs"]] == ["simlex999.txt", "wordsim353.tsv"]
    found = answer("evaluate", tmp_path / "v")
    assert found["analogies"]["path"] == str(GENSIM / "questions-words.txt")
    assert found["analogies"]["total"] == 3
    assert [Path(pairs["path"]).name for pairs in found["word_pairs"]] == ["wordsim353.tsv", "simlex999.txt"]


def test_evaluate_of_gensims_words_counts_missing_words(tmp_path):
    Vectors(["boy", "girl", "brother", "sister"], np.eye(4)).save(tmp_path / "v")
    status, out, err = run("evaluate", tmp_path / "v")
    assert status == 0
    assert "family" in out
    assert "word pairs" not in out
    assert len(err.splitlines()) == 2
    assert "wordsim353.tsv: must name at least two pairs" in err


def test_evaluate_without_words_names_the_argument(vectors, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_one_line(*run("evaluate", vectors), "--analogies", "--word-pairs", "pip install gensim")


def test_evaluate_looks_for_its_files_first(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(Vectors, "load", None)
    assert_one_line(*run("evaluate", vectors, "--analogies", tmp_path / "no"), f"{tmp_path / 'no'}: No such file")
    monkeypatch.undo()
    (tmp_path / "q").write_text("one two\n")
    assert_one_line(*run("evaluate", vectors, "--analogies", tmp_path / "q"), f"{tmp_path / 'q'}: ")


@pytest.mark.parametrize("suffix", [".png", ".HTML"])
def test_map_draws_words(vectors, tmp_path, suffix):
    output = tmp_path / f"map{suffix}"
    found = answer("map", vectors, "-o", output, "--words", "king, queen,king", "--words", "man")
    assert list(found) == ["file", "output", "method", "points"]
    assert [point["token"] for point in found["points"]] == ["king", "queen", "man"]
    expected = embax.maps.project(Vectors.load(vectors).subset(["king", "queen", "man"]).normalized().weight)
    np.testing.assert_allclose([(point["x"], point["y"]) for point in found["points"]], expected)
    assert output.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<!doctype html>")


def test_map_draws_the_first_tokens_without_rows_that_are_not_finite(tmp_path):
    weight = np.float32([[1, 0, 0], [np.nan, 0, 0], [0, 1, 0], [0, 0, 1]])
    Vectors(["a", "b", "c", "d"], weight).save(tmp_path / "v.npy")
    status, out, err = run("map", tmp_path / "v.npy", "-o", tmp_path / "map.html", "--first", 3)
    assert (status, out) == (0, "")
    assert "embax: note: 1 tokens are left out, as their vectors hold NaN or infinity.\n" in err
    assert err.endswith(f"embax: wrote {tmp_path / 'map.html'}: 2 tokens\n")
    assert '"tokens":["a","c"]' in (tmp_path / "map.html").read_text()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["-o", "map.svg"], ["map.svg: must end in .png or .html"]),
        (["-o", "folder.png"], ["folder.png: Is a directory"]),
        (["-o", "v.png"], ["v.png: is the file to read itself"]),
        (["-o", "map.png", "--words", "kong"], ['"kong" is not in the vocabulary', '"king"']),
        (["-o", "map.png", "--method", "tsne"], ["pca or umap, got 'tsne'"]),
        (["-o", "map.png", "--method", "umap"], ['pip install "embax[umap]"']),
        (["-o", "map.png", "--first", "0"], ["--first", "got 0"]),
        ([], ["--output"]),
    ],
)
def test_map_errors_name_the_argument(vectors, tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "umap", None)
    (tmp_path / "folder.png").mkdir()
    os.symlink(vectors, "v.png")
    assert_one_line(*run("map", "v.png", *options), *parts)
    assert not os.path.exists("map.png")
