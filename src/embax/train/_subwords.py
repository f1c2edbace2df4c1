"""Sub-words: the n-grams of words, as fastText cuts and hashes them, numbered for training.

For instance, with n-grams of 3 characters, "cat" has the pieces `cat, <ca, cat, at>`: its own row, and a row for each
n-gram. The vector of "cat" is their mean. Rows of words come first; behind them, training has rows only for the buckets
of hashes that occur.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from ..files._formats.fasttext.model import Arguments
from ..files._formats.fasttext.occurring import OccurringRows
from ..files._formats.fasttext.subwords import Ngrams, Subwords, means_of, numbered
from ..vocabulary import Vocabulary
from ._engines.engine import Model, Options

_NO_BUCKETS = np.zeros(0, np.int64)


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


class InputRows(NamedTuple):
    """The rows of an input table, with what they stand for."""

    vocabulary: Vocabulary
    counts: Int64[np.ndarray, " words"]
    rows: Float32[np.ndarray, "rows dim"]  # of the words, then of the buckets
    used: Int64[np.ndarray, " buckets"] = _NO_BUCKETS  # those that have rows, rising


def finished(
    trained: InputRows, ngram_options: NgramOptions, options: Options
) -> tuple[Float32[np.ndarray, "words dim"], Subwords]:
    """The vectors of all words, bit for bit as fastText computes them from the rows; and the sub-words."""
    own = np.arange(len(trained.vocabulary))
    stored = OccurringRows(trained.rows, trained.used, ngram_options.buckets)
    ngrams = Ngrams(stored, len(own), *ngram_options)
    arguments = Arguments(options.dim, options.window, neg=options.negative, model=_model(options.model))
    subwords = Subwords(ngrams, trained.vocabulary, own, arguments=tuple(arguments))
    found = [mean for _, _, mean in means_of(ngrams, subwords.encoded(trained.vocabulary), own)]
    return np.concatenate(found), subwords


def _model(model: Model) -> int:
    """The number of a model in the files of fastText."""
    return {"cbow": 1, "skipgram": 2}[model]
