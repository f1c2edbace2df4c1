"""How often rows are read: by a law or by counts, summed over the rows of each owner."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float64, Int64

from .._base import check as _check
from .._mesh.placement import Placement

Frequencies = Literal["uniform"] | float | ArrayLike

CALL = "embax.sharding.plan"
# Zipf's law over very many rows: the first rows are summed one by one, at least 64 for each device and 65,536 in total.
# The rest is cut into intervals that grow by 2 %, each integrated by 4 points. Sums are right to nine digits, the share
# of each device to four.
_HEAD_A_DEVICE, _HEAD, _GROWTH, _POINTS = 64, 1 << 16, 1.02, 4


class Law(NamedTuple):
    """How often rows are read; rows of equal probability are held once."""

    probability: Float64[np.ndarray, " kinds"]  # the probability of each row of a kind
    number: Float64[np.ndarray, " kinds"]  # the number of rows of a kind
    owner: Int64[np.ndarray, " kinds"]  # the owner of these rows, or -1 if all owners have equally many
    shards: int

    def by_owner(self, values: Float64[np.ndarray, " kinds"]) -> Float64[np.ndarray, " shards"]:
        """Sum a value of each row over the rows of each owner."""
        values, known = values * self.number, self.owner >= 0
        of_owner = np.bincount(self.owner[known], values[known], self.shards)
        return of_owner + values[~known].sum() / self.shards

    def distinct(self, draws: float) -> tuple[Float64[np.ndarray, " shards"], Float64[np.ndarray, " shards"]]:
        """The mean and the variance of the number of distinct rows of each owner among `draws` draws."""
        with np.errstate(divide="ignore"):  # a row that is always drawn
            missed = np.exp(draws * np.log1p(-self.probability)) if draws else np.ones_like(self.probability)
        # The second term: a draw that hits one row misses the others. Poisson counts have only the first term.
        spread = self.by_owner(missed * (1 - missed)) - draws * self.by_owner(self.probability * missed) ** 2
        return self.by_owner(1 - missed), np.maximum(spread, 0)


def law_of(placement: Placement, name: str, frequencies: Any) -> Law:
    rows, shards = placement.rows, placement.shards
    if isinstance(frequencies, str):
        _check.choice(f"{CALL}(frequencies=...)", frequencies, ("uniform",))
        frequencies = 0.0
    if np.ndim(frequencies) == 0:
        exponent = _exponent(frequencies)
        return _uniform(placement) if exponent == 0 or rows == 0 else _zipf(placement, exponent)
    counts = np.asarray(frequencies, np.float64)
    if counts.shape != (rows,) or not np.isfinite(counts).all() or (counts < 0).any() or (rows and not counts.any()):
        raise ValueError(
            f"`{CALL}(frequencies=...)` must be a count for each of the {rows} rows of {name!r}, none negative and "
            f"not all 0, got shape {counts.shape}. Count the ids of some batches with np.bincount(ids, minlength=rows)."
        )
    return Law(counts / max(counts.sum(), 1e-300), np.ones(rows), _owners(placement, np.arange(rows)), shards)


def _exponent(value: Any) -> float:
    exponent = (
        0.0 if isinstance(value, int | float) and value == 0 else _check.positive(f"{CALL}(frequencies=...)", value)
    )
    if math.isinf(exponent):
        raise ValueError(f"`{CALL}(frequencies=...)` must be a finite exponent, got {exponent}. Pass 1.05, say.")
    return exponent


def _owners(placement: Placement, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    return rows % placement.shards if placement.cyclic else rows // max(placement.block, 1)


def _uniform(placement: Placement) -> Law:
    rows, shards, owner = placement.rows, placement.shards, np.arange(placement.shards)
    number = (rows - owner + shards - 1) // shards if placement.cyclic else rows - owner * placement.block
    number = np.clip(number, 0, placement.block).astype(np.float64)
    return Law(np.full(shards, 1 / max(rows, 1)), number, owner, shards)


def _zipf(placement: Placement, exponent: float) -> Law:
    """Zipf's law, without an array of all rows."""
    rows, shards, block = placement.rows, placement.shards, placement.block
    head = min(rows, shards * max(_HEAD_A_DEVICE, -(-_HEAD // shards)))
    weight, number, owner = (
        [np.arange(1, head + 1.0) ** -exponent],
        [np.ones(head)],
        [_owners(placement, np.arange(head))],
    )
    if head < rows:
        edges = np.geomspace(head, rows, 2 + math.ceil(math.log(rows / head) / math.log(_GROWTH))).round()
        edges = edges if placement.cyclic else np.concatenate([edges, np.arange(1, shards) * float(block)])
        edges = np.unique(edges[(edges >= head) & (edges <= rows)])
        points, shares = np.polynomial.legendre.leggauss(_POINTS)
        # The sum over the rows from a up to b is close to the integral from a - 1/2 to b - 1/2; row r has rank r + 1.
        first, length = edges[:-1, None] + 0.5, np.diff(edges)[:, None]
        weight.append(np.ravel((first + length * (points + 1) / 2) ** -exponent))
        number.append(np.ravel(length * shares / 2))
        of_edges = np.full(edges.size - 1, -1) if placement.cyclic else (edges[:-1] // block).astype(np.int64)
        owner.append(np.repeat(of_edges, _POINTS))
    weights, numbers = np.concatenate(weight), np.concatenate(number)
    return Law(weights / (weights * numbers).sum(), numbers, np.concatenate(owner), shards)
