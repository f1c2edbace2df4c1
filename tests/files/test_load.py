import numpy as np
import pytest
import real

from embax import Vectors, Vocabulary, files
from embax.files import DuplicateTokensWarning
from embax.vectors._directions import is_mapped

VECTORS = Vectors(["king", "queen", "日本"], np.asarray([[1, 0.25], [-3, 1e-3], [0, 7]], np.float32))
SUFFIXES = [".safetensors", ".txt", ".vec", ".bin", ".npy", ".parquet", ".arrow", ".feather", ".fasttext.bin", ".glove"]


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_load_recognises_saved_files_under_any_name(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    VECTORS.save(path)
    for name in (path, tmp_path / "renamed") if suffix != ".npy" else (path,):
        if name != path:
            path.rename(name)
        loaded = Vectors.load(name)
        assert loaded.vocabulary.tokens() == VECTORS.vocabulary.tokens()
        np.testing.assert_array_equal(loaded.weight, VECTORS.weight)


@pytest.mark.parametrize("format", [name for name in files.FORMATS if name != "tensor"])
def test_a_format_can_be_named(tmp_path, format):
    path = tmp_path / ("v.npy" if format == "npy" else "v")
    VECTORS.save(path, format=format)
    loaded = Vectors.load(path, format=format)
    assert loaded.vocabulary.tokens() == VECTORS.vocabulary.tokens()
    np.testing.assert_array_equal(loaded.weight, VECTORS.weight)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_first_rows_in_another_dtype(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    VECTORS.save(path)
    loaded = Vectors.load(path, limit=2, dtype=np.float16)
    assert loaded.vocabulary.tokens() == ["king", "queen"]
    assert loaded.weight.dtype == np.float16
    np.testing.assert_array_equal(loaded.weight, VECTORS.weight[:2].astype(np.float16))
    assert len(Vectors.load(path, limit=0)) == 0
    assert len(Vectors.load(path, limit=9)) == 3


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_load_maps_arrays_if_possible(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    VECTORS.save(path)
    for mmap, mapped in ((True, True), (None, True), (False, False)):
        vectors = Vectors.load(path, mmap=mmap)
        assert is_mapped(vectors.weight) == mapped
        np.testing.assert_array_equal(vectors[["queen"]], VECTORS[["queen"]])
    with pytest.raises(ValueError, match="mmap"):
        Vectors.load(path, mmap=True, dtype=np.float16)


def test_load_takes_the_first_of_repeated_tokens(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("4 1\na 1\nb 2\na 3\nb 4\n")
    with pytest.warns(DuplicateTokensWarning, match=r"v\.txt: 2 rows are left out, .* such as 'a'"):
        vectors = Vectors.load(path)
    assert vectors.vocabulary.tokens() == ["a", "b"]
    assert vectors.weight.tolist() == [[1], [2]]


def test_tokens_of_another_encoding(tmp_path):
    path = tmp_path / "v.txt"
    path.write_bytes("2 1\nkön 1\na 2\n".encode("latin-1"))
    assert Vectors.load(path, encoding="latin-1").vocabulary.tokens() == ["kön", "a"]
    with pytest.raises(files.FormatError, match=r"token 0 is not UTF-8: b'k\\xf6n'\. Pass its encoding"):
        Vectors.load(path, errors="strict")
    for encoding in ("ascii", "no-such-encoding"):
        with pytest.raises(files.FormatError, match=f"token 0 is not {encoding}"):
            Vectors.load(path, encoding=encoding, errors="strict")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "word3vec"}, r"format=\.\.\.\)` must be one of 'safetensors', 'tensor'"),
        ({"limit": -1}, r"limit=\.\.\.\)` must not be negative"),
        ({"dtype": np.int32}, r"dtype=\.\.\.\)` must be a dtype of floats, got int32"),
        ({"dtype": "no"}, r"dtype=\.\.\.\)` must be a dtype of floats, got 'no'"),
        ({"errors": "ignore"}, r"errors=\.\.\.\)` must be one of 'strict', 'replace', 'escape', got 'ignore'"),
        ({"max_expansion": 0}, r"max_expansion=\.\.\.\)` must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, match):
    VECTORS.save(tmp_path / "v")
    with pytest.raises(ValueError, match=match):
        Vectors.load(tmp_path / "v", **options)


def test_suffixes_that_no_format_has_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"must end in one of \.safetensors.*, got 'v\.xlsx'\. Rename it, or pass format"
    ):
        VECTORS.save(tmp_path / "v.xlsx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"\n\n\n", b"{}", b"a b c\nd e f\n", bytes(range(256))])
def test_load_error_for_unknown_files_lists_the_formats(tmp_path, content):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(files.FormatError, match="v: "):
        Vectors.load(tmp_path / "v")


def test_save_through_a_symbolic_link_replaces_its_target(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "v.bin").symlink_to(tmp_path / "target")
    VECTORS.save(tmp_path / "v.bin")
    assert (tmp_path / "v.bin").is_symlink()
    assert len(Vectors.load(tmp_path / "target")) == 3


def test_vectors_of_none_can_be_saved_and_loaded(tmp_path):
    empty = Vectors([], np.zeros((0, 4), np.float32))
    for suffix in (".safetensors", ".txt", ".bin", ".npy", ".parquet", ".arrow"):
        empty.save(tmp_path / f"v{suffix}")
        assert Vectors.load(tmp_path / f"v{suffix}").weight.shape == (0, 4)


def test_special_tokens_round_trip(tmp_path):
    vectors = Vectors(Vocabulary(["[PAD]", "a"], special={"padding": "[PAD]"}), np.ones((2, 3), np.float32))
    vectors.save(tmp_path / "v.safetensors")
    assert Vectors.load(tmp_path / "v.safetensors").to_table().padding_idx == 0


def test_the_table_of_a_transformer_loads_by_name():
    path = next(real.MINILM.rglob("model.safetensors"))
    vectors = Vectors.load(f"{path}:embeddings.word_embeddings.weight")
    assert vectors.weight.shape == (30_522, 384)
    assert vectors.vocabulary.special["padding"] == 0
    assert "queen" in dict(vectors.most_similar("king", k=3))
