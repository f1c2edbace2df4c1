"""Sub-words: the n-grams of words, as fastText cuts and hashes them, numbered for training.

For instance, with n-grams of 3 characters, "cat" has the pieces `cat, <ca, cat, at>`: its own row, and a row for each
n-gram. The vector of "cat" is their mean. Rows of words come first; behind them, training has rows only for the buckets
of hashes that occur. A file has all buckets; the others are zeros.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from ..files._formats.fasttext.model import Arguments
from ..files._formats.fasttext.subwords import Ngrams, Subwords, means_of, numbered
from ..vocabulary import Vocabulary
from ._engines.engine import Model, Options


class NgramOptions(NamedTuple):
    """The options of n-grams."""

    minimum: int  # the length of the shortest n-grams, in characters
    maximum: int  # the length of the longest n-grams
    buckets: int


class Pieces(NamedTuple):
    """The rows of the input table whose mean is the vector of a word."""

    starts: Int64[np.ndarray, " words_and_1"]  # where the rows of each word begin in `ids`, and where the last end
    ids: Int32[np.ndarray, " pieces"]  # the row of a word itself, then the rows of its n-grams
    used: Int64[np.ndarray, " buckets"]  # the bucket of each row behind the words, rising

    @property
    def words(self) -> int:
        """The number of words."""
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        """The number of rows of the input table."""
        return self.words + len(self.used)


class OccurringRows:
    """The rows of words and of all buckets. Only the buckets that occur are stored; the rows of all others are zeros.

    Args:
      rows: The rows of words, then the rows of the buckets that occur.
      pieces: Which buckets these are.
      buckets: The number of all buckets.
    """

    def __init__(self, rows: Float32[np.ndarray, "rows dim"], pieces: Pieces, buckets: int):
        self._rows, self._words, self._used = rows, pieces.words, pieces.used
        self.shape = pieces.words + buckets, rows.shape[1]

    def take(self, indices: Any, axis: int = 0) -> Float32[np.ndarray, "some dim"]:
        """Return rows by their numbers."""
        indices = np.asarray(indices, np.int64)
        places = np.searchsorted(self._used, indices - self._words)
        exists = np.append(self._used, -1)[places] == indices - self._words
        rows = np.where(indices < self._words, indices, np.where(exists, self._words + places, 0))
        found = self._rows[rows]
        found[(indices >= self._words) & ~exists] = 0
        return found


def pieces_of(vocabulary: Vocabulary, options: NgramOptions) -> Pieces:
    """Cut words into n-grams, and number the rows of their hashes.

    Args:
      vocabulary: The words.
      options: The lengths of n-grams, and the number of buckets.

    Returns:
      The pieces of each word.
    """
    number = len(vocabulary)
    nothing = np.zeros((number + options.buckets, 0), np.float32)
    ngrams = Ngrams(nothing, 0, options.minimum, options.maximum, options.buckets)
    words = Subwords(ngrams, vocabulary, np.arange(number)).encoded(vocabulary)
    buckets, counts = numbered(ngrams, words)
    used, places = np.unique(buckets, return_inverse=True)
    starts = np.zeros(number + 1, np.int64)
    np.cumsum(counts + 1, out=starts[1:])
    ids = np.empty(starts[-1], np.int32)
    is_own = np.zeros(len(ids), bool)
    is_own[starts[:-1]] = True
    ids[is_own], ids[~is_own] = np.arange(number), number + places
    return Pieces(starts, ids, used)


def finished(
    vocabulary: Vocabulary,
    pieces: Pieces,
    rows: Float32[np.ndarray, "rows dim"],
    ngram_options: NgramOptions,
    options: Options,
) -> tuple[Float32[np.ndarray, "words dim"], Subwords]:
    """The vectors of all words, bit for bit as fastText computes them from the rows; and the sub-words."""
    own = np.arange(len(vocabulary))
    stored = OccurringRows(rows, pieces, ngram_options.buckets)
    ngrams = Ngrams(stored, len(own), *ngram_options)
    arguments = Arguments(options.dim, options.window, neg=options.negative, model=_model(options.model))
    subwords = Subwords(ngrams, vocabulary, own, arguments=tuple(arguments))
    found = [mean for _, _, mean in means_of(ngrams, subwords.encoded(vocabulary), own)]
    return np.concatenate(found), subwords


def _model(model: Model) -> int:
    """The number of a model in the files of fastText."""
    return {"cbow": 1, "skipgram": 2}[model]
