"""Vectors in an Arrow IPC file (Feather is the same format) or an IPC stream."""

import os

from .._io.contents import Contents, Options
from .._io.open import Source
from .columns import arrow, checked, columns_of, gathered, write_batches
from .format import Format

_MAGIC = b"ARROW1"
# A stream begins with a message: these bytes, the size of its metadata, and the metadata (16 bytes or more).
_CONTINUED = b"\xff\xff\xff\xff"
_LEAST, _MOST = 16, 1 << 30


def _recognises(source: Source) -> bool:
    size = int.from_bytes(source.start[4:8], "little")
    is_stream = source.start.startswith(_CONTINUED) and _LEAST <= size < _MOST and size % 8 == 0
    return source.start.startswith(_MAGIC) or is_stream


def _read(source: Source, options: Options) -> Contents:
    if options.mmap:
        raise source.error("an Arrow file cannot be mapped into memory as one table. Leave mmap=True out.")
    pa = arrow()
    with checked(source), pa.OSFile(source.as_file(), "rb") as file:
        # Anything that is not a file is tried as a stream: the oldest streams have no mark.
        open_it = pa.ipc.open_file if source.start.startswith(_MAGIC) else pa.ipc.open_stream
        schema = open_it(file).schema
        columns = columns_of(source, schema)
        # The other columns are not even decompressed.
        fields = sorted(schema.get_field_index(name) for name in columns.names)
        file.seek(0)
        reader = open_it(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        if open_it is pa.ipc.open_stream:
            return gathered(source, options, columns, reader, 0)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return gathered(source, options, columns, batches, 0)


def write_arrow(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write an Arrow IPC file with the columns of `write_batches`."""
    write_batches(path, contents, arrow().ipc.new_file)


FORMAT = Format("arrow", (".arrow", ".feather"), _recognises, _read, write_arrow)
