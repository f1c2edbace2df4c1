import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import real
from damage import damages, seeds, told
from gensim.models import KeyedVectors
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import files
from embax.files import FormatError
from embax.files._formats.glove import FORMAT
from embax.files._formats.word2vec import BINARY, TEXT
from embax.files._io.contents import Contents, DuplicateTokensWarning, Options
from embax.files._io.open import opened
from embax.vocabulary import Vocabulary

DATA = real.GENSIM
NUMBERS = np.asarray([[1, -0.0, 0.1], [1e-45, np.nan, -np.inf], [3.4028235e38, 1e-7, 123456789]], np.float32)
CONTENTS = Contents(Vocabulary(["the", "", "größe\u2028\x85\xa0"]), NUMBERS)


def read(path, **options):
    with opened(path, 100.0) as source:
        return FORMAT.read(source, Options(**options))


def read_bytes(folder, data, **options):
    path = Path(folder, "vectors")
    path.write_bytes(data)
    return read(path, **options)


def recogniser(path):
    """The first format that recognises a file, as they are tried."""
    with opened(path, 100.0) as source:
        return next((format.name for format in (BINARY, TEXT, FORMAT) if format.recognises(source)), None)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # gensim leaves the file open
def test_read_of_foreign_files_equals_gensim():
    path = DATA / "test_glove.txt"
    assert recogniser(path) == "glove"
    expected = KeyedVectors.load_word2vec_format(str(path), no_header=True)
    contents = read(path)
    assert contents.vocabulary.tokens() == expected.index_to_key
    assert contents.weight.tobytes() == expected.vectors.tobytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_gensim_reads_written_files(tmp_path):
    expected = KeyedVectors.load_word2vec_format(str(DATA / "euclidean_vectors.bin"), binary=True)
    FORMAT.write(tmp_path / "vectors", Contents(Vocabulary(expected.index_to_key), expected.vectors))
    assert recogniser(tmp_path / "vectors") == "glove"
    again = KeyedVectors.load_word2vec_format(str(tmp_path / "vectors"), no_header=True)
    assert again.index_to_key == expected.index_to_key
    assert again.vectors.tobytes() == expected.vectors.tobytes()


@pytest.mark.parametrize("has_pyarrow", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_read_returns_written_contents(tmp_path, monkeypatch, rows, has_pyarrow):
    if not has_pyarrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    FORMAT.write(tmp_path / "vectors", Contents(CONTENTS.vocabulary.take(np.arange(rows)), NUMBERS[:rows]))
    contents = read(tmp_path / "vectors")
    assert contents.vocabulary.tokens() == CONTENTS.vocabulary.tokens()[:rows]
    np.testing.assert_array_equal(contents.weight, NUMBERS[:rows])


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters=" \t\n", exclude_categories=["Cs"])), st.integers().map(str)
        ),
        unique=True,
        min_size=1,
    ),
    seed=st.integers(0, 2**32 - 1),
    dim=st.integers(1, 4),
    is_whole=st.booleans(),
)
def test_any_tokens_and_numbers_survive(tmp_path_factory, tokens, seed, dim, is_whole):
    draw = np.random.default_rng(seed)
    weight = draw.integers(0, 2**32, (len(tokens), dim), np.uint32).view(np.float32)
    weight = np.floor(draw.random((len(tokens), dim)) * 9).astype(np.float32) if is_whole else weight
    path = tmp_path_factory.getbasetemp() / "glove"
    FORMAT.write(path, Contents(Vocabulary(tokens), weight))
    assert recogniser(path) == "glove"
    contents = read(path)
    assert contents.vocabulary.tokens() == tokens
    np.testing.assert_array_equal(contents.weight, weight)


