"""Texts, or lists of tokens or ids, in a column of a parquet or Arrow file."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from .._io.open import MAX_EXPANSION, Source, opened
from . import arrow as _arrow
from . import parquet as _parquet
from .columns import arrow, checked, is_text, listing, only

# The column to read if there are several.
_NAMES = ("text", "tokens", "words", "ids", "input_ids")
# Rows that are decoded at once. A row may be a whole book.
_ROWS = 256
# The first bytes of a file by which its format is recognised.
_START = 8


def has_columns(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file is a parquet or Arrow file. Streams and compressed files are not looked into.

    Raises:
      OSError: If it cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(_START)
    return any(start.startswith(mark) for mark in (_parquet.MARK, *_arrow.MARKS))


def read_column(
    path: str | os.PathLike[str], column: str | None = None, *, max_expansion: float = MAX_EXPANSION
) -> Iterator[str | list[str] | list[int]]:
    """Read a column of texts, or of lists of tokens or ids, from a parquet or Arrow file, some rows at a time.

    Args:
      path: The file, plain or compressed. A compressed file, or a stream (`-` is standard input), is copied to the
        folder of temporary files first.
      column: The name of the column. Default: the one that is named text, tokens, words, ids or input_ids, or else the
        only one of strings, or of lists of strings or integers.
      max_expansion: The strings of some rows may take up to so many times the size of the file; 16 MiB are always
        allowed.

    Yields:
      The value of each row, in order, as a string or a list of strings or integers. A missing value is an empty one.

    Raises:
      FormatError: If the file has no such column, is damaged, or lacks an item of a list.
      OSError: If it cannot be opened.

    Example:
      >>> import embax.files, pathlib, pyarrow, pyarrow.parquet, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "liked.parquet")
      >>> pyarrow.parquet.write_table(pyarrow.table({"user": [1, 2], "films": [[7, 9], [9]]}), path)
      >>> list(embax.files.read_column(path))
      [[7, 9], [9]]
    """
    with opened(path, max_expansion) as source, checked(source), _opened_columns(source) as (schema, batches):
        name = _chosen(source, schema, column)
        row = 0
        for batch in batches(name):
            batch.validate(full=True)
            values = batch.column(name)
            _check_size(source, values)
            is_string = is_text(values.type)
            for value in values.to_pylist():
                if value is not None and not is_string and None in value:
                    raise source.error(f"row {row:,}: an item of {name!r} is missing.")
                yield ("" if is_string else []) if value is None else value
                row += 1


@contextlib.contextmanager
def _opened_columns(source: Source) -> Iterator[tuple[Any, Callable[[str], Iterator[Any]]]]:
    """The schema of a file, and a function that reads the column of a name in batches."""
    if _arrow.recognises(source):
        with _arrow.opened_batches(source) as (schema, batches):
            yield schema, lambda name: (part for batch in batches([name]) for part in _parts(batch))
        return
    if not _parquet.recognises(source):
        raise source.error("must be a parquet or Arrow file, which has columns.")
    data = source.as_file()
    with _parquet.parquet_file(data) as file:
        schema = file.schema_arrow

    def batches_of(name: str) -> Iterator[Any]:
        # As a dictionary, so that the size of strings can be checked before repeated ones are copied.
        with _parquet.parquet_file(data, [name] if is_text(schema.field(name).type) else []) as file:
            yield from _parquet.batches_of(file, _ROWS, [name])

    yield schema, batches_of


def _parts(batch: Any) -> Iterator[Any]:
    for first in range(0, batch.num_rows, _ROWS):
        yield batch.slice(first, _ROWS)


def _chosen(source: Source, schema: Any, column: str | None) -> str:
    fits = [field.name for field in schema if _is_readable(field.type)]
    name = only(fits, _NAMES) if column is None else column
    if name is None:
        raise source.error(
            f"must have one column of strings, or of lists of strings or integers, got {listing(schema)}. Name one."
        )
    if len(schema.get_all_field_indices(name)) != 1:
        raise source.error(f"must have one column {name!r}, got {listing(schema)}.")
    if name not in fits:
        kind = schema.field(name).type
        raise source.error(f"the column {name!r} must be of strings, or of lists of strings or integers, got {kind}.")
    return name


def _is_readable(kind: Any) -> bool:
    types = arrow().types
    if is_text(kind):
        return True
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and (is_text(kind.value_type) or types.is_integer(kind.value_type))


def _check_size(source: Source, values: Any) -> None:
    """Check the size of strings in a dictionary, where a long one may occur many times."""
    pa = arrow()
    if isinstance(values, pa.DictionaryArray):
        lengths = pa.compute.binary_length(values.dictionary).cast(pa.int64()).take(values.indices)
        if (pa.compute.sum(lengths).as_py() or 0) > source.limit:
            raise source.error(f"some strings take more than {source.limit:,} bytes. Raise max_expansion to trust it.")
