r"""The layout of a line of a text file: a token, followed by numbers.

Fields are separated by spaces and tabs, in some files with a comma before them: "the 0.1 0.2", "the\t0.1 0.2",
"the   0.1   0.2" and "the, 0.1, 0.2" all are the token "the" with two numbers. A token may have spaces in it ("New
York"), so a line is read from its end: if the file has 2 numbers a line, "New York 0.1 0.2" is "New York", 0.1, 0.2.
"""

import re
from collections import Counter
from typing import NamedTuple

# The same numbers that pyarrow accepts. Python's `float` would also accept "1_000".
_NUMBER = re.compile(
    rb"[ \t]*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan(?:\([0-9a-z_]*\))?)[ \t]*",
    re.IGNORECASE,
)
# The layout of a file is found by its first 100 lines.
_LOOKED_AT = 100
# Other ASCII white space is part of a token; it is replaced because `bytes.split` would split there.
_NOT_BLANK = bytes.maketrans(b"\n\r\x0b\x0c", b"????")


class TextLayout(NamedTuple):
    """The layout of the lines of a file."""

    delimiter: bytes  # between the numbers: a tab if the first line has one, else a space; or a comma before blanks
    dim: int  # the number of numbers in a line


class LayoutError(ValueError):
    """A line with another layout. The message is to follow "line 7 "."""


def is_number(field: bytes) -> bool:
    """Return whether bytes spell a number."""
    return _NUMBER.fullmatch(field) is not None


def stripped(line: bytes, delimiter: bytes) -> bytes:
    """Return a line without blanks, carriage returns and commas at its end."""
    return line.rstrip(b" \t\r,") if delimiter == b"," else line.rstrip(b" \t\r")


def without_commas(text: bytes, delimiter: bytes) -> bytes:
    """Replace the commas between fields by spaces; every other byte keeps its place."""
    return text.replace(b", ", b"  ").replace(b",\t", b" \t") if delimiter == b"," else text


def split(line: bytes, layout: TextLayout) -> tuple[bytes, list[bytes]]:
    """Split a line into its token and its numbers.

    Args:
      line: The line, without its end.
      layout: The layout of the file.

    Returns:
      The token and the numbers.

    Raises:
      LayoutError: If the line has another layout.
    """
    flat = _flat(line, layout.delimiter)
    fields = flat.rsplit(None, layout.dim)
    blanks = flat[: len(flat) - len(flat.lstrip(b" \t"))]
    if len(fields) == layout.dim and (blanks == b" " or blanks.count(b"\t") == 1):
        fields = [b"", *fields]  # the token of " 0.1 0.2" is empty
    if len(fields) <= layout.dim:
        raise LayoutError(f"has {max(0, len(fields) - 1)} numbers after the token, not {layout.dim:,}.")
    end = len(fields[0])
    behind = flat[end:]
    parting = behind[: len(behind) - len(behind.lstrip(b" \t"))]
    bad = next((field for field in fields[1:] if not is_number(field)), None)
    if bad is not None:
        raise LayoutError(f"has {bad[:40]!r} where a number should be.")
    if b"\t" not in parting and b"\t" in behind:
        raise LayoutError(f"has a tab between its last {layout.dim:,} numbers, and none between them and the token.")
    # With two numbers a line, the token of "New York 0.1 0.2" is "New York", but "York 0.3 0.1 0.2" and
    # "York; 0.3; 0.1 0.2" have a number too many. After a tab, a token may end in a number: "Route 66\t0.1 0.2".
    before = flat[:end].rsplit(b"\t" if b"\t" in parting else None, 1)
    if len(before) > 1 and is_number(before[-1].rstrip(b",;|")):
        raise LayoutError(f"has more than {layout.dim:,} numbers after the token.")
    token = line[len(blanks) : end]
    if b"\t" in token:
        raise LayoutError(f"has a tab within the token {token[:40]!r}.")
    return token, fields[1:]


def fits(line: bytes, layout: TextLayout) -> bool:
    """Return whether a line has this layout."""
    try:
        split(line, layout)
    except LayoutError:
        return False
    return True


