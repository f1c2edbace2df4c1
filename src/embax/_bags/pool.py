"""Pooling: sums and largest values of the rows of bags. Sums need no array of all rows.

Bags of one length are summed position by position: the first row of each bag, then the second one, and so on. So memory
holds one vector for each bag. For instance, 1,000 bags of 50 ids take 50 steps, each of which adds 1,000 rows.

Bags of different lengths, a Ragged, are first cut into pieces of 16 ids, which are bags of one length. For instance,
bags of 40, 0 and 5 ids:

    pieces    16, 16 and 8 ids of bag 0; 5 ids of bag 2; the last pieces of a bag are padded
    sums      four vectors (and some unused ones, since the number of pieces is static)
    result    bag 0 is the sum of the first three, bag 1 is zero, bag 2 is the fourth

A bag of more than 1,024 pieces has its sums cut into pieces again. So the sum is a tree, whose rounding error does not
grow with the length of the bag.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Shaped

from .._base.distinct import accumulator
from .._base.tangents import with_tangent
from .._core import ids as _ids
from .._core.dense import DENSE
from .._core.lookup import constant, ids_of_gradient, read_of_tangent, read_resolved, rows_of_tangent
from .._core.read_bags import read_bags
from .._core.storage import Storage
from .._core.table import Table, with_weight
from .ragged import segments_of

Mode = Literal["sum", "mean", "sqrtn", "max"]

# Up to this length, the steps are unrolled, so that XLA fuses them; longer bags take a loop.
_UNROLLED = 64
# Ids that a step of the loop reads.
_BLOCK = 1 << 12
# The length of a piece, and the largest number of pieces that are summed one after the other.
_PIECE, _LONGEST = 16, 1024


class BagLayout(NamedTuple):
    """Which ids belong to which bag."""

    shape: tuple[int, ...]  # the shape of the bags
    offsets: Int32[Array, " bags_and_1"] | None  # of a Ragged; None if ids are (*shape, length)


def is_used(layout: BagLayout, ids: _ids.Ids) -> Bool[Array, "*batch"]:
    """Which places of the ids belong to a bag."""
    if layout.offsets is None:
        return jnp.ones(ids.shape, bool)
    return jnp.arange(ids.shape[0], dtype=jnp.int32) < layout.offsets[-1]


def pool_rows(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    layout: BagLayout,
    mode: Mode,
    given: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*bags_dim"]:
    """Sum the rows of each bag, or take their largest values. `divided` turns sums into the other modes.

    Args:
      table: The table.
      ids: Row numbers from `_ids.resolve`.
      counted: Which ids count.
      weights: A factor for each id, in the dtype of sums, or None.
      layout: Which ids belong to which bag.
      mode: How rows are pooled.
      given: The ids from `_ids.unwrapped`, if all of them count.

    Returns:
      One vector for each bag; sums are in float32 or wider.
    """
    if table.out_of_range == "clip":  # ids are clipped already, but the sentinel must not be
        table = dataclasses.replace(table, out_of_range="nan")
    if mode == "max":
        return _largest(read_resolved(table, ids, counted), counted, layout)
    return _sum_of_rows(table, ids, counted, weights, layout.offsets, layout.shape, given)


def _sum_of_rows(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    offsets: Int32[Array, " bags_and_1"] | None,
    shape: tuple[int, ...],
    given: Int[Array, "*batch"] | None,
) -> Float[Array, "*bags_dim"]:
    """Sum the rows of bags. The value needs no array of all rows; its derivative does, so it is stated separately."""
    held = None if weights is None else jax.lax.stop_gradient(weights)
    total = _held_sum(constant(table), ids, counted, held, offsets, shape, given)
    rules, of_ids = with_weight(table, None), {"ids": ids, "counted": counted, "offsets": offsets}
    if jnp.issubdtype(table.dtype, jnp.inexact) and not table.freeze:
        function, others = _flat(_by_rows, of_ids | {"weights": weights, "given": given}, rules=rules, shape=shape)
        total = with_tangent(function, total, [table.weight], others)
    if weights is not None:
        function, others = _flat(_by_weights, of_ids | {"table": table}, shape=shape)
        total = with_tangent(function, total, [weights], others)
    return total


def _flat(function: Callable[..., Array], others: Any, **static: Any) -> tuple[Callable[..., Array], list[Array]]:
    """Turn `function(tangent, **others)` into a function of the tangent and a flat list of arrays, and return both."""
    leaves, structure = jax.tree.flatten(others)
    return lambda tangent, *leaves: function(tangent, **structure.unflatten(leaves), **static), leaves


def _by_rows(
    tangent: Array, ids: Any, counted: Any, weights: Any, offsets: Any, given: Any, rules: Table, shape: Any
) -> Float[Array, "*bags_dim"]:
    """The tangent of the sums for a tangent of the table's weight."""
    layout = BagLayout(shape, offsets)
    if _one_value_a_bag(rules, tangent, ids, weights, layout):
        ids, from_end = ids_of_gradient(with_weight(rules, tangent), ids, given)
        flat_ids, flat_counted = jnp.ravel(ids), jnp.ravel(counted)
        wide, named = read_of_tangent(rules, tangent, flat_ids, flat_counted if from_end is None else None)
        bag_of = None if offsets is None else _bag_of(offsets, ids.size)
        # Weights that do not count may be NaN.
        factors = None if weights is None else jnp.where(flat_counted, jnp.ravel(weights), jnp.zeros((), weights.dtype))
        sums = read_bags(wide, named, math.prod(shape), bag_of, factors, rules.storage, from_end)
        return jnp.reshape(sums, (*shape, *sums.shape[1:]))
    return _summed(_terms(rows_of_tangent(rules, tangent, ids, counted), counted, weights), layout, rules.storage)


