import gzip
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from damage import KINDS, damages, seeds, told
from safetensors.numpy import save_file

from embax import Vectors, Vocabulary, files
from embax.files._formats.safetensors.file import FORMAT
from embax.files._io.contents import Options
from embax.files._io.open import opened

TOKENS = ["the", "", "größe", "東京"]
CONTENTS = files.Contents(
    Vocabulary(TOKENS, special={"unknown": "", "end": "東京"}),
    np.arange(12, dtype=np.float32).reshape(4, 3),
    np.asarray([9, 5, 5, 1], np.int64),
)
METADATA = {"format": "embax.vectors", "version": "1"}


def read(path, **options):
    with opened(path, 100.0) as source:
        assert FORMAT.recognises(source)
        return FORMAT.read(source, Options(**options))


def tensors(**changes):
    encoded = [token.encode() for token in TOKENS]
    whole = {
        "weight": CONTENTS.weight,
        "counts": CONTENTS.counts,
        "tokens": np.frombuffer(b"".join(encoded), np.uint8),
        "token_offsets": np.cumsum([0, *map(len, encoded)]),
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def same(a, b):
    return a.vocabulary == b.vocabulary and all(
        (x is None and y is None) or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes())
        for x, y in zip(a[1:], b[1:], strict=True)
    )


@pytest.mark.parametrize("mmap", [None, True, False])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_read_returns_written_contents(tmp_path, shape, dtype, mmap):
    rows = shape[0]
    contents = files.Contents(Vocabulary(TOKENS[:rows]), np.ones(shape, dtype), CONTENTS.counts[:rows])
    files.write_safetensors(tmp_path / "v", contents)
    assert same(read(tmp_path / "v", mmap=mmap), contents)


def test_read_returns_special_tokens_without_counts(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS._replace(counts=None))
    found = files.read_safetensors(tmp_path / "v")
    assert found.counts is None
    assert found.vocabulary.special == {"unknown": 1, "end": 3}


def test_read_gives_the_metadata(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS._replace(metadata={"model": "größe", "engine": "xla"}))
    assert files.read_safetensors(tmp_path / "v").metadata == {"engine": "xla", "model": "größe"}
    vectors = Vectors.load(tmp_path / "v")
    assert vectors.subset(["the"]).normalized().metadata == vectors.metadata == {"engine": "xla", "model": "größe"}
    first = (tmp_path / "v").read_bytes()
    vectors.save(tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == first


@pytest.mark.parametrize("metadata", [{"format": "mine"}, {"special": "{}"}, {"subwords": "{}"}, {"engine": 1}])
def test_write_refuses_metadata_that_no_file_can_keep(tmp_path, metadata):
    with pytest.raises(ValueError, match="strings, by names other than format, version, special and subwords"):
        files.write_safetensors(tmp_path / "v", CONTENTS._replace(metadata=metadata))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 9])
def test_read_of_the_first_rows(tmp_path, limit):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    for path in (tmp_path / "v", compressed(tmp_path / "v")):
        found = read(path, limit=limit)
        assert found.vocabulary.tokens() == TOKENS[:limit]
        np.testing.assert_array_equal(found.weight, CONTENTS.weight[:limit])
        np.testing.assert_array_equal(found.counts, CONTENTS.counts[:limit])
        assert found.vocabulary.special == {role: row for role, row in {"unknown": 1, "end": 3}.items() if row < limit}


