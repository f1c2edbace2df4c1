"""Vectors in one safetensors file: the package's own format."""

import json
import os
from typing import Any, NamedTuple

import numpy as np
import safetensors
from jaxtyping import Float32, Int64

from ._atomic import replacing
from ._error import FormatError

_METADATA = {"format": "embax.vectors", "version": "1"}
# Name, NumPy dtype and axes of each tensor. Wide dtypes come first, so that each is aligned to its own size.
_LAYOUT = {
    "counts": ("<i8", "I64", 1),
    "token_offsets": ("<i8", "I64", 1),
    "weight": ("<f4", "F32", 2),
    "tokens": ("|u1", "U8", 1),
}


class Contents(NamedTuple):
    """What a file of vectors holds."""

    tokens: list[str]
    weight: Float32[np.ndarray, "rows dim"]
    counts: Int64[np.ndarray, " rows"]


def write_safetensors(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write vectors as one safetensors file, beside its destination and then renamed.

    The tensors are `weight` float32 `(rows, dim)`, `tokens` uint8 (the tokens in UTF-8, one after the other),
    `token_offsets` int64 `(rows + 1)` (where each begins and the last ends) and `counts` int64 `(rows)`; the metadata
    are `format=embax.vectors` and `version=1`. The same contents give the same bytes.

    Args:
      path: The destination; an existing file is replaced.
      contents: One token, vector and count a row.

    Raises:
      OSError: If the file cannot be written.

    Example:
      >>> import embax.files, numpy as np, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.safetensors")
      >>> contents = embax.files.Contents(["a", "b"], np.eye(2, dtype=np.float32), np.array([3, 1]))
      >>> embax.files.write_safetensors(path, contents)
      >>> embax.files.read_safetensors(path).tokens
      ['a', 'b']
    """
    encoded = [token.encode() for token in contents.tokens]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(token) for token in encoded], out=offsets[1:])
    values = {
        "counts": contents.counts,
        "token_offsets": offsets,
        "weight": contents.weight,
        "tokens": np.frombuffer(b"".join(encoded), np.uint8),
    }
    tensors = {name: np.ascontiguousarray(values[name], dtype) for name, (dtype, _, _) in _LAYOUT.items()}
    # Written here, as safetensors.numpy.save puts the metadata in another order in each call.
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name, (_, dtype, _) in _LAYOUT.items():
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": tensors[name].shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def read_safetensors(path: str | os.PathLike[str]) -> Contents:
    """Read vectors that `write_safetensors` wrote.

    The file is taken as hostile: its sizes are checked against each other before memory is taken.

    Args:
      path: The file.

    Returns:
      Its tokens, weight and counts.

    Raises:
      FormatError: If the file is not of this format, truncated or corrupt, naming the file and what is wrong.
      OSError: If the file cannot be opened or read.

    Example:
      See `write_safetensors`.
    """
    path = os.fspath(path)
    # A pipe would be waited for, and cannot be mapped into memory.
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise FormatError(path, "not a regular file.")
    with open(path, "rb"):  # for the operating system's own errors
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            _check_header(path, file)
            tensors = {name: file.get_tensor(name) for name in _LAYOUT}
    except safetensors.SafetensorError as error:
        raise FormatError(path, f"not a safetensors file, or a damaged one ({error}).") from None
    if (tensors["counts"] < 0).any():
        raise FormatError(path, "`counts` must not be negative.")
    tokens = _split(path, tensors["tokens"].tobytes(), tensors["token_offsets"])
    return Contents(tokens, tensors["weight"], tensors["counts"])


def _check_header(path: str, file: safetensors.safe_open) -> None:
    metadata = file.metadata() or {}
    found = {name: metadata.get(name) for name in _METADATA}
    if found != _METADATA:
        raise FormatError(path, f"the metadata must be {_METADATA}, got {found}. Is it a file of embax vectors?")
    missing = sorted(set(_LAYOUT) - set(file.keys()))
    if missing:
        raise FormatError(path, f"tensor `{missing[0]}` is missing.")
    shapes = {}
    for name, (_, dtype, axes) in _LAYOUT.items():
        tensor = file.get_slice(name)
        shapes[name] = tuple(tensor.get_shape())
        if tensor.get_dtype() != dtype or len(shapes[name]) != axes:
            raise FormatError(
                path, f"`{name}` must be {dtype} with {axes} axes, got {tensor.get_dtype()} {shapes[name]}."
            )
    rows = shapes["weight"][0]
    if shapes["counts"] != (rows,) or shapes["token_offsets"] != (rows + 1,):
        raise FormatError(
            path,
            f"`counts` must have {rows} entries and `token_offsets` {rows + 1}, as `weight` has {rows} rows, got "
            f"{shapes['counts'][0]} and {shapes['token_offsets'][0]}.",
        )


def _split(path: str, text: bytes, offsets: Int64[np.ndarray, " rows_and_one"]) -> list[str]:
    if offsets[0] != 0 or offsets[-1] != len(text) or (offsets[1:] < offsets[:-1]).any():
        raise FormatError(path, f"`token_offsets` must rise from 0 to the {len(text)} bytes of `tokens`.")
    ends = offsets.tolist()
    try:
        tokens = [text[ends[row] : ends[row + 1]].decode() for row in range(len(ends) - 1)]
    except UnicodeDecodeError:
        raise FormatError(path, "`tokens` must be UTF-8, cut between characters.") from None
    if len(set(tokens)) != len(tokens):
        raise FormatError(path, "`tokens` must not name two rows the same.")
    return tokens
