"""Read and check the header of a safetensors file, which lists its tensors and their places."""

import json
from typing import Any, NamedTuple

import numpy as np

from ..._io.error import FormatError
from ..._io.open import Source

# The largest header; the safetensors library has the same limit.
_MOST_BYTES = 100_000_000
# The bits of a number of each dtype.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# The dtypes that a table of vectors may have, and those of its row numbers, with NumPy's names of them.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
INTEGERS = {"I32": "int32", "I64": "int64", "U32": "uint32", "U16": "uint16"}


class Tensor(NamedTuple):
    """The dtype, the shape and the place of a tensor."""

    dtype: str  # as safetensors names it, such as "F32"
    shape: tuple[int, ...]
    begin: int  # its first byte in the file
    end: int  # the byte after its last one


def numpy_dtype(name: str) -> np.dtype:
    """Return the dtype, in the byte order of the file, of "I8" or one of `FLOATS` and `INTEGERS`."""
    if name == "BF16":
        # Only here, as ml_dtypes 0.7.0 takes 0.4 s to load, longer than all else that `embax info` does.
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype((FLOATS | INTEGERS | {"I8": "int8"})[name]).newbyteorder("<")


def is_safetensors(source: Source) -> bool:
    """Return whether a file begins like a safetensors file."""
    return 2 <= int.from_bytes(source.start[:8], "little") <= _MOST_BYTES and source.start[8:9] == b"{"


def read_header(source: Source) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the header.

    Args:
      source: The file, at its beginning.

    Returns:
      The metadata, and the tensors by name in the order in which they lie in the file.

    Raises:
      FormatError: If the header is damaged or contradicts itself, or the tensors leave gaps, overlap, or do not end at
        the end of the file.
    """
    size = int.from_bytes(source.read_exactly(8, "the length of the header"), "little")
    if size > _MOST_BYTES:
        raise _damaged(source, f"its header would have {size:,} bytes")
    text = source.read_exactly(size, "the header")
    try:
        if text[:1] != b"{":
            raise ValueError("its header does not begin with a brace")
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, str(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(source, "`__metadata__` holds other things than strings")
    tensors = {name: _tensor(source, name, entry, 8 + size) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + size
    for name, tensor in tensors.items():
        if tensor.begin != end:
            raise _damaged(source, f"tensor {name!r} begins at byte {tensor.begin:,}, where byte {end:,} comes next")
        end = tensor.end
    if source.size is not None and end != source.size:
        raise _damaged(source, f"its tensors end at byte {end:,}, the file ends at byte {source.size:,}")
    return metadata, tensors


def _tensor(source: Source, name: str, entry: Any, begin: int) -> Tensor:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, *offsets]
    except (TypeError, KeyError):
        raise _damaged(source, f"the entry of tensor {name!r} is not one") from None
    if any(type(number) is not int or number < 0 for number in numbers) or len(offsets) != 2 or len(entry) != 3:
        raise _damaged(source, f"the shape or the offsets of tensor {name!r} are not numbers from 0 on")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(source, f"tensor {name!r} is of the unknown dtype {dtype!r}")
    bits = BITS[dtype]
    for length in shape:
        bits *= length
        if bits > 1 << 64:  # stop early: a long shape would give enormous numbers
            break
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(source, f"tensor {name!r} is {dtype} {shape}, and has {offsets[1] - offsets[0]:,} bytes")
    return Tensor(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("its header names a thing twice")
    return entries


def _damaged(source: Source, reason: str) -> FormatError:
    return source.error(f"not a safetensors file, or a damaged one ({reason}).")
