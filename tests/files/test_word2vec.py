import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import real
import traced
from damage import damages, seeds, told
from gensim.models import KeyedVectors
from hypothesis import given, settings
from hypothesis import strategies as st

from embax.files import FormatError
from embax.files._formats.word2vec import BINARY, TEXT
from embax.files._io.contents import Contents, DuplicateTokensWarning, Gathered, Options
from embax.files._io.open import Source, opened
from embax.files._lines import lines as lines
from embax.vocabulary import Vocabulary

DATA = real.GENSIM
TEXTS = [
    "EN.1-10.cbow1_wind5_hs0_neg10_size300_smpl1e-05.txt",
    "IT.1-10.cbow1_wind5_hs0_neg10_size300_smpl1e-05.txt",
    "crime-and-punishment.vec",
    "high_precision.kv.txt",
    "lee_fasttext.vec",
    "pang_lee_polarity_fasttext.vec",
    "toy-model.vec",
    "word2vec_pre_kv_c",
]
BINARIES = ["euclidean_vectors.bin", "high_precision.kv.bin", "poincare_vectors.bin"]
NUMBERS = np.asarray([[1, -0.0, 0.1], [1e-45, np.nan, -np.inf], [3.4028235e38, 1e-7, 123456789]], np.float32)
CONTENTS = Contents(Vocabulary(["the", "", "größe\u2028\x85\xa0"]), NUMBERS)
ROWS = [[1.0, 0.5], [-2.0, 0.25]]
BITS = [np.asarray(row, "<f4").tobytes() for row in ROWS]


def read(format, path, **options):
    with opened(path, 100.0) as source:
        return format.read(source, Options(**options))


def read_bytes(format, folder, data, **options):
    path = Path(folder, "vectors")
    path.write_bytes(data)
    return read(format, path, **options)


def recognisers(path):
    with opened(path, 100.0) as source:
        return [format for format in (BINARY, TEXT) if format.recognises(source)]


def assert_as_gensim_has_it(contents, expected):
    assert contents.vocabulary.tokens() == expected.index_to_key
    assert contents.weight.dtype == np.float32
    assert contents.weight.tobytes() == expected.vectors.tobytes()


# Real files, against gensim


@pytest.mark.parametrize("name", TEXTS)
def test_read_of_foreign_text_files_equals_gensim(name):
    assert recognisers(DATA / name) == [TEXT]
    encoding = "latin-1" if name.startswith("pang") else "utf-8"  # of the token b"\x97"
    expected = KeyedVectors.load_word2vec_format(str(DATA / name), encoding=encoding)
    assert_as_gensim_has_it(read(TEXT, DATA / name, encoding=encoding), expected)


@pytest.mark.parametrize("name", BINARIES)
def test_read_of_foreign_binary_files_equals_gensim(name):
    assert recognisers(DATA / name) == [BINARY]
    expected = KeyedVectors.load_word2vec_format(str(DATA / name), binary=True)
    assert_as_gensim_has_it(read(BINARY, DATA / name), expected)


def test_a_header_of_too_many_rows_is_an_error_as_in_gensim():
    with pytest.raises(EOFError):
        KeyedVectors.load_word2vec_format(str(DATA / "pretrained.vec"))
    with pytest.raises(FormatError, match=r"pretrained.vec: the header says 3 rows, but the file ends after 1\."):
        read(TEXT, DATA / "pretrained.vec")


def test_tokens_that_are_not_utf8_are_an_error_as_in_gensim_if_asked_for():
    path = DATA / "w2v_keyedvectors_load_test.modeldata"
    with pytest.raises(UnicodeDecodeError):
        KeyedVectors.load_word2vec_format(str(path))
    with pytest.raises(FormatError, match=r"token 0 is not UTF-8"):
        read(TEXT, path, errors="strict")
    assert read(TEXT, path, encoding="latin-1").weight.shape == (2, 3)


@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_gensim_reads_written_files(tmp_path, format):
    expected = KeyedVectors.load_word2vec_format(str(DATA / "euclidean_vectors.bin"), binary=True)
    path = tmp_path / "vectors"
    format.write(path, Contents(Vocabulary(expected.index_to_key), expected.vectors))
    assert recognisers(path) == [format]
    again = KeyedVectors.load_word2vec_format(str(path), binary=format is BINARY)
    assert again.index_to_key == expected.index_to_key
    assert again.vectors.tobytes() == expected.vectors.tobytes()


