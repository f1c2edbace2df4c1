"""fill: make a weight for another vocabulary from existing vectors."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from .._base import check as _check
from ..vocabulary._vocabulary import UnknownTokenError, Vocabulary, quoted

if TYPE_CHECKING:
    from ._vectors import Vectors

# Rows that are summed at a time, so that temporary memory stays small.
_BLOCK = 1 << 14

Missing = Literal["mean", "random", "zero", "error"]


class MissingTokensWarning(UserWarning):
    """Some tokens have no vector, and got a mean, random or zero one."""


class Filled(NamedTuple):
    """A weight for another vocabulary, with a report of the missing tokens."""

    weight: Float[np.ndarray, "tokens dim"]  # a row for each token
    missing: tuple[str, ...]  # tokens without a vector, in the vocabulary's order
    found: int  # number of tokens with a vector


def filled(vectors: "Vectors", tokens: Vocabulary | Iterable[str], missing: Missing, seed: int) -> Filled:
    """The function behind `Vectors.fill`."""
    missing = _check.choice("embax.Vectors.fill(missing=...)", missing, Missing)
    vocabulary = tokens if isinstance(tokens, Vocabulary) else Vocabulary(tokens)
    names = vocabulary.tokens()
    rows = vectors.vocabulary.ids(names, unknown=-1)
    weight = np.zeros((len(names), vectors.weight.shape[1]), vectors.weight.dtype)
    weight[rows >= 0] = vectors.weight[rows[rows >= 0]]
    absent = np.flatnonzero(rows < 0)
    absent = absent[absent != vocabulary.special.get("padding", -1)]
    if vectors.subwords is not None and absent.size:
        covered = vectors.subwords.covers([names[row] for row in absent])
        weight[absent[covered]] = vectors.subwords.vectors([names[row] for row in absent[covered]])
        absent = absent[~covered]
    if absent.size and missing == "error":
        token = names[int(absent[0])]
        raise UnknownTokenError(token, vectors.vocabulary.closest(token))
    if absent.size and missing != "zero":
        mean, deviation = _moments(vectors.weight)
        noise = np.random.default_rng(seed).normal(size=(absent.size, len(mean))) if missing == "random" else 0
        weight[absent] = mean + deviation * noise
    return Filled(weight, tuple(names[row] for row in absent), len(names) - absent.size)


def warn_of_missing(call: str, filled: Filled) -> None:
    """Warn with the number of tokens that have no vector, if there are any."""
    if filled.missing:
        few = ", ".join(map(quoted, filled.missing[:5]))
        warnings.warn(
            f"`{call}`: {len(filled.missing):,} of {len(filled.weight):,} tokens have no vector, such as {few}. "
            "They were filled in. Pass return_report=True for a list of them.",
            MissingTokensWarning,
            stacklevel=3,
        )


def _moments(weight: Float[np.ndarray, "rows dim"]) -> tuple[Float64[np.ndarray, " dim"], Float64[np.ndarray, " dim"]]:
    """The mean and the standard deviation of each column, over finite rows."""
    number, total, squares = 0, np.zeros(weight.shape[1]), np.zeros(weight.shape[1])
    for start in range(0, len(weight), _BLOCK):
        block = weight[start : start + _BLOCK].astype(np.float64)
        block = block[np.isfinite(block).all(axis=1)]
        number, total, squares = number + len(block), total + block.sum(axis=0), squares + np.square(block).sum(axis=0)
    mean = total / max(1, number)
    return mean, np.sqrt(np.maximum(squares / max(1, number) - np.square(mean), 0))
