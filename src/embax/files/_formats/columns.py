"""Read and write tokens, vectors and counts as columns of Arrow's record batches, for parquet and Arrow files."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from .._io.atomic import replacing
from .._io.contents import Contents, Gathered, Options
from .._io.open import Source

# The bytes of vectors in one record batch.
_BLOCK = 1 << 23
_TOKEN, _VECTOR, _COUNT = ("token",), ("vector",), ("count", "counts")


class Columns(NamedTuple):
    """The names of the columns with tokens, vectors and counts."""

    token: str
    vector: tuple[str, ...]  # one column of lists, or one column for each number of a vector
    counts: str | None
    is_list: bool
    dim: int | None  # None if the lists have no fixed length
    dtype: np.dtype

    @property
    def names(self) -> list[str]:
        """The names of all these columns."""
        return [self.token, *self.vector, *([self.counts] if self.counts else [])]


def arrow() -> Any:
    """Import pyarrow. Only these formats need it, and it is large."""
    import pyarrow
    import pyarrow.compute

    return pyarrow


@contextlib.contextmanager
def checked(source: Source) -> Iterator[None]:
    """Turn pyarrow's errors about a damaged file into FormatErrors."""
    pa = arrow()
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise source.error(f"the file is damaged ({str(error)[:300].rstrip('.')}).") from None
    except OSError as error:
        if error.errno is not None:  # the operating system's own
            raise
        raise source.error(f"the file is damaged ({str(error)[:300].rstrip('.')}).") from None


def columns_of(source: Source, schema: Any) -> Columns:
    """Find the columns of tokens and vectors by their names, or else take the only columns of the right types.

    Raises:
      FormatError: If there is no such column, or several fit.
    """
    texts = [field.name for field in schema if is_text(field.type)]
    lists = {field.name: field.type for field in schema if _float_of(_item_of(field.type)) is not None}
    floats = {field.name: field.type for field in schema if _float_of(field.type) is not None}
    token = only(texts, _TOKEN)
    if token is None or not (lists or floats):
        raise source.error(f"must have a column of strings and one of lists of floats, got {listing(schema)}.")
    count = next((field.name for field in schema if field.name in _COUNT and _is_integer(field.type)), None)
    vector = only(list(lists), _VECTOR)
    if vector is not None:
        kind = _storage(lists[vector])
        columns = Columns(token, (vector,), count, True, _size_of(kind), _float_of(_item_of(kind)) or np.dtype("f4"))
    elif not lists:
        dtype = np.result_type(*map(_float_of, floats.values()))
        columns = Columns(token, tuple(floats), count, False, len(floats), dtype)
    else:
        raise source.error(
            f"must have one column of lists of floats, or name it {_VECTOR[0]!r}, got {listing(schema)}."
        )
    if columns.dim is not None and columns.dim < 0:
        raise source.error(f"its lists of floats must not have a negative length, got {columns.dim}.")
    twice = [name for name in columns.names if len(schema.get_all_field_indices(name)) > 1]
    if twice:
        raise source.error(f"must not name two columns the same, got {listing(schema)}.")
    return columns


def gathered(source: Source, options: Options, columns: Columns, batches: Iterable[Any], expected: int) -> Contents:
    """Collect the contents of record batches.

    Args:
      source: The file, for messages.
      options: The options of the caller.
      columns: The columns with tokens, vectors and counts.
      batches: The record batches.
      expected: The number of rows to allocate memory for, if the size of the file allows so many; else 0.

    Returns:
      The contents.

    Raises:
      FormatError: If a value is missing, or vectors differ in length.
    """
    options = options._replace(encoding="utf-8")  # Arrow knows no other
    all_, counts, dim, size = None, [], columns.dim, 0
    for batch in batches:
        if not batch.num_rows:
            continue
        batch.validate(full=True)
        first = 0 if all_ is None else all_.rows
        for name in columns.names:
            check_nulls(source, batch.column(name), name, first)
        text, lengths = packed(source, batch.column(columns.token), source.limit - size)
        numbers, dim = _numbers(source, columns, batch, dim, first)
        size += len(text) + numbers.nbytes
        if size > source.limit:  # Arrow's batches may be compressed, or the same one may occur many times
            raise source.error(f"holds more than {source.limit:,} bytes. Raise max_expansion if it is to be trusted.")
        if all_ is None:
            all_ = Gathered(source, options, dim, columns.dtype, min(expected, options.limit or expected))
        all_.add_packed(text, lengths, numbers)
        if columns.counts:
            counts.append(np.asarray(batch.column(columns.counts).cast(arrow().int64())))
        if all_.is_full:
            break
    if all_ is None:
        all_ = Gathered(source, options, dim or 0, columns.dtype)
    if not columns.counts:
        return all_.contents()
    number = np.concatenate([np.zeros(0, np.int64), *counts])[: all_.rows]
    if (number < 0).any():
        raise source.error(f"row {int((number < 0).argmax()):,}: the count must not be negative.")
    return all_.contents(number)


def packed(source: Source, column: Any, limit: int) -> tuple[bytes, Int64[np.ndarray, " tokens"]]:
    """Return the strings of a column, one after the other, and their lengths in bytes.

    Raises:
      FormatError: If they have more bytes than the limit. In a dictionary, a long string can occur many times.
    """
    pa = arrow()
    if isinstance(column, pa.DictionaryArray):
        lengths = pa.compute.binary_length(column.dictionary).cast(pa.int64()).take(column.indices)
        if (pa.compute.sum(lengths).as_py() or 0) > limit:
            raise source.error(f"its strings take more than {source.limit:,} bytes. Raise max_expansion to trust it.")
        column = column.dictionary_decode()
    column = column.cast(pa.large_string())
    _, offsets, text = column.buffers()
    if not len(column):
        return b"", np.zeros(0, np.int64)
    ends = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)
    return (b"" if text is None else bytes(memoryview(text)[ends[0] : ends[-1]])), np.diff(ends)


