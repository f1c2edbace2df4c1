"""Vectors in an Arrow IPC file (Feather is the same format) or an IPC stream."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from .._io.contents import Contents, Options
from .._io.open import Source
from .columns import arrow, checked, columns_of, gathered, write_batches
from .format import Format

_MAGIC = b"ARROW1"
# A stream begins with a message: these bytes, the size of its metadata, and the metadata (16 bytes or more).
_CONTINUED = b"\xff\xff\xff\xff"
_LEAST, _MOST = 16, 1 << 30
# The first bytes of files and streams.
MARKS = _MAGIC, _CONTINUED


def recognises(source: Source) -> bool:
    """Whether a file is an Arrow IPC file or stream."""
    size = int.from_bytes(source.start[4:8], "little")
    is_stream = source.start.startswith(_CONTINUED) and _LEAST <= size < _MOST and size % 8 == 0
    return source.start.startswith(_MAGIC) or is_stream


def _read(source: Source, options: Options) -> Contents:
    if options.mmap:
        raise source.error("an Arrow file cannot be mapped into memory as one table. Leave mmap=True out.")
    with checked(source), opened_batches(source) as (schema, batches):
        columns = columns_of(source, schema)
        return gathered(source, options, columns, batches(columns.names), 0)


@contextlib.contextmanager
def opened_batches(source: Source) -> Iterator[tuple[Any, Callable[[list[str]], Iterator[Any]]]]:
    """Open an Arrow file; yields its schema, and a function that reads columns of these names in record batches."""
    pa = arrow()
    with pa.OSFile(source.as_file(), "rb") as file:
        # Anything that is not a file is tried as a stream: the oldest streams have no mark.
        open_it = pa.ipc.open_file if source.start.startswith(_MAGIC) else pa.ipc.open_stream
        schema = open_it(file).schema

        def batches(names: list[str]) -> Iterator[Any]:
            # The other columns are not even decompressed.
            fields = sorted(schema.get_field_index(name) for name in names)
            file.seek(0)
            reader = open_it(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            if open_it is pa.ipc.open_stream:
                yield from reader
            else:
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

        yield schema, batches


def write_arrow(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write an Arrow IPC file with the columns of `write_batches`."""
    write_batches(path, contents, arrow().ipc.new_file)


FORMAT = Format("arrow", (".arrow", ".feather"), recognises, _read, write_arrow)
