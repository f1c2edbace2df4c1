"""OwnRows: how a device reads and writes its stored rows block by block, for heads, and how owners join results."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._base.dtypes import index_dtype
from .._base.row_blocks import read_block, write_block


class Block(NamedTuple):
    """Consecutive stored rows of a device."""

    first: Int[Array, ""]  # position of the first one among this device's rows
    ids: Int[Array, " block"]  # `rows` for padding that sharding adds
    rows: Float[Array, "block *dim"]


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """All rows of a table on one device, so that nothing is to be joined. `ShardedRows` is the one for a mesh.

    Args:
      storage: The storage of the table.
      rows: The number of rows of the table.
    """

    storage: Any
    rows: int

    @property
    def parts(self) -> int:
        """How many devices hold a part of each row, and so read a block together."""
        return 1

    @property
    def filled_up(self) -> bool:
        """Whether some device has padding rows that sharding added."""
        return False

    def places(self, labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Positions of rows among this device's rows; negative for rows of other devices."""
        return self.storage.positions(labels, self.rows)

    def read(self, weight: Float[Array, "stored *part"], start: Int[Array, ""], size: int) -> Block:
        """Read `size` stored rows from position `start` on; its share of them where rows are split by columns."""
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
        """Write rows back to where `read` with the same `start` and `size` read them."""
        return write_block(weight, self.part_of(values, size), start)

    def part_of(self, values: Float[Array, "share *dim"], size: int) -> Float[Array, "size *part"]:
        """Return this device's columns of `size` rows, given its share of the rows."""
        return values

    def exist(self, ids: Int[Array, " block"]) -> Bool[Array, " block"]:
        """Which ids are rows of the table, not padding that sharding adds."""
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
