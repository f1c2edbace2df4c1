"""Lines of a text file into tokens and rows of numbers."""

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from ._contents import Gathered
from ._open import Source

# Large against the cost of a call, small against a table.
_BLOCK = 1 << 21
_BLOCK_OF_A_THREAD = 1 << 19
_LONGEST_LINE = 1 << 24
# A block that pyarrow refuses is tried again in pieces, so that one odd line makes only few others slow.
_PIECE = 1 << 16
# pyarrow takes about a kilobyte a column and a thread, however short the lines are.
_MANY_COLUMNS = 10_000
# So many lines tell how a file without a header is laid out.
_LOOKED_AT = 100
# A line so long may be cut off where the start of a file ends.
LONG = 1 << 15
# What pyarrow takes for a number, too. Python's `float` would also take "1_000".
_NUMBER = re.compile(
    rb"[ \t]*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan(?:\([0-9a-z_]*\))?)[ \t]*",
    re.IGNORECASE,
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Layout(NamedTuple):
    """How a line is laid out: a token, and numbers behind it."""

    delimiter: bytes  # between all of them, a space or a tab
    dim: int  # how many numbers


class Packed(NamedTuple):
    """Tokens and rows of some lines."""

    text: bytes  # the tokens, one after the other
    lengths: Int64[np.ndarray, " rows"]
    rows: Float32[np.ndarray, "rows dim"]


def is_number(field: bytes) -> bool:
    """Tell whether bytes spell a number."""
    return _NUMBER.fullmatch(field) is not None


def delimiter_of(line: bytes) -> bytes:
    """Return what parts the fields of a line, as it does the last two."""
    line = line.rstrip(b" \t\r\n")
    return b"\t" if line.rfind(b"\t") > line.rfind(b" ") else b" "


def first_lines(source: Source) -> bytes:
    """Return the lines at the start of a file, as many as are whole."""
    whole, end, cut = source.start.rpartition(b"\n")
    if end:
        return whole
    # Of a single line that is longer than the start, the last number may be cut off.
    return cut.rpartition(delimiter_of(cut))[0] if len(cut) > LONG else cut


def layout_of(text: bytes) -> tuple[Layout, float]:
    """Return the layout that most of the first lines share, and the share of them that do.

    A field that is a number counts as one unless it is the first of a line. A token such as "Route 66" has one more
    than the others then, which is why a single line does not tell.
    """
    lines = [line.rstrip(b" \t\r") for line in text.split(b"\n", _LOOKED_AT)[:_LOOKED_AT]]
    delimiter = delimiter_of(next(filter(None, lines), b""))
    dims = [_numbers_at_end(line.split(delimiter)) for line in lines if line]
    dim, agreeing = Counter(dims).most_common(1)[0] if dims else (0, 0)
    return Layout(delimiter, dim), agreeing / max(1, len(dims))


def whole_lines(source: Source) -> Iterator[bytes]:
    """Read blocks that end where a line ends; the last line is given an end where it has none.

    Args:
      source: The file.

    Yields:
      Lines.

    Raises:
      FormatError: If a line is too long for any table.
    """
    parts: list[Any] = []
    while data := source.read(_BLOCK):
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
    layout: Layout,
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
    if table is None and in_pieces:
        for piece in _pieces(block):
            line = add_lines(source, gathered, piece, layout, line, in_pieces=False)
        return line
    found = [by_line(source, block, layout, line)] if table is None else map(_packed, table.to_batches())
    for packed in found:
        gathered.add_packed(*packed)
    return line + block.count(b"\n")


def by_line(source: Source, block: bytes, layout: Layout, line: int) -> Packed:
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
        text = text.rstrip(b" \t\r")
        if not text:
            continue
        token, *row = text.rsplit(layout.delimiter, layout.dim)
        if len(row) < layout.dim:
            raise source.error(f"line {place:,} has {len(row)} numbers after the token, not {layout.dim:,}.")
        bad = next((field for field in row if not is_number(field)), None)
        if bad is not None:
            raise source.error(f"line {place:,} has {bad[:40]!r} where a number should be.")
        # Of "New York 0.1 0.2", the token is "New York"; "York 0.3 0.1 0.2" is a number too long.
        if layout.delimiter in token and is_number(token.rpartition(layout.delimiter)[2]):
            raise source.error(f"line {place:,} has more than {layout.dim:,} numbers after the token.")
        tokens.append(token)
        numbers.extend(row)
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    return Packed(b"".join(tokens), lengths, _rounded(numbers).reshape(len(tokens), layout.dim))


def _numbers_at_end(fields: list[bytes]) -> int:
    number = 0
    while number < len(fields) - 1 and is_number(fields[-1 - number]):
        number += 1
    return number


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


def _table(block: bytes, layout: Layout) -> Any:
    """Read lines by pyarrow, or return None where it could not or would see something else in them."""
    block = block.replace(b"\r\n", b"\n").replace(layout.delimiter + b"\n", b"\n")
    # It takes a carriage return for the end of a line, and passes over a byte order mark.
    if b"\r" in block or block.startswith(_BYTE_ORDER_MARK) or layout.dim > _MANY_COLUMNS:
        return None
    # It makes as many columns as the first line has, each of which takes memory.
    if block.count(layout.delimiter, 0, block.find(b"\n") + 1 or len(block)) != layout.dim:
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
            csv.ParseOptions(delimiter=layout.delimiter.decode(), quote_char=False, double_quote=False),
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
