"""Relayout: bring rows on a mesh into another layout, a few rows at a time, so that no device holds the whole table."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from .._base.axes import laid_out, resharded
from .._base.dtypes import index_dtype
from .placement import Placement
from .sharded import put, take

# Rows are moved in 16 steps, but a step has at least 1,024 rows of each device.
_CHUNKS, _LEAST_ROWS = 16, 1024


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def moved(
    placement: Placement, leaf: Shaped[Array, "stored *dim"], to: Placement, start: int = 0
) -> Shaped[Array, "other *dim"]:
    """Copy rows into another layout. Each device holds little more than its parts of both arrays.

    Args:
      placement: Where the rows are.
      leaf: The rows.
      to: Where they are to be, on the same devices; it takes `to.rows` rows.
      start: The first row to take.

    Returns:
      The rows, laid out as `to`; its padding is zero.
    """
    dim, index = leaf.shape[1:], index_dtype(max(to.stored_rows, placement.rows))
    spec = to.spec((to.stored_rows, *dim), dim)
    by_shard = NamedSharding(to.mesh, PartitionSpec(spec[0], None, *spec[1:]))
    chunk = max(-(-to.block // _CHUNKS), min(to.block, _LEAST_ROWS), 1)

    def step(number: Array, out: Shaped[Array, "shards block *dim"]) -> Shaped[Array, "shards block *dim"]:
        first = jnp.minimum(number.astype(index) * chunk, to.block - chunk)  # the last chunk may overlap the one before
        shards = jnp.arange(to.shards, dtype=index)[:, None] * to.block
        ids = to.ids(shards + first + jnp.arange(chunk, dtype=index)[None, :])
        rows = take(placement, leaf, jnp.ravel(jnp.where(ids < to.rows, ids + start, placement.rows)), 0)
        rows = jnp.reshape(resharded(rows, to.mesh, spec), (to.shards, chunk, *dim))
        rows = laid_out(rows, by_shard)
        return jax.lax.dynamic_update_slice_in_dim(out, rows, first, 1)

    out = laid_out(jnp.zeros((to.shards, to.block, *dim), leaf.dtype), by_shard)
    if to.block:
        out = jax.lax.fori_loop(0, -(-to.block // chunk), step, out)
    return laid_out(jnp.reshape(out, (to.stored_rows, *dim)), NamedSharding(to.mesh, spec))


@functools.partial(jax.jit, static_argnums=(0, 2, 3), donate_argnums=1)
def moved_into(
    placement: Placement,
    leaf: Shaped[Array, "stored *dim"],
    start: int,
    of: Placement | None,
    rows: Shaped[Array, "others *dim"],
) -> Shaped[Array, "stored *dim"]:
    """Overwrite rows of a sharded array by rows of any layout.

    Args:
      placement: Where the rows of `leaf` are.
      leaf: The array; it is donated.
      start: The first row to be overwritten.
      of: Where the new rows are, or None if they are in row order.
      rows: The new rows.

    Returns:
      The array, laid out as before.
    """
    ids = jnp.arange(rows.shape[0], dtype=index_dtype(max(placement.rows, rows.shape[0])))
    exists = ids < rows.shape[0]
    if of is not None:
        ids = of.ids(ids)
        exists = ids < of.rows
    leaf = laid_out(leaf, placement.sharding(leaf.shape, leaf.shape[1:]))
    return put(placement, leaf, jnp.where(exists, ids + start, placement.rows), rows, "set")