def test_glove_6b_survives_both_formats(tmp_path):
    weight, tokens = real.glove().weight[:3_000], real.glove().vocabulary.tokens(np.arange(3_000))
    for format in (TEXT, BINARY):
        format.write(tmp_path / "vectors", Contents(Vocabulary(tokens), weight))
        contents = read(format, tmp_path / "vectors")
        assert contents.vocabulary.tokens() == tokens
        assert contents.weight.tobytes() == weight.astype(np.float32).tobytes()


# Round trips


@pytest.mark.parametrize("has_pyarrow", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_read_returns_written_contents(tmp_path, monkeypatch, format, rows, has_pyarrow):
    if not has_pyarrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "vectors"
    format.write(path, Contents(CONTENTS.vocabulary.take(np.arange(rows)), NUMBERS[:rows]))
    contents = read(format, path)
    assert contents.vocabulary.tokens() == CONTENTS.vocabulary.tokens()[:rows]
    np.testing.assert_array_equal(contents.weight, NUMBERS[:rows])
    assert np.array_equal(np.signbit(contents.weight[:1]), np.signbit(NUMBERS[: min(1, rows)]))
    assert recognisers(path) == [format if rows else TEXT]


@pytest.mark.parametrize("format", [TEXT, BINARY])
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.text(st.characters(exclude_characters=" \t\n", exclude_categories=["Cs"])), unique=True),
    seed=st.integers(0, 2**32 - 1),
    dim=st.integers(1, 4),
)
def test_any_tokens_and_bits_survive(tmp_path_factory, format, tokens, seed, dim):
    bits = np.random.default_rng(seed).integers(0, 2**32, (len(tokens), dim), np.uint32)
    weight = bits.view(np.float32)
    path = tmp_path_factory.mktemp("any") / "vectors"
    format.write(path, Contents(Vocabulary(tokens), weight))
    contents = read(format, path)
    assert contents.vocabulary.tokens() == tokens
    np.testing.assert_array_equal(contents.weight, weight)
    if format is BINARY:
        assert contents.weight.tobytes() == weight.tobytes()


def test_other_dtypes_are_written_as_float32(tmp_path):
    TEXT.write(tmp_path / "vectors", CONTENTS._replace(weight=np.full((3, 2), 0.1, np.float64)))
    assert (tmp_path / "vectors").read_bytes().startswith(b"3 2\nthe 0.1 0.1\n 0.1 0.1\n")


@pytest.mark.parametrize("token", ["New York", "two\nlines"])
@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_write_refuses_tokens_with_spaces(tmp_path, format, token):
    with pytest.raises(ValueError, match=r"must have no space or newline in a token for the format .*\.safetensors"):
        format.write(tmp_path / "vectors", Contents(Vocabulary(["a", token]), np.eye(2, dtype=np.float32)))
    assert not list(tmp_path.iterdir())


def test_write_refuses_rows_without_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"must have a number in each row for the format 'word2vec', got \(1, 0\)"):
        TEXT.write(tmp_path / "vectors", Contents(Vocabulary(["a"]), np.zeros((1, 0), np.float32)))


