"""Read lines of a text file as tokens and rows of numbers: by pyarrow if possible, else line by line."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from .._io.contents import Gathered
from .._io.open import Source
from .layout import LayoutError, TextLayout, split, stripped, without_commas
from .line_ends import BYTE_ORDER_MARK, ends_in_returns, with_ends_normalized, with_feeds, without_mark

# Bytes read at once: large enough that the cost of a call does not matter, small compared with a table.
_BLOCK = 1 << 21
_BLOCK_OF_A_THREAD = 1 << 19
_LONGEST_LINE = 1 << 24
# A block that pyarrow refuses is tried again in pieces, so that one odd line slows down only its own piece.
_PIECE = 1 << 16
# pyarrow needs about a kilobyte for each column and thread, however short the lines are.
_MANY_COLUMNS = 10_000
# A longer line may not fit into the first bytes by which a format is recognised.
LONG = 1 << 15
# Lines that only `split` reads rightly: a tab or comma at the beginning, or a space before a later tab.
_TO_BE_SPLIT_ALONE = re.compile(rb"^ *\t|^[ \t]*,[ \t]|^[ \t]*[^ \t\n]+ [^\n]*\t", re.MULTILINE)


class Packed(NamedTuple):
    """Tokens and rows of some lines."""

    text: bytes  # the tokens, one after the other
    lengths: Int64[np.ndarray, " rows"]
    rows: Float32[np.ndarray, "rows dim"]


def beginning(source: Source) -> bytes:
    """Return the start of a text file, without a byte-order mark and with line feeds at the ends of lines."""
    start = without_mark(source.start)
    return with_ends_normalized(start)


def first_lines(source: Source) -> bytes:
    """Return the whole lines at the start of a file."""
    whole, end, cut = beginning(source).rpartition(b"\n")
    if end:
        return whole
    # A single line that is longer than the start: drop the last number, which may be cut off.
    return cut[: max(0, cut.rfind(b" "), cut.rfind(b"\t"))] if len(cut) > LONG else cut


def whole_lines(source: Source) -> Iterator[bytes]:
    """Read a file in blocks of whole lines. A line feed is added to the last line if it has none.

    A byte-order mark is left out, and carriage returns at the ends of lines become line feeds.

    Args:
      source: The file.

    Yields:
      A block of lines.

    Raises:
      FormatError: If a line is longer than 16 MiB.
    """
    parts: list[Any] = []
    has_returns = ends_in_returns(source.start)
    if source.start.startswith(BYTE_ORDER_MARK):
        source.read(len(BYTE_ORDER_MARK))
    while data := source.read(_BLOCK):
        data = with_feeds(data) if has_returns else data
        end = data.rfind(b"\n") + 1
        if end:
            block = b"".join([*parts, memoryview(data)[:end]])
            parts = [data[end:]]
            del data  # saves memory: the caller still holds the block when the next data are read
            yield block
        else:
            parts.append(data)
            size = sum(map(len, parts))
            if size > _LONGEST_LINE:  # splitting it would take far more memory than the file
                raise source.error(
                    f"the line at byte {source.position - size:,} is longer than {_LONGEST_LINE:,} bytes."
                )
    rest = b"".join(parts)
    if rest:
        yield rest + b"\n"


def add_lines(
    source: Source,
    gathered: Gathered,
    block: bytes,
    layout: TextLayout,
    line: int,
    limit: int | None = None,
    in_pieces: bool = True,
) -> int:
    """Add the tokens and rows of whole lines; blank lines are skipped.

    Args:
      source: The file, for messages.
      gathered: The collection to which they are added.
      block: The lines.
      layout: The layout of the file.
      line: The number of the first line of the block, counted from 1.
      limit: The number of rows wanted in all; later lines are ignored.
      in_pieces: Whether to try smaller pieces if pyarrow refuses the block, before reading it line by line.

    Returns:
      The number of the line after the block.

    Raises:
      FormatError: If a line has another layout; the message has its number.
    """
    if limit is not None:
        block = block[: _end_of(block, limit - gathered.rows)]
    table = _table(block, layout)
    if table is None and (plain := _with_single_spaces(block, layout)) is not None:
        table = _table(plain, TextLayout(b" ", layout.dim))
    if table is None and in_pieces:
        for piece in _pieces(block):
            line = add_lines(source, gathered, piece, layout, line, in_pieces=False)
        return line
    found = [by_line(source, block, layout, line)] if table is None else map(_packed, table.to_batches())
    for packed in found:
        gathered.add_packed(*packed)
    return line + block.count(b"\n")


def by_line(source: Source, block: bytes, layout: TextLayout, line: int) -> Packed:
    """Read lines one by one. Unlike pyarrow, this allows spaces in tokens, and its errors name the line.

    Args:
      source: The file, for messages.
      block: The lines.
      layout: The layout of the file.
      line: The number of the first line of the block, counted from 1.

    Returns:
      Their tokens and rows.

    Raises:
      FormatError: If a line has another layout; the message has its number.
    """
    tokens, numbers = [], []
    for place, text in enumerate(block.split(b"\n"), line):
        if not stripped(text, b" "):
            continue
        try:
            token, row = split(text, layout)
        except LayoutError as error:
            raise source.error(f"line {place:,} {error}") from None
        tokens.append(token)
        numbers.extend(row)
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    return Packed(b"".join(tokens), lengths, _rounded(numbers).reshape(len(tokens), layout.dim))


def _end_of(block: bytes, rows: int) -> int:
    end = 0
    while rows > 0 and end < len(block):
        begin, end = end, block.find(b"\n", end) + 1 or len(block)
        rows -= bool(block[begin:end].strip(b" \t\r\n"))
    return end


def _pieces(block: bytes) -> Iterator[bytes]:
    begin = 0
    while begin < len(block):
        end = block.find(b"\n", begin + _PIECE) + 1 or len(block)
        yield block[begin:end]
        begin = end


def _with_single_spaces(block: bytes, layout: TextLayout) -> bytes | None:
    """Return lines with one space between fields; None if they have that already, or if it would change a token."""
    if (b"\t" in block or layout.delimiter == b",") and _TO_BE_SPLIT_ALONE.search(block):
        return None
    spaced = without_commas(block, layout.delimiter).replace(b"\r\n", b"\n").replace(b"\t", b" ")
    while b"  " in spaced:
        spaced = spaced.replace(b"  ", b" ")
    spaced = spaced.replace(b"\n ", b"\n").removeprefix(b" ")
    return None if spaced == block else spaced


def _table(block: bytes, layout: TextLayout) -> Any:
    """Read lines by pyarrow; return None if it cannot read them, or would read them differently from `split`."""
    delimiter = layout.delimiter
    block = block.replace(b"\r\n", b"\n").replace(delimiter + b"\n", b"\n")
    # pyarrow ends a line at a carriage return, and skips a byte-order mark.
    if b"\r" in block or block.startswith(BYTE_ORDER_MARK) or layout.dim > _MANY_COLUMNS:
        return None
    # pyarrow would make blanks beside the delimiter part of the token.
    if delimiter == b"," or (b"\t" in block if delimiter == b" " else b" \t" in block or b"\n " in b"\n" + block):
        return None
    # pyarrow makes a column for each field of the first line, and each column takes memory.
    if block.count(delimiter, 0, block.find(b"\n") + 1 or len(block)) != layout.dim:
        return None
    try:
        import pyarrow as pa
        from pyarrow import csv
    except ImportError:
        return None
    types = {"f0": pa.binary()} | {f"f{column}": pa.float32() for column in range(1, layout.dim + 1)}
    try:
        table = csv.read_csv(
            pa.BufferReader(block),
            csv.ReadOptions(autogenerate_column_names=True, block_size=_BLOCK_OF_A_THREAD),
            csv.ParseOptions(delimiter=delimiter.decode(), quote_char=False, double_quote=False),
            csv.ConvertOptions(column_types=types, null_values=[], check_utf8=False),
            memory_pool=pa.system_memory_pool(),  # the default one keeps about 10 MiB more
        )
    except pa.ArrowInvalid:
        return None
    return table if table.num_columns == layout.dim + 1 else None


def _packed(batch: Any) -> Packed:
    """Return the tokens and rows of a pyarrow batch."""
    tokens, *columns = batch.columns
    _, offsets, text = tokens.buffers()
    offsets = np.frombuffer(offsets, np.int32)[tokens.offset : tokens.offset + len(tokens) + 1]
    text = b"" if text is None else memoryview(text)[offsets[0] : offsets[-1]].tobytes()
    # Not `to_numpy`, which would load pandas. There are no nulls.
    numbers = [np.frombuffer(column.buffers()[1], np.float32, len(column), 4 * column.offset) for column in columns]
    return Packed(text, np.diff(offsets).astype(np.int64), np.stack(numbers, axis=1))


def _rounded(numbers: list[bytes]) -> Float32[np.ndarray, " numbers"]:
    """Return the float32 that is nearest to each number.

    Converting to float64 and then to float32 rounds twice. The result is wrong if the float64 lies exactly halfway
    between two float32 and the number itself does not; those numbers are compared as decimals.
    """
    values = np.asarray([float(number.partition(b"(")[0]) for number in numbers], np.float64)
    with np.errstate(all="ignore"):
        nearest = values.astype(np.float32)
        other = np.nextafter(nearest, np.where(values > _wide(nearest), np.inf, -np.inf).astype(np.float32))
        halfway = np.isfinite(values) & (values - _wide(nearest) == _wide(other) - values)
    for place in np.flatnonzero(halfway):
        number, value = Decimal(numbers[place].decode().strip()), Decimal(values[place].item())
        if number != value:
            nearest[place] = (max if number > value else min)(nearest[place], other[place])
    return nearest


def _wide(values: Float32[np.ndarray, " numbers"]) -> np.ndarray:
    # After the largest float32, the next step would be 2**128.
    return np.nan_to_num(values.astype(np.float64), nan=np.nan, posinf=2.0**128, neginf=-(2.0**128))