def test_write_refuses_tokens_that_cannot_be_read_back(tmp_path):
    with pytest.raises(ValueError, match=r"must have no space or newline in a token for the format 'glove', got 'New"):
        FORMAT.write(tmp_path / "vectors", Contents(Vocabulary(["New York"]), NUMBERS[:1]))
    with pytest.raises(ValueError, match=r"must have no tab in a token for the format 'glove', got 'a.tb'"):
        FORMAT.write(tmp_path / "vectors", Contents(Vocabulary(["a\tb"]), NUMBERS[:1]))
    with pytest.raises(ValueError, match=r"must have a row for the format 'glove', which has no header, got none"):
        FORMAT.write(tmp_path / "vectors", Contents(Vocabulary([]), NUMBERS[:0]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "tokens", "dim"),
    [
        (b"the 1 2\nof 3 4\n", ["the", "of"], 2),
        (b"the 1 2\r\nof 3 4 \r\n\r\n", ["the", "of"], 2),
        (b"the 1 2\nof 3 4", ["the", "of"], 2),
        (b"the 1 2", ["the"], 2),
        (b"7 1 2\n8 3 4\n", ["7", "8"], 2),
        (b"the 1\nof 2\n", ["the", "of"], 1),
        (b"7 1.0\n8 2.0\n", ["7", "8"], 1),
        (b". . . 1 2\n. . 3 4\nat a@b.com 5 6\n", [". . .", ". .", "at a@b.com"], 2),
        (b"New York\t1\t2\nLos Angeles\t3\t4\n", ["New York", "Los Angeles"], 2),
        (b" 1 2\nnan 3 4\n", ["", "nan"], 2),
        (b"\xef\xbb\xbfthe 1 2\nof 3 4\n", ["the", "of"], 2),
        (b"2 3 4\n", ["2"], 2),
    ],
)
def test_glove_is_read(tmp_path, text, tokens, dim):
    contents = read_bytes(tmp_path, text)
    assert contents.vocabulary.tokens() == tokens
    assert contents.weight.shape == (len(tokens), dim)
    if tokens[0] != "2":
        assert contents.weight.ravel().tolist() == list(range(1, len(tokens) * dim + 1))
    assert recogniser(tmp_path / "vectors") == "glove"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"the first lines are no tokens with numbers after them"),
        (b"\n\n", r"the first lines are no tokens"),
        (b"one uno\ntwo due\n", r"the first lines are no tokens"),
        (b"the 1 2\nof 3 4\nand 5\n", r"line 3 has 1 numbers after the token, not 2"),
        (b"the 1 2\nof 3 4\nand 5 6 7\n", r"line 3 has more than 2 numbers after the token"),
        (b"the 1 2\nof 3 4\nand 5 6x\n", r"line 3 has b'6x' where a number should be"),
        (b"2 2\nthe 1 2\nof 3 4\n", r"line 1 has 1 numbers after the token, not 2"),
    ],
)
def test_read_refuses_malformed_lines(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        read_bytes(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"", None),
        (b"hello\n", None),
        (b"hello world\n", None),
        (b"page 1\nof x\nthe 1 2\nbook 1 2 3\n", None),
        (b"one uno\ntwo 2\n", None),
        (b"a 1 2\nb c d\ne f g\n", None),
        (b"the 1 2\nof 3 4\nand 5 x\n", "glove"),
        (b"the 0.5", "glove"),
        (b"3 1\n4 2\n", "word2vec"),
        (b"3 7\n4 2\n5 3\n", "glove"),
        (b"the" + b" 0.125" * 20_000, "glove"),
        (b"the" + b" -1e-10" * 9_362 + b"9\n", "glove"),
        (bytes(range(256)) * 300, None),
    ],
)
def test_recognition(tmp_path, text, name):
    (tmp_path / "vectors").write_bytes(text)
    assert recogniser(tmp_path / "vectors") == name


@pytest.mark.parametrize(
    "name", ["lee.cor", "toy-data.txt", "simlex999.txt", "questions-words.txt", "lee_fasttext.bin"]
)
def test_other_files_are_not_recognised(name):
    assert recogniser(DATA / name) is None


@pytest.mark.parametrize(("limit", "rows"), [(0, 0), (1, 1), (3, 3), (9, 3)])
def test_limit_is_of_the_first_rows(tmp_path, limit, rows):
    FORMAT.write(tmp_path / "vectors", CONTENTS)
    np.testing.assert_array_equal(read(tmp_path / "vectors", limit=limit).weight, NUMBERS[:rows])


def test_limit_leaves_the_rest_unread(tmp_path):
    assert read_bytes(tmp_path, b"the 1 2\n \nof 3 4\nand 5\n", limit=2).weight.tolist() == [[1, 2], [3, 4]]


def test_mapping_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"text cannot be mapped into memory. Leave mmap=True out"):
        read_bytes(tmp_path, b"the 1 2\n", mmap=True)


@pytest.mark.parametrize("is_packed", [False, True])
def test_memory_for_rows_that_get_shorter_grows(tmp_path, is_packed):
    # By the first lines, which fill more than a block, there would be far fewer rows.
    text = b"".join(b"%d %s 2\n" % (row, b"1." + b"0" * 500 if row < 5_000 else b"1") for row in range(200_000))
    contents = read_bytes(tmp_path, gzip.compress(text, 1) if is_packed else text)
    assert contents.weight.shape == (200_000, 2)
    assert contents.weight.sum(0).tolist() == [200_000, 400_000]
    assert contents.vocabulary.tokens([0, 199_999]) == ["0", "199999"]


@seeds
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning", "ignore::embax.files.UndecodedTokensWarning")
def test_damaged_files_are_read_or_an_error(tmp_path, seed):
    path = tmp_path / "damaged"
    whole = b"".join((DATA / "test_glove.txt").read_bytes().splitlines(keepends=True)[:4])
    pieces = [b" ", b"\n", b"\r", b"\t", b"nan", b"e99", b"9" * 400]
    for name, data in damages(whole, 300, seed, pieces=pieces):
        path.write_bytes(data)
        with told(name):
            try:
                recogniser(path)
                contents = read(path)
            except FormatError:
                continue
            assert len(contents.vocabulary) == len(contents.weight)


def test_a_line_of_many_fields_takes_no_memory_for_columns(tmp_path, monkeypatch):
    from pyarrow import csv

    fields, read_csv = [], csv.read_csv

    def watched(buffer, *args, **options):
        fields.append(buffer.read().split(b"\n")[0].count(b" "))
        buffer.seek(0)
        return read_csv(buffer, *args, **options)

    monkeypatch.setattr(csv, "read_csv", watched)
    long = b"b" + b" x" * 100_000 + b" 1\n"
    path = tmp_path / "v"
    path.write_bytes(b"a 1\n" * 10 + long + b"c 1\n")
    with pytest.warns(DuplicateTokensWarning):
        assert len(files.load(path, format="glove").weight) == 3  # one a token with spaces
    assert set(fields) == {1}