def _one_value_a_bag(rules: Table, tangent: Array, ids: Array, weights: Array | None, layout: BagLayout) -> bool:
    """Whether the gradient of the table is held as one value for each bag: if this is exact, and saves memory."""
    if rules.scale_grad_by_freq or not rules.storage.reads_bags(tangent, ids):
        return False
    if not all(isinstance(n, int) for n in (*ids.shape, *layout.shape)):  # an exported shape may have symbols
        return False
    # A weighted gradient in bfloat16 would be rounded before it is weighted.
    if weights is not None and accumulator(tangent.dtype) != tangent.dtype:
        return False
    return 0 < math.prod(layout.shape) < ids.size


def _by_weights(
    tangent: Float[Array, "*batch"], ids: Any, counted: Any, table: Table, offsets: Any, shape: Any
) -> Float[Array, "*bags_dim"]:
    """The tangent of the sums for a tangent of the ids' weights."""
    rows = read_resolved(table, ids, counted)
    return _summed(_terms(rows, counted, tangent), BagLayout(shape, offsets), table.storage)


def divided(
    total: Float[Array, "*bags_dim"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    layout: BagLayout,
    mode: Mode,
) -> Shaped[Array, "*bags_dim"]:
    """Divide sums as the mode says; an empty bag stays zero.

    Args:
      total: The result of `pool_rows`.
      counted: As in `pool_rows`.
      weights: As in `pool_rows`.
      layout: As in `pool_rows`.
      mode: As in `pool_rows`.

    Returns:
      The pooled vectors.
    """
    if mode in ("sum", "max"):
        return total
    number = _summed(counted.astype(total.dtype), layout)
    by = number
    if weights is not None:
        counting = jnp.where(counted, weights, 0).astype(total.dtype)
        by = _summed(jnp.square(counting) if mode == "sqrtn" else counting, layout)
    by = jnp.where(number > 0, by, 1)
    by = jnp.sqrt(by) if mode == "sqrtn" else by
    return total / jnp.expand_dims(by, tuple(range(by.ndim, total.ndim)))


@functools.partial(jax.jit, static_argnums=5, inline=True)  # a loop in an eager call compiles once
def _held_sum(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    offsets: Int32[Array, " bags_and_1"] | None,
    shape: tuple[int, ...],
    given: Int[Array, "*batch"] | None = None,
) -> Float[Array, "*bags_dim"]:
    inputs: Array
    if offsets is None and table.storage.pools(table, shape, ids.shape[-1], weights is not None):

        def pool_here(table: Table, ids: Array, *others: Any) -> Array:
            return _held_sum(table, ids, *others, None, ids.shape[:-1])

        return table.storage.pooled(table, pool_here, ids, counted, weights)
    if table.storage.is_local:
        inputs = jnp.where(counted, ids, 0)
    else:  # one exchange brings all rows, which are then summed in the same order
        inputs = read_resolved(table, jnp.where(counted, ids, table.rows))
        if offsets is not None:
            return _summed(_terms(inputs, counted, weights), BagLayout(shape, offsets), table.storage)
        inputs = jnp.moveaxis(inputs, len(shape), -1)

    def terms(part: Array, counted: Array, weights: Array | None) -> Float[Array, "*batch_dim"]:
        if table.storage.is_local:
            part = read_resolved(table, part)
        elif counted.ndim > len(shape):  # a block of positions, not a single one
            part = jnp.moveaxis(part, -1, len(shape))
        return _terms(part, counted, weights)

    start = jnp.zeros((*shape, *table.dim), accumulator(table.dtype))
    # XLA's CPU backend computes bfloat16 in float32. For repeated gathers it would convert the whole table first.
    converts = jax.default_backend() == "cpu" and table.dtype not in (np.float16, start.dtype)
    add = _at_once if converts else functools.partial(_by_places, unroll=table.max_norm is None)
    if offsets is None:
        total = add(terms, start, inputs, counted, weights)
    else:
        total = _by_pieces(add, terms, start, inputs, counted, weights, offsets)
    return table.storage.bags_by_kernel([total], table, ids, counted, weights, offsets, given)[0]


def _terms(
    rows: Shaped[Array, "*batch_dim"], counted: Bool[Array, "*batch"] | None, weights: Float[Array, "*batch"] | None
) -> Float[Array, "*batch_dim"]:
    """The term that each id adds to its bag; if `counted` is None, all ids count."""
    rows = rows.astype(accumulator(rows.dtype))
    # Rows and weights that do not count may be NaN, so both are replaced, not multiplied by zero.
    if counted is not None:
        rows = jnp.where(jnp.expand_dims(counted, range(counted.ndim, rows.ndim)), rows, jnp.zeros((), rows.dtype))
    if weights is None:
        return rows
    if counted is not None:
        weights = jnp.where(counted, weights, jnp.zeros((), weights.dtype))
    return rows * jnp.expand_dims(weights.astype(rows.dtype), range(weights.ndim, rows.ndim))


def _summed(
    terms: Float[Array, "*batch_dim"], layout: BagLayout, storage: Storage = DENSE
) -> Float[Array, "*bags_dim"]:
    """Sum the terms of each bag; terms in unused places must be zero.

    For a sharded table, bags are split over its devices, as ids are, and each term is sent to the device of its bag.
    """
    if layout.offsets is None:
        return terms.sum(axis=len(layout.shape))
    if layout.shape == (0,):
        return jnp.zeros((0, *terms.shape[1:]), terms.dtype)
    return storage.summed_by(_bag_of(layout.offsets, terms.shape[0]), terms, layout.shape[0])


def _bag_of(offsets: Int32[Array, " bags_and_1"], capacity: int) -> Int32[Array, " capacity"]:
    """The bag of each place. Unused places get the last bag: checkify would report a number out of bounds."""
    return jnp.minimum(segments_of(offsets, capacity), offsets.shape[0] - 2)


def _at_once(
    terms: Callable[..., Array], total: Array, inputs: Array, counted: Array, weights: Array | None
) -> Float[Array, "*bags_dim"]:
    """Sum bags of one length by one gather, with all of their rows in memory."""
    return total + terms(inputs, counted, weights).sum(axis=counted.ndim - 1)


def _by_places(
    terms: Callable[..., Array], total: Array, of_ids: Array, counted: Array, weights: Array | None, unroll: bool
) -> Float[Array, "*bags_dim"]:
    """Sum bags of one length position by position."""
    axis, length = counted.ndim - 1, counted.shape[-1]
    inputs = of_ids, counted, weights
    if unroll and length <= _UNROLLED:
        add_place = jax.jit(lambda total, *inputs: total + terms(*inputs))  # traced and lowered once for all positions
        for place in range(length):
            total = add_place(total, *(None if x is None else x[..., place] for x in inputs))
        return total
    # If there are few bags, a step takes several positions.
    width = min(max(1, _BLOCK // max(1, math.prod(counted.shape[:-1]))), max(1, length))
    inputs = [None if x is None else _cut(x, width) for x in inputs]

    def step(total: Array, part: Sequence[Any]) -> tuple[Array, None]:
        return total + terms(*part).sum(axis=axis), None

    return jax.lax.scan(step, total, tuple(inputs))[0]


def _by_pieces(
    add: Callable[..., Array],
    terms: Callable[..., Array],
    start: Array,
    ids: Array,
    counted: Array,
    weights: Array | None,
    offsets: Int32[Array, " bags_and_1"],
) -> Float[Array, "*bags_dim"]:
    """Sum bags of different lengths by pieces of one length, as the head of this file describes."""
    longest = ids.shape[0]
    if longest == 0 or start.shape[0] == 0:  # XLA has no gather from nothing
        return start
    places, exists, offsets = _pieces(offsets, longest)
    inputs = ids[places], counted[places] & exists, None if weights is None else weights[places]
    total = add(terms, _zeros(places, start), *inputs)
    while (longest := -(-longest // _PIECE)) > _LONGEST:
        places, exists, offsets = _pieces(offsets, total.shape[0])
        of_pieces = functools.partial(_terms_of_pieces, total)
        total = _by_places(of_pieces, _zeros(places, start), places, exists, None, unroll=True)
    return start.at[_bag_of(offsets, total.shape[0])].add(total, mode="drop", indices_are_sorted=True)


def _pieces(
    offsets: Int32[Array, " bags_and_1"], capacity: int
) -> tuple[Int32[Array, "pieces piece"], Bool[Array, "pieces piece"], Int32[Array, " bags_and_1"]]:
    """Cut bags into pieces of `_PIECE` places.

    Returns:
      The places of each piece, which of them exist, and the offsets of the bags among the pieces.
    """
    bags = offsets.shape[0] - 1
    numbers = -(-jnp.diff(offsets) // _PIECE)
    among_pieces = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(numbers, dtype=jnp.int32)])
    pieces = jnp.arange(capacity // _PIECE + bags, dtype=jnp.int32)  # an upper limit
    bag = segments_of(among_pieces, pieces.shape[0])
    # Pieces beyond the last bag belong to an empty bag.
    starts = jnp.concatenate([offsets, offsets[-1:]])
    first = starts[bag] + _PIECE * (pieces - among_pieces[bag])
    places = first[:, None] + jnp.arange(_PIECE, dtype=jnp.int32)[None, :]
    exists = places < starts[bag + 1][:, None]
    return jnp.where(exists, places, 0), exists, among_pieces


def _terms_of_pieces(
    sums: Float[Array, "pieces *dim"], places: Int32[Array, " many"], exists: Bool[Array, " many"], weights: None
) -> Float[Array, "many *dim"]:
    return _terms(sums[places], exists, weights)


def _zeros(places: Int32[Array, "pieces piece"], like: Float[Array, "bags *dim"]) -> Float[Array, "pieces *dim"]:
    return jnp.zeros((places.shape[0], *like.shape[1:]), like.dtype)


def _cut(array: Shaped[Array, "*batch length"], width: int) -> Shaped[Array, "blocks *batch width"]:
    """Cut the last axis into blocks, pad the last block with zeros, and move the axis of blocks to the front."""
    blocks = -(-array.shape[-1] // width)
    full = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, blocks * width - array.shape[-1])])
    return jnp.moveaxis(jnp.reshape(full, (*array.shape[:-1], blocks, width)), -2, 0)


def _largest(
    rows: Shaped[Array, "*batch_dim"], counted: Bool[Array, "*batch"], layout: BagLayout
) -> Shaped[Array, "*bags_dim"]:
    """The largest value of each bag and column; the first of equal ones gets the gradient. 0 for an empty bag."""
    axis = 0 if layout.offsets is not None else len(layout.shape)
    length = rows.shape[axis]
    trailing = tuple(range(counted.ndim, rows.ndim))
    candidates = jnp.expand_dims(counted, trailing) & jnp.ones(rows.shape, bool)
    if length == 0 or 0 in layout.shape:
        return jnp.zeros((*layout.shape, *rows.shape[axis + 1 :]), rows.dtype)
    lowest = jnp.asarray(-jnp.inf, rows.dtype)
    values = jnp.where(candidates, jax.lax.stop_gradient(rows), lowest)
    # NaN is found separately, since XLA's CPU backend may ignore it in a maximum.
    is_nan = jnp.isnan(values)
    if layout.offsets is None:
        is_largest = candidates & (values == values.max(axis=axis, keepdims=True))
        first = jnp.argmax(jnp.where(is_nan, 2, is_largest.astype(jnp.int32)), axis=axis)  # first NaN, else largest
        out = _numbers_at(rows, first, axis)
        return jnp.where(candidates.any(axis=axis), out, jnp.zeros((), rows.dtype))
    shape, bags = (*layout.shape, *rows.shape[1:]), _bag_of(layout.offsets, length)
    largest = jnp.full(shape, lowest).at[bags].max(values, mode="drop", indices_are_sorted=True)
    position = jnp.expand_dims(jnp.arange(length, dtype=jnp.int32), trailing)
    of_equals = jnp.where(candidates & (values == largest[bags]), position, length)
    position = jnp.where(is_nan, position - length, of_equals)  # negative, so that NaN comes first
    first = jnp.full(shape, length, jnp.int32).at[bags].min(position, mode="drop", indices_are_sorted=True)
    first = jnp.where(first < 0, first + length, first)
    # By explicit column indices, since checkify has no rule for the derivative of `take_along_axis`.
    columns = jnp.indices(shape, sparse=True)[1:]
    out = rows.at[(jnp.minimum(first, length - 1), *columns)].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(first < length, out, jnp.zeros((), rows.dtype))


def _numbers_at(
    rows: Shaped[Array, "*batch_dim"], places: Int[Array, "*bags_dim"], axis: int
) -> Shaped[Array, "*bags_dim"]:
    """For bags of one length, take the value at the given position of each bag and column."""
    taken = jnp.take_along_axis(jax.lax.stop_gradient(rows), jnp.expand_dims(places, axis), axis=axis)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return taken.squeeze(axis)
    return with_tangent(functools.partial(_selected, axis), taken.squeeze(axis), [rows], [places])


def _selected(axis: int, rows: Shaped[Array, "*batch_dim"], places: Int[Array, "*bags_dim"]) -> Array:
    # By selection, whose transpose needs no scatter; checkify has no rule for the transpose of `take_along_axis`.
    numbers = jnp.arange(rows.shape[axis], dtype=places.dtype)
    numbers = jnp.expand_dims(numbers, [i for i in range(rows.ndim) if i != axis])
    return jnp.where(numbers == jnp.expand_dims(places, axis), rows, jnp.zeros((), rows.dtype)).sum(axis)
