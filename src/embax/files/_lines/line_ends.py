"""How text begins and how its lines end: byte-order marks, and carriage returns in place of line feeds."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def without_mark(text: bytes) -> bytes:
    """Drop the byte-order mark that some editors put before UTF-8."""
    return text.removeprefix(BYTE_ORDER_MARK)


def ends_in_returns(text: bytes) -> bool:
    """Tell whether lines end in a carriage return alone, as on old Macs.

    Where there is a line feed, a carriage return may be part of a token.

    Args:
      text: All of it, or the first lines.
    """
    return b"\r" in text and b"\n" not in text


def with_ends_normalized(text: bytes) -> bytes:
    """Return a whole text, or its first lines, with line feeds at the ends of the lines."""
    return with_feeds(text) if ends_in_returns(text) else text


def with_feeds(text: bytes) -> bytes:
    """End lines in a line feed that end in carriage returns, or in both."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