def write_batches(
    path: str | os.PathLike[str],
    contents: Contents,
    writer_to: Callable[[BinaryIO, Any], contextlib.AbstractContextManager],
) -> None:
    r"""Write vectors as record batches: columns `token`, `vector` and, where there are counts, `count`.

    Bytes of tokens that are not UTF-8 become `\xNN`, as Arrow's strings are text. bfloat16, which Arrow does not know,
    becomes float32. The roles of special tokens are not kept.

    Args:
      path: The destination.
      contents: The contents to write.
      writer_to: Returns pyarrow's writer of the format for a file and a schema.

    Raises:
      ValueError: If the vectors have no numbers.
      OSError: If the file cannot be written.
    """
    schema, batches = _schema_and_batches(contents)
    with replacing(path) as file, writer_to(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _schema_and_batches(contents: Contents) -> tuple[Any, Iterator[Any]]:
    pa = arrow()
    weight = np.asarray(contents.weight)
    # Arrow has no bfloat16, and no numbers in the other byte order.
    dtype = weight.dtype.newbyteorder("=") if weight.dtype.kind == "f" else np.dtype(np.float32)
    dim = weight.shape[1]
    if not dim:
        raise ValueError(
            '`embax.files.save(contents=...)` must have vectors of one number or more, got none. Save as "safetensors".'
        )
    fields = [("token", pa.large_string()), ("vector", pa.list_(pa.from_numpy_dtype(dtype), dim))]
    schema = pa.schema([*fields, *([("count", pa.int64())] if contents.counts is not None else [])])
    return schema, _record_batches(pa, schema, contents, weight, dtype)


def _record_batches(pa: Any, schema: Any, contents: Contents, weight: np.ndarray, dtype: np.dtype) -> Iterator[Any]:
    text, offsets = contents.vocabulary.escaped().utf8
    step = max(1, _BLOCK // (weight.shape[1] * dtype.itemsize))
    for first in range(0, len(weight), step):
        rows = np.ascontiguousarray(weight[first : first + step], dtype)
        ends = offsets[first : first + len(rows) + 1]
        strings = np.ascontiguousarray(text[ends[0] : ends[-1]])
        buffers = [None, pa.py_buffer(np.ascontiguousarray(ends - ends[0])), pa.py_buffer(strings)]
        columns = [
            pa.Array.from_buffers(pa.large_string(), len(rows), buffers),
            pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1]),
        ]
        if contents.counts is not None:
            columns.append(pa.array(np.asarray(contents.counts[first : first + step], np.int64)))
        yield pa.record_batch(columns, schema)


def lengths_of(batch: Any, columns: Columns) -> Int64[np.ndarray, " rows"]:
    """Return the length of each list; 0 for a missing list."""
    lists = _stored(batch.column(columns.vector[0]))
    return np.asarray(arrow().compute.list_value_length(lists).fill_null(0), np.int64)


def _numbers(source: Source, columns: Columns, batch: Any, dim: int | None, first: int) -> tuple[np.ndarray, int]:
    """Return the vectors of a record batch, and their length."""
    if not columns.is_list:
        numbers = np.empty((batch.num_rows, len(columns.vector)), columns.dtype)
        for place, name in enumerate(columns.vector):
            numbers[:, place] = batch.column(name).to_numpy()
        return numbers, len(columns.vector)
    lists, lengths = _stored(batch.column(columns.vector[0])), lengths_of(batch, columns)
    dim = int(lengths[0]) if dim is None else dim
    if (lengths != dim).any():
        row = int((lengths != dim).argmax())
        raise source.error(f"row {first + row:,} has {lengths[row]} numbers, but the rows before it have {dim}.")
    numbers = lists.flatten()
    if numbers.null_count:
        row = int(np.asarray(numbers.is_null()).argmax()) // dim
        raise source.error(f"row {first + row:,}: a number is missing.")
    return numbers.to_numpy().reshape(batch.num_rows, dim), dim


def check_nulls(source: Source, column: Any, name: str, first: int) -> None:
    """Check that no value is missing; `first` is the number of the first row."""
    missing = np.asarray(column.is_null())
    if missing.any():
        raise source.error(f"row {first + int(missing.argmax()):,}: the value of {name!r} is missing.")


def only(names: list[str], called: tuple[str, ...]) -> str | None:
    """Return the first of the names in `called` that occurs, or the only name, or None."""
    found = [name for name in called if name in names]
    return found[0] if found else names[0] if len(names) == 1 else None


def is_text(kind: Any) -> bool:
    """Return whether a type is of strings, perhaps in a dictionary that stores each string once."""
    types = arrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_integer(kind: Any) -> bool:
    return arrow().types.is_integer(kind)


def _storage(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, arrow().BaseExtensionType) else kind


def _stored(column: Any) -> Any:
    return column.storage if isinstance(column, arrow().ExtensionArray) else column


def _item_of(kind: Any) -> Any:
    types, kind = arrow().types, _storage(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _size_of(kind: Any) -> int | None:
    return kind.list_size if arrow().types.is_fixed_size_list(kind) else None


def _float_of(kind: Any) -> np.dtype | None:
    return np.dtype(kind.to_pandas_dtype()) if kind is not None and arrow().types.is_floating(kind) else None


def listing(schema: Any) -> str:
    """List the columns for a message."""
    return ", ".join(f"{field.name!r} {field.type}" for field in list(schema)[:10]) or "no columns"
