"""Convert tokens from the encoding of a file to UTF-8, and handle tokens that are invalid in the encoding."""

import codecs
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64

from ..._base.text.escapes import respelled, rows_not_utf8
from ..._base.text.strings import offsets_of
from .open import Source

# Python's error handlers for the values of `errors`. For "strict", the error is raised after the tokens are counted.
_HANDLERS = {"strict": "replace", "replace": "replace", "escape": "surrogateescape"}
_FATE = {"replace": "have U+FFFD for what cannot be decoded", "escape": "keep their bytes"}


class UndecodedTokensWarning(UnicodeWarning, UserWarning):
    """Some tokens of a file are invalid in its encoding; `errors=` says how they are kept.

    Args:
      message: The message.
      number: The number of such tokens.
    """

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number


def is_utf8(encoding: str) -> bool:
    """Return whether an encoding is UTF-8, in any spelling, with or without a byte-order mark."""
    try:
        return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    except (LookupError, ValueError):  # a name with a zero character is a ValueError
        return False


def decoded(
    source: Source, text: Any, offsets: Int64[np.ndarray, " number_and_1"], encoding: str, errors: str
) -> tuple[Any, Int64[np.ndarray, " number_and_1"]]:
    """Convert tokens to UTF-8, and warn of tokens that are invalid in the encoding.

    Args:
      source: The file, for messages.
      text: The tokens, one after the other.
      offsets: The byte at which each token begins, and the end of the last one; not decreasing.
      encoding: The encoding of the tokens.
      errors: How an invalid token is read: `"strict"` raises an error, `"replace"` puts U+FFFD in place of invalid
        bytes, `"escape"` keeps the bytes.

    Returns:
      The text and the offsets; the arguments themselves if nothing changes.

    Raises:
      FormatError: If a token cannot be decoded, or there is no such encoding.
    """
    data = np.frombuffer(text, np.uint8)
    known_as, after = encoding, (text, offsets)
    if is_utf8(encoding):
        known_as, wrong = "UTF-8", rows_not_utf8(data, offsets)
        if wrong.size and errors == "replace":
            after = respelled(data, offsets, wrong, lambda token: token.decode(errors="replace"))
    else:
        after, wrong = _recoded(source, data.tobytes(), offsets, encoding, _HANDLERS[errors])
    if not wrong.size:
        return after
    row = int(wrong[0])
    token = data[offsets[row] : offsets[row + 1]].tobytes()[:40]
    if errors == "strict":
        raise source.error(
            f"token {row} is not {known_as}: {token!r}. Pass its encoding, such as encoding='latin-1', or "
            "errors='escape' to keep its bytes."
        )
    warnings.warn(
        UndecodedTokensWarning(
            f"{source.name}: {wrong.size:,} of {len(offsets) - 1:,} tokens are not {known_as}, such as {token!r}; they "
            f"{_FATE[errors]}. If the file is of another encoding, pass such as encoding='latin-1'.",
            int(wrong.size),
        ),
        stacklevel=4,
    )
    return after


def _recoded(
    source: Source, text: bytes, offsets: Int64[np.ndarray, " number_and_1"], encoding: str, handler: str
) -> tuple[tuple[bytes, Int64[np.ndarray, " number_and_1"]], Int64[np.ndarray, " wrong"]]:
    """Return the tokens in UTF-8, and the numbers of the tokens that are invalid in the encoding."""
    tokens, wrong = [], []
    for row, (begin, end) in enumerate(pairwise(offsets.tolist())):
        token = text[begin:end]
        try:
            try:
                tokens.append(token.decode(encoding).encode())
            except UnicodeDecodeError:
                wrong.append(row)
                tokens.append(token.decode(encoding, handler).encode(errors="surrogateescape"))
        except (UnicodeError, LookupError) as error:
            raise source.error(f"token {row} is not {encoding}: {token[:40]!r} ({error}).") from None
    return (b"".join(tokens), offsets_of(tokens)), np.asarray(wrong, np.int64)
