"""Bags of a sharded table, summed by the owners of their rows, so that sums are sent instead of rows.

For instance, 8 rows on two devices, 4 each: for the bag of ids 1, 6 and 7 on device 0, device 1 adds row 6 and row 7,
and sends one sum instead of two rows. Bags have one length here, since shapes are static.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from .._base.distinct import accumulator
from .._core.dense import DENSE
from .._core.table import Table, with_weight
from . import exchange as _exchange
from .sharded import first_of, group_of, on_devices, padded, whole_rows


def is_pooled_where_stored(table: Table, bags: tuple[int, ...], length: int, weighted: bool) -> bool:
    """Say whether bags are pooled by the owners of their rows, rather than on the devices of their ids.

    Args:
      table: The table.
      bags: The shape of the bags.
      length: The number of ids of each bag.
      weighted: Whether ids have weights.

    Returns:
      True if owners pool. Always False if rows are split by columns and have a `max_norm`: it needs whole rows.
    """
    placement: Any = table.placement
    if placement.columns is not None and table.max_norm is not None:
        return False
    if placement.layout == "columns":
        return True
    part, wide = math.prod(table.dim) // placement.column_shards, accumulator(table.dtype).itemsize
    return placement.sums_travel(math.prod(bags), length, part * table.dtype.itemsize, part * wide, weighted * wide)


def pooled_where_stored(
    table: Table,
    pool: Callable[..., Array],
    ids: Int[Array, "*bags length"],
    counted: Bool[Array, "*bags length"],
    weights: Float[Array, "*bags length"] | None,
) -> Float[Array, "*bags_dim"]:
    """Sum the rows of bags on their owners, the bags being split over all devices.

    Args:
      table: The table, for which `is_pooled_where_stored` is True.
      pool: Sums bags of a dense table: `pool(table, ids, counted, weights)`.
      ids: Row numbers. If rows are split by columns, each device gets the ids of its whole group.
      counted: Which ids count.
      weights: A factor for each id, or None.

    Returns:
      One sum for each bag, in the dtype of sums: float32 or wider.
    """
    placement: Any = table.placement
    if placement.layout == "columns":

        def pool_here(weight: Array, ids: Array, weights: Array | None) -> Array:
            part = with_weight(table, weight, storage=DENSE)
            return whole_rows(placement, pool(part, ids, ids >= 0, weights))

        return _on_bags(table, pool_here, jnp.where(counted, ids, -1), weights)
    missing = counted & ~((ids >= 0) & (ids < table.rows))
    sums = _on_bags(table, _summed_by_owners(table, pool), jnp.where(counted, ids, -1), weights)
    # No owner gets an id without a row, so its fill value is added here, as a lookup would read it.
    fill_value = 0 if table.out_of_range == "zero" else np.nan
    filled = jnp.where(missing, jnp.asarray(fill_value, sums.dtype) * (1 if weights is None else weights), 0).sum(-1)
    return sums + jnp.expand_dims(filled, tuple(range(filled.ndim, sums.ndim))).astype(sums.dtype)


def _summed_by_owners(table: Table, pool: Callable[..., Array]) -> Callable[..., Array]:
    placement: Any = table.placement

    def sum_here(weight: Array, ids: Array, weights: Array | None) -> Array:
        # `own` numbers this device's rows from 0, so `padding_idx` would name a wrong row. Ids of padding rows do not
        # count anyway, and are not sent.
        own = with_weight(table, weight, storage=DENSE, padding_idx=None)

        def terms(local: Array, factors: Array | None) -> Array:
            bags_of_one = (None if x is None else x[..., None] for x in (local, local < placement.block, factors))
            return pool(own, *bags_of_one)

        positions, factors = placement.positions(jnp.ravel(ids)), None if weights is None else jnp.ravel(weights)
        return whole_rows(placement, _exchange.summed_by_owners(placement, positions, factors, ids.shape[-1], terms))

    return sum_here


def _on_bags(
    table: Table,
    function: Callable[[Array, Array, Array | None], Array],
    ids: Int[Array, "*bags length"],
    weights: Float[Array, "*bags length"] | None,
) -> Shaped[Array, "*bags_dim"]:
    """Call `function(weight, ids, weights)` on each device, with the bags, (bags, length), of its group."""
    placement: Any = table.placement
    bags, length = ids.shape[:-1], ids.shape[-1]
    number = math.prod(bags)
    given = [(ids, -1), *([(weights, 0)] if weights is not None else [])]
    args = [padded(placement, jnp.reshape(x, (number, length)), fill_value) for x, fill_value in given]

    def local(weight: Array, *of_bags: Array) -> Array:
        ids, *others = (group_of(placement, x) for x in of_bags)
        return function(weight, ids, others[0] if others else None)

    spec = placement.batch_spec
    in_specs = (placement.spec(table.weight.shape, table.dim), *(spec for _ in args))
    sums = first_of(placement, on_devices(placement, local, in_specs, spec)(table.weight, *args), number)
    return jnp.reshape(sums, (*bags, *table.dim))
