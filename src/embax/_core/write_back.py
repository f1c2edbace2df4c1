"""The clipped rows of a layer that stores what it reads: one weight for all lanes of a vmap."""

from typing import Any

import jax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from .._base.tangents import straight_through
from .ids import Ids
from .lookup import constant, renormalize
from .table import Table


def clipped_table(table: Table, ids: Ids) -> Array:
    """Return the weight of a table, with the rows of some ids clipped."""
    # As in the core. JAX cannot split the derivative of a custom_vmap into primal and tangent, so it is said out here.
    return straight_through(_jitted(constant(table), ids), table.weight)


@custom_vmap
def _renormalized_for_all_lanes(table: Table, ids: Array) -> Array:
    return renormalize(table, ids).weight


@_renormalized_for_all_lanes.def_vmap
def _renormalized_by_lanes(axis_size: int, batched: Any, table: Table, ids: Array) -> tuple[Array, bool]:
    """One weight that all lanes read stays one weight: it is renormalised for the ids of all lanes together."""
    table_batched, ids_batched = batched
    if not table_batched.weight:
        return _renormalized_for_all_lanes(table, ids), False
    lanes = jax.vmap(renormalize, in_axes=(0, 0 if ids_batched else None), axis_size=axis_size)
    return lanes(table, ids).weight, True


_jitted = jax.jit(_renormalized_for_all_lanes)
