"""Sub-words: fastText's vectors of n-grams, from which every token gets a vector."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64

from ...._base.text import strings as _strings
from ...._base.unit_rows import unit_rows
from ....vocabulary import Vocabulary
from . import ngrams as _ngrams


@runtime_checkable
class Rows(Protocol):
    """A matrix of which rows can be taken: an array, or a compressed one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows and their size."""
        ...

    def take(self, indices: Any, axis: int) -> Float32[np.ndarray, "some dim"]:
        """Return rows."""
        ...


class Ngrams(NamedTuple):
    """The vectors of n-grams. An n-gram has the row `first + hash % buckets`."""

    rows: np.ndarray | Rows  # (words + n-grams, dim) float32: fastText's input matrix
    first: int  # the row of the first n-gram
    minimum: int  # the length of the shortest n-grams, in characters
    maximum: int  # the length of the longest n-grams
    buckets: int
    # If n-grams were pruned: the buckets that were kept, and their rows counted from `first`.
    kept: tuple[Int32[np.ndarray, " kept"], Int32[np.ndarray, " kept"]] | None = None
    line_end: bool = False  # whether "</s>" has n-grams, as in the oldest models


@final
class Subwords:
    """Vectors of n-grams of characters, as fastText learns them.

    A token outside the vocabulary gets the mean of its n-grams' vectors, the same as of fastText's `get_word_vector`. A
    token of the vocabulary also has a row of its own, which is part of its mean. Those means are the weight of the
    vectors that were read with this object; do not ask for them here.

    Args:
      ngrams: The n-grams.
      vocabulary: The tokens with a row of their own.
      own: The row of each of these tokens in `ngrams.rows`.
      encoding: The encoding of the tokens in the file; the bytes in this encoding are hashed.
      raw: The bytes of the tokens in the file, if they differ from the vocabulary's.
      arguments: fastText's arguments from the file.
      unit: Whether the vectors of tokens are scaled to length 1, as in `Vectors.normalized`.

    Example:
      >>> import embax, numpy as np
      >>> from embax.files._formats.fasttext.subwords import Ngrams, Subwords
      >>> rows = np.arange(10, dtype=np.float32)[:, None]
      >>> subwords = Subwords(Ngrams(rows, 1, 3, 3, 9), embax.Vocabulary(["cat"]), np.array([0]))
      >>> subwords
      Subwords(9 rows of n-grams of 3 to 3 characters, dim=1)
      >>> subwords.vectors(["cats", ""])  # the mean of "<ca", "cat", "ats" and "ts>"; "" has no n-gram
      array([[3.75],
             [0.  ]], dtype=float32)
      >>> subwords.covers(["cats", ""])
      array([ True, False])
    """

    def __init__(
        self,
        ngrams: Ngrams,
        vocabulary: Vocabulary,
        own: Int64[np.ndarray, " tokens"],
        *,
        encoding: str = "utf-8",
        raw: _strings.Strings | None = None,
        arguments: tuple[Any, ...] | None = None,
        unit: bool = False,
    ):
        self.ngrams, self.vocabulary, self.own = ngrams, vocabulary, own
        self.encoding, self.arguments = encoding, arguments
        self._raw, self._unit = raw, unit

    @property
    def dim(self) -> int:
        """The size of a vector."""
        return self.ngrams.rows.shape[1]

    def vector(self, token: str) -> Float32[np.ndarray, " dim"]:
        """Return the mean of the vectors of a token's n-grams; zeros if it has none, as fastText does."""
        return self.vectors([token])[0]

    def vectors(self, tokens: Iterable[str]) -> Float32[np.ndarray, "tokens dim"]:
        """Return the vectors of several tokens, see `vector`."""
        words = self._encoded(list(tokens))
        means = np.zeros((words.number, self.dim), np.float32)
        for start, stop, mean in means_of(self.ngrams, words):
            means[start:stop] = mean
        if not self._unit:
            return means
        return unit_rows(means)

    def covers(self, tokens: Iterable[str]) -> Bool[np.ndarray, " tokens"]:
        """Return which tokens have an n-gram; the vectors of the others are zeros."""
        words = self._encoded(list(tokens))
        counts = [numbered(self.ngrams, block)[1] for _, _, block in _blocks(self.ngrams, words)]
        return np.concatenate([np.zeros(0, np.int64), *counts]) > 0

    def normalized(self) -> "Subwords":
        """Return sub-words that give tokens vectors of length 1; zeros for a token without n-grams.

        Files do not store this: after writing and reading, vectors have the same directions but their old lengths.
        """
        return Subwords(
            self.ngrams,
            self.vocabulary,
            self.own,
            encoding=self.encoding,
            raw=self._raw,
            arguments=self.arguments,
            unit=True,
        )

    def encoded(self, vocabulary: Vocabulary) -> _strings.Strings:
        """Return the bytes of tokens in the encoding of the file."""
        if vocabulary is self.vocabulary and self._raw is not None:
            return self._raw
        if self._raw is None and self.encoding == "utf-8":
            text, offsets = vocabulary.utf8
            return _strings.Strings(_strings.padded(text), offsets)
        tokens = vocabulary.tokens()
        words = [_bytes(token, self.encoding) for token in tokens]
        if self._raw is not None:
            text, offsets = self._raw
            for place, row in enumerate(self.vocabulary.ids(tokens, unknown=-1).tolist()):
                if row >= 0:
                    words[place] = text[offsets[row] : offsets[row + 1]].tobytes()
        return _strings.packed(words)

    def own_rows(
        self, vocabulary: Vocabulary, weight: Float[np.ndarray, "rows dim"]
    ) -> Iterator[Float32[np.ndarray, "some dim"]]:
        """Compute the own row of each token, so that its mean with the n-grams is the token's vector.

        A token keeps the row that was read if its vector has not changed. Otherwise, for a vector `v` of a token with
        `n` n-grams, the row is `(n + 1) * v` minus the sum of the n-grams. "</s>" has no n-grams here.

        Args:
          vocabulary: The tokens.
          weight: Their vectors.

        Yields:
          The rows, block by block.
        """
        ngrams, words = self.ngrams._replace(line_end=False), self.encoded(vocabulary)
        same = vocabulary is self.vocabulary
        places = np.arange(len(vocabulary)) if same else self.vocabulary.ids(vocabulary.tokens(), unknown=-1)
        own = np.append(self.own, 0)[places]
        for start, stop, mean in means_of(ngrams, words, own):
            given = weight[start:stop]
            with np.errstate(all="ignore"):
                mean = mean.astype(given.dtype)
            same_bits = ((mean == given) | (np.isnan(mean) & np.isnan(given))).all(axis=1)
            changed = ~same_bits | (places[start:stop] < 0)
            rows = ngrams.rows.take(own[start:stop], axis=0)
            if changed.any():
                some = _strings.taken(words, start + np.flatnonzero(changed))
                rows = np.array(rows)
                rows[changed] = _left_over(ngrams, some, given[changed])
            yield rows

    def __repr__(self) -> str:
        rows, grams = self.ngrams.rows.shape[0] - self.ngrams.first, self.ngrams
        return f"Subwords({rows} rows of n-grams of {grams.minimum} to {grams.maximum} characters, dim={self.dim})"

    def _encoded(self, tokens: list[str]) -> _strings.Strings:
        return _strings.packed([_bytes(token, self.encoding) for token in tokens])


