"""Queries by token: parse them, and compute the direction that each asks for.

For instance, the query `(["king", "woman"], ["man"])` asks for `unit(king) + unit(woman) - unit(man)`, scaled to
length 1; the rows of these three tokens are left out of the answers.
"""

import mmap
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy.typing import ArrayLike, DTypeLike

from ..vocabulary._vocabulary import UnknownTokenError, quoted
from . import _nearest as _queries

if TYPE_CHECKING:
    from ._queries import Queries

# Rows that are checked at a time, so that temporary memory stays small.
_BLOCK = 1 << 14

# A token or a vector; a list of them, whose directions are added; or a pair of such lists, the second one subtracted.
Query = Any


class NotFiniteWarning(UserWarning):
    """Some vectors have NaN or infinity, and are left out of queries."""


def as_list(items: Query) -> list[Query]:
    """Return a list of tokens and vectors, given one or several."""
    if isinstance(items, str) or is_vector(items):
        return [items]
    return list(items)


def names_of(tokens: Any) -> list[str]:
    """Return a list of tokens, given one or several.

    Raises:
      TypeError: If one is not a token.
    """
    names = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Iterable) else list(tokens)
    others = [name for name in names if not isinstance(name, str)]
    if others:
        raise TypeError(
            f"`embax.Vectors[...]` must be a token or several, got {others[0]!r}. For rows, take `.weight`."
        )
    return names


def is_vector(item: Any) -> bool:
    """Whether a query is one vector: a 1-D array of any library, or a list of numbers."""
    if hasattr(item, "ndim"):
        return item.ndim == 1
    return isinstance(item, list | tuple) and len(item) > 0 and all(isinstance(number, Real) for number in item)


def directions_of(
    call: str, vectors: "Queries", unit: Float32[np.ndarray, "rows dim"], queries: Sequence[Query]
) -> tuple[Float32[np.ndarray, "queries dim"], Int64[np.ndarray, "queries most"]]:
    """Sum the directions of each query.

    Args:
      call: The call and its argument, for error messages.
      vectors: The vectors.
      unit: The vectors, scaled to length 1.
      queries: The queries; each has one or more tokens and vectors.

    Returns:
      A direction for each query, of length 1 or 0; and the rows of the tokens it names, -1 in unused places.

    Raises:
      UnknownTokenError: If a token has no vector.
      ValueError: If a query is empty, or a vector is of another shape, or has NaN or infinity.
    """
    parts = [_parts(call, query) for query in queries]
    asked = np.full((len(parts), max(map(len, parts), default=0)), -1, np.int64)
    total = np.zeros((len(parts), unit.shape[1]), np.float32)
    items = [
        (number, place, item, sign)
        for number, of_query in enumerate(parts)
        for place, (item, sign) in enumerate(of_query)
    ]
    named = [entry for entry in items if isinstance(entry[2], str)]
    others = [(number, item, sign) for number, _, item, sign in items if not isinstance(item, str)]
    rows = vectors.vocabulary.ids([item for *_, item, _ in named], unknown=-1)
    owners = np.asarray([number for number, *_ in named], np.int64)
    signs = np.asarray([sign for *_, sign in named], np.float32)
    asked[owners, np.asarray([place for _, place, *_ in named], np.int64)] = rows
    known = rows >= 0
    np.add.at(total, owners[known], unit[rows[known]] * signs[known, None])
    unknown = [named[place] for place in np.flatnonzero(~known)]
    if unknown:
        found = of_subwords(vectors, [token for *_, token, _ in unknown])
        others += [(number, row, sign) for (number, *_, sign), row in zip(unknown, found, strict=True)]
    for number, vector, sign in others:
        total[number] += sign * _direction(call, vector, unit.shape[1])
    bad = np.flatnonzero(~np.isfinite(total).all(axis=1))
    if bad.size:
        names = ", ".join(quoted(item) if isinstance(item, str) else "a vector" for item, _ in parts[bad[0]])
        raise ValueError(
            f"`{call}` must have finite vectors, got {names}, one of which has NaN or infinity. Leave it out."
        )
    return _queries.unit_rows(total), asked


def of_subwords(vectors: "Queries", tokens: Sequence[str]) -> Float32[np.ndarray, "tokens dim"]:
    """Return the vectors of tokens that are not in the vocabulary, from fastText's n-grams.

    Raises:
      UnknownTokenError: If a token has no n-grams, or the vectors have none.
    """
    subwords = vectors.subwords
    covered = np.zeros(len(tokens), bool) if subwords is None else subwords.covers(tokens)
    if subwords is None or not covered.all():
        token = tokens[int(np.argmin(covered))]
        raise UnknownTokenError(token, vectors.vocabulary.closest(token))
    return subwords.vectors(tokens)


def warn_of_not_finite(name: str, weight: Float[np.ndarray, "rows dim"]) -> None:
    """Warn with the number of rows that have NaN or infinity, if there are any.

    Args:
      name: The start of the message.
      weight: The rows.
    """
    number = 0
    for start in range(0, len(weight), _BLOCK):
        block = weight[start : start + _BLOCK]
        # A row with a finite sum is finite. The others are checked entry by entry: a sum may also overflow.
        with np.errstate(all="ignore"):
            suspects = block[~np.isfinite(block @ np.ones(block.shape[1], block.dtype))]
        number += int((~np.isfinite(suspects).all(axis=1)).sum())
    if number:
        warnings.warn(
            f"{name}: {number:,} of {len(weight):,} vectors hold NaN or infinity. Queries leave them out.",
            NotFiniteWarning,
            stacklevel=4,
        )


def is_mapped(array: object) -> bool:
    """Whether an array is a view of a memory-mapped file."""
    while array is not None and not isinstance(array, np.memmap | mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


def read_only(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """A read-only view of an array, since results computed from it are cached; the caller's array stays writable."""
    array = np.asarray(values, dtype).view()
    array.flags.writeable = False
    return array


def float_dtype(values: object) -> np.dtype:
    """The dtype of a float array; float32 for anything else."""
    dtype = np.dtype(getattr(values, "dtype", object))
    if dtype.kind == "f":
        return dtype.newbyteorder("=")  # JAX accepts only the native byte order
    # The floats of ml_dtypes, such as bfloat16, do not have NumPy's kind "f".
    return dtype if "float" in dtype.name else np.dtype(np.float32)


def _parts(call: str, query: Query) -> list[tuple[Query, float]]:
    """The tokens and vectors of a query, each with its sign."""
    is_pair = isinstance(query, tuple) and len(query) == 2 and not is_vector(query)
    if is_pair and not any(isinstance(part, str) for part in query):
        positive, negative = map(as_list, query)
    else:
        positive, negative = as_list(query), []
    parts = [(item, 1.0) for item in positive] + [(item, -1.0) for item in negative]
    if not parts:
        raise ValueError(f"`{call}` must name a token, got none. Pass one.")
    return parts


def _direction(call: str, vector: object, dim: int) -> Float32[np.ndarray, " dim"]:
    vector = np.asarray(vector)
    # The floats of ml_dtypes, such as bfloat16, do not have NumPy's kind "f".
    if vector.shape != (dim,) or not (vector.dtype.kind in "iuf" or "float" in vector.dtype.name):
        raise ValueError(
            f"`{call}` must be tokens, or vectors of {dim} numbers, got {vector.dtype} of shape {vector.shape}. Pass "
            "one of these."
        )
    return _queries.unit_rows(vector[None].astype(np.float64))[0]
