"""OwnRows: the stored rows that a device reads block by block, for heads, and how owners join their results."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._base.dtypes import index_dtype
from .._base.row_blocks import read_block, write_block


class Block(NamedTuple):
    """Rows that a device reads at once."""

    first: Int[Array, ""]  # the place of the first one among the rows of this device
    ids: Int[Array, " block"]  # `rows` where there is none
    rows: Float[Array, "block *dim"]


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """The rows of a table that one device has all of, and nothing to be joined with others.

    Args:
      storage: The storage of the table.
      rows: The number of rows of the table.
    """

    storage: Any
    rows: int

    @property
    def parts(self) -> int:
        """How many devices read a block of stored rows together."""
        return 1

    @property
    def filled_up(self) -> bool:
        """Whether some device reads stored rows without a meaning."""
        return False

    def places(self, labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Say where rows are among those of this device; below 0 where they are not."""
        return self.storage.positions(labels, self.rows)

    def read(self, weight: Float[Array, "stored *part"], start: Int[Array, ""], size: int) -> Block:
        """Read `size` stored rows from place `start` on, or this device's share of them if it has parts of them."""
        index = index_dtype(self.rows)
        start, rows = start.astype(index), read_block(weight, start, size)
        places = start + jnp.arange(size, dtype=index)
        return Block(start, self.storage.ids(places, self.rows), rows)

    def write(
        self,
        weight: Float[Array, "stored *part"],
        values: Float[Array, "share *dim"],
        start: Int[Array, ""],
        size: int,
    ) -> Float[Array, "stored *part"]:
        """Write rows where `read` has read them."""
        return write_block(weight, self.part_of(values, size), start)

    def part_of(self, values: Float[Array, "share *dim"], size: int) -> Float[Array, "size *part"]:
        """Take this device's part of `size` rows of which it has a share."""
        return values

    def exist(self, ids: Int[Array, " block"]) -> Bool[Array, " block"]:
        """Tell the rows that have a meaning."""
        return ids < self.rows

    def highest(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The largest of all owners' values."""
        return values

    def summed(self, values: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """The sum of all owners' values."""
        return values

    def summed_over_replicas(self, values: Float[Array, "block *dim"]) -> Float[Array, "block *dim"]:
        """The sum over replicas of the same rows, each of which saw other tokens."""
        return values
