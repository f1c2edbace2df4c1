"""Continue from vectors: known words begin at their vectors, and words that the new text lacks keep theirs.

For instance, of known vectors of "king" and "crown", and a new text of "king" and "queen": "king" and "queen" are
trained, from the known vector and from a fresh one. The result has all three words, "crown" with its known vector.
"""

import hashlib

import numpy as np
from jaxtyping import Float32, Int64

from ..vectors import Vectors
from ..vocabulary import Vocabulary
from ._engines.engine import Known


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


def digest(initial: Vectors | None) -> str | None:
    """A hash of vectors, to tell runs apart."""
    if initial is None:
        return None
    found = hashlib.sha256(np.ascontiguousarray(initial.weight).data)
    for array in initial.vocabulary.utf8:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def known_of(initial: Vectors | None, vocabulary: Vocabulary) -> Known | None:
    """The vectors of the tokens that are known."""
    if initial is None:
        return None
    at = initial.vocabulary.ids(vocabulary.tokens(), unknown=-1)
    rows = np.flatnonzero(at >= 0)
    return Known(rows, at[rows], initial.weight)


def joined(
    initial: Vectors | None,
    vocabulary: Vocabulary,
    weight: Float32[np.ndarray, "rows dim"],
    counts: Int64[np.ndarray, " rows"],
    metadata: dict[str, str],
) -> Vectors:
    """Vectors of all words, by falling count and then by spelling; counts are summed."""
    if initial is None:
        return Vectors(vocabulary, weight, counts, metadata=metadata)
    tokens = vocabulary.tokens()
    known = initial.vocabulary.ids(tokens, unknown=-1)
    counts = counts + np.append(initial.counts, 0)[known]
    others = np.setdiff1d(np.arange(len(initial)), known)
    tokens = tokens + initial.vocabulary.tokens(others)
    counts = np.concatenate([counts, initial.counts[others]])
    weight = np.concatenate([weight, initial.weight[others].astype(np.float32)])
    order = sorted(range(len(tokens)), key=lambda row: (-counts[row], tokens[row]))
    return Vectors([tokens[row] for row in order], weight[order], counts[order], metadata=metadata)
