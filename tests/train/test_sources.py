import gzip
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from corpora import ids_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embax import files, train
from embax.train._input.corpus import BREAK, encode
from embax.train._input.sources import expanded
from embax.train._parts import WHOLE

TEXT = "To be,\nor not.\n\nThe King's\nend"


def read(*arguments, **options):
    return [list(sequence) for sequence in train.read_sequences(*arguments, **options)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [["to", "be", "or", "not"], ["the", "king's", "end"]]),
        ({"tokenizer": "whitespace"}, [["To", "be,", "or", "not."], ["The", "King's", "end"]]),
        ({"lines": True}, [["to", "be"], ["or", "not"], [], ["the", "king's"], ["end"]]),
        (
            {"tokenizer": lambda text: list(text[:2]), "lines": True},
            [list("To"), list("or"), [], list("Th"), list("en")],
        ),
    ],
)
def test_read_sequences_cuts_text(text, options, expected):
    assert read(text, **options) == read([str(text)], **options) == expected
    packed = text.with_suffix(".gz")
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert read([packed, text], **options) == expected * 2


def test_read_sequences_cuts_an_endless_line_between_words(tmp_path):
    words = [f"word{number}" for number in range(300_000)]
    (tmp_path / "text").write_text(" ".join(words) + "\r\nnext")
    sequences = read(tmp_path / "text", lines=True, tokenizer="whitespace")
    assert 3 <= len(sequences) <= 5
    assert [word for sequence in sequences for word in sequence] == [*words, "next"]
    assert sequences[-1] == ["next"]


def test_read_sequences_takes_standard_input_and_pipes(text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b\nc")))
    assert read([text, "-"]) == [*read(text), ["a", "b", "c"]]
    pipe, write = os.pipe()
    os.write(write, b"d e")
    os.close(write)
    assert read(f"/dev/fd/{pipe}") == [["d", "e"]]
    os.close(pipe)


def test_read_sequences_takes_columns_among_texts(text, tmp_path):
    table = pa.table({"text": ["A b.", None, "c\n\nd"], "ids": [[1, 2], [], [3]]})
    pyarrow.parquet.write_table(table, tmp_path / "rows")
    rows = [["a", "b"], [], ["c", "d"]]
    assert read([text, tmp_path / "rows"]) == [*read(text), *rows]
    assert read([text, tmp_path / "rows"], lines=True) == [*read(text, lines=True), *rows]
    assert read(tmp_path / "rows", column="ids") == [[1, 2], [], [3]]


def test_read_sequences_finds_the_files_of_a_pattern(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", "odd[1].txt"):
        (tmp_path / name).write_text(name[0])
    assert read(tmp_path / "[ab].txt") == [["a"], ["b"]]
    assert sorted(read(tmp_path / "**" / "*.txt")) == [["a"], ["b"], ["d"], ["o"]]
    assert read(tmp_path / "odd[1].txt") == [["o"]]


def test_read_sequences_cuts_by_a_file_of_tokenizers(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "the": 1, "k": 2, "##ing": 3, "end": 4}))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("end $A end", special_tokens=[("end", 4)])
    tokenizer.save(str(tmp_path / "t.json"))
    unknown = "[UNK]"
    expected = [[unknown] * 6, ["the", "k", "##ing", unknown, unknown, "end"]]
    assert read(text, tokenizer=tmp_path / "t.json") == read(text, tokenizer=str(tmp_path / "t.json")) == expected
    (tmp_path / "t.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(files.FormatError, match=r't.json: must be "words", "whitespace" or a JSON file of tokenizers'):
        train.read_sequences(text, tokenizer=tmp_path / "t.json")


def test_read_sequences_names_the_missing_library(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "embax\[tokenizers\]"'):
        train.read_sequences(text, tokenizer=text)


@pytest.mark.parametrize(
    ("names", "options", "error", "match"),
    [
        ([], {}, ValueError, "must name a file, got none"),
        (["-", "-"], {}, ValueError, "must name standard input once"),
        (["text.txt", "missing"], {}, FileNotFoundError, "missing"),
        (["*.none"], {}, FileNotFoundError, r"No file matches.*\*\.none"),
        (["text.txt"], {"lines": True, "column": "a"}, ValueError, r"lines=.* must be False for a column"),
        (["rows"], {"lines": True}, ValueError, r"lines=.* must be False without text"),
        (["text.txt"], {"tokenizer": "word"}, FileNotFoundError, "word"),
    ],
)
def test_read_sequences_refuses_before_it_reads(text, monkeypatch, names, options, error, match):
    monkeypatch.chdir(text.parent)
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), "rows")
    with pytest.raises(error, match=match):
        train.read_sequences(names, **options)


def test_read_sequences_of_a_column_refuses_text(text):
    with pytest.raises(files.FormatError, match="must be a parquet or Arrow file, which has columns"):
        read(text, column="a")


def test_expanded_leaves_plain_names(text):
    assert expanded([text, "-"]) == [str(text), "-"]


