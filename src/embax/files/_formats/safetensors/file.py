"""embax's own format: vectors and tokens in one safetensors file."""

import json
import os
from typing import Any

import numpy as np

from ....vocabulary import Vocabulary
from ..._io.atomic import replacing
from ..._io.contents import Contents, Options
from ..._io.open import Source, opened
from ..array import table_of
from ..format import Format
from . import subwords as _subwords
from .header import BITS, FLOATS, Tensor, is_safetensors, numpy_dtype, read_header
from .written import Written

_METADATA = {"format": "embax.vectors", "version": "1"}
_SPECIAL = "special"
_OWN = (*_METADATA, _SPECIAL, _subwords.NAME)
# The NumPy dtype, safetensors dtype and number of axes of each tensor except those of rows.
_LAYOUT = {"counts": ("<i8", "I64", 1), "token_offsets": ("<i8", "I64", 1), "tokens": ("|u1", "U8", 1)}
_LAYOUT |= _subwords.LAYOUT


def write_safetensors(path: str | os.PathLike[str], contents: Contents) -> None:
    r"""Write vectors as one safetensors file; an old file is replaced only when the new one is complete.

    The tensors are `weight` `(rows, dim)` in its own dtype of floats, `tokens` uint8 (the tokens in UTF-8, one after
    the other), `token_offsets` int64 `(rows + 1)` (the byte at which each token begins, and the end of the last one)
    and, if there are counts, `counts` int64 `(rows)`. The metadata are `format=embax.vectors`, `version=1`, if there
    are special tokens, `special`, their row numbers as JSON, and those of the contents. Sub-words have a few tensors
    more, only for those n-grams that occur: `subword_rows` float32 and `subword_buckets` int64. Bytes of tokens that
    are not UTF-8 become ``\xNN``. The same contents give the same bytes.

    Args:
      path: The destination; an existing file is replaced.
      contents: One token and one vector for each row.

    Raises:
      ValueError: If the weight is not a table of floats with a row for each token, the sub-words have another size, a
        token occurs twice, or the metadata have a name of the format's own.
      OSError: If the file cannot be written.

    Example:
      >>> import embax, embax.files, numpy as np, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.safetensors")
      >>> contents = embax.files.Contents(embax.Vocabulary(["a", "b"]), np.eye(2, dtype=np.float32))
      >>> embax.files.write_safetensors(path, contents)
      >>> embax.files.read_safetensors(path).vocabulary.tokens()
      ['a', 'b']
    """
    dtype = _checked(contents)
    vocabulary = contents.vocabulary.escaped()
    text, offsets = vocabulary.utf8
    tensors: dict[str, Written] = {}
    if contents.counts is not None:
        tensors["counts"] = Written.of(np.asarray(contents.counts, "<i8"), "I64")
    tensors["token_offsets"] = Written.of(np.asarray(offsets, "<i8"), "I64")
    tensors["weight"] = Written.of(np.asarray(contents.weight, numpy_dtype(dtype)), dtype)
    tensors["tokens"] = Written.of(text, "U8")
    metadata = dict(_METADATA)
    if vocabulary.special:
        metadata[_SPECIAL] = json.dumps(vocabulary.special, separators=(",", ":"))
    if contents.subwords is not None:
        of_subwords, metadata[_subwords.NAME] = _subwords.written(contents)
        tensors |= of_subwords
    metadata |= sorted((contents.metadata or {}).items())
    # Wide dtypes come first, so that each tensor is aligned to the size of its numbers.
    tensors = dict(sorted(tensors.items(), key=lambda tensor: -BITS[tensor[1].dtype]))
    # Not by safetensors.numpy.save, which writes the metadata in another order in each call.
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            for block in tensor.blocks:
                # As bytes, because Python's buffers do not support bfloat16.
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def read_safetensors(path: str | os.PathLike[str]) -> Contents:
    """Read vectors that `write_safetensors` wrote.

    The file need not be trusted: its sizes are checked against each other before memory is allocated. The weight is
    mapped into memory, so that only the rows that are used are read.

    Args:
      path: The file, plain or compressed.

    Returns:
      The contents.

    Raises:
      FormatError: If the file is not in this format, truncated or corrupt.
      OSError: If the file cannot be opened or read.

    Example:
      See `write_safetensors`.
    """
    with opened(path) as source:
        return _read(source, Options())


