"""How often rows are read: by laws and counts, summed over the rows of each device."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float64, Int64

from .._base import check as _check
from .._mesh.placement import Placement

Frequencies = Literal["uniform"] | float | ArrayLike

CALL = "embax.sharding.plan"
# Of a law over very many rows, the first ones are taken one by one, as many a device at least and as many in all; the
# others in intervals that grow by a fiftieth, by a quadrature of so many points. Sums are right to nine digits; which
# device has how much of them, to four.
_HEAD_A_DEVICE, _HEAD, _GROWTH, _POINTS = 64, 1 << 16, 1.02, 4


class Law(NamedTuple):
    """How often rows are read: alike ones are held once."""

    probability: Float64[np.ndarray, " kinds"]  # of each of the rows of a kind
    number: Float64[np.ndarray, " kinds"]  # of these rows
    owner: Int64[np.ndarray, " kinds"]  # which block of rows they are in, or -1 where they are in all alike
    shards: int

    def by_owner(self, values: Float64[np.ndarray, " kinds"]) -> Float64[np.ndarray, " shards"]:
        """Sum a value of each row over the rows of each block."""
        values, known = values * self.number, self.owner >= 0
        of_owner = np.bincount(self.owner[known], values[known], self.shards)
        return of_owner + values[~known].sum() / self.shards

    def distinct(self, draws: float) -> tuple[Float64[np.ndarray, " shards"], Float64[np.ndarray, " shards"]]:
        """The mean and the variance of how many different rows of each block some draws name."""
        with np.errstate(divide="ignore"):  # of a row that is always drawn
            missed = np.exp(draws * np.log1p(-self.probability)) if draws else np.ones_like(self.probability)
        # Of independent draws, each one that names a row names no other: hence the second term (Poisson counts have
        # only the first).
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
        # The sum from row a up to row b is close to the integral from a - 1/2 to b - 1/2; row r has the rank r + 1.
        first, length = edges[:-1, None] + 0.5, np.diff(edges)[:, None]
        weight.append(np.ravel((first + length * (points + 1) / 2) ** -exponent))
        number.append(np.ravel(length * shares / 2))
        of_edges = np.full(edges.size - 1, -1) if placement.cyclic else (edges[:-1] // block).astype(np.int64)
        owner.append(np.repeat(of_edges, _POINTS))
    weights, numbers = np.concatenate(weight), np.concatenate(number)
    return Law(weights / (weights * numbers).sum(), numbers, np.concatenate(owner), shards)
