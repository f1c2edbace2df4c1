"""Vectors in the columns of a parquet file."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from .._io.contents import Contents, Options
from .._io.open import Source
from .columns import (
    Columns,
    arrow,
    check_nulls,
    checked,
    columns_of,
    gathered,
    is_text,
    lengths_of,
    listing,
    only,
    packed,
    write_batches,
)
from .format import Format

MARK = b"PAR1"
# The bytes of vectors that are decoded at once.
_BLOCK = 1 << 21
_BUFFER = 1 << 20
# The number of strings that are read at once from a vocabulary.
_ROWS = 1 << 16
# The names of a vocabulary's column.
_TOKENS = ("token", "word", "index")


def recognises(source: Source) -> bool:
    """Whether a file is a parquet file."""
    return source.start.startswith(MARK)


def _read(source: Source, options: Options) -> Contents:
    if options.mmap:
        raise source.error("a parquet file cannot be mapped into memory, as it is encoded. Leave mmap=True out.")
    with checked(source):
        data = source.as_file()
        with parquet_file(data) as file:
            columns = columns_of(source, file.schema_arrow)
            rows, dim = _sizes(source, file, columns)
        step = max(1, _BLOCK // (max(1, dim) * columns.dtype.itemsize))
        if options.limit is not None:
            step = max(1, min(step, options.limit))
        # Read as a dictionary, so that the size of the strings can be checked before repeated ones are copied.
        with parquet_file(data, [columns.token]) as file:
            return gathered(source, options, columns, batches_of(file, step, columns.names), rows)


def read_tokens(source: Source) -> tuple[bytes, Int64[np.ndarray, " tokens_and_1"]]:
    """Read a column of strings of a parquet file: the one named token, word or index, or else the only one.

    Args:
      source: The file.

    Returns:
      The strings, one after the other; and the byte at which each begins, and the end of the last one.

    Raises:
      FormatError: If there is no such column, a string is missing, or the file is damaged.
    """
    texts, lengths, size, rows = [], [np.zeros(1, np.int64)], 0, 0
    with checked(source):
        data = source.as_file()
        with parquet_file(data) as file:
            schema = file.schema_arrow
        name = only([field.name for field in schema if is_text(field.type)], _TOKENS)
        if name is None or len(schema.get_all_field_indices(name)) > 1:
            raise source.error(f"must have one column of strings, or name it {_TOKENS[0]!r}, got {listing(schema)}.")
        with parquet_file(data, [name]) as file:
            for batch in batches_of(file, _ROWS, [name]):
                batch.validate(full=True)
                check_nulls(source, batch.column(name), name, rows)
                text, length = packed(source, batch.column(name), source.limit - size)
                texts.append(text)
                lengths.append(length)
                size, rows = size + len(text), rows + len(length)
    return b"".join(texts), np.cumsum(np.concatenate(lengths))


def parquet_file(data: Any, dictionary: Sequence[str] = ()) -> Any:
    """Open a parquet file; columns of strings in `dictionary` are read with each distinct string once."""
    arrow()
    from pyarrow.parquet import ParquetFile

    # With a buffer: else pyarrow first reads a whole row group, which may be the whole file.
    return ParquetFile(data, read_dictionary=list(dictionary), pre_buffer=False, buffer_size=_BUFFER)


def batches_of(file: Any, step: int, names: list[str]) -> Iterator[Any]:
    """Yield columns of a parquet file as record batches of at most `step` rows."""
    # Each row group by itself, so that the memory of its dictionary is freed before the next one.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(step, row_groups=[group], columns=names, use_threads=False)


def _sizes(source: Source, file: Any, columns: Columns) -> tuple[int, int]:
    """Return the number of rows and their length, checked against the size of the file."""
    rows, dim = file.metadata.num_rows, columns.dim
    if dim is None:
        # From the first row: the column metadata have it, too, but pyarrow aborts the process if they are damaged.
        first = next(batches_of(file, 1, list(columns.vector)), None)
        dim = 0 if first is None else int(lengths_of(first, columns)[:1].sum())
    if rows < 0 or rows * dim * columns.dtype.itemsize > source.limit:
        raise source.error(
            f"says that it holds {rows:,} rows of {dim:,} numbers, more than is likely of a file of its size. "
            "Raise max_expansion if it is to be trusted."
        )
    return rows, dim


def write_parquet(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a parquet file with the columns of `write_batches`."""
    arrow()
    from pyarrow.parquet import ParquetWriter

    write_batches(path, contents, functools.partial(ParquetWriter, compression="zstd", use_dictionary=False))


FORMAT = Format("parquet", (".parquet",), recognises, _read, write_parquet)
