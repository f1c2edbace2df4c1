"""scatter-add: the gradient of `weight[ids]`, of windows and of columns, also under `jax.vmap`.

For instance, the gradients of these reads of a weight of 40 rows and 3 columns have the rows:

    weight[[7, 9]]                                                 7 and 9
    dynamic_slice(weight, (k, 0), (2, 3)), vmapped over k = 5, 6   5, 6 and 6, 7
    weight[[7, 9], 1]                                              7 and 9, zero in columns 0 and 2
    weight[:, [0, 2]]                                              0 and 2 in each of 40 lanes: no rows of the table
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.lax import GatherScatterMode
from jaxtyping import Array

from ..._base.axes import on_every_device
from ..._core import ids as _ids
from .equations import shape_of
from .opening import FEW, Lanes, Opening, rows_of_arrays
from .rows import Read, Rows, Term, Terms


class _Scattered(NamedTuple):
    """A scatter-add in terms of rows."""

    batching: int  # leading axes that are lanes of the operand, the indices and the updates
    lanes: int  # leading axes that are lanes of the operand; lanes beyond `batching` share their ids
    component: int  # the component of an index that is the row number
    rows: int  # number of rows that are written for each index
    window: tuple[int, ...]  # the shape that is written for each index
    is_whole: bool  # whether whole rows are written

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "_Scattered | None":
        """Describe a scatter-add; None if its operand has no axis of rows."""
        operand, _, updates = eqn.invars
        numbers, shape = eqn.params["dimension_numbers"], shape_of(operand)
        batching, axes = len(numbers.operand_batching_dims), tuple(map(int, numbers.scatter_dims_to_operand_dims))
        if not numbers.operand_batching_dims == tuple(range(batching)) == numbers.scatter_indices_batching_dims:
            return None
        lanes = min(axes, default=batching)
        window = tuple(shape_of(updates)[axis] for axis in numbers.update_window_dims)
        is_scattered = axes and lanes >= batching and all(axis >= lanes for axis in numbers.inserted_window_dims)
        if not is_scattered or window[: lanes - batching] != shape[batching:lanes]:
            return None
        of_rows = () if lanes in numbers.inserted_window_dims else (window[lanes - batching],)
        of_row = window[lanes - batching + len(of_rows) :]
        rows = of_rows[0] if of_rows else 1
        is_whole = axes == (lanes,) and of_row == shape[lanes + 1 :]
        return cls(batching, lanes, axes.index(lanes), rows, window, is_whole)


def scattered_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    operand, indices, _ = eqn.invars
    scattered = _Scattered.of(eqn)
    if scattered is None:
        return None
    shape = shape_of(operand)
    ids = math.prod(shape_of(indices)[:-1]) * math.prod(shape[scattered.batching : scattered.lanes]) * scattered.rows
    # Rows that are written in some columns only hold zeros in the others, which must not outweigh a dense array.
    if not scattered.is_whole and FEW * ids > math.prod(shape[: scattered.lanes + 1]):
        return None
    return rows_of_arrays((1, 2), ids, scattered.lanes, terms={0: True})


def scattered_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    operand, indices, updates = eqn.invars
    scattered, shape = _Scattered.of(eqn), shape_of(operand)
    assert scattered is not None
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    index, values = on_every_device(read(indices)), on_every_device(read(updates))
    return [*terms(operand), Rows(*_written(index, values, scattered, shape, numbers, mode))]


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)  # one program in an eager call
def _written(
    index: Array, values: Array, scattered: _Scattered, shape: tuple[int, ...], numbers: Any, mode: Any
) -> tuple[Array, Array]:
    """Return the ids and the values of the rows."""
    batching, leading, window = scattered.batching, scattered.lanes, numbers.update_window_dims
    total, *dim = shape[leading:]
    values = jnp.moveaxis(values, window, range(values.ndim - len(window), values.ndim))
    first = _in_range(index[..., scattered.component], total, scattered.rows, mode)
    # Insert the lanes that share their ids.
    same = range(batching, leading)
    values = jnp.moveaxis(values, range(first.ndim, first.ndim + len(same)), same)
    first = jnp.expand_dims(first, same)
    batch = (*first.shape[:batching], *shape[batching:leading], *first.shape[leading:])
    first = jnp.broadcast_to(first[..., None], (*batch, scattered.rows))
    ids = jnp.where(first < total, first + lax.broadcasted_iota(first.dtype, first.shape, len(batch)), total)
    if not scattered.is_whole:
        others = jnp.broadcast_to(jnp.expand_dims(index, same), (*batch, index.shape[-1]))
        others = others.at[..., scattered.component].set(0)
        values = _in_columns(others, values, scattered, (scattered.rows, *dim), numbers, mode)
    return ids, jnp.reshape(values, (*ids.shape, *dim))


def _in_range(first: Array, total: int, rows: int, mode: Any) -> Array:
    """The first row that is written for each index, by the scatter's mode; `total` if nothing is written."""
    first, last = _ids.narrow(first, total, jnp), total - rows
    if mode == GatherScatterMode.CLIP:
        return jnp.clip(first, 0, last)
    return jnp.where((first >= 0) & (first <= last), first, total)


def _in_columns(
    index: Array, values: Array, scattered: _Scattered, shape: tuple[int, ...], numbers: Any, mode: Any
) -> Array:
    """Scatter the values of each index into zero rows of their own."""
    lanes = scattered.lanes
    window = len(scattered.window) - (lanes - scattered.batching)
    of_index = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(window)),
        inserted_window_dims=tuple(axis - lanes for axis in numbers.inserted_window_dims),
        scatter_dims_to_operand_dims=tuple(axis - lanes for axis in numbers.scatter_dims_to_operand_dims),
    )

    def write(index: Array, values: Array) -> Array:
        zeros = jnp.zeros(shape, values.dtype)
        return lax.scatter_add(zeros, index, values, of_index, mode=mode)

    for _ in range(index.ndim - 1):
        write = jax.vmap(write)
    return write(index, values)
