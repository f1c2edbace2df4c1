"""Placed heads: what reads all rows of a table on a mesh, each device its own ones, and joins what they make of it.

A device multiplies whole rows. Where rows are split by columns, too, the devices that have parts of the same rows
exchange these, a block at a time, so that each has some of the rows whole.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from .._base.axes import laid_out_as, on_every_device, resharded
from .._base.dtypes import index_dtype
from .._base.row_blocks import read_block
from .._core.own_rows import Block, OwnRows
from .exchange import start_of_device
from .placement import Placement
from .sharded import on_devices


@dataclasses.dataclass(frozen=True)
class ShardedRows(OwnRows):
    """The stored rows of one device of a mesh.

    For instance, of 7 cyclic rows on two devices, the second one has rows 1, 3 and 5, and one without a meaning.
    """

    @property
    def placement(self) -> Placement:
        """Where the rows of the table are."""
        placement: Any = self.storage.placement
        return placement

    @property
    def parts(self) -> int:
        """How many devices read a block of stored rows together."""
        return self.placement.column_shards

    @property
    def filled_up(self) -> bool:
        """Whether some device reads stored rows without a meaning."""
        return self.placement.stored_rows > self.rows or self.placement.block % self.parts > 0

    def places(self, labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Say where rows are among those of this device; below 0 where they are not."""
        local = self.placement.positions(labels) - start_of_device(self.placement, labels.dtype)
        return jnp.where((local >= 0) & (local < self.placement.block), local, -1)

    def read(self, weight: Float[Array, "stored *part"], start: Int[Array, ""], size: int) -> Block:
        """Read `size` stored rows from place `start` on, or this device's share of them if it has parts of them."""
        index = index_dtype(self.rows)
        start, rows = start.astype(index), read_block(weight, start, size)
        placement, share = self.placement, -(-size // self.parts)
        if placement.columns is not None:
            rows = jnp.pad(rows, [(0, share * self.parts - size), *[(0, 0)] * (rows.ndim - 1)])
            rows = jax.lax.all_to_all(rows, placement.columns, 0, 1, tiled=True)
            start += jax.lax.axis_index(placement.columns).astype(index) * share
        local = start + jnp.arange(share, dtype=index)
        ids = placement.ids(start_of_device(placement, index) + local)
        return Block(start, jnp.where(local < placement.block, ids, self.rows), rows)

    def part_of(self, values: Float[Array, "share *dim"], size: int) -> Float[Array, "size *part"]:
        """Take this device's part of `size` rows of which it has a share."""
        if self.placement.columns is None:
            return values
        return jax.lax.all_to_all(values, self.placement.columns, 1, 0, tiled=True)[:size]

    def highest(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The largest of all owners' values."""
        names = self.placement.owner_axes
        return jax.lax.pmax(values, names) if names else values

    def summed(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The sum of all owners' values."""
        names = self.placement.owner_axes
        return jax.lax.psum(values, names) if names else values

    def summed_over_replicas(self, values: Float[Array, "block *dim"]) -> Float[Array, "block *dim"]:
        """The sum over replicas of the same rows, each of which saw other tokens."""
        names = self.placement.copy_axes
        return jax.lax.psum(values, names) if names else values


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How a batch is laid out for a head: split over the copies of the table, and the same for all owners of rows.

    Args:
      placement: That of the table.
      batch: The batch's shape.
    """

    placement: Placement
    batch: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The batch's shape, flat and filled up where its first axis cannot be split."""
        if self.placement.copies == 1 or (self.batch and self.batch[0] % self.placement.copies == 0):
            return self.batch
        return (-(-math.prod(self.batch) // self.placement.copies) * self.placement.copies,)

    @property
    def spec(self) -> PartitionSpec:
        """How the batch is laid out."""
        return PartitionSpec(self.placement.copy_axes) if self.placement.copies > 1 else PartitionSpec()

    @property
    def is_parted(self) -> bool:
        """Whether the owners of rows can take a part of the batch each."""
        parts = self.placement.shards * self.placement.column_shards
        first = self.shape[0] // self.placement.copies if self.shape else 0
        return parts > 1 and first > 0 and first % parts == 0

    @property
    def parted_spec(self) -> PartitionSpec:
        """How the batch is laid out if they do."""
        return PartitionSpec((*self.placement.copy_axes, *self.placement.owner_axes)) if self.is_parted else self.spec

    def summed(self, values: Float[Array, "*tokens_dim"]) -> Float[Array, "*part_dim"]:
        """The sum of all owners' values, laid out as `parted_spec` says."""
        names = self.placement.owner_axes
        if self.is_parted:
            return jax.lax.psum_scatter(values, names, scatter_dimension=0, tiled=True)
        return jax.lax.psum(values, names) if names else values

    def joined(self, logits: Float[Array, "*tokens own"]) -> Float[Array, "*part rows"]:
        """The logits of all owners' rows in the order of the ids, laid out as `parted_spec` says."""
        placement, names, last = self.placement, self.placement.owner_axes, logits.ndim - 1
        if self.is_parted:
            logits = jax.lax.all_to_all(logits, names, 0, last, tiled=True)
        elif names:
            logits = jax.lax.all_gather(logits, names, axis=last, tiled=True)
        batch = logits.shape[:-1]
        logits = jnp.reshape(logits, (*batch, placement.shards, logits.shape[-1] // placement.shards))
        logits = logits[..., : placement.block]
        if placement.cyclic:
            logits = jnp.swapaxes(logits, -1, -2)
        return jnp.reshape(logits, (*batch, placement.stored_rows))[..., : placement.rows]

    def laid_out(self, array: Shaped[Array, "*batch_dim"], fill_value: Any = 0) -> Shaped[Array, "*tokens_dim"]:
        """Lay out what there is for each token, filled up with `fill_value`."""
        if self.shape == self.batch:
            return array
        dim = array.shape[len(self.batch) :]
        flat = jnp.reshape(on_every_device(array), (math.prod(self.batch), *dim))
        missing = self.shape[0] - flat.shape[0]
        return jnp.pad(flat, [(0, missing), *[(0, 0)] * len(dim)], constant_values=fill_value)

    def restored(self, array: Shaped[Array, "*tokens_dim"], like: Array) -> Shaped[Array, "*batch_dim"]:
        """Give what there is for each token the batch's shape, and its layout where axes are explicit."""
        if self.shape != self.batch:
            array = resharded(array, self.placement.mesh, PartitionSpec())[: math.prod(self.batch)]
            array = jnp.reshape(array, (*self.batch, *array.shape[1:]))
        return laid_out_as(like, array, len(self.batch), self.placement.mesh)


def on_owners(
    tokens: Tokens,
    function: Callable[..., tuple[Array, ...]],
    out_specs: Sequence[PartitionSpec],
    weight: Float[Array, "stored *dim"],
    *of_tokens: Shaped[Array, "..."],
) -> tuple[Array, ...]:
    """Call a function on each device, with its own rows.

    Args:
      tokens: How the batch is laid out.
      function: Called as `function(weight, *of_tokens)`; it returns a tuple.
      out_specs: How what it returns is laid out.
      weight: The weight.
      *of_tokens: Arrays as `Tokens.laid_out` gives them.

    Returns:
      What it returns.
    """
    in_specs = (tokens.placement.spec(weight.shape, weight.shape[1:]), *(tokens.spec for _ in of_tokens))
    return on_devices(tokens.placement, function, in_specs, tuple(out_specs))(weight, *of_tokens)
