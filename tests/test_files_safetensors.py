import json
import os

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from embax import files

CONTENTS = files.Contents(
    ["the", "", "größe", "東京"],
    np.arange(12, dtype=np.float32).reshape(4, 3),
    np.asarray([9, 5, 5, 1], np.int64),
)
METADATA = {"format": "embax.vectors", "version": "1"}


def tensors(**changes):
    encoded = [token.encode() for token in CONTENTS.tokens]
    whole = {
        "weight": CONTENTS.weight,
        "counts": CONTENTS.counts,
        "tokens": np.frombuffer(b"".join(encoded), np.uint8),
        "token_offsets": np.cumsum([0, *map(len, encoded)]),
    }
    return {name: value for name, value in (whole | changes).items() if value is not None}


def same(a, b):
    return a.tokens == b.tokens and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a[1:], b[1:], strict=True)
    )


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (4, 0), (0, 0)])
def test_read_gives_what_was_written(tmp_path, shape):
    rows = shape[0]
    contents = files.Contents(CONTENTS.tokens[:rows], np.ones(shape, np.float32), CONTENTS.counts[:rows])
    files.write_safetensors(tmp_path / "v", contents)
    assert same(files.read_safetensors(tmp_path / "v"), contents)


def test_write_is_read_by_the_safetensors_library(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    with safetensors.safe_open(tmp_path / "v", framework="numpy") as file:
        assert file.metadata() == METADATA
        for name, expected in tensors().items():
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_read_takes_files_that_the_safetensors_library_wrote(tmp_path):
    save_file(tensors() | {"extra": np.zeros(3)}, tmp_path / "v", METADATA | {"more": "x"})
    assert same(files.read_safetensors(tmp_path / "v"), CONTENTS)


def test_write_gives_the_same_bytes_whatever_the_layout_of_the_arrays(tmp_path):
    files.write_safetensors(tmp_path / "a", CONTENTS)
    strided = CONTENTS._replace(weight=np.asfortranarray(CONTENTS.weight), counts=np.repeat(CONTENTS.counts, 2)[::2])
    files.write_safetensors(tmp_path / "b", strided)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_aligns_each_tensor_to_its_dtype(tmp_path):
    files.write_safetensors(tmp_path / "v", CONTENTS)
    data = (tmp_path / "v").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    for name, entry in header.items():
        assert (8 + size + entry["data_offsets"][0]) % tensors()[name].itemsize == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight": None}, "tensor `weight` is missing"),
        ({"tokens": None}, "tensor `tokens` is missing"),
        ({"weight": CONTENTS.weight.astype(np.float64)}, r"`weight` must be F32 with 2 axes, got F64 \(4, 3\)"),
        ({"weight": CONTENTS.weight.reshape(-1)}, r"`weight` must be F32 with 2 axes, got F32 \(12,\)"),
        ({"weight": CONTENTS.weight[:3].copy()}, "`counts` must have 3 entries"),
        ({"counts": CONTENTS.counts.astype(np.int32)}, "`counts` must be I64"),
        ({"counts": CONTENTS.counts - 2}, "`counts` must not be negative"),
        ({"tokens": np.zeros(3, np.int8)}, "`tokens` must be U8"),
        ({"token_offsets": np.asarray([0, 3, 3, 10])}, "`token_offsets` 5"),
        ({"token_offsets": np.asarray([0, 3, 2, 10, 16])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([1, 3, 3, 10, 16])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([0, 3, 3, 10, 2**62])}, "`token_offsets` must rise"),
        ({"token_offsets": np.asarray([0, 3, 3, 6, 16])}, "UTF-8"),
        ({"tokens": np.full(16, 0xFF, np.uint8)}, "UTF-8"),
        ({"tokens": np.full(16, 0x41, np.uint8), "token_offsets": np.asarray([0, 1, 2, 3, 16])}, "two rows the same"),
    ],
)
def test_read_refuses_contents_that_do_not_fit_together(tmp_path, changes, match):
    save_file(tensors(**changes), tmp_path / "v", METADATA)
    with pytest.raises(files.FormatError, match=f"{tmp_path / 'v'}: .*{match}"):
        files.read_safetensors(tmp_path / "v")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "embax.vectors", "version": "2"}])
def test_read_refuses_other_safetensors_files(tmp_path, metadata):
    save_file(tensors(), tmp_path / "v", metadata)
    with pytest.raises(files.FormatError, match="the metadata must be"):
        files.read_safetensors(tmp_path / "v")


def header_of(**changes):
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]} | changes
    text = json.dumps({"__metadata__": METADATA, "weight": entry}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 48


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"plain text, nothing else",
        b"\xff" * 64,
        (1 << 62).to_bytes(8, "little") + b"{}",
        header_of()[:-1],
        header_of(shape=[1 << 40, 1 << 40]),
        header_of(shape=[-4, 3]),
        header_of(data_offsets=[0, 1 << 60]),
        header_of(data_offsets=[48, 0]),
        header_of(dtype="F33"),
    ],
)
def test_read_refuses_headers_that_lie(tmp_path, data):
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(files.FormatError, match="not a safetensors file, or a damaged one"):
        files.read_safetensors(tmp_path / "v")


def test_read_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.FormatError, match="not a regular file"):
        files.read_safetensors(tmp_path / "pipe")


def test_read_of_a_missing_file_and_of_a_directory_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        files.read_safetensors(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        files.read_safetensors(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read_of_any_damage_gives_rows_or_a_format_error(tmp_path, data):
    path = tmp_path / "v"
    files.write_safetensors(path, CONTENTS)
    whole = path.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for position in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=3 if damaged else 0)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        contents = files.read_safetensors(path)
    except files.FormatError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert len(damaged) == len(whole)
        assert len(contents.tokens) == len(set(contents.tokens)) == len(contents.weight) == len(contents.counts)