def means_of(
    ngrams: Ngrams, words: _strings.Strings, own: Int64[np.ndarray, " words"] | None = None
) -> Iterator[tuple[int, int, Float32[np.ndarray, "some dim"]]]:
    """Average the own row of each word and the rows of its n-grams.

    Rows are added one after the other in float32 and the sum is multiplied by 1 / number, so that the result is equal
    to fastText's bit by bit.

    Args:
      ngrams: The n-grams.
      words: The words.
      own: The own row of each word. Default: they have none.

    Yields:
      The first word of a block, the one after its last, and the means; zeros for a word without rows.
    """
    for start, stop, block in _blocks(ngrams, words):
        rows, counts = numbered(ngrams, block)
        if own is not None:
            rows, counts = _with_own(rows, counts, own[start:stop])
        means = _summed(ngrams.rows, rows, counts)
        means *= (1 / np.maximum(counts, 1)).astype(np.float32)[:, None]
        yield start, stop, means


def numbered(
    ngrams: Ngrams, words: _strings.Strings
) -> tuple[Int64[np.ndarray, " ngrams"], Int64[np.ndarray, " words"]]:
    """Return the rows of the n-grams, word by word, and the number for each word, without pruned n-grams."""
    hashes, counts = _ngrams.hashed(words, ngrams.minimum, ngrams.maximum, ngrams.line_end)
    buckets = (hashes % np.uint32(ngrams.buckets)).astype(np.int64)
    if ngrams.kept is None:
        return buckets + ngrams.first, counts
    known, places = ngrams.kept
    found = np.searchsorted(known, buckets)
    is_kept = np.append(known, -1)[found] == buckets
    before = np.concatenate([[0], np.cumsum(is_kept)])
    ends = np.concatenate([[0], np.cumsum(counts)])
    return places[found[is_kept]].astype(np.int64) + ngrams.first, np.diff(before[ends])


