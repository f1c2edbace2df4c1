"""Pooling: sums and largest numbers of the rows of bags, without the rows in between."""

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
from .._core.lookup import constant, read_resolved, rows_of_tangent
from .._core.storage import Storage
from .._core.table import Table, with_weight
from .ragged import segments_of

Mode = Literal["sum", "mean", "sqrtn", "max"]

# The longest bags of one length that are summed place by place in one fusion; beyond, it is a loop.
_UNROLLED = 64
# Ids that such a loop reads at a time.
_BLOCK = 1 << 12
# The length of the pieces that bags of different lengths are cut into, and how many pieces are summed in a row.
_PIECE, _LONGEST = 16, 1024


class BagLayout(NamedTuple):
    """Which ids belong to which bag."""

    shape: tuple[int, ...]  # of the bags
    offsets: Int32[Array, " bags_and_1"] | None  # of a Ragged; None where ids are (*shape, length)


def is_used(layout: BagLayout, ids: _ids.Ids) -> Bool[Array, "*batch"]:
    """Tell where there is an id of a bag."""
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
) -> Float[Array, "*bags_dim"]:
    """Sum the rows of each bag, or take their largest numbers; `divided` makes the other modes of the sum.

    Args:
      table: The table.
      ids: Row numbers as `_ids.resolve` gives them.
      counted: Which of them count.
      weights: As in `pool`.
      layout: As in `pool`.
      mode: As in `pool`.

    Returns:
      One vector a bag; sums in the dtype that they run in.
    """
    if table.out_of_range == "clip":  # which ids are by now; one that stands for no row may not be
        table = dataclasses.replace(table, out_of_range="nan")
    if mode == "max":
        return _largest(read_resolved(table, ids, counted), counted, layout)
    return _sum_of_rows(table, ids, counted, weights, layout.offsets, layout.shape)


def _sum_of_rows(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    offsets: Int32[Array, " bags_and_1"] | None,
    shape: tuple[int, ...],
) -> Float[Array, "*bags_dim"]:
    """Sum rows without these in memory; the derivative, which has them, is said apart."""
    held = None if weights is None else jax.lax.stop_gradient(weights)
    total = _held_sum(constant(table), ids, counted, held, offsets, shape)
    rules, of_ids = with_weight(table, None), {"ids": ids, "counted": counted, "offsets": offsets}
    if jnp.issubdtype(table.dtype, jnp.inexact) and not table.freeze:
        function, others = _flat(_by_rows, of_ids | {"weights": weights}, rules=rules, shape=shape)
        total = with_tangent(function, total, [table.weight], others)
    if weights is not None:
        function, others = _flat(_by_weights, of_ids | {"table": table}, shape=shape)
        total = with_tangent(function, total, [weights], others)
    return total


def _flat(function: Callable[..., Array], others: Any, **static: Any) -> tuple[Callable[..., Array], list[Array]]:
    """Make a function of a tangent and of arrays, of one of a tangent and of trees by their names."""
    leaves, structure = jax.tree.flatten(others)
    return lambda tangent, *leaves: function(tangent, **structure.unflatten(leaves), **static), leaves


def _by_rows(
    tangent: Shaped[Array, "rows *dim"], ids: Any, counted: Any, weights: Any, offsets: Any, rules: Table, shape: Any
) -> Float[Array, "*bags_dim"]:
    """Return the tangent of a sum, given that of the weight of its table."""
    rows = rows_of_tangent(rules, tangent, ids, counted)
    return _summed(_terms(rows, counted, weights), BagLayout(shape, offsets), rules.storage)


def _by_weights(
    tangent: Float[Array, "*batch"], ids: Any, counted: Any, table: Table, offsets: Any, shape: Any
) -> Float[Array, "*bags_dim"]:
    """Return the tangent of a sum, given that of the factors of its terms."""
    rows = read_resolved(table, ids, counted)
    return _summed(_terms(rows, counted, tangent), BagLayout(shape, offsets), table.storage)


