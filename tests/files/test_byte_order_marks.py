import codecs
import gzip
import io
import json
import sys

import numpy as np
import pytest

from embax import Vectors, Vocabulary, evaluate, files, train

MARK = codecs.BOM_UTF8
TABLE = np.eye(2, dtype=np.float32)


def written(folder, name, text):
    (folder / name).write_text(text, "utf-8-sig")
    assert (folder / name).read_bytes().startswith(MARK)
    return folder / name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "UTF8", "latin-1"])
@pytest.mark.parametrize("header", ["", "2 2\n", "2 2\r\n", "2 2\r", "  2  2\n"])
def test_a_mark_is_dropped_from_vectors(tmp_path, header, encoding):
    end = header.lstrip("2 ") or "\n"
    path = written(tmp_path, "v.vec", header + end.join(["the 1 0", "of 0 1", ""]))
    (tmp_path / "v.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("v.vec", "v.gz"):
        assert files.identify(tmp_path / name).format == ("word2vec" if header else "glove")
        vectors = Vectors.load(tmp_path / name, encoding=encoding)
        assert vectors.vocabulary.tokens() == ["the", "of"]
        assert vectors.weight.tolist() == TABLE.tolist()


def test_byte_order_mark_after_the_first_token_is_text(tmp_path):
    for text in ("2 2\n\ufeffa 1 0\nb 0 1\n", "b 0 1\n\ufeffa 1 0\n"):
        (tmp_path / "v.txt").write_text(text)
        assert "\ufeffa" in Vectors.load(tmp_path / "v.txt")


@pytest.mark.parametrize("suffix", [".glove", ".txt", ".bin"])
def test_first_token_that_begins_with_a_mark_round_trips(tmp_path, suffix):
    Vectors(["\ufeffa", "b"], TABLE).save(tmp_path / f"v{suffix}")
    assert Vectors.load(tmp_path / f"v{suffix}").vocabulary.tokens() == ["\ufeffa", "b"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.txt", "the\nof\n"),
        ("v.txt", "the\r\nof\r\n"),
        ("v.txt", "the\rof\r"),
        ("v.vocab", "the\nof"),
        ("v.json", json.dumps(["the", "of"])),
        ("v.json", json.dumps({"of": 1, "the": 0})),
    ],
)
def test_a_mark_is_dropped_from_a_vocabulary_beside_an_array(tmp_path, name, text):
    np.save(tmp_path / "v.npy", TABLE)
    written(tmp_path, name, text)
    assert Vectors.load(tmp_path / "v.npy").vocabulary.tokens() == ["the", "of"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_mark_is_dropped_from_a_vocabulary_in_another_encoding(tmp_path, encoding):
    np.save(tmp_path / "v.npy", TABLE)
    (tmp_path / "v.txt").write_bytes(
        "\ufeffthé\nof\n".removeprefix("\ufeff" * (encoding != "utf-16-le")).encode(encoding)
    )
    assert Vectors.load(tmp_path / "v.npy", encoding=encoding).vocabulary.tokens() == ["thé", "of"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.txt", "[PAD]\nof\n"),
        ("vocab.json", json.dumps({"[PAD]": 0, "of": 1})),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"[PAD]": 0, "of": 1}}})),
    ],
)
def test_a_mark_is_dropped_from_a_tokenizer(tmp_path, name, text):
    from safetensors.numpy import save_file

    save_file({"embed": TABLE}, tmp_path / "model.safetensors")
    written(tmp_path, name, text)
    written(tmp_path, "tokenizer_config.json", json.dumps({"pad_token": "[PAD]"}))
    vocabulary = Vectors.load(tmp_path / "model.safetensors").vocabulary
    assert vocabulary == Vocabulary(["[PAD]", "of"], special={"padding": "[PAD]"})


@pytest.mark.parametrize("text", ["", "the of\n", "the of\n\nof the"])
def test_a_mark_is_dropped_from_a_corpus(tmp_path, monkeypatch, text):
    path = written(tmp_path, "corpus", text)
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    for name in (path, tmp_path / "corpus.gz", "-"):
        assert "".join(files.read_text(name)) == text
    (tmp_path / "corpus").write_bytes(MARK + b"abc\xff")
    with pytest.raises(files.FormatError, match="byte 6 of the text is not UTF-8"):
        list(train.tokenize(files.read_text(path)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_mark_is_dropped_from_questions_and_pairs(tmp_path, end):
    vectors = Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
    (tmp_path / "q").write_bytes(MARK + end.join([": royals", "man king woman queen", ""]).encode())
    assert evaluate.analogies(vectors, tmp_path / "q").sections == (evaluate.Section("royals", 1, 1),)
    (tmp_path / "p").write_bytes(MARK + end.join(["man\twoman\t1", "king\tqueen\t7", "man\tking\t3", ""]).encode())
    assert evaluate.word_pairs(vectors, tmp_path / "p").pairs == 3
