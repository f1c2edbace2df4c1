"""The contents of a file of vectors, collected block by block while it is read."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import DTypeLike

from ...vocabulary import Vocabulary
from .encodings import decoded
from .open import Source

# Growth factor of the array of rows while the number of rows is unknown.
_GROWTH = 1.25


class DuplicateTokensWarning(UserWarning):
    """Some tokens of a file occur more than once; only the first row of each is kept.

    Args:
      message: The message.
      number: The number of rows that are left out.
    """

    def __init__(self, message: str, number: int = 0):
        super().__init__(message)
        self.number = number


class Contents(NamedTuple):
    """The contents of a file of vectors."""

    vocabulary: Vocabulary  # the token of each row
    weight: Float[np.ndarray, "rows dim"]  # the vectors
    counts: Int64[np.ndarray, " rows"] | None = None  # how often each token occurs in the training text, if known
    subwords: Any = None  # the `Subwords` of a fastText model, or None
    metadata: Mapping[str, str] | None = None  # how the vectors were made, in words


class Options(NamedTuple):
    """The arguments of `load` that a reader needs."""

    limit: int | None = None  # read only so many rows
    dtype: np.dtype | None = None  # None for the dtype of the file; float32 for text
    mmap: bool | None = None  # None: map the rows if possible without converting them
    encoding: str = "utf-8"  # of the tokens
    errors: str = "escape"  # how tokens that are invalid in the encoding are read, see `encodings.decoded`
    is_decoded: bool = False  # whether the tokens are UTF-8 already, and the user was warned of invalid ones


class Gathered:
    """Collects tokens and rows while a file is read.

    Args:
      source: The file, for messages.
      options: The options of the caller.
      dim: The size of a row.
      dtype: The dtype of the file, used if the caller asks for none.
      expected: The number of rows to allocate memory for. It must not be larger than the size of the file allows.
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
        """Add tokens, given as one text and their lengths in bytes, and their rows."""
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
        """Return the collected tokens, rows and counts. Of rows with the same token, the first is kept."""
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
    """Make an array larger if it has fewer than `rows` rows: by a quarter at least, but not beyond `most` rows."""
    if rows > len(weight):
        roomy = max(rows, int(len(weight) * _GROWTH))
        resize(weight, roomy if most is None else min(roomy, most))


def resize(weight: np.ndarray, rows: int) -> None:
    """Change the number of rows in place. For large arrays the system moves memory pages and copies nothing."""
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
    """Make contents of tokens and rows: decode the tokens, and keep the first row of each token.

    Args:
      source: The file, for messages.
      options: The options of the caller; the text is in their encoding.
      text: The tokens, one after the other.
      offsets: The byte at which each token begins, and the end of the last one; not decreasing.
      weight: One row for each token.
      counts: One count for each token.
      special: The rows of special tokens by role, such as "padding".

    Returns:
      The contents.

    Raises:
      FormatError: If a token is invalid in the encoding and `options.errors` is "strict".
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
