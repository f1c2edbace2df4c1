"""Tokens that were cut inside a character, as programs do that count bytes."""

import json
import re
import sys
import warnings

import numpy as np
import pyarrow.feather
import pyarrow.parquet
import pytest
from cli_runs import run
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import Vectors, Vocabulary, files
from embax._base.text.escapes import rows_not_utf8
from embax.files import FormatError, UndecodedTokensWarning
from embax.vocabulary._vocabulary import printable, quoted

# "東" and "京" cut, the rest of "京", half a surrogate pair as UTF-8, and a good token with a backslash.
CUT = [b"king", "東".encode()[:2], b"caf\xc3", "京x".encode()[2:], b"\xed\xa0\xbd", "größe".encode(), rb"back\xslash"]
STRINGS = ["king", "\udce6\udc9d", "caf\udcc3", "\udcacx", "\udced\udca0\udcbd", "größe", r"back\xslash"]
ESCAPED = ["king", r"\xe6\x9d", r"caf\xc3", r"\xacx", r"\xed\xa0\xbd", "größe", r"back\xslash"]
REPLACED = [token.decode(errors="replace") for token in CUT]
WRONG = 4
WEIGHT = np.arange(2.0 * len(CUT), dtype=np.float32).reshape(-1, 2) + 0.5


def lines(tokens=CUT, weight=WEIGHT):
    return b"".join(
        b"%b %b %b\n" % (token, *(str(n).encode() for n in row)) for token, row in zip(tokens, weight, strict=True)
    )


FILES = {
    "glove": lines(),
    "word2vec": b"%d 2\n" % len(CUT) + lines(),
    "word2vec-binary": b"%d 2\n" % len(CUT)
    + b"".join(token + b" " + row.tobytes() for token, row in zip(CUT, WEIGHT, strict=True)),
}
formats = pytest.mark.parametrize("format", FILES)
quiet = pytest.mark.filterwarnings("ignore::embax.files.UndecodedTokensWarning")


def offsets(tokens):
    return np.concatenate([[0], np.cumsum([len(token) for token in tokens])])


@pytest.fixture
def cut():
    vectors = Vectors(Vocabulary.from_utf8(b"".join(CUT), offsets(CUT), errors="escape"), WEIGHT)
    assert vectors.vocabulary.tokens() == STRINGS
    return vectors


@pytest.fixture
def path(tmp_path, format):
    (tmp_path / "v").write_bytes(FILES[format])
    return tmp_path / "v"


@formats
def test_the_same_format_is_written_with_the_same_bytes(tmp_path, path, format):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = Vectors.load(path)
    (warning,) = caught
    assert warning.category is UndecodedTokensWarning
    assert re.search(
        r"v: 4 of 7 tokens are not UTF-8, such as b'\\xe6\\x9d'; they keep their bytes", str(warning.message)
    )
    assert warning.message.number == WRONG
    assert vectors.vocabulary.tokens() == STRINGS
    np.testing.assert_array_equal(vectors.weight, WEIGHT)
    vectors.save(tmp_path / "again", format=format)
    assert (tmp_path / "again").read_bytes() == FILES[format]


@formats
def test_load_errors_option_decides_about_invalid_utf8(tmp_path, path, format):
    with pytest.raises(
        FormatError, match=r"v: token 1 is not UTF-8: b'\\xe6\\x9d'. Pass its encoding, .* errors='escape'"
    ):
        Vectors.load(path, errors="strict")
    with pytest.warns(UndecodedTokensWarning, match="4 of 7 tokens .* have U[+]FFFD for what cannot be decoded"):
        assert Vectors.load(path, errors="replace").vocabulary.tokens() == REPLACED
    assert Vectors.load(path, encoding="latin-1").vocabulary.tokens() == [token.decode("latin-1") for token in CUT]
    good = lines([b"a", "größe".encode()], WEIGHT[:2])
    path.write_bytes(good)
    for errors in ("strict", "replace", "escape"):
        assert Vectors.load(path, errors=errors).vocabulary.tokens() == ["a", "größe"]


@quiet
@formats
def test_vectors_of_cut_tokens_are_found(path, format):
    vectors = Vectors.load(path)
    assert vectors.vocabulary.ids(STRINGS).tolist() == list(range(len(CUT)))
    assert [token in vectors for token in STRINGS] == [True] * len(CUT)
    np.testing.assert_array_equal(vectors["caf\udcc3"], WEIGHT[2])
    assert "caf\udcc3" in dict(vectors.most_similar("king"))
    for token in ("\ud83d", "\udc9d", "caf", "\udcc3\udcb6"):
        assert token not in vectors