# Text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b"2 2\na 1 0.5\nb -2 0.25\n", ["a", "b"]),
        (b"2 2\na 1 0.5\nb -2 0.25", ["a", "b"]),
        (b"2\t2 \r\na 1 0.5\r\nb -2 0.25\r\n", ["a", "b"]),
        (b"2 2\na 1 0.5 \nb -2 0.25 \n\n", ["a", "b"]),
        (b"2 2\na 1 0.5 \nb -2 0.25  \n \n\n", ["a", "b"]),
        (b"2 2\na 1.0 .5\nb -2. +2.5E-1\n", ["a", "b"]),
        (b"2 2\na\t1\t0.5\nNew York\t-2\t0.25\n", ["a", "New York"]),
        (b"2 2\na 1 0.5\nNew York -2 0.25\n", ["a", "New York"]),
        (b"2 2\na\x00 1 0.5\n\rb\r -2 0.25\n", ["a\x00", "\rb\r"]),
        (b'2 2\n 1 0.5\n" -2 0.25\n', ["", '"']),
        (b"2 2\n\\ 1 0.5\n, -2 0.25\n", ["\\", ","]),
        (b"2 2\n\xef\xbb\xbfa 1 0.5\nNA -2 0.25\n", ["\ufeffa", "NA"]),
        ("2 2\na\u2028\x85 1 0.5\n\xa0b\xa0c\u3000 -2 0.25\n".encode(), ["a\u2028\x85", "\xa0b\xa0c\u3000"]),
    ],
)
def test_text_is_read(tmp_path, text, tokens):
    contents = read_bytes(TEXT, tmp_path, text)
    assert contents.vocabulary.tokens() == tokens
    assert contents.weight.tolist() == ROWS
    assert recognisers(tmp_path / "vectors") == [TEXT]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"the first line must be the number of rows and the number of columns"),
        (b"\n", r"the first line must be"),
        (b"the 0.1 0.2\n", r"the first line must be"),
        (b"2 2 2\n", r"the first line must be"),
        (b" 2 2\n", r"the first line must be"),
        (b"-2 2\n", r"the first line must be"),
        (b"2_0 2\n", r"the first line must be"),
        (b"9999999999999999999 1\na 1\n", r"the first line must be"),
        (b"1 0\na\n", r"must say 1 to 1,048,576 numbers a row, got 0"),
        (b"0 999999999999\n", r"must say 1 to 1,048,576 numbers a row, got 999,999,999,999"),
        (b"1 999999\na 1 2\n", r"line 2 has 2 numbers after the token, not 999,999"),
        (b"9999999999 2\na 1 2\n", r"the header says 9,999,999,999 rows, but the file ends after 1"),
        (b"3 2\na 1 0.5\nb 1 2\n", r"the header says 3 rows, but the file ends after 2. Is it whole\?"),
        (b"1 2\na 1 0.5\nb 1 2\n", r"the header says 1 rows, but the file has more"),
        (b"0 2\nb 1 2\n", r"the header says 0 rows, but the file has more"),
        (b"2 2\na 1 0.5\nb 1\n", r"line 3 has 1 numbers after the token, not 2"),
        (b"2 2\na 1 0.5\n\nb 1\n", r"line 4 has 1 numbers after the token, not 2"),
        (b"2 2\na 1 0.5\nb 1 2 3\n", r"line 3 has more than 2 numbers after the token"),
        (b"2 2\na 1 0.5\nb 0x10 2\n", r"line 3 has b'0x10' where a number should be"),
        (b"2 2\na 1 0.5\nb 1_000 2\n", r"line 3 has b'1_000' where"),
        (b"2 2\na 1 0.5\nb 1e 2\n", r"line 3 has b'1e' where"),
        (b"2 2\na 1 0.5\nb 1,5 2\n", r"line 3 has b'1,5' where"),
        ("2 2\na 1 0.5\nb 1 \u0662\n".encode(), r"line 3 has b'\\xd9\\xa2' where"),
    ],
)
def test_text_that_is_wrong_is_an_error(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        read_bytes(TEXT, tmp_path, text)


def test_errors_name_the_line_far_into_a_file(tmp_path):
    rows = [b"token%d 0.25 0.5" % row for row in range(300_000)]
    text = b"300000 2\n" + b"\n".join(rows)
    assert read_bytes(TEXT, tmp_path, text).weight.sum() == 225_000
    rows[234_567] = b"token 0.25 0.5x"
    with pytest.raises(FormatError, match=r"line 234,569 has b'0\.5x'"):
        read_bytes(TEXT, tmp_path, b"300000 2\n" + b"\n".join(rows))
    rows[234_567] = b"a token 0.25 0.5"
    contents = read_bytes(TEXT, tmp_path, b"300000 2\n" + b"\n".join(rows))
    assert contents.vocabulary.tokens([234_566, 234_567, 299_999]) == ["token234566", "a token", "token299999"]


def test_lines_beyond_any_table_are_an_error(tmp_path):
    text = b"2 2\na 1 0.5\n" + b"1 " * (1 << 24) + b"1 \n"
    with pytest.raises(FormatError, match=r"the line at byte 12 is longer than 16,777,216 bytes"):
        read_bytes(TEXT, tmp_path, text)


def test_lines_longer_than_a_block_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 1 << 18)
    dim = 90_000
    text = b"2 %d\n" % dim + b"".join(token + b" 0.5" * dim + b"\n" for token in (b"a", b"b"))
    assert len(text) > 2 * lines._BLOCK
    contents = read_bytes(TEXT, tmp_path, text)
    assert contents.vocabulary.tokens() == ["a", "b"]
    assert contents.weight.shape == (2, dim)
    assert (contents.weight == 0.5).all()
    assert recognisers(tmp_path / "vectors") == [TEXT]


