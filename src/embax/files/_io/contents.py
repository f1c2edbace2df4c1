"""What a file of vectors holds, gathered block by block."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import DTypeLike

from ...vocabulary import Vocabulary
from .encodings import decoded
from .open import Source

# By how much an array of rows grows where it is not known how many there will be.
_GROWTH = 1.25


class DuplicateTokensWarning(UserWarning):
    """A file names some rows as others before them; those are left out.

    Args:
      message: What is told.
      number: How many rows are left out.
    """

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number


class Contents(NamedTuple):
    """What a file of vectors holds."""

    vocabulary: Vocabulary
    weight: Float[np.ndarray, "rows dim"]
    counts: Int64[np.ndarray, " rows"] | None = None
    subwords: Any = None  # a Subwords of fastText's, or None


class Options(NamedTuple):
    """What the caller wants of a file."""

    limit: int | None = None  # of rows, the first ones
    dtype: np.dtype | None = None  # None for that of the file, float32 for text
    mmap: bool | None = None  # None where it is possible and nothing has to be converted
    encoding: str = "utf-8"  # of the tokens
    errors: str = "escape"  # what becomes of tokens that are not of the encoding, as in `_encodings.decoded`
    is_decoded: bool = False  # whether the tokens are in UTF-8 already, and those that are not have been told of


class Gathered:
    """Tokens and rows of a file, in the order in which they are read.

    Args:
      source: The file, for messages.
      options: What the caller wants.
      dim: The size of a row.
      dtype: Of the file; the caller's goes first.
      expected: How many rows there will be, where the size of the file bears that out. Memory is taken for so many.
    """

    def __init__(self, source: Source, options: Options, dim: int, dtype: DTypeLike = np.float32, expected: int = 0):
        self._source, self._options = source, options
        self._weight = np.empty((expected, dim), options.dtype or dtype)
        self._texts: list[bytes] = []
        self._lengths: list[Int64[np.ndarray, " tokens"]] = []
        self.rows = 0

    @property
    def is_full(self) -> bool:
        """Whether the caller's limit is reached."""
        return self._options.limit is not None and self.rows >= self._options.limit

    def add(self, tokens: list[bytes], rows: np.ndarray) -> None:
        """Add tokens and their rows, `(len(tokens), dim)`; those beyond the limit are left out."""
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        self.add_packed(b"".join(tokens), lengths, rows)

    def add_packed(self, text: bytes, lengths: Int64[np.ndarray, " tokens"], rows: np.ndarray) -> None:
        """The same for tokens that lie one after the other."""
        if self._options.limit is not None and self.rows + len(rows) > self._options.limit:
            keep = self._options.limit - self.rows
            text, lengths, rows = text[: int(lengths[:keep].sum())], lengths[:keep], rows[:keep]
        end = self.rows + len(rows)
        make_room(self._weight, end)
        self._weight[self.rows : end] = rows
        self._texts.append(text)
        self._lengths.append(lengths)
        self.rows = end

    def contents(self, counts: Int64[np.ndarray, " rows"] | None = None) -> Contents:
        """Return all of it, without the rows that are named as others before them, and their counts."""
        resize(self._weight, self.rows)
        offsets, end = np.zeros(self.rows + 1, np.int64), 0
        for lengths in self._lengths:
            np.cumsum(lengths, out=offsets[end + 1 : end + 1 + len(lengths)])
            offsets[end + 1 : end + 1 + len(lengths)] += offsets[end]
            end += len(lengths)
        text = b"".join(self._texts)
        self._texts.clear()
        self._lengths.clear()
        return contents_of(self._source, self._options, text, offsets, self._weight, counts)


def make_room(weight: np.ndarray, rows: int, most: int | None = None) -> None:
    """Let an array of rows grow, where it is too small, to so many rows and some to spare, but no more than `most`."""
    if rows > len(weight):
        roomy = max(rows, int(len(weight) * _GROWTH))
        resize(weight, roomy if most is None else min(roomy, most))


def resize(weight: np.ndarray, rows: int) -> None:
    """Give an array another number of rows, in place: the system moves pages of a large one, not numbers."""
    weight.resize((rows, weight.shape[1]), refcheck=False)


def contents_of(
    source: Source,
    options: Options,
    text: Any,
    offsets: Int64[np.ndarray, " rows_and_1"],
    weight: Float[np.ndarray, "rows dim"],
    counts: Int64[np.ndarray, " rows"] | None = None,
    special: Mapping[str, int] | None = None,
) -> Contents:
    """Put together what a reader has found: tokens in UTF-8, and of those that occur twice the first.

    Args:
      source: The file, for messages.
      options: What the caller wants; the encoding is that of the text.
      text: The tokens, one after the other.
      offsets: Where each begins, and where the last ends, in bytes; rising.
      weight: A row a token.
      counts: A count a token.
      special: The rows of special tokens, by what they stand for.

    Returns:
      The same.

    Raises:
      FormatError: If a token is not of the encoding and that is to be an error.
    """
    if not options.is_decoded:
        text, offsets = decoded(source, text, offsets, options.encoding, options.errors)
    vocabulary = Vocabulary.from_utf8(text, offsets, special=special, errors="escape")
    repeated = vocabulary.repeated()
    if repeated.any():
        number, first = int(repeated.sum()), vocabulary.tokens(int(repeated.argmax()))
        warnings.warn(
            DuplicateTokensWarning(
                f"{source.name}: {number:,} rows are left out, as their tokens occurred before, such as {first!r}.",
                number,
            ),
            stacklevel=2,
        )
        keep = np.flatnonzero(~repeated)
        vocabulary, weight = vocabulary.take(keep), weight[keep]
        counts = None if counts is None else counts[keep]
    return Contents(vocabulary, weight, counts)
