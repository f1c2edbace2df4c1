"""word2vec's text and binary formats: a header with rows and dim, then a token and its numbers for each row."""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._io.atomic import replacing
from .._io.contents import Contents, Gathered, Options
from .._io.open import Source
from .._lines.layout import TextLayout, fits, layout_of, layout_with
from .._lines.lines import LONG, add_lines, beginning, first_lines, whole_lines
from .._lines.written_lines import blocks_of, check_tokens, lines_of
from .format import Format

_TEXT, _BINARY = "word2vec", "word2vec-binary"
# Bytes read at once: large enough that the cost of a call does not matter, small compared with a table.
_BLOCK = 1 << 21
_LONGEST_TOKEN = 1 << 20
# A larger dim in a header is refused: no table is so wide, and a row of this size fits into any memory.
_WIDEST = 1 << 20
# A header that is aligned to the right begins with two blanks or more. With one blank, " 2 2" is a line of GloVe's
# with an empty token and two numbers.
_HEADER = re.compile(rb"(?:[ \t]{2,})?([0-9]{1,18}),?[ \t]+([0-9]{1,18})[ \t]*\r?\n?")
_PRINTABLE = bytes([*b"\t\n\r", *range(0x20, 0x7F)])


class Header(NamedTuple):
    """The first line of a file."""

    rows: int
    dim: int
    size: int  # the length of the line in bytes


def recognises_binary(source: Source) -> bool:
    """Return whether a header is followed by a token and bytes that are not text."""
    header = _header(source.start)
    if header is None or not header.dim:
        return False
    start = source.start[header.size :]
    line, end, _ = start.partition(b"\n")
    if end and _is_row(line, header.dim):
        return False
    _, space, numbers = start.lstrip(b"\n").partition(b" ")
    return bool(space) and bool(numbers[: 4 * header.dim].translate(None, _PRINTABLE))


def recognises_text(source: Source) -> bool:
    """Return whether a header is followed by a row of its dim, or the first line at least is no row of GloVe's."""
    start = beginning(source)
    header = _header(start)
    if header is None or recognises_binary(source):
        return False
    line, end, _ = start[header.size :].partition(b"\n")
    if not line or (not end and len(line) > LONG) or _is_row(line, header.dim):
        return True
    layout, share = layout_of(first_lines(source))
    return layout.dim != 1 or share < 1


def read_text(source: Source, options: Options) -> Contents:
    """Read a text file of word2vec's or fastText's; it must have as many rows as its header says."""
    blocks = whole_lines(source)
    block = next(blocks, b"")
    header = _checked(source, options, _header(block))
    block = block[header.size :] or next(blocks, b"")
    layout = layout_with(block, header.dim)
    rows, line = _Rows(source, options, header, 2 * header.dim), 2
    while block and not rows.gathered.is_full:
        line = add_lines(source, rows.gathered, block, layout, line, options.limit)
        if rows.gathered.rows > header.rows:
            raise source.error(f"the header says {header.rows:,} rows, but the file has more. Correct the header.")
        block = next(blocks, b"")
    if rows.gathered.rows < rows.wanted:
        raise source.error(
            f"the header says {header.rows:,} rows, but the file ends after {rows.gathered.rows:,}. Is it whole?"
        )
    return rows.gathered.contents()


def read_binary(source: Source, options: Options) -> Contents:
    """Read a binary file of word2vec's, with or without a line feed after each row."""
    header = _checked(source, options, _header(source.start))
    source.read(header.size)
    rows = _Rows(source, options, header, 4 * header.dim + 1)
    gathered, width, left = rows.gathered, 4 * header.dim, b""
    while gathered.rows < rows.wanted:
        begin = source.position - len(left)
        data = source.read(max(_BLOCK, width + 1))
        block = left + data if left else data
        tokens, places, end = _places(block, width, rows.wanted - gathered.rows)
        row = gathered.rows + len(tokens) + 1
        gathered.add(tokens, _cut_out(block, places, header.dim))
        left = block[end:]
        if gathered.rows < rows.wanted:
            if b" " not in left[: _LONGEST_TOKEN + 1] and len(left) > _LONGEST_TOKEN:
                raise source.error(f"row {row:,}, from byte {begin + end:,} on, is no token that ends with a space.")
            if not data:
                raise source.truncated(f"row {row:,} of {header.rows:,}")
    if gathered.rows == header.rows:
        # A line feed may follow the last row.
        position = source.position - len(left)
        rest = left or source.read(_BLOCK)
        if rest.strip(b"\r\n"):
            raise source.error(f"the header says {header.rows:,} rows, but the file goes on at byte {position:,}.")
    return gathered.contents()