@quiet
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tokens_that_are_not_of_another_encoding_keep_their_bytes(tmp_path, encoding):
    (tmp_path / "v").write_bytes(lines([b"a\x81", b"b"], WEIGHT[:2]))
    assert Vectors.load(tmp_path / "v", encoding=encoding).vocabulary.tokens() == ["a\udc81", "b"]
    assert Vectors.load(tmp_path / "v", encoding=encoding, errors="replace").vocabulary.tokens() == ["a\ufffd", "b"]
    with pytest.raises(FormatError, match=f"token 0 is not {encoding}"):
        Vectors.load(tmp_path / "v", encoding=encoding, errors="strict")


@pytest.mark.parametrize("name", ["v.txt", "v.json"])
def test_a_vocabulary_beside_an_array_keeps_them(tmp_path, name):
    np.save(tmp_path / "v.npy", WEIGHT)
    listing = b"[" + b", ".join(b'"%b"' % token.replace(b"\\", rb"\\") for token in CUT) + b"]"
    (tmp_path / name).write_bytes(listing if name == "v.json" else b"\n".join(CUT))
    with pytest.warns(UndecodedTokensWarning, match=rf"{name}: 4 of 7 tokens") as caught:
        assert Vectors.load(tmp_path / "v.npy").vocabulary.tokens() == STRINGS
    assert len(caught) == 1
    with pytest.warns(UndecodedTokensWarning):
        assert Vectors.load(tmp_path / "v.npy", errors="replace").vocabulary.tokens() == REPLACED
    with pytest.raises(FormatError, match=rf"{name}: token 1 is not UTF-8"):
        Vectors.load(tmp_path / "v.npy", errors="strict")


@pytest.mark.parametrize("has_pyarrow", [True, False])
@pytest.mark.parametrize("suffix", [".txt", ".glove", ".bin", ".fasttext.bin"])
def test_files_of_bytes_are_written_with_their_bytes(tmp_path, monkeypatch, cut, suffix, has_pyarrow):
    if not has_pyarrow:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    cut.save(tmp_path / f"v{suffix}")
    data = (tmp_path / f"v{suffix}").read_bytes()
    assert all(token in data for token in CUT)
    with pytest.warns(UndecodedTokensWarning, match="4 of 7"):
        assert Vectors.load(tmp_path / f"v{suffix}").vocabulary == cut.vocabulary


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".safetensors", ".npy"])
def test_files_of_text_are_written_with_an_escape(tmp_path, cut, suffix):
    cut.save(tmp_path / f"v{suffix}")
    assert Vectors.load(tmp_path / f"v{suffix}").vocabulary.tokens() == ESCAPED
    if suffix == ".parquet":
        assert pyarrow.parquet.read_table(tmp_path / "v.parquet")["token"].to_pylist() == ESCAPED
    if suffix in (".arrow", ".feather"):
        assert pyarrow.feather.read_table(tmp_path / f"v{suffix}")["token"].to_pylist() == ESCAPED
    if suffix == ".npy":
        assert json.loads((tmp_path / "v.json").read_text("utf-8")) == ESCAPED


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".safetensors", ".npy"])
def test_an_escape_that_is_another_token_is_refused(tmp_path, suffix):
    vectors = Vectors(["caf\udcc3", r"caf\xc3"], WEIGHT[:2])
    with pytest.raises(ValueError, match=r"must have no token that is spelled as another one .* got 'caf.*xc3' twice"):
        vectors.save(tmp_path / f"v{suffix}")
    assert not list(tmp_path.iterdir())


def test_vocabulary_accepts_its_own_escaped_strings(cut):
    assert Vocabulary(STRINGS) == cut.vocabulary
    assert Vocabulary(cut.vocabulary) == cut.vocabulary
    assert cut.vocabulary.take(np.array([2, 0])).tokens() == ["caf\udcc3", "king"]
    assert [token.encode(errors="surrogateescape") for token in cut.vocabulary] == CUT
    for token in ("\ud800", "\udc00", "\udcc3\udca9", "\udc41"):  # of no byte, or of bytes that are a character
        with pytest.raises(ValueError, match="must be valid Unicode"):
            Vocabulary([token])
        assert token not in cut.vocabulary
        assert cut.vocabulary.ids(["king", token], unknown=-1).tolist() == [0, -1]


def test_from_utf8_errors_option_decides_about_invalid_utf8():
    text, ends = "aé".encode(), [0, 2, 3]
    with pytest.raises(ValueError, match=r"token 1 is not UTF-8: b'\\xa9'"):
        Vocabulary.from_utf8(text, ends)
    assert Vocabulary.from_utf8(text, ends, errors="escape").tokens() == ["a\udcc3", "\udca9"]
    assert Vocabulary.from_utf8(text, ends, errors="replace").tokens() == ["a\ufffd", "\ufffd"]
    with pytest.raises(
        ValueError, match=r"errors=\.\.\.\)` must be one of 'strict', 'replace', 'escape', got 'ignore'"
    ):
        Vocabulary.from_utf8(text, ends, errors="ignore")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.text("aé東\U0001f600", max_size=3), st.binary(max_size=4)), max_size=12))
