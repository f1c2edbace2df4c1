r"""Tokens that are not UTF-8: kept as bytes, shown with surrogates (PEP 383), escaped where only Unicode is allowed.

A file whose words were cut to four bytes has b"caf\xc3" for "café". In memory the token stays these four bytes. As a
str it is "caf\udcc3": each byte that is no part of a character becomes one of 128 surrogates, which no valid text has,
so the bytes can be restored. A terminal or a parquet file cannot hold a surrogate: there, the byte is escaped with a
backslash, as r"caf\xc3".
"""

import itertools
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt8

# Tokens that are decoded at a time, since a str may take four times the memory of its bytes.
_CHECKED = 1 << 15
_ESCAPES = re.compile("[\udc80-\udcff]")


def decoded(data: bytes) -> str:
    """Return a token as a str."""
    return data.decode("utf-8", "surrogateescape")


def encoded(token: str) -> bytes:
    """Return the bytes of a token.

    Raises:
      UnicodeEncodeError: If no bytes decode to this str: a surrogate stands for no byte, or several of them would form
        a character.
    """
    try:
        return token.encode()
    except UnicodeEncodeError as error:
        data = token.encode(errors="surrogateescape")
        if decoded(data) != token:
            raise error
        return data


def spelled_out(token: str) -> str:
    r"""Write `\xNN` for each byte that is no part of a character."""
    return _ESCAPES.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", token)


def rows_not_utf8(
    text: UInt8[np.ndarray, " bytes"], offsets: Int64[np.ndarray, " number_and_1"]
) -> Int64[np.ndarray, " some"]:
    """Find the tokens that are not UTF-8.

    Args:
      text: The tokens, one after the other.
      offsets: Where each begins, and where the last ends; rising.

    Returns:
      Their numbers.
    """
    found: list[int] = []
    for start in range(0, offsets.size - 1, _CHECKED):
        ends = offsets[start : start + _CHECKED + 1]
        block = text[ends[0] : ends[-1]].tobytes()
        begins = ends[:-1][ends[:-1] < ends[-1]]
        # In UTF-8, every byte of a character but the first is 10xxxxxx. If no token begins with such a byte, a block
        # that is valid as a whole has only valid tokens.
        if not ((text[begins] & 0xC0) == 0x80).any() and _is_utf8(block):
            continue
        places = (ends - ends[0]).tolist()
        found += [start + row for row, (a, b) in enumerate(itertools.pairwise(places)) if not _is_utf8(block[a:b])]
    return np.asarray(found, np.int64)


def respelled(
    text: UInt8[np.ndarray, " bytes"],
    offsets: Int64[np.ndarray, " number_and_1"],
    rows: Int64[np.ndarray, " some"],
    spell: Callable[[bytes], str],
) -> tuple[bytes, Int64[np.ndarray, " number_and_1"]]:
    """Spell some of the tokens in another way.

    Args:
      text: The tokens, one after the other.
      offsets: Where each begins, and where the last ends; rising.
      rows: Which tokens; rising.
      spell: Returns the new spelling of a token.

    Returns:
      The text and the offsets of all tokens.
    """
    parts, lengths, place = [], np.diff(offsets), 0
    for row in rows.tolist():
        begin, end = int(offsets[row]), int(offsets[row + 1])
        spelling = spell(text[begin:end].tobytes()).encode()
        parts += [text[place:begin].tobytes(), spelling]
        lengths[row], place = len(spelling), end
    parts.append(text[place:].tobytes())
    return b"".join(parts), np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
