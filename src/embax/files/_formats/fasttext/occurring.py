"""The rows of n-grams that occur: most of the 2,000,000 buckets of a model of a small text are zeros.

For instance, with 2 words and 1,000 buckets, of which 5 and 9 occur, four rows are stored: those of the words and those
of the two buckets.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from .subwords import Ngrams

_ROWS = 1 << 14


class OccurringRows:
    """The rows of words and of all buckets. Only the buckets that occur are stored; the rows of all others are zeros.

    Args:
      rows: The rows of words, then the rows of the buckets that occur.
      used: The buckets that occur, rising.
      buckets: The number of all buckets.
    """

    def __init__(self, rows: Float32[np.ndarray, "rows dim"], used: Int64[np.ndarray, " used"], buckets: int):
        self.rows, self.used, self._words = rows, used, len(rows) - len(used)
        self.shape = self._words + buckets, rows.shape[1]

    def take(self, indices: Any, axis: int = 0) -> Float32[np.ndarray, "some dim"]:
        """Return rows by their numbers."""
        indices = np.asarray(indices, np.int64)
        places = np.searchsorted(self.used, indices - self._words)
        exists = (indices < self._words) | (np.append(self.used, -1)[places] == indices - self._words)
        rows = np.where(indices < self._words, indices, self._words + places)
        found = np.zeros((len(indices), self.shape[1]), np.float32)
        found[exists] = self.rows[rows[exists]]
        return found


def occurring(ngrams: Ngrams) -> Int64[np.ndarray, " used"]:
    """Return the buckets that have rows, rising: those that were not pruned, or those whose rows are not zeros."""
    if ngrams.kept is not None:
        return ngrams.kept[0].astype(np.int64)
    if isinstance(ngrams.rows, OccurringRows):
        return ngrams.rows.used
    found, first = [np.zeros(0, np.int64)], 0
    for rows in rows_of(ngrams, np.arange(ngrams.buckets)):
        found.append(first + np.flatnonzero(rows.any(axis=1)))
        first += len(rows)
    return np.concatenate(found)


def rows_of(ngrams: Ngrams, buckets: Int64[np.ndarray, " some"]) -> Iterator[Float32[np.ndarray, "some dim"]]:
    """Read the rows of buckets, block by block.

    Args:
      ngrams: The n-grams.
      buckets: Some of the buckets; if n-grams were pruned, of those that were kept.

    Yields:
      Their rows, in this order.
    """
    places = buckets
    if ngrams.kept is not None:
        places = ngrams.kept[1][np.searchsorted(ngrams.kept[0], buckets)].astype(np.int64)
    for start in range(0, len(buckets), _ROWS):
        yield ngrams.rows.take(places[start : start + _ROWS] + ngrams.first, axis=0)
