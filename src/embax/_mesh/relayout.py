"""Moves: rows on a mesh brought into another layout, a few at a time."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from .._base.axes import laid_out, resharded
from .._base.dtypes import index_dtype
from .placement import Placement
from .sharded import put, take

# Rows are moved in so many steps, if that is not too few rows for one.
_CHUNKS, _LEAST_ROWS = 16, 1024


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def moved(
    placement: Placement, leaf: Shaped[Array, "stored *dim"], to: Placement, start: int = 0
) -> Shaped[Array, "other *dim"]:
    """Lay rows out in another way, each device holding little more than its part of both.

    Args:
      placement: Where the rows are.
      leaf: The rows.
      to: Where they shall be, on the same devices: as many rows as it has, from row `start` on.
      start: The first row.

    Returns:
      The rows, laid out as `to` says; zero where it has no row.
    """
    dim, index = leaf.shape[1:], index_dtype(max(to.stored_rows, placement.rows))
    spec = to.spec((to.stored_rows, *dim), dim)
    by_shard = NamedSharding(to.mesh, PartitionSpec(spec[0], None, *spec[1:]))
    chunk = max(-(-to.block // _CHUNKS), min(to.block, _LEAST_ROWS), 1)

    def step(number: Array, out: Shaped[Array, "shards block *dim"]) -> Shaped[Array, "shards block *dim"]:
        first = jnp.minimum(number.astype(index) * chunk, to.block - chunk)  # the last one meets the one before
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
    """Write rows, however they are laid out, into others from row `start` on.

    Args:
      placement: Where the others are.
      leaf: The others.
      start: The first row to be written.
      of: Where the rows are, or None.
      rows: The rows.

    Returns:
      The others, laid out as they were.
    """
    ids = jnp.arange(rows.shape[0], dtype=index_dtype(max(placement.rows, rows.shape[0])))
    exists = ids < rows.shape[0]
    if of is not None:
        ids = of.ids(ids)
        exists = ids < of.rows
    leaf = laid_out(leaf, placement.sharding(leaf.shape, leaf.shape[1:]))
    return put(placement, leaf, jnp.where(exists, ids + start, placement.rows), rows, "set")
