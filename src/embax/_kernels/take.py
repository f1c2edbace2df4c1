"""take: read rows of a table."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from .library import has
from .primitive import FLOATS, INTEGERS, Outs, call, fits, primitive


def take(
    table: Shaped[Array, "rows *dim"],
    ids: Int[Array, "*batch"],
    fill_value: float,
    out_sharding: NamedSharding | None = None,
    *,
    linear: bool = False,
    given: Int[Array, "*batch"] | None = None,
) -> Shaped[Array, "*batch_dim"]:
    """Read a row for each id.

    Args:
      table: The table, of one row or more.
      ids: Row numbers; a number outside of `[0, rows)` stands for no row.
      fill_value: The value that is read for an id without a row.
      out_sharding: The sharding of the rows on explicit axes.
      linear: Whether to read by plain JAX, for tangents.
      given: The ids before negative ones are wrapped, for the kernel to wrap: a program that computes nothing but the
        call of a kernel runs at once, while XLA hands others to a thread of its own (45 us a call).

    Returns:
      The rows.
    """
    places = table.at[ids]
    rows = places.get(mode="fill", fill_value=fill_value, wrap_negative_indices=False, out_sharding=out_sharding)
    wrap = given is not None
    read = given if wrap else ids
    if linear or not _has_kernel(table, read, fill_value):
        return rows
    # The table keeps its shape: inside a loop, XLA would copy the table to reshape it.
    plain = jnp.reshape(rows, (ids.size, *table.shape[1:]))
    (taken,) = take_p.bind(plain, table, jnp.ravel(read), nan=fill_value != 0, wrap=wrap, parts=(ids.size,))
    return jnp.reshape(taken, rows.shape)


def take_parts(
    plain: Sequence[Shaped[Array, "ids *dim"]],
    table: Shaped[Array, "rows *dim"],
    ids: Int[Array, " all_ids"],
    fill_value: float,
) -> list[Shaped[Array, "ids *dim"]]:
    """Read a row for each id into several arrays, so that there is no array of all rows.

    Args:
      plain: The rows that `take` reads, cut into several arrays.
      table: The table.
      ids: Row numbers, as in `take`.
      fill_value: As in `take`.

    Returns:
      The same rows.
    """
    plain = list(plain)
    if not (_has_kernel(table, ids, fill_value) and fits(*plain, ids=ids)):
        return plain
    parts = tuple(len(rows) for rows in plain)
    return take_p.bind(*plain, table, ids, nan=fill_value != 0, wrap=False, parts=parts)


def _has_kernel(table: Array, ids: Array, fill_value: float) -> bool:
    if not (has("take") and fits(table, ids=ids)):
        return False
    return table.dtype in FLOATS + INTEGERS if fill_value == 0 else np.isnan(fill_value) and table.dtype in FLOATS


def _by_kernel(outs: Outs, table: Array, ids: Array, *, nan: bool, wrap: bool, parts: tuple[int, ...]) -> list[Array]:
    return call("take", outs, table, ids, nan=np.int32(nan), wrap=np.int32(wrap))


def _batched(
    plain: Array, args: Sequence[Array], axes: Sequence[int | None], **params: Any
) -> Shaped[Array, "lanes ids *dim"] | None:
    (table, ids), (of_table, of_ids) = args, axes
    if of_table is not None or of_ids is None:
        return None
    flat = jnp.reshape(plain, (-1, *table.shape[1:])), table, jnp.ravel(jnp.moveaxis(ids, of_ids, 0))
    (rows,) = take_p.bind(*flat, **params | {"parts": (flat[0].shape[0],)})
    return jnp.reshape(rows, plain.shape)


take_p = primitive("take", _by_kernel, _batched, results="parts")
