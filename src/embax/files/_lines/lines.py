"""Lines of a text file into tokens and rows of numbers."""

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

# Large against the cost of a call, small against a table.
_BLOCK = 1 << 21
_BLOCK_OF_A_THREAD = 1 << 19
_LONGEST_LINE = 1 << 24
# A block that pyarrow refuses is tried again in pieces, so that one odd line makes only few others slow.
_PIECE = 1 << 16
# pyarrow takes about a kilobyte a column and a thread, however short the lines are.
_MANY_COLUMNS = 10_000
# A line so long may be cut off where the start of a file ends.
LONG = 1 << 15
# A line that begins with a tab or a comma, or that has a space behind the token and, later on, a tab.
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
    """Return the lines at the start of a file, as many as are whole."""
    whole, end, cut = beginning(source).rpartition(b"\n")
    if end:
        return whole
    # Of a single line that is longer than the start, the last number may be cut off.
    return cut[: max(0, cut.rfind(b" "), cut.rfind(b"\t"))] if len(cut) > LONG else cut


def whole_lines(source: Source) -> Iterator[bytes]:
    """Read blocks that end where a line ends; the last line is given an end where it has none.

    A byte-order mark is left out, and lines that end in carriage returns end in line feeds.

    Args:
      source: The file.

    Yields:
      Lines.

    Raises:
      FormatError: If a line is too long for any table.
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
            del data  # before the next block, as the block before is still in use
            yield block
        else:
            parts.append(data)
            size = sum(map(len, parts))
            if size > _LONGEST_LINE:  # its fields would take far more memory than the file
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
    """Add the rows of whole lines to those gathered; lines without anything are passed over.

    Args:
      source: The file, for messages.
      gathered: Where to add them.
      block: The lines.
      layout: How they are laid out.
      line: The number of the first one in the file, from 1 on.
      limit: How many rows are wanted in all; lines beyond are not looked at.
      in_pieces: Whether to try smaller pieces, where pyarrow refuses the whole, before going line by line.

    Returns:
      The number of the line after the block.

    Raises:
      FormatError: If a line is laid out in another way, naming it.
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
    """Read lines one by one, for what pyarrow cannot do: spaces in tokens, and errors that name the line.

    Args:
      source: The file, for messages.
      block: The lines.
      layout: How they are laid out.
      line: The number of the first one in the file, from 1 on.

    Returns:
      Their tokens and rows.

    Raises:
      FormatError: If a line is laid out in another way, naming it.
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
    """Return lines with one space between fields, or None where they are so already or would lose their meaning."""
    if (b"\t" in block or layout.delimiter == b",") and _TO_BE_SPLIT_ALONE.search(block):
        return None
    spaced = without_commas(block, layout.delimiter).replace(b"\r\n", b"\n").replace(b"\t", b" ")
    while b"  " in spaced:
        spaced = spaced.replace(b"  ", b" ")
    spaced = spaced.replace(b"\n ", b"\n").removeprefix(b" ")
    return None if spaced == block else spaced


def _table(block: bytes, layout: TextLayout) -> Any:
    """Read lines by pyarrow, or return None where it could not or would see something else in them."""
    delimiter = layout.delimiter
    block = block.replace(b"\r\n", b"\n").replace(delimiter + b"\n", b"\n")
    # It takes a carriage return for the end of a line, and passes over a byte order mark.
    if b"\r" in block or block.startswith(BYTE_ORDER_MARK) or layout.dim > _MANY_COLUMNS:
        return None
    # Blanks beside the delimiter belong to no token.
    if delimiter == b"," or (b"\t" in block if delimiter == b" " else b" \t" in block or b"\n " in b"\n" + block):
        return None
    # It makes as many columns as the first line has, each of which takes memory.
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
    """Take the tokens and rows out of a batch of pyarrow's."""
    tokens, *columns = batch.columns
    _, offsets, text = tokens.buffers()
    offsets = np.frombuffer(offsets, np.int32)[tokens.offset : tokens.offset + len(tokens) + 1]
    text = b"" if text is None else memoryview(text)[offsets[0] : offsets[-1]].tobytes()
    # Not `to_numpy`, which would load pandas. There are no nulls.
    numbers = [np.frombuffer(column.buffers()[1], np.float32, len(column), 4 * column.offset) for column in columns]
    return Packed(text, np.diff(offsets).astype(np.int64), np.stack(numbers, axis=1))


def _rounded(numbers: list[bytes]) -> Float32[np.ndarray, " numbers"]:
    """Return the nearest float32 of each number.

    By way of float64 it would be another one where the nearest float64 lies halfway between two of float32 and the
    number itself does not.
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
    # Beyond the largest float32, the next one would be 2**128.
    return np.nan_to_num(values.astype(np.float64), nan=np.nan, posinf=2.0**128, neginf=-(2.0**128))