def divided(
    total: Float[Array, "*bags_dim"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    layout: BagLayout,
    mode: Mode,
) -> Shaped[Array, "*bags_dim"]:
    """Divide sums by what the mode says; a bag of nothing stays zero.

    Args:
      total: What `pool_rows` gives.
      counted: As there.
      weights: As there.
      layout: As there.
      mode: As there.

    Returns:
      The same, divided.
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
) -> Float[Array, "*bags_dim"]:
    inputs: Array
    if offsets is None and table.storage.pools(table, shape, ids.shape[-1], weights is not None):

        def pool_here(table: Table, ids: Array, *others: Any) -> Array:
            return _held_sum(table, ids, *others, None, ids.shape[:-1])

        return table.storage.pooled(table, pool_here, ids, counted, weights)
    if table.storage.is_local:
        inputs = jnp.where(counted, ids, 0)
    else:  # one exchange of all rows, which are then summed in the same order where they have arrived
        inputs = read_resolved(table, jnp.where(counted, ids, table.rows))
        if offsets is not None:
            return _summed(_terms(inputs, counted, weights), BagLayout(shape, offsets), table.storage)
        inputs = jnp.moveaxis(inputs, len(shape), -1)

    def terms(part: Array, counted: Array, weights: Array | None) -> Float[Array, "*batch_dim"]:
        if table.storage.is_local:
            part = read_resolved(table, part)
        elif counted.ndim > len(shape):  # several places
            part = jnp.moveaxis(part, -1, len(shape))
        return _terms(part, counted, weights)

    start = jnp.zeros((*shape, *table.dim), accumulator(table.dtype))
    # XLA's CPU backend has no bfloat16: for gathers in a row or a loop it would convert the whole table once.
    converts = jax.default_backend() == "cpu" and table.dtype not in (np.float16, start.dtype)
    add = _at_once if converts else functools.partial(_by_places, unroll=table.max_norm is None)
    if offsets is None:
        total = add(terms, start, inputs, counted, weights)
    else:
        total = _by_pieces(add, terms, start, inputs, counted, weights, offsets)
    return table.storage.bags_by_kernel(total, table, ids, counted, weights, offsets)


def _terms(
    rows: Shaped[Array, "*batch_dim"], counted: Bool[Array, "*batch"] | None, weights: Float[Array, "*batch"] | None
) -> Float[Array, "*batch_dim"]:
    """What each id adds to its bag; all of them count where `counted` is None."""
    rows = rows.astype(accumulator(rows.dtype))
    # What does not count is left out of both factors, not multiplied by zero: it may be NaN.
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
    """Sum what stands there for each id, bag by bag; behind the last one is zero, or what has no row.

    Of a table on a mesh, the bags are split over its devices as their ids are, and what is of another device's bag goes
    there.
    """
    if layout.offsets is None:
        return terms.sum(axis=len(layout.shape))
    if layout.shape == (0,):
        return jnp.zeros((0, *terms.shape[1:]), terms.dtype)
    return storage.summed_by(_bag_of(layout.offsets, terms.shape[0]), terms, layout.shape[0])


def _bag_of(offsets: Int32[Array, " bags_and_1"], capacity: int) -> Int32[Array, " capacity"]:
    """Number the bag of each place; behind the last one it is the last, since checkify takes another for an error."""
    return jnp.minimum(segments_of(offsets, capacity), offsets.shape[0] - 2)


def _at_once(
    terms: Callable[..., Array], total: Array, inputs: Array, counted: Array, weights: Array | None
) -> Float[Array, "*bags_dim"]:
    """Sum bags of one length with all of their rows in memory."""
    return total + terms(inputs, counted, weights).sum(axis=counted.ndim - 1)


def _by_places(
    terms: Callable[..., Array], total: Array, of_ids: Array, counted: Array, weights: Array | None, unroll: bool
) -> Float[Array, "*bags_dim"]:
    """Sum bags of one length: the first id of all bags, then the second, and so on."""
    axis, length = counted.ndim - 1, counted.shape[-1]
    inputs = of_ids, counted, weights
    if unroll and length <= _UNROLLED:
        add_place = jax.jit(lambda total, *inputs: total + terms(*inputs))  # traced and lowered once for all places
        for place in range(length):
            total = add_place(total, *(None if x is None else x[..., place] for x in inputs))
        return total
    # A few places at a time where there are few bags.
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
    """Sum bags of different lengths: cut them into pieces of one length, and sum first those, then their sums.

    A long bag is cut again, so that its sum is a tree whose rounding error does not grow with the length.
    """
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
      The places of each piece; which of them are part of a bag; and the offsets of the bags among the pieces.
    """
    bags = offsets.shape[0] - 1
    numbers = -(-jnp.diff(offsets) // _PIECE)
    among_pieces = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(numbers, dtype=jnp.int32)])
    pieces = jnp.arange(capacity // _PIECE + bags, dtype=jnp.int32)  # no bags need more
    bag = segments_of(among_pieces, pieces.shape[0])
    # Beyond the last bag there is an empty one.
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
    """Cut the last axis into blocks, the last one filled up with zeros, and put the axis of blocks first."""
    blocks = -(-array.shape[-1] // width)
    full = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, blocks * width - array.shape[-1])])
    return jnp.moveaxis(jnp.reshape(full, (*array.shape[:-1], blocks, width)), -2, 0)


