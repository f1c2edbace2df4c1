"""put: set rows of a table or add to them, in place where the table is not needed any more."""

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
      ids: Row numbers; any outside of `[0, rows)` goes nowhere.
      values: The rows. Those that are set have to be equal where an id occurs twice.
      mode: Whether rows are set or added; duplicates are summed in float32 or wider.
      out_sharding: How the table is laid out on explicit axes.

    Returns:
      The table.
    """
    plain = _scattered(table, ids, values, mode, out_sharding)
    if not _has_kernel(table, ids, values, mode):
        return plain
    # The table goes as it is: XLA would copy it in a loop to give it another shape.
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
        # Else the sum would be rounded after each duplicate.
        values = jnp.reshape(values, (ids.size, *table.shape[1:])).astype(jnp.float32)
        _, (ids, values, _) = _distinct.combine(None, jnp.ravel(ids), values, table.shape[0])
    # Ids without a row lie outside and are dropped. They are equal, though, so that the ids are not called unique.
    write = table.at[ids].set if mode == "set" else table.at[ids].add
    return write(values.astype(table.dtype), mode="drop", wrap_negative_indices=False, out_sharding=out_sharding)


def _by_kernel(outs: Outs, table: Array, ids: Array, values: Array, *, mode: Mode) -> list[Array]:
    return call("put", outs, table, ids, values, aliases={0: 0}, add=np.int32(mode == "add"))


put_p = primitive("put", _by_kernel)
