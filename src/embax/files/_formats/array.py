"""Read a table of plain binary numbers: map it into memory, or read it block by block."""

import numpy as np
from jaxtyping import Float

from .._io.contents import Options, make_room
from .._io.open import Source

# Bytes read at once: large enough that the cost of a call does not matter, small compared with a table.
_BLOCK = 1 << 23


def table_of(
    source: Source, options: Options, dtype: np.dtype, shape: tuple[int, int], begin: int, by_column: bool = False
) -> Float[np.ndarray, "rows dim"]:
    """Read a table.

    Args:
      source: The file. If its size is known, the caller has checked that the table fits into it.
      options: The options of the caller.
      dtype: The dtype of the numbers in the file.
      shape: The shape of the whole table in the file.
      begin: The byte at which the table begins.
      by_column: Whether the numbers are stored column by column.

    Returns:
      The table, or its first `options.limit` rows.

    Raises:
      FormatError: If the data end within the table, or `options.mmap` is True and the table cannot be mapped.
    """
    wanted = options.dtype or dtype.newbyteorder("=")
    reason = None
    if source.in_order is not None:
        reason = source.in_order
    elif not dtype.isnative:
        reason = "its numbers have their bytes in the order of another machine"
    elif dtype != wanted:
        reason = f"it holds {dtype} and {wanted} is wanted"
    elif begin % dtype.itemsize:
        reason = f"its numbers begin at byte {begin}, which is no multiple of {dtype.itemsize}"
    if options.mmap and reason is not None:
        raise source.error(f"the file cannot be mapped into memory, as {reason}. Leave mmap=True out.")
    rows = shape[0] if options.limit is None else min(shape[0], options.limit)
    if 0 in (rows, shape[1]):
        return np.empty((rows, shape[1]), wanted)
    # A table stored by column is mapped only on request: each row is spread over the whole file, so look-ups are slow.
    if reason is None and (options.mmap or (options.mmap is None and not by_column)):
        order = "F" if by_column else "C"
        return np.memmap(source.as_file(), dtype, "r", begin, shape, order)[:rows].view(np.ndarray)
    source.skip_to(begin)
    if by_column:
        return _read_by_column(source, dtype, wanted, shape, rows)
    return _read_by_row(source, dtype, wanted, rows, shape[1])


def _read_by_row(source: Source, dtype: np.dtype, wanted: np.dtype, rows: int, dim: int) -> np.ndarray:
    # A stream or compressed file may be shorter than its header says, so memory grows with the data that are read.
    weight = np.empty((rows if source.in_order is None else 0, dim), wanted)
    step = max(1, _BLOCK // (dim * dtype.itemsize))
    for first in range(0, rows, step):
        number = min(step, rows - first)
        data = source.read_exactly(number * dim * dtype.itemsize, f"row {first:,} and those after it")
        make_room(weight, first + number, most=rows)
        weight[first : first + number] = np.frombuffer(data, dtype).reshape(number, dim)
    return weight


def _read_by_column(source: Source, dtype: np.dtype, wanted: np.dtype, shape: tuple[int, int], rows: int) -> np.ndarray:
    if source.in_order is not None:
        data = source.read_exactly(shape[0] * shape[1] * dtype.itemsize, "the table")
        return np.ascontiguousarray(np.frombuffer(data, dtype).reshape(shape, order="F")[:rows], wanted)
    begin, height = source.position, shape[0] * dtype.itemsize
    weight = np.empty((rows, shape[1]), wanted)
    for column in range(shape[1]):
        source.skip_to(begin + column * height)
        data = source.read_exactly(rows * dtype.itemsize, f"column {column}")
        weight[:, column] = np.frombuffer(data, dtype)
    return weight
