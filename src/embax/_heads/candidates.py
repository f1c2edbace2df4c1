"""Candidates: row numbers drawn at random from a known distribution, and the probability of each row.

For instance, a `Unigram` of three rows with weights 2, 1 and 1 cuts the range of uint32, `[0, 2^32)`, at `2^31` and
`3 * 2^30`. A random uint32 of `2^31 + 5` falls in the second piece, so it draws row 1, whose probability is 1/4.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt32
from numpy.typing import ArrayLike

from .._base import check as _check
from .._core import ids as _ids

_NAMES = ("log_uniform", "uniform")
# Rows that are drawn at a time, if more are drawn than the table has.
_BLOCK = 1 << 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Unigram:
    """A distribution that draws rows by their counts, for `sampled_softmax`. Made by `from_counts`.

    `P(r) = counts[r] ** power / sum_s counts[s] ** power`, to a multiple of 2^-32

    A pytree of one array, to be passed into jitted functions. The array holds the end of each row's piece of the range
    of uint32, so a draw is a binary search in `log2(rows)` steps. An alias table would draw in two steps, but needs two
    arrays, and a third one for probabilities; here one array gives exact draws and exact probabilities.

    Example:
      >>> import embax
      >>> embax.Unigram.from_counts([400, 20, 3])
      Unigram(3 rows)
    """

    ends: UInt32[Array, " rows"]

    @classmethod
    def from_counts(cls, counts: ArrayLike, power: float = 0.75) -> "Unigram":
        """Make the distribution from the counts of rows.

        Args:
          counts: How often each row occurs, `(rows,)`, whole numbers or not, dimensionless. A row with 0 is not drawn.
          power: The exponent of the counts, 0 or more: 1 draws rows as often as they occur, 0 all rows alike. Default:
            word2vec's.

        Returns:
          The distribution.

        Raises:
          TypeError: If the counts are not real numbers, or the power is not one.
          ValueError: If the counts are not of one axis, one is negative or not finite, all are 0, or the power is
            negative.

        References:
          Mikolov et al., Distributed representations of words and phrases and their compositionality, 2013,
          https://arxiv.org/abs/1310.4546, section 2.2.
        """
        if isinstance(power, bool) or power != 0:
            power = _check.positive("embax.Unigram.from_counts(power=...)", power)
        if math.isinf(power):
            raise ValueError("`embax.Unigram.from_counts(power=...)` must be finite, got inf. Pass a smaller number.")
        counts = np.asarray(counts)
        if counts.dtype.kind not in "iuf":
            raise TypeError(
                f"`embax.Unigram.from_counts(counts=...)` must be of real numbers, got {counts.dtype}. Pass one a row."
            )
        if counts.ndim != 1:
            raise ValueError(
                "`embax.Unigram.from_counts(counts=...)` must be one number a row, (rows,), got the shape "
                f"{counts.shape}. Flatten them."
            )
        counts = counts.astype(np.float64)
        if not (np.isfinite(counts) & (counts >= 0)).all() or not counts.any():
            raise ValueError(
                "`embax.Unigram.from_counts(counts=...)` must be finite, not negative and not all 0, got "
                f"{counts.tolist() if counts.size < 10 else counts}. Count the rows, or use candidates='uniform'."
            )
        return cls(jnp.asarray(pieces(np.where(counts > 0, counts**power, 0))))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.ends.shape[0]

    def __repr__(self) -> str:
        return f"Unigram({self.rows} rows)" if hasattr(self.ends, "shape") else f"Unigram({self.ends!r})"


Candidates = Literal["log_uniform", "uniform"] | Unigram


def pieces(weights: Float[np.ndarray, " rows"]) -> UInt32[np.ndarray, " rows"]:
    """Cut the range of uint32 into one piece for each row, in proportion to its weight; returns the ends."""
    ends = np.cumsum(weights) / weights.sum() * 2.0**32
    return np.minimum(np.round(ends), 2.0**32 - 1).astype(np.uint32)


def draw_pieces(key: Key[Array, ""], ends: UInt32[Array, " rows"], shape: tuple[int, ...]) -> Int[Array, "*shape"]:
    """Draw rows in proportion to their pieces; the last row has the rest of the range."""
    rows = jnp.searchsorted(ends, jax.random.bits(key, shape, jnp.uint32), side="right")
    return jnp.minimum(rows, ends.shape[0] - 1).astype(jnp.int32)


def checked_candidates(argument: str, candidates: object, rows: int) -> Candidates:
    """Check the `candidates=` of a caller.

    Args:
      argument: The call and its argument, for error messages.
      candidates: The caller's value.
      rows: The number of rows of the table.

    Returns:
      The same value.

    Raises:
      TypeError: If it is neither a name nor a Unigram.
      ValueError: If the name is unknown, or the Unigram is of another number of rows.
    """
    if not isinstance(candidates, str | Unigram):
        raise TypeError(
            f"`{argument}` must be one of {', '.join(map(repr, _NAMES))} or an embax.Unigram, got "
            f"{type(candidates).__name__}. Make one by embax.Unigram.from_counts(counts)."
        )
    if isinstance(candidates, str):
        return _check.choice(argument, candidates, _NAMES)
    if candidates.rows != rows:
        raise ValueError(
            f"`{argument}` must be of the table's {rows} rows, got {candidates!r}. Make one of a count for each row."
        )
    return candidates


def draw_distinct(
    key: Key[Array, ""], candidates: Candidates, samples: int, rows: int
) -> tuple[Int[Array, " candidates"], Bool[Array, " candidates"]]:
    """Draw row numbers with replacement, and mark one of each group of equal numbers.

    Args:
      key: A random key.
      candidates: The distribution.
      samples: The number of draws.
      rows: The number of rows to draw from.

    Returns:
      `min(samples, rows)` row numbers, all of which were drawn; and which of them to count, so that every drawn row
      counts once. Memory follows `min(samples, rows)`.
    """
    if samples <= rows:
        drawn = draw(key, candidates, samples, rows)
        first, _ = _ids.occurrences(drawn)
        return drawn, first == jnp.arange(drawn.size, dtype=first.dtype)
    was_drawn = _was_drawn(key, candidates, samples, rows)
    ids = jnp.arange(rows, dtype=_ids.index_dtype(rows))
    # Places of rows that were not drawn name a drawn row instead, so that no other row gets a gradient, of zeros.
    return jnp.where(was_drawn, ids, jnp.argmax(was_drawn).astype(ids.dtype)) if rows else ids, was_drawn


def _was_drawn(key: Key[Array, ""], candidates: Candidates, samples: int, rows: int) -> Bool[Array, " rows"]:
    """For each row, whether one of `samples` draws hits it; drawn block by block."""
    blocks = -(-samples // _BLOCK)
    size = min(samples, _BLOCK)

    def add(block: Array, was_drawn: Bool[Array, " rows"]) -> Bool[Array, " rows"]:
        block_key = jax.random.fold_in(key, block) if blocks > 1 else key
        drawn = draw(block_key, candidates, size, rows)
        in_block = jnp.where(block == blocks - 1, samples - (blocks - 1) * size, size)
        return was_drawn.at[jnp.where(jnp.arange(size) < in_block, drawn, rows)].set(True, mode="drop")

    return jax.lax.fori_loop(0, blocks, add, jnp.zeros(rows, bool)) if rows else jnp.zeros(0, bool)


def draw(key: Key[Array, ""], candidates: Candidates, samples: int, rows: int) -> Int[Array, " samples"]:
    """Draw row numbers with replacement; an empty array if there are no rows."""
    if rows == 0:
        return jnp.zeros(0, jnp.int32)
    if isinstance(candidates, Unigram):
        return draw_pieces(key, candidates.ends, (samples,))
    index = _ids.index_dtype(rows)
    if candidates == "uniform":
        return jax.random.randint(key, (samples,), 0, rows, index)
    return _draw_log_uniform(key, samples, rows).astype(index)


def probability(candidates: Candidates, ids: Int[Array, "*batch"], rows: int) -> Float[Array, "*batch"]:
    """The probability of each row in one draw; 0 for an id without a row."""
    exists = (ids >= 0) & (ids < rows)
    ids = jnp.where(exists, ids, 0)
    if isinstance(candidates, Unigram):
        chances = _length_of_piece(candidates.ends, ids)
    elif candidates == "uniform":
        chances = jnp.full(ids.shape, 1 / max(rows, 1), jnp.float32)
    else:
        chances = jnp.log1p(1 / (ids.astype(jnp.float32) + 1)) / math.log(rows + 1) if rows else exists
    return jnp.where(exists, chances.astype(jnp.float32), 0)


def _length_of_piece(ends: UInt32[Array, " rows"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    if ends.shape[0] == 1:
        return jnp.ones(ids.shape, jnp.float32)
    begin = jnp.where(ids > 0, ends.at[jnp.maximum(ids - 1, 0)].get(mode="clip"), 0)
    end = jnp.where(ids < ends.shape[0] - 1, ends.at[ids].get(mode="clip"), 0)  # 0 is 2**32, the end of the range
    return (end - begin).astype(jnp.float32) * 2.0**-32


def _draw_log_uniform(key: Key[Array, ""], samples: int, rows: int) -> Integer[Array, " samples"]:
    """Draw by the inverse of the distribution function: `r + 1 = floor((rows + 1) ** u)`."""
    real, whole, signed = (
        (jnp.float64, jnp.uint64, jnp.int64) if rows > np.iinfo(np.int32).max else (jnp.float32, jnp.uint32, jnp.int32)
    )
    key, key_inside = jax.random.split(key)
    exponent = math.log(rows + 1)
    place = jnp.exp(jax.random.uniform(key, (samples,), real) * exponent)
    # Uniform float32 numbers are multiples of 2**-23, and their products with the exponent are rounded again. Among 100
    # million rows, neighbouring draws would skip hundreds of rows. So each draw is spread evenly over two such steps.
    # The whole part and the spread are added as integers, since float32 counts only up to 2**24.
    step = exponent * 2.0 ** -jnp.finfo(real).nmant
    spread = place * (step * (2 * jax.random.uniform(key_inside, (samples,), real) - 0.5))
    below = jnp.floor(place)
    more = jnp.floor(place - below + spread).astype(signed)
    number = below.astype(whole) + jax.lax.bitcast_convert_type(more, whole)
    return jnp.clip(number, 1, rows) - 1
