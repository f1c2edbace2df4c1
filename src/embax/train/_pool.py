"""Pooling of pieces in steps: words read the mean of their rows, and move each of these rows.

Words have different numbers of pieces, and a step has a static shape. So the pieces of a step's words are laid one
after the other, and handled `width` at a time until none is left. For instance, words with 3, 1 and 2 pieces have the
pieces `0 0 0 1 2 2`, by word; with a width of 4 they take two rounds.

As in fastText, each row of a mean gets its whole gradient, so the mean moves as far as a word's own row would.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from ._subwords import Pieces


class Pooling(NamedTuple):
    """Pieces on the device. The last two words, without pieces, are padding and the end."""

    starts: Int32[Array, " words_and_2"]
    ids: Int32[Array, " pieces"]


class Round(NamedTuple):
    """Pieces of some words that are handled together."""

    word: Int32[Array, " width"]  # the place of the piece's word; any place where there is no piece
    row: Int32[Array, " width"]  # the row of the piece
    exists: Bool[Array, " width"]


def on_device(pieces: Pieces) -> Pooling:
    """Copy pieces to the device, with padding as one more word, without pieces."""
    starts = np.append(pieces.starts, pieces.starts[-1])
    return Pooling(jnp.asarray(starts, jnp.int32), jnp.asarray(pieces.ids))


def numbers(pooling: Pooling, words: Int32[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """The number of pieces of each word."""
    return pooling.starts[words + 1] - pooling.starts[words]


def each_round(
    pooling: Pooling, words: Int32[Array, " places"], width: int, do: Callable[[Round, Any], Any], start: Any
) -> Any:
    """Handle the pieces of some words, `width` at a time: `state = do(round, state)`, from `start` on."""
    ends = jnp.cumsum(numbers(pooling, words))
    begins = ends - numbers(pooling, words)

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        first, state = carry
        places = first + jnp.arange(width, dtype=jnp.int32)
        word = jnp.searchsorted(ends, places, side="right", method="scan_unrolled").astype(jnp.int32)
        exists = places < ends[-1]
        word = jnp.where(exists, word, 0)
        row = pooling.ids[jnp.where(exists, pooling.starts[words[word]] + places - begins[word], 0)]
        return first + width, do(Round(word, row, exists), state)

    return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], body, (jnp.int32(0), start))[1]


def pooled(
    pooling: Pooling, weight: Float32[Array, "rows dim"], words: Int32[Array, "*batch"], width: int
) -> Float32[Array, "*batch dim"]:
    """The mean of the rows of each word; zeros for padding."""
    flat = jnp.ravel(words)

    def add(of: Round, sums: Array) -> Array:
        rows = jnp.where(of.exists[:, None], weight.at[of.row].get(mode="promise_in_bounds"), np.float32(0))
        return sums.at[of.word].add(rows, mode="promise_in_bounds")

    sums = each_round(pooling, flat, width, add, jnp.zeros((flat.size, weight.shape[1]), weight.dtype))
    means = sums / jnp.maximum(numbers(pooling, flat), 1).astype(jnp.float32)[:, None]
    return jnp.reshape(means, (*words.shape, weight.shape[1]))


def moved(
    pooling: Pooling,
    weight: Float32[Array, "rows dim"],
    totals: Float32[Array, " rows"],
    words: Int32[Array, "*batch"],
    moves: Float32[Array, "*batch dim"],
    curvature: Float32[Array, "*batch"],
    rate: Callable[[Float32[Array, " width"]], Float32[Array, " width"]],
    width: int,
) -> tuple[Float32[Array, "rows dim"], Float32[Array, " rows"]]:
    """Move the rows of words; the sum of curvatures over the words of a row gives its rate.

    Args:
      pooling: The pieces.
      weight: The input table.
      totals: Zeros, which are returned as zeros, so that no step touches all rows.
      words: The words.
      moves: The gradient of each word.
      curvature: The curvature of each word.
      rate: Gives the rate for a sum of curvatures.
      width: The number of pieces of a round.

    Returns:
      The table, and the zeros.
    """
    flat, moves, curvature = jnp.ravel(words), jnp.reshape(moves, (-1, weight.shape[1])), jnp.ravel(curvature)
    zero = np.float32(0)

    def add(of: Round, totals: Array) -> Array:
        return totals.at[of.row].add(jnp.where(of.exists, curvature[of.word], zero), mode="promise_in_bounds")

    totals = each_round(pooling, flat, width, add, totals)

    def move(of: Round, weight: Array) -> Array:
        rates = jnp.where(of.exists, rate(totals[of.row]), zero)
        return weight.at[of.row].add(rates[:, None] * moves[of.word], mode="promise_in_bounds")

    weight = each_round(pooling, flat, width, move, weight)
    # Rows of no piece are set, too, to the zero that they have.
    clear = lambda of, totals: totals.at[of.row].set(zero, mode="promise_in_bounds")  # noqa: E731
    return weight, each_round(pooling, flat, width, clear, totals)


def padded(pooling: Pooling, words: Int32[Array, "*batch"], longest: int, rows: int) -> Int32[Array, "*batch longest"]:
    """The rows of each word, filled up with the sentinel `rows`, for storages that exchange rows."""
    places = jnp.arange(longest, dtype=jnp.int32)
    at = pooling.starts[words][..., None] + jnp.reshape(places, (1,) * words.ndim + (longest,))
    exists = jnp.reshape(places, (1,) * words.ndim + (longest,)) < numbers(pooling, words)[..., None]
    return jnp.where(exists, pooling.ids[jnp.where(exists, at, 0)], rows)