def write_text(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a text file of word2vec's, in float32; no token may have a space, tab or newline."""
    check_tokens(contents, _TEXT)
    _write(path, contents, lines_of(contents))


def write_binary(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a binary file of word2vec's, in float32, without line feeds; no token may have a space or newline."""
    check_tokens(contents, _BINARY, b" \n")
    blocks = (
        b"".join(part for token, row in zip(tokens, rows, strict=True) for part in (token, b" ", row.data))
        for tokens, rows in blocks_of(contents)
    )
    _write(path, contents, blocks)


def _write(path: str | os.PathLike[str], contents: Contents, blocks: Iterator[bytes]) -> None:
    with replacing(path) as file:
        file.write(b"%d %d\n" % contents.weight.shape)
        for block in blocks:
            file.write(block)


class _Rows:
    """The collected rows of a file, and the number of rows that are wanted.

    Args:
      source: The file, read up to the first row.
      options: The options of the caller.
      header: The header of the file.
      least: The smallest number of bytes that a row can take.
    """

    def __init__(self, source: Source, options: Options, header: Header, least: int):
        self.wanted = header.rows if options.limit is None else min(header.rows, options.limit)
        # Memory is allocated for no more rows than the file can hold: the header may be wrong.
        expected = 0 if source.size is None else min(self.wanted, source.size // least)
        self.gathered = Gathered(source, options, header.dim, expected=expected)


def _header(start: bytes) -> Header | None:
    match = _HEADER.match(start, 0, start.find(b"\n") + 1 or len(start))
    if match is None or match.end() != (start.find(b"\n") + 1 or len(start)):
        return None
    return Header(int(match[1]), int(match[2]), match.end())


def _checked(source: Source, options: Options, header: Header | None) -> Header:
    if options.mmap:
        raise source.error("rows with tokens between them cannot be mapped into memory. Leave mmap=True out.")
    if header is None:
        raise source.error("the first line must be the number of rows and the number of columns, such as '400000 50'.")
    if not 0 < header.dim <= _WIDEST:
        raise source.error(f"the first line must say 1 to {_WIDEST:,} numbers a row, got {header.dim:,}.")
    return header


def _is_row(line: bytes, dim: int) -> bool:
    return fits(line, TextLayout(b" ", dim)) or fits(line, TextLayout(b",", dim))


def _places(block: bytes, width: int, wanted: int) -> tuple[list[bytes], list[int], int]:
    """Find rows in bytes; return the tokens, the places where their numbers begin, and the end of the last row."""
    tokens, places, end = [], [], 0
    last, find = len(block) - width, block.find
    while len(tokens) < wanted:
        place = find(b" ", end, end + _LONGEST_TOKEN + 1) + 1
        if not 0 < place <= last:
            break
        tokens.append(block[end : place - 1].lstrip(b"\n"))
        places.append(place)
        end = place + width
    return tokens, places, end


def _cut_out(block: bytes, places: list[int], dim: int) -> np.ndarray:
    """Copy the rows of numbers that begin at the given places, which need not be aligned."""
    if not places:
        return np.zeros((0, dim), np.float32)
    starts = np.ndarray((len(block) - 4 * dim + 1,), f"V{4 * dim}", block, strides=(1,))
    return starts[places].view("<f4").reshape(len(places), dim)


TEXT = Format(_TEXT, (".txt", ".vec"), recognises_text, read_text, write_text)
BINARY = Format(_BINARY, (".bin",), recognises_binary, read_binary, write_binary)