def _largest(
    rows: Shaped[Array, "*batch_dim"], counted: Bool[Array, "*batch"], layout: BagLayout
) -> Shaped[Array, "*bags_dim"]:
    """The largest number of each bag and column, of which the first one gets the gradient; 0 for a bag of nothing."""
    axis = 0 if layout.offsets is not None else len(layout.shape)
    length = rows.shape[axis]
    trailing = tuple(range(counted.ndim, rows.ndim))
    candidates = jnp.expand_dims(counted, trailing) & jnp.ones(rows.shape, bool)
    if length == 0 or 0 in layout.shape:
        return jnp.zeros((*layout.shape, *rows.shape[axis + 1 :]), rows.dtype)
    lowest = jnp.asarray(-jnp.inf, rows.dtype)
    values = jnp.where(candidates, jax.lax.stop_gradient(rows), lowest)
    # Found apart from the largest: XLA's CPU backend may leave NaN out of a maximum.
    is_nan = jnp.isnan(values)
    if layout.offsets is None:
        is_largest = candidates & (values == values.max(axis=axis, keepdims=True))
        first = jnp.argmax(jnp.where(is_nan, 2, is_largest.astype(jnp.int32)), axis=axis)  # of NaNs, else of equals
        out = _numbers_at(rows, first, axis)
        return jnp.where(candidates.any(axis=axis), out, jnp.zeros((), rows.dtype))
    shape, bags = (*layout.shape, *rows.shape[1:]), _bag_of(layout.offsets, length)
    largest = jnp.full(shape, lowest).at[bags].max(values, mode="drop", indices_are_sorted=True)
    position = jnp.expand_dims(jnp.arange(length, dtype=jnp.int32), trailing)
    of_equals = jnp.where(candidates & (values == largest[bags]), position, length)
    position = jnp.where(is_nan, position - length, of_equals)  # below 0, so that it comes first
    first = jnp.full(shape, length, jnp.int32).at[bags].min(position, mode="drop", indices_are_sorted=True)
    first = jnp.where(first < 0, first + length, first)
    # By the numbers of the columns; checkify has no rule for the derivative of `take_along_axis`.
    columns = jnp.indices(shape, sparse=True)[1:]
    out = rows.at[(jnp.minimum(first, length - 1), *columns)].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return jnp.where(first < length, out, jnp.zeros((), rows.dtype))


def _numbers_at(
    rows: Shaped[Array, "*batch_dim"], places: Int[Array, "*bags_dim"], axis: int
) -> Shaped[Array, "*bags_dim"]:
    """Take the number at a place of an axis, for each bag of one length and each column."""
    taken = jnp.take_along_axis(jax.lax.stop_gradient(rows), jnp.expand_dims(places, axis), axis=axis)
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return taken.squeeze(axis)
    return with_tangent(functools.partial(_selected, axis), taken.squeeze(axis), [rows], [places])


def _selected(axis: int, rows: Shaped[Array, "*batch_dim"], places: Int[Array, "*bags_dim"]) -> Array:
    # By selection, whose transpose needs no scatter. Checkify has no rule for that of `take_along_axis`.
    numbers = jnp.arange(rows.shape[axis], dtype=places.dtype)
    numbers = jnp.expand_dims(numbers, [i for i in range(rows.ndim) if i != axis])
    return jnp.where(numbers == jnp.expand_dims(places, axis), rows, jnp.zeros((), rows.dtype)).sum(axis)