# Binary


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n"])
def test_binary_is_read_with_and_without_ends_of_lines(tmp_path, end, last):
    contents = read_bytes(BINARY, tmp_path, b"2 2\na " + BITS[0] + end + b"b " + BITS[1] + last)
    assert contents.vocabulary.tokens() == ["a", "b"]
    assert contents.weight.tolist() == ROWS
    assert recognisers(tmp_path / "vectors") == [BINARY]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"the first line must be"),
        (b"2 2\n", r"the file ends at byte 4, within row 1 of 2"),
        (b"2 2\nab", r"the file ends at byte 6, within row 1 of 2"),
        (b"2 2\na " + BITS[0], r"the file ends at byte 14, within row 2 of 2"),
        (b"2 2\na " + BITS[0] + b"b " + BITS[1][:-1], r"the file ends at byte 23, within row 2 of 2"),
        (b"1 2\na " + BITS[0] + b"\nb " + BITS[1], r"the header says 1 rows, but the file goes on at byte 14"),
        (b"999999999999 2\na " + BITS[0], r"within row 2 of 999,999,999,999"),
        (b"999999999999 1048576\na " + BITS[0], r"within row 1 of"),
        (b"1 0\na ", r"must say 1 to 1,048,576 numbers a row, got 0"),
        (b"1 99999999\na ", r"must say 1 to 1,048,576 numbers a row, got 99,999,999"),
        (b"2 2\na " + BITS[0] + bytes(1 << 21), r"row 2, from byte 14 on, is no token that ends with a space"),
        (b"2 2\na " + BITS[0] + bytes((1 << 20) + 1) + b" " + BITS[1], r"row 2, from byte 14 on, is no token"),
    ],
)
def test_binary_that_is_wrong_is_an_error(tmp_path, data, message):
    with pytest.raises(FormatError, match=message):
        read_bytes(BINARY, tmp_path, data)


def test_binary_of_many_blocks_is_read(tmp_path):
    weight = np.random.default_rng(0).standard_normal((40_000, 33)).astype(np.float32)
    vocabulary = Vocabulary(map(str, range(40_000)))
    BINARY.write(tmp_path / "vectors", Contents(vocabulary, weight))
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "vectors").read_bytes(), 1))
    for name in ("vectors", "packed"):
        contents = read(BINARY, tmp_path / name)
        assert contents.vocabulary == vocabulary
        assert contents.weight.tobytes() == weight.tobytes()


# Options


@pytest.mark.parametrize(("limit", "rows"), [(0, 0), (1, 1), (2, 2), (9, 3)])
@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_limit_is_of_the_first_rows(tmp_path, format, limit, rows):
    format.write(tmp_path / "vectors", CONTENTS)
    contents = read(format, tmp_path / "vectors", limit=limit)
    assert contents.vocabulary.tokens() == CONTENTS.vocabulary.tokens()[:rows]
    np.testing.assert_array_equal(contents.weight, NUMBERS[:rows])


@pytest.mark.parametrize(
    ("format", "data"),
    [
        (TEXT, b"9 2\n\na 1 0.5\nb -2 0.25\nthe rest is broken\n"),
        (BINARY, b"9 2\na " + BITS[0] + b"b " + BITS[1] + b"?"),
    ],
)
def test_limit_leaves_the_rest_unread(tmp_path, format, data):
    assert read_bytes(format, tmp_path, data, limit=2).weight.tolist() == ROWS
    with pytest.raises(FormatError):
        read_bytes(format, tmp_path, data)


@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_dtype_converts(tmp_path, format):
    format.write(tmp_path / "vectors", Contents(Vocabulary("ab"), np.asarray(ROWS, np.float32)))
    contents = read(format, tmp_path / "vectors", dtype=np.dtype(np.float16))
    assert contents.weight.dtype == np.float16
    assert contents.weight.tolist() == ROWS


@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_mapping_is_refused(tmp_path, format):
    format.write(tmp_path / "vectors", CONTENTS)
    with pytest.raises(FormatError, match=r"cannot be mapped into memory. Leave mmap=True out"):
        read(format, tmp_path / "vectors", mmap=True)


@pytest.mark.parametrize("format", [TEXT, BINARY])
def test_encoding_is_of_the_tokens(tmp_path, format):
    data = b"1 1\ngr\xf6\xdfe " + (b"1\n" if format is TEXT else np.asarray(1, "<f4").tobytes())
    assert read_bytes(format, tmp_path, data, encoding="latin-1").vocabulary.tokens() == ["größe"]


def test_repeated_tokens_are_left_out(tmp_path):
    with pytest.warns(DuplicateTokensWarning, match=r"1 rows are left out"):
        contents = read_bytes(TEXT, tmp_path, b"3 1\na 1\nb 2\na 3\n")
    assert contents.vocabulary.tokens() == ["a", "b"]
    assert contents.weight.tolist() == [[1], [2]]