def _checked(contents: Contents) -> str:
    """Check the contents, and return the dtype of the weight as safetensors names it."""
    where = "embax.files.write_safetensors(contents=...)"
    weight, rows = contents.weight, len(contents.vocabulary)
    dtype = next((name for name, numpy_name in FLOATS.items() if numpy_name == weight.dtype.name), None)
    counted = rows if contents.counts is None else len(contents.counts)
    if dtype is None or weight.ndim != 2 or len(weight) != rows or counted != rows:
        raise ValueError(
            f"`{where}` must have a weight of 16, 32 or 64 bit floats with a row, and counts with a number, for each "
            f"of {rows} tokens, got {weight.dtype} {weight.shape} and {counted} counts. Convert or cut them."
        )
    for name, value in (contents.metadata or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or name in _OWN:
            raise ValueError(
                f"`{where}` must have metadata that are strings, by names other than {', '.join(_OWN[:-1])} and "
                f"{_OWN[-1]}, got {name!r}: {value!r}. Rename or convert it."
            )
    repeated = contents.vocabulary.repeated()
    if repeated.any():
        twice = contents.vocabulary.tokens(int(repeated.argmax()))
        raise ValueError(f"`{where}` must not name two rows the same, got {twice!r} twice. Drop one.")
    return dtype


def _recognises(source: Source) -> bool:
    header = source.start[8 : 8 + int.from_bytes(source.start[:8], "little")]
    return is_safetensors(source) and _METADATA["format"].encode() in header


def _read(source: Source, options: Options) -> Contents:
    metadata, tensors = read_header(source)
    rows = _check_header(source, metadata, tensors)
    of_subwords = _subwords.checked(source, metadata, tensors)
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():  # in the order of the file, for compressed data
        if name == "weight":
            shape = (tensor.shape[0], tensor.shape[1])
            found[name] = table_of(source, options, numpy_dtype(tensor.dtype), shape, tensor.begin)
        elif name == _subwords.ROWS and of_subwords is not None:
            shape = (tensor.shape[0], tensor.shape[1])
            found[name] = table_of(source, Options(mmap=options.mmap), numpy_dtype(tensor.dtype), shape, tensor.begin)
        elif name in _LAYOUT:
            source.skip_to(tensor.begin)
            data = source.read_exactly(tensor.end - tensor.begin, f"`{name}`")
            found[name] = np.frombuffer(data, _LAYOUT[name][0])
    text, offsets = found["tokens"], found["token_offsets"]
    if offsets[0] != 0 or offsets[-1] != len(text) or (offsets[1:] < offsets[:-1]).any():
        raise source.error(f"`token_offsets` must rise from 0 to the {len(text):,} bytes of `tokens`.")
    counts = found.get("counts")
    if counts is not None and (counts < 0).any():
        raise source.error("`counts` must not be negative.")
    special = _special(source, metadata, rows)
    if options.limit is not None and options.limit < rows:
        rows = options.limit
        offsets = offsets[: rows + 1]
        text, counts = text[: offsets[-1]], None if counts is None else counts[:rows]
        special = {role: row for role, row in special.items() if row < rows}
    try:
        # Repeated tokens are not looked for: that would take longer than all the rest, and the writer did it.
        vocabulary = Vocabulary.from_utf8(text, offsets, special=special)
    except ValueError as error:
        raise source.error(f"`tokens` must be UTF-8, cut between characters: {error}.") from None
    subwords = None if of_subwords is None else _subwords.read(source, of_subwords, found, vocabulary)
    others = {name: value for name, value in metadata.items() if name not in _OWN}
    return Contents(vocabulary, found["weight"], counts, subwords, others or None)


def _check_header(source: Source, metadata: dict[str, str], tensors: dict[str, Tensor]) -> int:
    """Check that the tensors of this format are there and fit together; return the number of rows."""
    found = {name: metadata.get(name) for name in _METADATA}
    if found != _METADATA:
        raise source.error(f"the metadata must be {_METADATA}, got {found}. Is it a file of embax vectors?")
    for name in ("weight", "tokens", "token_offsets"):
        if name not in tensors:
            raise source.error(f"tensor `{name}` is missing.")
    weight = tensors["weight"]
    if weight.dtype not in FLOATS or len(weight.shape) != 2:
        raise source.error(f"`weight` must be {', '.join(FLOATS)} with 2 axes, got {weight.dtype} {weight.shape}.")
    rows = weight.shape[0]
    lengths = {"counts": rows, "token_offsets": rows + 1}
    for name, (_, dtype, axes) in _LAYOUT.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.dtype != dtype or len(tensor.shape) != axes:
            raise source.error(f"`{name}` must be {dtype} with {axes} axis, got {tensor.dtype} {tensor.shape}.")
        if tensor.shape[0] != lengths.get(name, tensor.shape[0]):
            raise source.error(
                f"`{name}` must have {lengths[name]:,} entries, as `weight` has {rows:,} rows, got {tensor.shape[0]:,}."
            )
    return rows


def _special(source: Source, metadata: dict[str, str], rows: int) -> dict[str, int]:
    try:
        special = json.loads(metadata.get(_SPECIAL, "{}"))
    except (ValueError, RecursionError):
        special = None
    if not isinstance(special, dict) or any(type(row) is not int or not 0 <= row < rows for row in special.values()):
        raise source.error(f"`special` must be row numbers below {rows:,} by name, got {metadata[_SPECIAL][:80]!r}.")
    return special


FORMAT = Format("safetensors", (".safetensors",), _recognises, _read, write_safetensors, keeps_subwords=True)
