"""Write clipped rows back into a layer's weight, also under `vmap`, where all lanes share the weight."""

from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from ..._base.tangents import straight_through
from ..ids import Ids
from ..lookup import constant, renormalize
from ..table import Table


def clipped_table(table: Table, ids: Ids) -> Array:
    """Return the weight of a table, with the rows of some ids clipped."""
    # JAX cannot differentiate through a custom_vmap by linearising it, so the derivative is stated outside of it.
    return straight_through(_jitted(constant(table), ids), table.weight)


@custom_vmap
def _renormalized_for_all_lanes(table: Table, ids: Array) -> Array:
    return renormalize(table, ids).weight


@_renormalized_for_all_lanes.def_vmap
def _renormalized_by_lanes(axis_size: int, batched: Any, table: Table, ids: Array) -> tuple[Array, bool]:
    """Keep one weight if all lanes share it: renormalise it for the ids of all lanes together."""
    table_batched, ids_batched = batched
    if not table_batched.weight:
        return _renormalized_for_all_lanes(table, ids), False
    lanes = jax.vmap(renormalize, in_axes=(0, 0 if ids_batched else None), axis_size=axis_size)
    return lanes(table, ids).weight, True


_jitted = jax.jit(_renormalized_for_all_lanes)
