"""Continue from vectors: known words begin at their vectors, and words that the new text lacks keep theirs.

For instance, of known vectors of "king" and "crown", and a new text of "king" and "queen": "king" and "queen" are
trained, from the known vector and from a fresh one. The result has all three words, "crown" with its known vector.
"""

import hashlib

import numpy as np
from jaxtyping import Float, Float32, Int64

from ..files._formats.fasttext.occurring import occurring, rows_of
from ..files._formats.fasttext.subwords import Subwords
from ..vectors import Vectors
from ..vocabulary import Vocabulary
from ._engines.engine import Known
from ._subwords import InputRows, NgramOptions, Pieces


def checked(argument: str, initial: object, dim: int | None) -> int | None:
    """Check the vectors to continue from, and return the size of a vector."""
    if initial is None:
        return dim
    if not isinstance(initial, Vectors):
        raise TypeError(
            f"`{argument}` must be Vectors, got {type(initial).__name__}. Read them by embax.Vectors.load(path)."
        )
    size = initial.weight.shape[1]
    if size == 0 or dim not in (None, size):
        raise ValueError(f"`{argument}` must have vectors of the size dim={dim}, got {size}. Leave dim out.")
    unusable = np.flatnonzero(~np.isfinite(initial.weight).all(axis=1))
    if unusable.size:
        token = initial.vocabulary.tokens(int(unusable[0]))
        raise ValueError(f"`{argument}` must be finite, got NaN or infinity in the vector of {token!r}. Leave it out.")
    return size


def check_subwords(call: str, initial: Vectors, options: NgramOptions) -> None:
    """Check that a run with n-grams can continue from vectors."""
    subwords = initial.subwords
    if subwords is None or subwords.ngrams.kept is not None or subwords.encoding != "utf-8":
        got = "none" if subwords is None else "pruned ones" if subwords.ngrams.kept is not None else subwords.encoding
        raise ValueError(
            f"`{call}(initial=..., subwords=True)` must have sub-words that are complete and in UTF-8, got {got}. "
            "Continue from a file that was written with sub-words, or leave them out."
        )
    ngrams = subwords.ngrams
    theirs = NgramOptions(ngrams.minimum, ngrams.maximum, ngrams.buckets)
    if theirs != options:
        asked, found = (f"{x.minimum} to {x.maximum} characters in {x.buckets:,} buckets" for x in (options, theirs))
        raise ValueError(
            f"`{call}(initial=..., subwords=True)` must have n-grams as the arguments say, of {asked}, got {found}. "
            "Pass these as `ngram_lengths` and `buckets`."
        )


def digest(initial: Vectors | None) -> str | None:
    """A hash of vectors, to tell runs apart."""
    if initial is None:
        return None
    found = hashlib.sha256(np.ascontiguousarray(initial.weight).data)
    for array in initial.vocabulary.utf8:
        found.update(np.ascontiguousarray(array).data)
    if initial.subwords is not None:
        for rows in rows_of(initial.subwords.ngrams, occurring(initial.subwords.ngrams)):
            found.update(np.ascontiguousarray(rows).data)
    return found.hexdigest()


def known_of(initial: Vectors | None, vocabulary: Vocabulary) -> Known | None:
    """The vectors of the tokens that are known."""
    return None if initial is None else Known(*_places(initial, vocabulary), initial.weight)


def _places(
    initial: Vectors, vocabulary: Vocabulary
) -> tuple[Int64[np.ndarray, " known"], Int64[np.ndarray, " known"]]:
    """The rows of known tokens, now and in `initial`."""
    at = initial.vocabulary.ids(vocabulary.tokens(), unknown=-1)
    rows = np.flatnonzero(at >= 0)
    return rows, at[rows]


def known_pieces(initial: Vectors | None, vocabulary: Vocabulary, pieces: Pieces) -> Known | None:
    """The rows of words and of n-grams that are known. An n-gram that never occurred has a row of zeros: it is not."""
    if initial is None:
        return None
    (rows, at), ngrams = _places(initial, vocabulary), _subwords_of(initial).ngrams
    buckets = np.intersect1d(occurring(ngrams), pieces.used)
    of_buckets = pieces.words + np.searchsorted(pieces.used, buckets)
    weight = np.concatenate([_own_rows(initial)[at], *rows_of(ngrams, buckets)])
    return Known(np.concatenate([rows, of_buckets]), np.arange(len(weight)), weight)


def joined(initial: Vectors | None, trained: InputRows, metadata: dict[str, str]) -> Vectors:
    """Vectors of all words, by falling count and then by spelling; counts are summed."""
    found = trained if initial is None else _joined(initial, initial.weight, trained)
    return Vectors(found.vocabulary, found.rows, found.counts, metadata=metadata)


def joined_pieces(initial: Vectors | None, trained: InputRows) -> InputRows:
    """The rows of all words, in the same order, and of all n-grams."""
    if initial is None:
        return trained
    ngrams, words = _subwords_of(initial).ngrams, len(trained.vocabulary)
    of_words = _joined(initial, _own_rows(initial), trained._replace(rows=trained.rows[:words]))
    others = np.setdiff1d(occurring(ngrams), trained.used)
    used = np.concatenate([trained.used, others])
    rows = np.concatenate([trained.rows[words:], *rows_of(ngrams, others)])
    order = np.argsort(used)
    return of_words._replace(used=used[order], rows=np.concatenate([of_words.rows, rows[order]]))


def _joined(initial: Vectors, weight: Float[np.ndarray, "known dim"], trained: InputRows) -> InputRows:
    tokens = trained.vocabulary.tokens()
    known = initial.vocabulary.ids(tokens, unknown=-1)
    counts = trained.counts + np.append(initial.counts, 0)[known]
    others = np.setdiff1d(np.arange(len(initial)), known)
    tokens = tokens + initial.vocabulary.tokens(others)
    counts = np.concatenate([counts, initial.counts[others]])
    rows = np.concatenate([trained.rows, weight[others].astype(np.float32)])
    order = sorted(range(len(tokens)), key=lambda row: (-counts[row], tokens[row]))
    return InputRows(Vocabulary([tokens[row] for row in order]), counts[order], rows[order])


def _subwords_of(initial: Vectors) -> Subwords:
    if initial.subwords is None:
        raise ValueError("`initial` must have sub-words, got none.")  # `check_subwords` comes before
    return initial.subwords


def _own_rows(initial: Vectors) -> Float32[np.ndarray, "words dim"]:
    """The row of each word, whose mean with the rows of its n-grams is its vector."""
    rows = _subwords_of(initial).own_rows(initial.vocabulary, initial.weight)
    return np.concatenate([np.zeros((0, initial.weight.shape[1]), np.float32), *rows])