def compressed(path):
    (path.parent / "v.gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.parent / "v.gz"


def test_read_of_a_compressed_file(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    assert same(read(compressed(tmp_path / "v")), CONTENTS)
    with pytest.raises(files.FormatError, match="cannot be mapped into memory, as it is compressed"):
        read(tmp_path / "v.gz", mmap=True)


def test_read_refuses_truncated_compressed_data(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    whole = (tmp_path / "v").read_bytes()
    for end in range(len(whole)):
        (tmp_path / "v.gz").write_bytes(gzip.compress(whole[:end], 1))
        with pytest.raises(files.FormatError, match=f"the file ends at byte {end}, within "):
            files.read_safetensors(tmp_path / "v.gz")
    (tmp_path / "v.gz").write_bytes(gzip.compress(whole[:-20]))
    with pytest.raises(files.FormatError, match="within what comes before byte"):
        read(tmp_path / "v.gz", limit=1)


def test_read_casts_to_the_dtype_that_is_wanted(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    found = read(tmp_path / "v", dtype=np.dtype(np.float16)).weight
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, CONTENTS.weight.astype(np.float16))
    with pytest.raises(files.FormatError, match="as it holds float32 and float16 is wanted"):
        read(tmp_path / "v", dtype=np.dtype(np.float16), mmap=True)


def test_read_maps_a_weight_that_needs_no_conversion(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    for mmap in (None, True):
        weight = read(tmp_path / "v", mmap=mmap).weight
        assert isinstance(weight.base, np.memmap)
        assert type(weight) is np.ndarray
        assert not weight.flags.writeable
    assert read(tmp_path / "v", mmap=False).weight.base is None


def test_read_maps_only_numbers_that_are_aligned(tmp_path):
    entries = {"tokens": ("U8", 16), "weight": ("F32", 48), "counts": ("I64", 32), "token_offsets": ("I64", 40)}
    header, end = {"__metadata__": METADATA}, 0
    for name, (dtype, size) in entries.items():
        shape = list(tensors()[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 8)
    data = b"".join(tensors()[name].tobytes() for name in entries)
    (tmp_path / "v").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert same(read(tmp_path / "v"), CONTENTS._replace(vocabulary=Vocabulary(TOKENS)))
    with pytest.raises(files.FormatError, match="which is no multiple of 4"):
        read(tmp_path / "v", mmap=True)


def test_write_is_read_by_the_safetensors_library(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    with safetensors.safe_open(tmp_path / "v", framework="numpy") as file:
        assert file.metadata() == METADATA | {"special": '{"unknown":1,"end":3}'}
        for name, expected in tensors().items():
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_read_takes_files_that_the_safetensors_library_wrote(tmp_path):
    save_file(tensors() | {"extra": np.zeros(3)}, tmp_path / "v", METADATA | {"more": "x"})
    found = files.read_safetensors(tmp_path / "v")
    assert found.metadata == {"more": "x"}
    assert same(found._replace(metadata=None), CONTENTS._replace(vocabulary=Vocabulary(TOKENS)))


def test_write_gives_the_same_bytes_whatever_the_layout_of_the_arrays(tmp_path):
    files.write_safetensors(tmp_path / "a", CONTENTS)
    strided = CONTENTS._replace(weight=np.asfortranarray(CONTENTS.weight), counts=np.repeat(CONTENTS.counts, 2)[::2])
    files.write_safetensors(tmp_path / "b", strided)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_write_aligns_each_tensor_to_its_dtype(tmp_path, dtype):
    files.write_safetensors(tmp_path / "v", CONTENTS._replace(weight=CONTENTS.weight.astype(dtype)))
    data = (tmp_path / "v").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    for name, entry in header.items():
        itemsize = np.dtype(dtype).itemsize if name == "weight" else tensors()[name].itemsize
        assert (8 + size + entry["data_offsets"][0]) % itemsize == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": np.zeros((4, 3), np.int32)}, "16, 32 or 64 bit floats .* got int32"),
        ({"weight": np.zeros(4, np.float32)}, r"got float32 \(4,\)"),
        ({"weight": np.zeros((3, 3), np.float32)}, r"for each of 4 tokens, got float32 \(3, 3\)"),
        ({"counts": np.zeros(3, np.int64)}, "and 3 counts"),
        ({"vocabulary": Vocabulary.from_utf8(b"abca", range(5))}, "must not name two rows the same, got 'a' twice"),
    ],
)
def test_write_refuses_contents_that_it_cannot_hold(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        files.write_safetensors(tmp_path / "v", CONTENTS._replace(**changes))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": None}, "tensor `weight` is missing"),
        ({"tokens": None}, "tensor `tokens` is missing"),
        ({"token_offsets": None}, "tensor `token_offsets` is missing"),
        ({"weight": CONTENTS.weight.astype(np.int32)}, r"`weight` must be .* with 2 axes, got I32 \(4, 3\)"),
        ({"weight": CONTENTS.weight.reshape(-1)}, r"`weight` must be .* with 2 axes, got F32 \(12,\)"),
        ({"weight": CONTENTS.weight[:3].copy()}, "`counts` must have 3 entries"),
        ({"counts": CONTENTS.counts.astype(np.int32)}, "`counts` must be I64"),
        ({"counts": CONTENTS.counts - 2}, "`counts` must not be negative"),
        ({"tokens": np.zeros(3, np.int8)}, "`tokens` must be U8"),
        ({"token_offsets": np.asarray([0, 3, 3, 10])}, "`token_offsets` must have 5"),
        ({"token_offsets": np.asarray([0, 3, 2, 10, 16])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([1, 3, 3, 10, 16])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([0, 3, 3, 10, 2**62])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([0, 3, 3, 6, 16])}, "UTF-8"),
        ({"tokens": np.full(16, 0xFF, np.uint8)}, "UTF-8"),
    ],
)
def test_read_refuses_contents_that_do_not_fit_together(tmp_path, changes, match):
    save_file(tensors(**changes), tmp_path / "v", METADATA)
    with pytest.raises(files.FormatError, match=f"{tmp_path / 'v'}: .*{match}"):
        files.read_safetensors(tmp_path / "v")


def test_read_finds_the_first_of_tokens_that_occur_twice(tmp_path):
    changes = {"tokens": np.full(4, 0x41, np.uint8), "token_offsets": np.asarray([0, 0, 1, 2, 4])}
    save_file(tensors(**changes), tmp_path / "v", METADATA)
    assert files.read_safetensors(tmp_path / "v").vocabulary.ids(["A", "AA"]).tolist() == [1, 3]


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "embax.vectors", "version": "2"}])
def test_read_refuses_other_safetensors_files(tmp_path, metadata):
    save_file(tensors(), tmp_path / "v", metadata)
    with pytest.raises(files.FormatError, match="the metadata must be"):
        files.read_safetensors(tmp_path / "v")


