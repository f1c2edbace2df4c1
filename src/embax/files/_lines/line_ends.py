"""Byte-order marks at the beginning of text, and carriage returns at the ends of lines."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def without_mark(text: bytes) -> bytes:
    """Drop the byte-order mark that some editors put before UTF-8."""
    return text.removeprefix(BYTE_ORDER_MARK)


def ends_in_returns(text: bytes) -> bool:
    """Return whether lines end in a carriage return alone, as on old Macs.

    In text with line feeds, a carriage return may be part of a token.

    Args:
      text: The whole text, or its first lines.
    """
    return b"\r" in text and b"\n" not in text


def with_ends_normalized(text: bytes) -> bytes:
    """Return a whole text, or its first lines, with line feeds at the ends of the lines."""
    return with_feeds(text) if ends_in_returns(text) else text


def with_feeds(text: bytes) -> bytes:
    """Replace carriage returns at the ends of lines, with or without a line feed, by line feeds."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
