"""Vectors in the record batches of an Arrow IPC file, which Feather is, too."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ._columns import arrow, checked, columns_of, gathered, write_batches
from ._contents import Contents, Options
from ._format import Format
from ._open import Source

_MAGIC = b"ARROW1"


def _recognises(source: Source) -> bool:
    return source.start.startswith(_MAGIC)


def _read(source: Source, options: Options) -> Contents:
    if options.mmap:
        raise source.error("an Arrow file cannot be mapped into memory as one table. Leave mmap=True out.")
    with checked(source), _file(source) as file:
        pa = arrow()
        schema = pa.ipc.open_file(file).schema
        columns = columns_of(source, schema)
        # The other columns are not even decompressed.
        fields = sorted(schema.get_field_index(name) for name in columns.names)
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return gathered(source, options, columns, batches, 0)


@contextlib.contextmanager
def _file(source: Source) -> Iterator[Any]:
    pa = arrow()
    with pa.BufferReader(source.read_all()) if source.compressed else pa.OSFile(source.path, "rb") as file:
        yield file


def write_arrow(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write vectors as an Arrow IPC file: columns `token`, `vector` and, where there are counts, `count`.

    What special tokens stand for is not kept. bfloat16, which Arrow does not know, becomes float32.

    Args:
      path: The destination.
      contents: What to write.

    Raises:
      ValueError: If the vectors have no number.
      OSError: If the file cannot be written.
    """
    write_batches(path, contents, arrow().ipc.new_file)


FORMAT = Format("arrow", (".arrow", ".feather"), _recognises, _read, write_arrow)