def _with_own(
    rows: Int64[np.ndarray, " ngrams"], counts: Int64[np.ndarray, " words"], own: Int64[np.ndarray, " words"]
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " words"]]:
    """Insert the own row of each word before the rows of its n-grams."""
    counts = counts + 1
    joined = np.empty(rows.size + own.size, np.int64)
    is_own = np.zeros(joined.size, bool)
    is_own[np.cumsum(counts) - counts] = True
    joined[is_own], joined[~is_own] = own, rows
    return joined, counts


def _blocks(ngrams: Ngrams, words: _strings.Strings) -> Iterator[tuple[int, int, _strings.Strings]]:
    return _ngrams.blocks(words, ngrams.maximum - max(ngrams.minimum, 1) + 1, ngrams.rows.shape[1])


def _summed(
    matrix: np.ndarray | Rows, rows: Int64[np.ndarray, " ngrams"], counts: Int64[np.ndarray, " words"]
) -> Float32[np.ndarray, "words dim"]:
    # Multiplying by a sparse matrix of ones adds the rows in their order, without copying them.
    import scipy.sparse

    if not isinstance(matrix, np.ndarray):
        used, rows = np.unique(rows, return_inverse=True)
        matrix = matrix.take(used, axis=0)
    ends = np.concatenate([[0], np.cumsum(counts)])
    ones = np.ones(rows.size, np.float32)
    return scipy.sparse.csr_array((ones, rows, ends), shape=(counts.size, matrix.shape[0])) @ matrix


def _left_over(ngrams: Ngrams, words: _strings.Strings, weight: np.ndarray) -> Float32[np.ndarray, "words dim"]:
    left = np.empty(weight.shape, np.float32)
    for start, stop, block in _blocks(ngrams, words):
        rows, counts = numbered(ngrams, block)
        # In float64, because subtracting numbers of similar size loses digits.
        with np.errstate(all="ignore"):
            sums = weight[start:stop].astype(np.float64) * (counts + 1)[:, None]
            left[start:stop] = np.where((counts > 0)[:, None], sums - _summed(ngrams.rows, rows, counts), sums)
    return left


def _bytes(token: str, encoding: str) -> bytes:
    try:
        return token.encode(encoding, "surrogateescape")
    except UnicodeError:  # a file in this encoding cannot have this token, so any other bytes will do
        return token.encode(errors="surrogatepass")