# Recognition


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (b"the 0.1\n", None),
        (b"", None),
        (b"3 1\nb 2\n", TEXT),
        (b"7 1\n8 2\n9 3\n", TEXT),
        (b"7 3\n8 2\n9 3\n", None),
        (b"2 5\n", TEXT),
        (b"2 5", TEXT),
        (b"2 2\na 1 0.5 3\nb 1 x\n", TEXT),
        ("2 2\na ção 1 0.5\n".encode(), TEXT),
        (b"2 1\na \x00\x00\x00\x00", BINARY),
        (b"2 1\n\na \x00\x00\x00\x00", BINARY),
        (b"2 1\n", TEXT),
        (b"2 0\na \x00\x00\x00\x00", TEXT),
        (b"2 5000 \na " + np.full(5000, 0.3, "<f4").tobytes() + b"\n", BINARY),
        (b"2 50000\na " + np.full(50000, 0.3, "<f4").tobytes(), BINARY),
    ],
)
def test_recognition(tmp_path, data, format):
    (tmp_path / "vectors").write_bytes(data)
    assert recognisers(tmp_path / "vectors") == [format] * (format is not None)


# Hostile files

REAL = [
    (TEXT, (DATA / "toy-model.vec").read_bytes()),
    (TEXT, (DATA / "high_precision.kv.txt").read_bytes()),
    (BINARY, (DATA / "high_precision.kv.bin").read_bytes()),
    (BINARY, (DATA / "euclidean_vectors.bin").read_bytes()[:532].replace(b"2747", b"12", 1)),
]


@seeds
@pytest.mark.parametrize(("format", "whole"), REAL)
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning", "ignore::embax.files.UndecodedTokensWarning")
def test_damaged_files_are_read_or_an_error(tmp_path, format, whole, seed):
    path = tmp_path / "damaged"
    pieces = [b"9" * 12, b" ", b"\n", b"\r", b"nan", b"e99"]
    for name, data in damages(whole, 120, seed, head=10, pieces=pieces):
        path.write_bytes(data)
        with told(name):
            try:
                recognisers(path)
                contents = read(format, path)
            except FormatError:
                continue
            assert len(contents.vocabulary) == len(contents.weight)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("format", "data"), REAL)
def test_a_file_cut_anywhere_is_an_error(tmp_path, format, data, step):
    whole = read_bytes(format, tmp_path, data)
    for end in range(len(data)):
        if end % step and min(end, len(data) - end) > 60:
            continue
        # Text may lack its last end of line, and then a digit or more of the last number, without a trace.
        if (
            format is TEXT
            and b"\n" not in data[end:-1]
            and data[:end].rsplit(b"\n", 1)[1].count(b" ") >= whole.weight.shape[1]
        ):
            continue
        with told(f"cut at {end}"), pytest.raises(FormatError):
            read_bytes(format, tmp_path, data[:end])


def test_memory_is_not_taken_by_the_header(tmp_path):
    cut = {
        "text": b"99999999999 300\na" + b" 1" * 300 + b"\n",
        "wide text": b"99999999999 999999\na 1\n",
        "binary": b"99999999999 300\na " + bytes(1200),
        "wide binary": b"99999999999 999999\na " + bytes(100),
    }
    for name, data in cut.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"packed {name}").write_bytes(gzip.compress(data))
    found = traced.traced(
        """
        import pathlib
        from embax.files import FormatError
        from embax.files._formats.word2vec import BINARY, TEXT
        from embax.files._io.contents import Options
        from embax.files._io.open import opened

        def is_refused(path):
            with opened(path, 100.0) as source:
                try:
                    (BINARY if path.name.endswith("binary") else TEXT).read(source, Options())
                except FormatError:
                    return True
            return False

        found = {}
        for path in pathlib.Path(sys.argv[1]).iterdir():
            refused = []
            found[path.name] = [peak(lambda: refused.append(is_refused(path))), *refused]
        """,
        tmp_path,
    )
    assert len(found) == 8
    for name, (peak, is_refused) in found.items():
        assert is_refused, name
        assert peak < 1 << 24, name


def test_gathering_goes_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 40)
    calls = []
    add = Gathered.add_packed
    monkeypatch.setattr(Gathered, "add_packed", lambda self, *packed: calls.append(1) or add(self, *packed))
    TEXT.write(tmp_path / "vectors", CONTENTS)
    with opened(tmp_path / "vectors", 100.0) as source:
        assert isinstance(source, Source)
        contents = TEXT.read(source, Options())
    assert len(calls) > 1
    np.testing.assert_array_equal(contents.weight, NUMBERS)
