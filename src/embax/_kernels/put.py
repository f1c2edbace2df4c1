"""put: set rows of a table or add to them, in place if the old table is not used afterwards."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from .._base import distinct as _distinct
from .library import has
from .primitive import FLOATS, INTEGERS, Outs, call, fits, primitive

Mode = Literal["set", "add"]


def put(
    table: Shaped[Array, "rows *dim"],
    ids: Int[Array, "*batch"],
    values: Shaped[Array, "*batch_dim"],
    mode: Mode,
    out_sharding: NamedSharding | None = None,
) -> Shaped[Array, "rows *dim"]:
    """Write a row for each id.

    Args:
      table: The table.
      ids: Row numbers; a row for an id outside of `[0, rows)` is dropped.
      values: The rows. In mode "set", the rows of an id that occurs twice must be equal.
      mode: Whether rows are set or added; duplicates are summed in float32 or wider.
      out_sharding: The sharding of the result on explicit axes.

    Returns:
      The table.
    """
    plain = _scattered(table, ids, values, mode, out_sharding)
    if not _has_kernel(table, ids, values, mode):
        return plain
    # The table keeps its shape: inside a loop, XLA would copy the table to reshape it.
    flat = jnp.ravel(ids), jnp.reshape(values, (ids.size, *table.shape[1:]))
    (out,) = put_p.bind(plain, table, *flat, mode=mode)
    return out


def _has_kernel(table: Array, ids: Array, values: Array, mode: Mode) -> bool:
    known = FLOATS if mode == "add" else FLOATS + INTEGERS
    return (
        has("put")
        and table.dtype in known
        and values.dtype == table.dtype
        and values.shape == (*ids.shape, *table.shape[1:])
        and fits(table, values, ids=ids)
    )


def _scattered(table: Array, ids: Array, values: Array, mode: Mode, out_sharding: NamedSharding | None) -> Array:
    if mode == "add" and jnp.issubdtype(table.dtype, jnp.inexact) and jnp.finfo(table.dtype).bits < 32:
        # Otherwise each addition would be rounded.
        values = jnp.reshape(values, (ids.size, *table.shape[1:])).astype(jnp.float32)
        _, (ids, values, _) = _distinct.combine(None, jnp.ravel(ids), values, table.shape[0])
    # Ids without a row are out of bounds and dropped. The sentinel may repeat, so `unique_indices` must stay False.
    write = table.at[ids].set if mode == "set" else table.at[ids].add
    return write(values.astype(table.dtype), mode="drop", wrap_negative_indices=False, out_sharding=out_sharding)


def _by_kernel(outs: Outs, table: Array, ids: Array, values: Array, *, mode: Mode) -> list[Array]:
    return call("put", outs, table, ids, values, aliases={0: 0}, add=np.int32(mode == "add"))


put_p = primitive("put", _by_kernel)
