"""Placement: which device of a mesh owns which rows of a table.

For instance, 10 rows on four devices. Each device has a block of 3 stored rows, 12 in total; a dot is padding:

    rows           0 1 2 | 3 4 5 | 6 7 8 | 9 . .      row 5 is at position 5
    rows-cyclic    0 4 8 | 1 5 9 | 2 6 . | 3 7 .      row 5 is at position 4

Cyclic rows balance the load where low ids are frequent. A lookup of 1,024 ids on each device asks an owner for 256 rows
on average; with a `skew` of 2, one round of the exchange has room for 512.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from .._base import check as _check
from .._base.axes import is_explicit
from .._core.layout import Layout, Split


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the rows of a table are on a mesh; made by `embax.shard`, and kept by the table.

    The weight of a sharded table is one array, sharded over the mesh. All devices have blocks of equal size, so the
    last rows may be padding, which is zero. Mesh axes that split neither rows nor columns hold replicas.

    Args:
      mesh: The mesh.
      axes: The mesh axes over which rows are split, the major one first; empty if rows are not split.
      columns: The mesh axis over which the first axis of a row is split, or None.
      cyclic: Whether row `r` is on device `r mod n`, rather than `r // block`.
      rows: The number of rows, without padding.
      skew: A lookup needs a second round when a device asks one owner for more than `skew` times the mean number of
        rows; 1 or more, dimensionless.
      pool_at_owners: Whether owners may sum the rows of a bag, where that sends less.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.shard(embax.Table(jnp.ones((10, 2))), mesh, "x")
      >>> table.placement.layout, table.placement.rows
      ('rows', 10)
    """

    mesh: Any  # a Mesh; an AbstractMesh for planning
    axes: tuple[str, ...]
    columns: str | None
    cyclic: bool
    rows: int
    skew: float = 2.0
    pool_at_owners: bool = False

    def __repr__(self) -> str:
        over = [f"{self.mesh.shape[name]} of {name!r}" for name in self.owner_axes]
        return f"Placement({self.layout!r} over {' x '.join(over) or 'copies'})"

    @property
    def layout(self) -> Layout:
        """The layout as `embax.shard` names it; a table split by rows and columns has the name of its rows' layout."""
        if self.axes:
            return "rows-cyclic" if self.cyclic else "rows"
        return "columns" if self.columns else "replicated"

    @property
    def shards(self) -> int:
        """The number of blocks that the rows are split into."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    @property
    def column_shards(self) -> int:
        """The number of parts that each row is split into."""
        return self.mesh.shape[self.columns] if self.columns else 1

    @property
    def block(self) -> int:
        """The number of stored rows of a device."""
        return -(-self.rows // self.shards)

    @property
    def stored_rows(self) -> int:
        """The number of stored rows, padding included."""
        return self.block * self.shards

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.mesh.size

    @property
    def copy_axes(self) -> tuple[str, ...]:
        """The mesh axes of replicas; along these axes, devices have the same rows."""
        return tuple(name for name in self.mesh.axis_names if name not in (*self.axes, self.columns))

    @property
    def copies(self) -> int:
        """The number of replicas of each row."""
        return math.prod(self.mesh.shape[name] for name in self.copy_axes)

    @property
    def owner_axes(self) -> tuple[str, ...]:
        """The mesh axes of owners; along these axes, devices have different rows, or different parts of rows."""
        return (*self.axes, *([self.columns] if self.columns is not None else []))

    @property
    def batch_spec(self) -> PartitionSpec:
        """Sharding of a batch of ids, which is split over all devices."""
        return PartitionSpec(tuple(self.mesh.axis_names))

    @property
    def owner_spec(self) -> PartitionSpec:
        """Sharding of ids that are already on the device that owns their row."""
        return PartitionSpec(self.axes or None)

    def spec(self, shape: tuple[int, ...], dim: tuple[int, ...]) -> PartitionSpec:
        """Sharding of an array with an entry for each stored row.

        Args:
          shape: The shape of the array.
          dim: The shape of the table's rows. An array with other trailing axes is not split by columns.

        Returns:
          A PartitionSpec.
        """
        by_columns = self.columns is not None and shape[1:] == dim and len(dim) > 0
        names = (self.axes or None, *([self.columns] * by_columns))
        # On explicit axes, JAX's types spell out the trailing None. We do the same: else a step would compile again
        # for the arrays that it returned.
        return PartitionSpec(*names, *[None] * (len(shape) - len(names)) * is_explicit(self.mesh))

    def sharding(self, shape: tuple[int, ...], dim: tuple[int, ...]) -> NamedSharding:
        """`spec` as a NamedSharding on the mesh."""
        return NamedSharding(self.mesh, self.spec(shape, dim))

    def positions(self, ids: Int[Array | np.ndarray, "*batch"]) -> Any:
        """The stored position of each row; the sentinel `stored_rows` for an id without a row. NumPy in, NumPy out."""
        exists = (ids >= 0) & (ids < self.rows)
        places = (ids % self.shards) * self.block + ids // self.shards if self.cyclic else ids
        where = np.where if isinstance(ids, np.ndarray) else jnp.where
        return where(exists, places, self.stored_rows)

    def ids(self, positions: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The row stored at each position; the sentinel `rows` for padding and positions out of bounds."""
        ids = positions
        if self.cyclic:
            block = max(self.block, 1)
            ids = (positions % block) * self.shards + positions // block
        return jnp.where((positions < self.stored_rows) & (ids < self.rows), ids, self.rows)

    def capacity(self, ids: int) -> int:
        """The number of rows that a device can ask one owner for in one round.

        Args:
          ids: The number of ids on each device.

        Returns:
          The number of rows.
        """
        mean = ids / self.shards
        # With few ids, chance alone often exceeds twice the mean, so there is room for six standard deviations.
        return min(ids, math.ceil(max(self.skew * mean, mean + 6 * math.sqrt(mean))))

    def sums_travel(self, bags: int, length: int, row: int, total: int, weight: int) -> bool:
        """Say whether the owners of rows pool bags, and send sums.

        They do if `pool_at_owners` allows it and it sends less: one sum from each owner for each bag, instead of rows.

        Args:
          bags: The number of bags on all devices.
          length: The number of ids of each bag.
          row: The size in bytes of a device's part of a row.
          total: The size in bytes of its part of a sum.
          weight: The size in bytes of an id's weight, or 0.

        Returns:
          True if owners pool.
        """
        if not self.pool_at_owners or self.shards == 1 or self.rows == 0:
            return False
        group = self.ids_of_device(bags)
        capacity = self.capacity(group * length)
        number = np.dtype(np.int32).itemsize  # each id is sent with the number of its bag
        return group * total + capacity * (number + weight) < capacity * row

    def ids_of_device(self, batch: int) -> int:
        """The number of ids that a device handles; if rows are split by columns, the ids of its whole group."""
        return -(-batch // self.devices) * self.column_shards


def placement_of(call: str, split: Split, shape: Sequence[int]) -> Placement:
    """Check how a table is to be split, and make its placement.

    Args:
      call: The call, for error messages.
      split: The arguments of `embax.shard`.
      shape: The table's shape, `(rows, *dim)`.

    Returns:
      The placement.

    Raises:
      TypeError: If `mesh` is not a mesh.
      ValueError: If an argument is outside of its range, or the columns do not divide.
    """
    mesh, axis, columns = split.mesh, split.axis, split.columns
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"`{call}(mesh=...)` must be a jax.sharding.Mesh, got {type(mesh).__name__}. Make one.")
    layout = _check.choice(f"{call}(layout=...)", split.layout, Layout)
    axes: tuple[str, ...] = (axis,) if isinstance(axis, str) else tuple(axis or ())
    named: list[str] = [*axes, *([columns] if columns is not None else [])]
    if not axes or len(set(named)) < len(named) or not set(named) <= set(mesh.axis_names):
        raise ValueError(
            f"`{call}(axis=..., columns=...)` must be different axes of the mesh, {mesh.axis_names}, got {axis!r} and "
            f"{columns!r}. Name some of them."
        )
    if layout in ("columns", "replicated"):
        if columns is not None or (layout == "columns" and len(axes) > 1):
            raise ValueError(
                f"`{call}(layout={layout!r})` must have one axis and no other for columns, got {axis!r} and "
                f"{columns!r}. For rows and columns, pass layout='rows'."
            )
        axes, columns = (), named[0] if layout == "columns" else None
    skew = _check.positive(f"{call}(skew=...)", split.skew)
    if not 1 <= skew < math.inf:
        raise ValueError(f"`{call}(skew=...)` must be finite and at least 1, got {skew}. Pass 2.0, say.")
    pool_at_owners = _check.flag(f"{call}(pool_at_owners=...)", split.pool_at_owners)
    placement = Placement(mesh, axes, columns, layout == "rows-cyclic", 0, skew, pool_at_owners)
    placement = with_rows(call, placement, shape[0])
    if columns is not None and (len(shape) < 2 or shape[1] % placement.column_shards):
        raise ValueError(
            f"`{call}` must have rows whose first axis divides by {placement.column_shards}, the size of the mesh axis "
            f"{columns!r}, got rows of the shape {tuple(shape[1:])}. Split by rows only, or choose another axis."
        )
    return placement


def with_rows(call: str, placement: Placement, rows: int) -> Placement:
    """The same placement for another number of rows.

    Args:
      call: The call, for the error message.
      placement: The placement.
      rows: The new number of rows.

    Returns:
      The new placement.

    Raises:
      ValueError: If the row numbers fit in 32 bits, but not the positions with padding.
    """
    placement = dataclasses.replace(placement, rows=rows)
    if rows <= np.iinfo(np.int32).max < placement.stored_rows:
        raise ValueError(
            f"`{call}` must have rows that fit in 32 bits together with the padding for {placement.shards} devices, "
            f"got {rows} rows. Use fewer rows, or more than {np.iinfo(np.int32).max} for 64-bit ids."
        )
    return placement
