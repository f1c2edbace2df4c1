"""Bring rows from this process onto a mesh, and back. Each device reads only the rows that it owns."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, DTypeLike

from .placement import Placement

# A function that reads the rows of a slice, and some columns of them.
Reader = Callable[[slice, tuple[slice, ...]], np.ndarray]


def stored(placement: Placement, read: Reader, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Make the stored array of a placement; each shard reads its own rows."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    of_all = (placement.stored_rows, *shape[1:])

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(of_all[0])
        step = placement.shards if placement.cyclic else 1
        start = first // placement.block if placement.cyclic and last > first else first
        own = read(slice(start, min(start + (last - first) * step, placement.rows), step), index[1:])
        missing = last - first - own.shape[0]
        own = np.pad(own, [(0, missing), *[(0, 0)] * (own.ndim - 1)]) if missing else own
        return np.asarray(own, dtype)

    return jax.make_array_from_callback(of_all, placement.sharding(of_all, of_all[1:]), part, dtype=dtype)


def of_array(rows: Array | np.ndarray) -> Reader:
    """A reader of an array of this process, or of a memory map."""
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:
        raise ValueError(
            f"`embax.shard(tree=...)` must have arrays of this process, or tables on the same mesh, got "
            f"{rows.sharding}. Make the table on the mesh, with Table.create(mesh=...) or from a file."
        )
    if isinstance(rows, jax.Array) and [device.platform for device in rows.devices()] == ["cpu"]:
        rows = np.asarray(rows)  # the same memory; NumPy slices it without compiling
    # Only the slice is copied, also from a device.
    return lambda some, columns: np.asarray(rows[(slice(some.start, max(some.stop, some.start), some.step), *columns)])


def of_shards(placement: Placement, leaf: jax.Array) -> Reader:
    """A reader of a sharded array's shards in this process, in row order."""
    shards = {tuple((s.start, s.stop) for s in x.index): x for x in leaf.addressable_shards}

    def read(some: slice, columns: tuple[slice, ...]) -> np.ndarray:
        ids = np.arange(some.start, max(some.stop, some.start), some.step)
        places = placement.positions(ids)
        out = np.zeros((len(ids), *leaf.shape[1:]), leaf.dtype)
        for shard in shards.values():
            first, last, _ = shard.index[0].indices(placement.stored_rows)
            here = np.flatnonzero((places >= first) & (places < last))
            out[(here, *shard.index[1:])] = np.asarray(shard.data)[places[here] - first]
        return out[(slice(None), *columns)]

    return read