def layout_of(text: bytes) -> tuple[TextLayout, float]:
    """Return the most common layout of the first lines, and the share of lines that have it.

    Every field that spells a number counts as one, except the first field of a line. So the line of a token such as
    "Route 66" seems to have one number too many, and one line is not enough to find the layout.

    Args:
      text: The first lines.
    """
    lines = _first_lines(text)
    delimiter, (dim, agreeing) = _delimiter_of(lines), _most_common(_dims(lines, b" "))
    if dim <= 1:  # "0.1," is not a number, so lines with commas seem to have one number at most
        with_commas, agreeing_then = _most_common(_dims(lines, b","))
        if with_commas > 1:
            delimiter, dim, agreeing = b",", with_commas, agreeing_then
    if lines and all(map(_has_fraction_before_tab, lines)):
        dim += 1  # a layout that no line has, so that an error names the first line
    return TextLayout(delimiter, dim), agreeing / max(1, len(lines))


def layout_with(text: bytes, dim: int) -> TextLayout:
    """Return the layout of lines with a known number of numbers.

    Args:
      text: The first lines.
      dim: The number of numbers in a line, from the header of the file.
    """
    lines = _first_lines(text)
    fitting = [sum(fits(line, TextLayout(delimiter, dim)) for line in lines) for delimiter in (b" ", b",")]
    return TextLayout(b"," if dim > 1 and fitting[1] > fitting[0] else _delimiter_of(lines), dim)


def _first_lines(text: bytes) -> list[bytes]:
    return [line for line in text.split(b"\n", _LOOKED_AT)[:_LOOKED_AT] if line.strip(b" \t\r")]


def _delimiter_of(lines: list[bytes]) -> bytes:
    return b"\t" if lines and b"\t" in lines[0] else b" "


def _flat(line: bytes, delimiter: bytes) -> bytes:
    """Return a line of the same length in which only spaces and tabs separate the fields."""
    line = stripped(line, delimiter)
    first = len(line) - len(line.lstrip(b" \t")) + 1  # a comma there is a token
    return (line[:first] + without_commas(line[first:], delimiter)).translate(_NOT_BLANK)


def _dims(lines: list[bytes], delimiter: bytes) -> list[int]:
    """Count the numbers of each line."""
    lines = [_flat(line, delimiter) for line in lines]
    dims = [_numbers_at_end(line) for line in lines]
    # The line " 1 2" is an empty token with two numbers, or the token "1" with one number: the other lines decide.
    open_ = [_is_blank_and_numbers(line) for line in lines]
    if open_ == [True]:
        return [dims[0] + 1]
    most, _ = _most_common([dim for dim, is_open in zip(dims, open_, strict=True) if not is_open])
    return [dim + (is_open and dim + 1 == most) for dim, is_open in zip(dims, open_, strict=True)]


def _numbers_at_end(line: bytes) -> int:
    """Count the numbers at the end of a line: back to the tab after the token, or else to the first field."""
    pieces, number = line.split(b"\t"), 0
    while len(pieces) > 1:
        fields = pieces.pop().split()
        found = _trailing(fields)
        number += found
        if found < len(fields):  # the token is here; anything before it means another layout
            return 0 if b"".join(pieces).strip() else number
    fields = pieces[0].split()
    return number or max(0, min(_trailing(fields), len(fields) - 1))


def _is_blank_and_numbers(line: bytes) -> bool:
    return line[:1] == b" " and line[1:2] not in (b" ", b"\t") and all(map(is_number, line.split()))


def _trailing(fields: list[bytes]) -> int:
    number = 0
    while number < len(fields) and is_number(fields[-1 - number]):
        number += 1
    return number


def _has_fraction_before_tab(line: bytes) -> bool:
    r"""Return whether a line begins like "the 0.1\t0.2", where the tab would make "0.1" part of the token."""
    before, tab, _ = line.partition(b"\t")
    fields = before.split(b" ")
    return bool(tab) and len(fields) > 1 and b"." in fields[-1] and is_number(fields[-1])


def _most_common(dims: list[int]) -> tuple[int, int]:
    return Counter(dims).most_common(1)[0] if dims else (0, 0)