def test_bytes_and_strings_are_each_others_inverse(tokens):
    tokens = list(dict.fromkeys(token.encode() if isinstance(token, str) else token for token in tokens))
    vocabulary = Vocabulary.from_utf8(b"".join(tokens), offsets(tokens), errors="escape")
    strings = vocabulary.tokens()
    assert [token.encode(errors="surrogateescape") for token in strings] == tokens
    assert Vocabulary(strings) == vocabulary
    assert vocabulary.ids(strings * 3).tolist() == [*range(len(tokens))] * 3
    wrong = [
        row for row, token in enumerate(strings) if not token.isprintable() and re.search("[\udc80-\udcff]", token)
    ]
    assert rows_not_utf8(*vocabulary.utf8).tolist() == wrong
    assert [printable(token) for token in strings] == [printable(token) for token in map(escaped_alone, tokens)]


def escaped_alone(token):
    return token.decode(errors="backslashreplace")


def test_tokens_far_into_a_vocabulary_are_checked(monkeypatch):
    monkeypatch.setattr("embax._base.text.escapes._CHECKED", 3)
    tokens = [b"a", b"b", b"", "é".encode(), b"c\xc3", b"\xa9", b"", b"", b"\xff", b"d"]
    assert rows_not_utf8(np.frombuffer(b"".join(tokens), np.uint8), offsets(tokens)).tolist() == [4, 5, 8]


@formats
def test_the_terminal_gets_an_escape(tmp_path, path, format):
    status, out, err = run("neighbors", path, "king")
    assert status == 0
    assert all(token in out for token in ESCAPED[1:])
    assert out.isprintable() or out.replace("\n", "").isprintable()
    assert err.startswith(f"embax: note: {path}: 4 of 7 tokens are not UTF-8")
    status, out, _ = run("neighbors", path, "caf\udcc3", "--json")
    found = json.loads(out)["neighbors"][0]
    assert (status, found["word"]) == (0, r"caf\xc3")
    assert {one["token"] for one in found["nearest"]} == set(ESCAPED) - {r"caf\xc3"}
    status, out, err = run("info", path)
    assert (status, err.count("4 of 7 tokens are not UTF-8"), r"caf\xc3" in out) == (0, 1, True)
    assert run("convert", path, tmp_path / "o", "--to", format)[0] == 0
    assert (tmp_path / "o").read_bytes() == FILES[format]
    status, _, err = run("convert", path, tmp_path / "o", "--errors", "strict")
    assert (status, "token 1 is not UTF-8" in err) == (2, True)
    status, _, err = run("info", path, "--errors", "ignore")
    assert (status, "one of strict, replace, escape, got 'ignore'" in err) == (2, True)


def test_messages_escape_invalid_bytes():
    assert quoted("caf\udcc3") == r'"caf\xc3"'
    assert printable("\x1bcaf\udcc3é") == r"\x1bcaf\xc3é"
    assert printable("".join(map(chr, range(0xDC80, 0xDD00)))) == "".join(
        f"\\x{byte:02x}" for byte in range(0x80, 0x100)
    )


def test_a_tokens_sub_words_are_of_its_bytes():
    from embax.files._formats.fasttext.subwords import Ngrams, Subwords

    rows = np.arange(64, dtype=np.float32)[:, None]
    plain = Subwords(Ngrams(rows, 1, 3, 3, 63), Vocabulary(["x"]), np.array([0]))
    halves = ["caf\udcc3", "caf\udcc4"]
    assert plain.covers(halves).all()
    assert len({*plain.vectors(halves).ravel().tolist()}) == 2


def test_repeated_tokens_with_invalid_bytes_warn_of_both(tmp_path):
    (tmp_path / "v").write_bytes(lines([b"a\xff", b"a\xff", b"b"], WEIGHT[:3]))
    with (
        pytest.warns(UndecodedTokensWarning, match="2 of 3"),
        pytest.warns(files.DuplicateTokensWarning, match="1 rows"),
    ):
        assert Vectors.load(tmp_path / "v").vocabulary.tokens() == ["a\udcff", "b"]
    (tmp_path / "v").write_bytes(lines([b"a\xff", b"a\xfe", b"b"], WEIGHT[:3]))
    with pytest.warns(UndecodedTokensWarning), pytest.warns(files.DuplicateTokensWarning, match="1 rows"):
        assert len(Vectors.load(tmp_path / "v", errors="replace")) == 2
