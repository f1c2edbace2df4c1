r"""How a line of a text file is laid out: a token, and numbers behind it.

A run of spaces and tabs parts two fields, and in some files a comma before it: "the 0.1 0.2", "the\t0.1 0.2",
"the   0.1   0.2" and "the, 0.1, 0.2" are all "the" with two numbers. As a token may have spaces in it ("New York"), a
line is read from its end: as many numbers as the file has, and the token is what is left.
"""

import re
from collections import Counter
from typing import NamedTuple

# What pyarrow takes for a number, too. Python's `float` would also take "1_000".
_NUMBER = re.compile(
    rb"[ \t]*[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan(?:\([0-9a-z_]*\))?)[ \t]*",
    re.IGNORECASE,
)
# So many lines tell how a file is laid out.
_LOOKED_AT = 100
# Other white space of ASCII is part of a token, but `bytes.split` would cut there.
_NOT_BLANK = bytes.maketrans(b"\n\r\x0b\x0c", b"????")


class TextLayout(NamedTuple):
    """How the lines of a file are laid out."""

    delimiter: bytes  # between the numbers: a space or a tab, whichever comes first, or a comma with such a blank
    dim: int  # how many numbers


class LayoutError(ValueError):
    """A line that is laid out in another way; the message goes on after "line 7 "."""


def is_number(field: bytes) -> bool:
    """Tell whether bytes spell a number."""
    return _NUMBER.fullmatch(field) is not None


def stripped(line: bytes, delimiter: bytes) -> bytes:
    """Return a line without what may follow its last number."""
    return line.rstrip(b" \t\r,") if delimiter == b"," else line.rstrip(b" \t\r")


def without_commas(text: bytes, delimiter: bytes) -> bytes:
    """Put blanks in place of the commas that part fields, and leave every other byte where it is."""
    return text.replace(b", ", b"  ").replace(b",\t", b" \t") if delimiter == b"," else text


def split(line: bytes, layout: TextLayout) -> tuple[bytes, list[bytes]]:
    """Cut a line into its token and its numbers.

    Args:
      line: The line, without its end.
      layout: How it is laid out.

    Returns:
      The token and the numbers.

    Raises:
      LayoutError: If it is laid out in another way.
    """
    flat = _flat(line, layout.delimiter)
    fields = flat.rsplit(None, layout.dim)
    blanks = flat[: len(flat) - len(flat.lstrip(b" \t"))]
    if len(fields) == layout.dim and (blanks == b" " or blanks.count(b"\t") == 1):
        fields = [b"", *fields]  # of " 0.1 0.2", the token is empty
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
    # Of "New York 0.1 0.2", the token is "New York"; "York 0.3 0.1 0.2" and "York; 0.3; 0.1 0.2" are a number too long.
    # A tab tells where the token of "Route 66" ends.
    before = flat[:end].rsplit(b"\t" if b"\t" in parting else None, 1)
    if len(before) > 1 and is_number(before[-1].rstrip(b",;|")):
        raise LayoutError(f"has more than {layout.dim:,} numbers after the token.")
    token = line[len(blanks) : end]
    if b"\t" in token:
        raise LayoutError(f"has a tab within the token {token[:40]!r}.")
    return token, fields[1:]


def fits(line: bytes, layout: TextLayout) -> bool:
    """Tell whether a line is laid out so."""
    try:
        split(line, layout)
    except LayoutError:
        return False
    return True


def layout_of(text: bytes) -> tuple[TextLayout, float]:
    """Return the layout that most of the first lines share, and the share of them that do.

    A field that is a number counts as one unless it is the first of a line. A token such as "Route 66" has one more
    than the others then, which is why a single line does not tell.

    Args:
      text: The first lines.
    """
    lines = _first_lines(text)
    delimiter, (dim, agreeing) = _delimiter_of(lines), _most_common(_dims(lines, b" "))
    if dim <= 1:  # before a comma, nothing is a number
        with_commas, agreeing_then = _most_common(_dims(lines, b","))
        if with_commas > 1:
            delimiter, dim, agreeing = b",", with_commas, agreeing_then
    if lines and all(map(_has_fraction_before_tab, lines)):
        dim += 1  # no line is laid out so, and an error names the first
    return TextLayout(delimiter, dim), agreeing / max(1, len(lines))


def layout_with(text: bytes, dim: int) -> TextLayout:
    """Return the layout of lines of so many numbers, as a header says.

    Args:
      text: The first lines.
      dim: How many numbers a line has.
    """
    lines = _first_lines(text)
    fitting = [sum(fits(line, TextLayout(delimiter, dim)) for line in lines) for delimiter in (b" ", b",")]
    return TextLayout(b"," if dim > 1 and fitting[1] > fitting[0] else _delimiter_of(lines), dim)


def _first_lines(text: bytes) -> list[bytes]:
    return [line for line in text.split(b"\n", _LOOKED_AT)[:_LOOKED_AT] if line.strip(b" \t\r")]


def _delimiter_of(lines: list[bytes]) -> bytes:
    return b"\t" if lines and b"\t" in lines[0] else b" "


def _flat(line: bytes, delimiter: bytes) -> bytes:
    """Return a line in which fields are parted by blanks only, each at its place."""
    line = stripped(line, delimiter)
    first = len(line) - len(line.lstrip(b" \t")) + 1  # a comma there is a token
    return (line[:first] + without_commas(line[first:], delimiter)).translate(_NOT_BLANK)


def _dims(lines: list[bytes], delimiter: bytes) -> list[int]:
    """Count the numbers of each line."""
    lines = [_flat(line, delimiter) for line in lines]
    dims = [_numbers_at_end(line) for line in lines]
    # The line " 1 2" is an empty token with two numbers, or the token "1" with one, as the other lines are.
    open_ = [_is_blank_and_numbers(line) for line in lines]
    if open_ == [True]:
        return [dims[0] + 1]
    most, _ = _most_common([dim for dim, is_open in zip(dims, open_, strict=True) if not is_open])
    return [dim + (is_open and dim + 1 == most) for dim, is_open in zip(dims, open_, strict=True)]


def _numbers_at_end(line: bytes) -> int:
    """Count the fields at the end that are numbers, up to the tab behind the token, or all but the first field."""
    pieces, number = line.split(b"\t"), 0
    while len(pieces) > 1:
        fields = pieces.pop().split()
        found = _trailing(fields)
        number += found
        if found < len(fields):  # the token, if nothing but blanks is before it
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
    r"""Tell whether a line begins as "the 0.1\t0.2", where the first number would be part of the token."""
    before, tab, _ = line.partition(b"\t")
    fields = before.split(b" ")
    return bool(tab) and len(fields) > 1 and b"." in fields[-1] and is_number(fields[-1])


def _most_common(dims: list[int]) -> tuple[int, int]:
    return Counter(dims).most_common(1)[0] if dims else (0, 0)
