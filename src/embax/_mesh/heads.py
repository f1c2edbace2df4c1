"""Heads of a sharded table: each device multiplies its own rows, and collectives join the results.

A head such as a softmax reads all rows. For instance, 8 rows on two owners and 6 tokens: both owners see all 6 tokens,
each computes 4 logits for each token, and `OwnRows.highest` and `summed` join their maxima and sums of exponentials.
With two replicas of the table, each replica takes 3 of the tokens (`Tokens`).

A device multiplies whole rows. If rows are also split by columns, the devices with parts of the same rows exchange
them, block by block, so that each has some rows whole.
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

    For instance, of 7 cyclic rows on two devices, the second device has rows 1, 3 and 5, and one padding row.
    """

    @property
    def placement(self) -> Placement:
        """Where the rows of the table are."""
        placement: Any = self.storage.placement
        return placement

    @property
    def parts(self) -> int:
        """How many devices hold a part of each row, and so read a block together."""
        return self.placement.column_shards

    @property
    def filled_up(self) -> bool:
        """Whether some device has padding rows that sharding added."""
        return self.placement.stored_rows > self.rows or self.placement.block % self.parts > 0

    def places(self, labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Positions of rows among this device's rows; -1 for rows of other devices."""
        local = self.placement.positions(labels) - start_of_device(self.placement, labels.dtype)
        return jnp.where((local >= 0) & (local < self.placement.block), local, -1)

    def read(self, weight: Float[Array, "stored *part"], start: Int[Array, ""], size: int) -> Block:
        """Read `size` stored rows from position `start` on; its share of them where rows are split by columns."""
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
        """Return this device's columns of `size` rows, given its share of the rows."""
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
    """The layout of a batch of tokens for a head: split over replicas of the table, the same for all owners.

    Args:
      placement: The table's placement.
      batch: The batch's shape.
    """

    placement: Placement
    batch: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The batch's shape; flattened and padded if its first axis cannot be split over the replicas."""
        if self.placement.copies == 1 or (self.batch and self.batch[0] % self.placement.copies == 0):
            return self.batch
        return (-(-math.prod(self.batch) // self.placement.copies) * self.placement.copies,)

    @property
    def spec(self) -> PartitionSpec:
        """The batch's PartitionSpec."""
        return PartitionSpec(self.placement.copy_axes) if self.placement.copies > 1 else PartitionSpec()

    @property
    def is_parted(self) -> bool:
        """Whether results can be split further, so that each owner has a part of its replica's tokens."""
        parts = self.placement.shards * self.placement.column_shards
        first = self.shape[0] // self.placement.copies if self.shape else 0
        return parts > 1 and first > 0 and first % parts == 0

    @property
    def parted_spec(self) -> PartitionSpec:
        """The PartitionSpec of results: split over owners, too, if `is_parted`."""
        return PartitionSpec((*self.placement.copy_axes, *self.placement.owner_axes)) if self.is_parted else self.spec

    def summed(self, values: Float[Array, "*tokens_dim"]) -> Float[Array, "*part_dim"]:
        """Sum the values of all owners; laid out as `parted_spec`."""
        names = self.placement.owner_axes
        if self.is_parted:
            return jax.lax.psum_scatter(values, names, scatter_dimension=0, tiled=True)
        return jax.lax.psum(values, names) if names else values

    def joined(self, logits: Float[Array, "*tokens own"]) -> Float[Array, "*part rows"]:
        """Concatenate the logits of all owners in row order; laid out as `parted_spec`."""
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
        """Give an array with entries per token the shape `self.shape`, padded with `fill_value`."""
        if self.shape == self.batch:
            return array
        dim = array.shape[len(self.batch) :]
        flat = jnp.reshape(on_every_device(array), (math.prod(self.batch), *dim))
        missing = self.shape[0] - flat.shape[0]
        return jnp.pad(flat, [(0, missing), *[(0, 0)] * len(dim)], constant_values=fill_value)

    def restored(self, array: Shaped[Array, "*tokens_dim"], like: Array) -> Shaped[Array, "*batch_dim"]:
        """Undo `laid_out`: drop the padding, restore the batch's shape, and shard it as `like` on explicit axes."""
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
      tokens: The layout of the batch.
      function: Called as `function(weight, *of_tokens)`; returns a tuple.
      out_specs: The layouts of its results.
      weight: The weight.
      *of_tokens: Arrays with entries per token, from `Tokens.laid_out`.

    Returns:
      The function's results.
    """
    in_specs = (tokens.placement.spec(weight.shape, weight.shape[1:]), *(tokens.spec for _ in of_tokens))
    return on_devices(tokens.placement, function, in_specs, tuple(out_specs))(weight, *of_tokens)