PEAK = """
import re, sys
from embax.train import read_sequences
from embax.train._input.corpus import encode
from embax.train._parts import WHOLE
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
def kilobytes(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
corpus, = encode(read_sequences(sys.argv[1:]), 5, WHOLE, max_vocabulary=5_000)
words = sum(int((block >= 0).sum()) for block in corpus.blocks(1 << 16))
assert words == corpus.counts.sum(), (words, corpus.counts.sum())
print(words, kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure memory")
def test_memory_does_not_grow_with_the_text(tmp_path):
    often = " ".join(f"w{word % 3000}" for word in np.random.default_rng(0).zipf(1.5, 250_000).tolist())[:820_000]
    peaks = {}
    for millions in (2, 20):
        path = tmp_path / str(millions)
        with open(path, "w") as file:
            for number in range(millions):  # a million characters of frequent words, and 20,000 that come once
                rare = "\n\n".join(f"r{word}" for word in range(20_000 * number, 20_000 * (number + 1)))
                file.write(f"{often}\n\n{rare}\n\n")
        done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        words, peaks[millions] = map(int, done.stdout.split())
        assert path.stat().st_size > 0.97e6 * millions
        assert words > 200_000 * millions
    assert peaks[20] - peaks[2] < 16_000, peaks  # kB; the ids of the longer text alone take 18 MB


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure memory")
def test_memory_does_not_grow_with_columns(tmp_path):
    """A file of strings and one of lists, in pieces of 105,000 words, of which 5,000 occur in no other piece."""
    often = [f"w{word % 3000}" for word in np.random.default_rng(0).zipf(1.5, 100_000).tolist()]
    strings, lists = pa.schema({"words": pa.string()}), pa.schema({"words": pa.list_(pa.string())})
    peaks = {}
    for pieces in (2, 15):
        paths = tmp_path / f"{pieces}.parquet", tmp_path / f"{pieces}.arrow"
        with (
            pyarrow.parquet.ParquetWriter(paths[0], strings) as parquet,
            pa.ipc.new_file(str(paths[1]), lists) as arrow,
        ):
            for number in range(pieces):
                words = [*often, *(f"r{word}" for word in range(5_000 * number, 5_000 * (number + 1)))]
                rows = [words[first : first + 50] for first in range(0, len(words), 50)]
                parquet.write_table(pa.table({"words": [" ".join(row) for row in rows]}, schema=strings))
                arrow.write_table(pa.table({"words": rows}, schema=lists))
        done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        words, peaks[pieces] = map(int, done.stdout.split())
        assert words > 2 * 99_000 * pieces
    assert peaks[15] - peaks[2] < 8_000, peaks  # kB; the ids of the longer text alone take 11 MB more, and words more


ALPHABET = "aAbB'-_ \n\0\t" + "é\u2019\u00ad1"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(ALPHABET, max_size=80), st.booleans(), st.sampled_from(["words", "whitespace"]), st.sampled_from([None, 2])
)
def test_batches_give_the_corpus_of_the_sequences(tmp_path, text, lines, tokenizer, held_out):
    path = tmp_path / "text"
    path.write_text(text, newline="")
    sequences = train.read_sequences(path, lines=lines, tokenizer=tokenizer)
    one_by_one = [list(sequence) for sequence in sequences]
    one_by_one = [[word for word in words if word != "\0"] for words in one_by_one]
    one_by_one = [words for words in one_by_one if words]
    if not any(one_by_one if not held_out else one_by_one[::2]):
        with pytest.raises(train.CorpusError):
            encode(sequences, 1, WHOLE, held_out=held_out)
        return
    found, expected = encode(sequences, 1, WHOLE, held_out=held_out), encode(one_by_one, 1, WHOLE, held_out=held_out)
    for part, of_each in zip(found, expected, strict=True):
        assert part.tokens == of_each.tokens
        assert part.counts.tolist() == of_each.counts.tolist()
        assert ids_of(part) == ids_of(of_each)


def test_batches_report_the_words_so_far(text, tmp_path):
    pyarrow.parquet.write_table(pa.table({"ids": [[1, 2], [], [3]]}), tmp_path / "rows")
    sequences, reports = train.read_sequences([text, tmp_path / "rows"]), []
    sequences.report = reports.append
    (corpus,) = encode(sequences, 1, WHOLE)
    assert reports == [7, 10]
    assert corpus.counts.sum() == 10
    assert [corpus.tokens[row] for row in ids_of(corpus) if row != BREAK][-3:] == ["1", "2", "3"]


def test_zero_character_is_not_a_word(tmp_path):
    pyarrow.parquet.write_table(pa.table({"words": [["a", "\0"], ["b"]]}), tmp_path / "rows")
    with pytest.raises(ValueError, match="must not have the zero character as a word"):
        encode(train.read_sequences(tmp_path / "rows"), 1, WHOLE)
    with pytest.raises(ValueError, match=r"cbow\(sequences=.* must not have the zero character"):
        encode([["a", "\0"], ["b"]], 1, WHOLE, call="embax.train.cbow")