@pytest.mark.parametrize("special", ["", "[]", '{"padding":4}', '{"padding":-1}', '{"padding":true}', "[" * 10**5])
def test_read_refuses_missing_special_tokens(tmp_path, special):
    save_file(tensors(), tmp_path / "v", METADATA | {"special": special})
    with pytest.raises(files.FormatError, match="`special` must be row numbers below 4 by name"):
        files.read_safetensors(tmp_path / "v")


def header_of(size=48, **changes):
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]} | changes
    return with_header(json.dumps({"__metadata__": METADATA, "weight": entry}).encode(), size)


def with_header(text, size=48):
    return len(text).to_bytes(8, "little") + text + b"\0" * size


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "ends at byte 0, within the length of the header"),
        (b"plain text, nothing else", "header would have"),
        (b"\xff" * 64, "header would have"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "header would have"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "ends at byte 10, within the header"),
        (with_header(b"{]", 0), "damaged one"),
        (with_header(b"{\xff}", 0), "damaged one"),
        (with_header(b'{"a":' + b"[" * 10**5, 0), "damaged one"),
        (with_header(b'{"a":' + b"1" * 10**5 + b"}", 0), "damaged one"),
        (with_header(b'{"__metadata__":{},"__metadata__":{}}', 0), "names a thing twice"),
        (with_header(b'{"__metadata__":[]}', 0), "other things than strings"),
        (with_header(b'{"__metadata__":{"a":1}}', 0), "other things than strings"),
        (with_header(b'{"weight":1}', 0), "the entry of tensor 'weight' is not one"),
        (with_header(b'{"weight":{"dtype":"F32","shape":4}}', 0), "the entry of tensor 'weight' is not one"),
        (header_of(47), "its tensors end at byte .*, the file ends at byte"),
        (header_of(49), "its tensors end at byte .*, the file ends at byte"),
        (header_of(shape=[1 << 40, 1 << 40]), "has 48 bytes"),
        (header_of(shape=[2] * 10**4), "has 48 bytes"),
        (header_of(shape=[-4, 3]), "not numbers from 0 on"),
        (header_of(shape=[4.0, 3]), "not numbers from 0 on"),
        (header_of(shape=[True, 12]), "not numbers from 0 on"),
        (header_of(data_offsets=[0, 48, 48]), "not numbers from 0 on"),
        (header_of(data_offsets=[0, 1 << 60]), "has 1,152,921,504,606,846,976 bytes"),
        (header_of(data_offsets=[48, 0]), "has -48 bytes"),
        (header_of(data_offsets=[8, 56]), "begins at byte"),
        (header_of(dtype="F33"), "the unknown dtype 'F33'"),
        (header_of(dtype=["F32"]), "the unknown dtype"),
    ],
)
def test_read_refuses_wrong_headers(tmp_path, data, match):
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(files.FormatError, match=match):
        files.read_safetensors(tmp_path / "v")
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(tmp_path / "v", framework="numpy"):
        pass


def test_read_refuses_headers_that_begin_with_a_space(tmp_path):
    (tmp_path / "v").write_bytes(with_header(b" {}", 0))
    with pytest.raises(files.FormatError, match="does not begin with a brace"):
        files.read_safetensors(tmp_path / "v")


def test_read_does_not_allocate_by_the_header_of_a_compressed_file(tmp_path):
    big = header_of(0, shape=[1, 1 << 50], data_offsets=[0, 1 << 52])
    header = json.loads(big[8:])
    header["token_offsets"] = {"dtype": "I64", "shape": [2], "data_offsets": [1 << 52, (1 << 52) + 16]}
    header["tokens"] = {"dtype": "U8", "shape": [0], "data_offsets": [(1 << 52) + 16] * 2}
    (tmp_path / "v").write_bytes(gzip.compress(with_header(json.dumps(header).encode(), 1 << 16)))
    with pytest.raises(files.FormatError, match="within row 0"):
        files.read_safetensors(tmp_path / "v")


def test_read_of_a_missing_file_and_of_a_directory_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        files.read_safetensors(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        files.read_safetensors(tmp_path)


@seeds
def test_read_of_any_damage_gives_rows_or_a_format_error(tmp_path, seed):
    path = tmp_path / "v"
    files.write_safetensors(path, CONTENTS)
    pieces = [b"0", b"-", b"9" * 12, b'"', b"}", b"F16", b"F64"]
    for case, (name, data) in enumerate(damages(path.read_bytes(), 300, seed, pieces=pieces)):
        is_packed = case // len(KINDS) % 2
        path.write_bytes(gzip.compress(data, 1) if is_packed else data)
        with told(name):
            try:
                contents = files.read_safetensors(path)
            except files.FormatError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert len(contents.vocabulary) == len(contents.weight)
                if not is_packed:  # the library takes it, too
                    with safetensors.safe_open(path, framework="numpy") as file:
                        np.testing.assert_array_equal(file.get_tensor("weight"), contents.weight)
