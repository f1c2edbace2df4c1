"""Pooling of pieces in steps: words read the mean of their rows, and move each of these rows.

Words have different numbers of pieces, and a step has a static shape. So the pieces of a step's words are laid one
after the other, and handled `width` at a time until none is left. For instance, words with 3, 1 and 2 pieces have the
pieces `0 0 0 1 2 2`, by word; with a width of 4 they take two rounds.

A word that occurs several times in a step is handled once: at one of its places, its owner (see `_base.distinct`), with
the moves of all its places.

As in fastText, each row of a mean gets its whole gradient, so the mean moves as far as a word's own row would.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from .._subwords import Pieces


class Pooling(NamedTuple):
    """Pieces on the device. Behind the words is one without pieces, for padding."""

    starts: Int32[Array, " words_and_2"]
    ids: Int32[Array, " pieces"]


class Round(NamedTuple):
    """Pieces that are handled together."""

    place: Int32[Array, " width"]  # the place of the piece's word
    row: Int32[Array, " width"]  # the row of the piece
    exists: Bool[Array, " width"]


class Scratch(NamedTuple):
    """Memory that is reused from step to step."""

    slots: Int32[Array, " words"]  # the owner of each word
    place: Int32[Array, " most"]  # the pieces of a step, from `pooled` for `moved`, see `Round`
    row: Int32[Array, " most"]
    number: Int32[Array, ""]  # of these pieces
    totals: Float32[Array, " rows"]  # zeros before and after `moved`, so that no step touches all rows


def on_device(pieces: Pieces) -> Pooling:
    """Copy pieces to the device, with padding as one more word, without pieces."""
    starts = np.append(pieces.starts, pieces.starts[-1])
    return Pooling(jnp.asarray(starts, jnp.int32), jnp.asarray(pieces.ids))


def numbers(pooling: Pooling, words: Int32[Array, "*batch"]) -> Int32[Array, "*batch"]:
    """The number of pieces of each word."""
    return pooling.starts[words + 1] - pooling.starts[words]


def scratch_of(rows: int, words: int, places: int, longest: int, width: int) -> Scratch:
    """Make the memory for steps of so many places, whose words have up to `longest` pieces."""
    most = jnp.zeros(-(-places * longest // width) * width, jnp.int32)
    return Scratch(jnp.zeros(words, jnp.int32), most, most, jnp.int32(0), jnp.zeros(rows, jnp.float32))


def owners(
    slots: Int32[Array, " rows"], ids: Int32[Array, " places"]
) -> tuple[Int32[Array, " rows"], Int32[Array, " places"]]:
    """Choose one of the places of each id, its owner, by slots, see `_base.distinct.scratch`; ids must be in bounds."""
    slots = slots.at[ids].set(jnp.arange(ids.size, dtype=jnp.int32), mode="promise_in_bounds")
    return slots, slots.at[ids].get(mode="promise_in_bounds")


def _each_round(scratch: Scratch, width: int, do: Callable[[Round, Any], Any], start: Any) -> Any:
    """Handle the pieces of a step, `width` at a time: `state = do(round, state)`, from `start` on."""

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        first, state = carry
        place, row = (jax.lax.dynamic_slice(x, (first,), (width,)) for x in (scratch.place, scratch.row))
        exists = first + jnp.arange(width, dtype=jnp.int32) < scratch.number
        return first + width, do(Round(place, row, exists), state)

    return jax.lax.while_loop(lambda carry: carry[0] < scratch.number, body, (jnp.int32(0), start))[1]


def _listed(pooling: Pooling, scratch: Scratch, words: Int32[Array, " places"], width: int) -> Scratch:
    """List the pieces of words, one word after the other."""
    ends = jnp.cumsum(numbers(pooling, words))
    begins = ends - numbers(pooling, words)
    total = ends[-1]

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        first, place, row = carry
        pieces = first + jnp.arange(width, dtype=jnp.int32)
        places = jnp.searchsorted(ends, pieces, side="right", method="scan_unrolled").astype(jnp.int32)
        exists = pieces < total
        places = jnp.where(exists, places, 0)
        rows = pooling.ids[jnp.where(exists, pooling.starts[words[places]] + pieces - begins[places], 0)]
        place, row = (
            jax.lax.dynamic_update_slice(buffer, new, (first,)) for buffer, new in ((place, places), (row, rows))
        )
        return first + width, place, row

    start = jnp.int32(0), scratch.place, scratch.row
    _, place, row = jax.lax.while_loop(lambda carry: carry[0] < total, body, start)
    return scratch._replace(place=place, row=row, number=total)


def pooled(
    pooling: Pooling, weight: Float32[Array, "rows dim"], scratch: Scratch, words: Int32[Array, "*batch"], width: int
) -> tuple[Float32[Array, "*batch dim"], Scratch]:
    """The mean of the rows of each word."""
    flat = jnp.ravel(words)
    slots, owner = owners(scratch.slots, flat)
    once = jnp.where(owner == jnp.arange(flat.size, dtype=jnp.int32), flat, pooling.starts.size - 2)
    scratch = _listed(pooling, scratch._replace(slots=slots), once, width)

    def add(of: Round, sums: Array) -> Array:
        rows = jnp.where(of.exists[:, None], weight.at[of.row].get(mode="promise_in_bounds"), np.float32(0))
        return sums.at[of.place].add(rows, mode="promise_in_bounds")

    sums = _each_round(scratch, width, add, jnp.zeros((flat.size, weight.shape[1]), weight.dtype))
    means = sums / jnp.maximum(numbers(pooling, once), 1).astype(jnp.float32)[:, None]
    means = means.at[owner].get(mode="promise_in_bounds")
    return jnp.reshape(means, (*words.shape, weight.shape[1])), scratch


def moved(
    weight: Float32[Array, "rows dim"],
    scratch: Scratch,
    words: Int32[Array, "*batch"],
    moves: Float32[Array, "*batch dim"],
    curvature: Float32[Array, "*batch"],
    rate: Callable[[Float32[Array, " width"]], Float32[Array, " width"]],
    width: int,
) -> tuple[Float32[Array, "rows dim"], Scratch]:
    """Move the rows of words; the sum of curvatures over the words of a row gives its rate.

    Args:
      weight: The input table.
      scratch: From `pooled` of the same words.
      words: The words.
      moves: The gradient of each word.
      curvature: The curvature of each word.
      rate: Gives the rate for a sum of curvatures.
      width: The number of pieces of a round.

    Returns:
      The table, and the memory for the next step.
    """
    owner = scratch.slots.at[jnp.ravel(words)].get(mode="promise_in_bounds")
    moves = jnp.zeros((owner.size, weight.shape[1]), moves.dtype).at[owner].add(jnp.reshape(moves, (owner.size, -1)))
    curvature = jnp.zeros(owner.size, curvature.dtype).at[owner].add(jnp.ravel(curvature))
    zero = np.float32(0)

    def add(of: Round, totals: Array) -> Array:
        return totals.at[of.row].add(jnp.where(of.exists, curvature[of.place], zero), mode="promise_in_bounds")

    totals = _each_round(scratch, width, add, scratch.totals)

    def move(of: Round, weight: Array) -> Array:
        rates = jnp.where(of.exists, rate(totals[of.row]), zero)
        return weight.at[of.row].add(rates[:, None] * moves[of.place], mode="promise_in_bounds")

    weight = _each_round(scratch, width, move, weight)

    def clear(of: Round, totals: Array) -> Array:
        return totals.at[of.row].set(zero, mode="promise_in_bounds")

    return weight, scratch._replace(totals=_each_round(scratch, width, clear, totals))


def padded(pooling: Pooling, words: Int32[Array, "*batch"], longest: int, rows: int) -> Int32[Array, "*batch longest"]:
    """The rows of each word, filled up with the sentinel `rows`, for storages that exchange rows."""
    places = jnp.arange(longest, dtype=jnp.int32)
    at = pooling.starts[words][..., None] + jnp.reshape(places, (1,) * words.ndim + (longest,))
    exists = jnp.reshape(places, (1,) * words.ndim + (longest,)) < numbers(pooling, words)[..., None]
    return jnp.where(exists, pooling.ids[jnp.where(exists, at, 0)], rows)
