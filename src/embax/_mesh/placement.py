"""Placement: which device of a mesh has which rows of a table."""

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

    The weight of a placed table is one array, sharded over the mesh. Each device has a block of as many rows, so that
    behind the last row there may be some without a meaning, which are zero. Axes of the mesh that are neither for rows
    nor for columns hold copies.

    Args:
      mesh: The mesh.
      axes: The mesh axes over which rows are split, the first one being the major one; none where they are not.
      columns: The mesh axis over which the first axis of a row is split, or None.
      cyclic: Whether row `r` is on device `r mod n`, and not in the block `r // block`.
      rows: The number of rows that have a meaning.
      skew: How many times the mean number of rows a device may be asked for by another before a lookup takes a second
        round, 1 or more, dimensionless.
      pool_at_owners: Whether owners of rows sum those of a bag, where that is less to be sent.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.shard(embax.Table(jnp.ones((10, 2))), mesh, "x")
      >>> table.placement.layout, table.placement.rows
      ('rows', 10)
    """

    mesh: Any  # a Mesh; an AbstractMesh to plan with
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
        """The layout of the rows; of a table that is split both ways, that of the rows."""
        if self.axes:
            return "rows-cyclic" if self.cyclic else "rows"
        return "columns" if self.columns else "replicated"

    @property
    def shards(self) -> int:
        """Into how many blocks the rows are split."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    @property
    def column_shards(self) -> int:
        """Into how many parts each row is split."""
        return self.mesh.shape[self.columns] if self.columns else 1

    @property
    def block(self) -> int:
        """The number of rows of a device."""
        return -(-self.rows // self.shards)

    @property
    def stored_rows(self) -> int:
        """The number of rows of the stored array."""
        return self.block * self.shards

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.mesh.size

    @property
    def copy_axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices have the same rows."""
        return tuple(name for name in self.mesh.axis_names if name not in (*self.axes, self.columns))

    @property
    def copies(self) -> int:
        """How many devices have the same rows."""
        return math.prod(self.mesh.shape[name] for name in self.copy_axes)

    @property
    def owner_axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices have other rows, or other parts of them."""
        return (*self.axes, *([self.columns] if self.columns is not None else []))

    @property
    def batch_spec(self) -> PartitionSpec:
        """How ids are split over all devices."""
        return PartitionSpec(tuple(self.mesh.axis_names))

    @property
    def owner_spec(self) -> PartitionSpec:
        """How the ids of rows are laid out that are where they are stored."""
        return PartitionSpec(self.axes or None)

    def spec(self, shape: tuple[int, ...], dim: tuple[int, ...]) -> PartitionSpec:
        """How an array is laid out that has an entry, or a row, for each row of a table.

        Args:
          shape: The shape of the array.
          dim: The sizes of a row's axes in the table; what has others is not split by columns.

        Returns:
          A PartitionSpec.
        """
        by_columns = self.columns is not None and shape[1:] == dim and len(dim) > 0
        names = (self.axes or None, *([self.columns] * by_columns))
        # As JAX writes it in the types of arrays, lest a step compile again for what it has itself returned.
        return PartitionSpec(*names, *[None] * (len(shape) - len(names)) * is_explicit(self.mesh))

    def sharding(self, shape: tuple[int, ...], dim: tuple[int, ...]) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(shape, dim))

    def positions(self, ids: Int[Array | np.ndarray, "*batch"]) -> Any:
        """Say where rows are stored, by NumPy for an array of NumPy; `stored_rows` for what is no row."""
        exists = (ids >= 0) & (ids < self.rows)
        places = (ids % self.shards) * self.block + ids // self.shards if self.cyclic else ids
        where = np.where if isinstance(ids, np.ndarray) else jnp.where
        return where(exists, places, self.stored_rows)

    def ids(self, positions: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Say which rows are stored at some positions; `rows` for those where there is none."""
        ids = positions
        if self.cyclic:
            block = max(self.block, 1)
            ids = (positions % block) * self.shards + positions // block
        return jnp.where((positions < self.stored_rows) & (ids < self.rows), ids, self.rows)

    def capacity(self, ids: int) -> int:
        """How many rows a device may ask another one for in one round.

        Args:
          ids: The number of ids on each device.

        Returns:
          The number of rows.
        """
        mean = ids / self.shards
        # Of few ids, the number that falls to a device is often twice the mean: six standard deviations, if by chance.
        return min(ids, math.ceil(max(self.skew * mean, mean + 6 * math.sqrt(mean))))

    def sums_travel(self, bags: int, length: int, row: int, total: int, weight: int) -> bool:
        """Say whether bags of one length are pooled by the owners of their rows.

        They are if that is asked for, and less is sent: for each bag a sum by each owner instead of rows.

        Args:
          bags: The number of bags, on all devices.
          length: How many ids each has.
          row: The size of what a device has of a row, in bytes.
          total: That of what it has of a sum.
          weight: That of the weight of an id, or 0.

        Returns:
          Whether they are.
        """
        if not self.pool_at_owners or self.shards == 1 or self.rows == 0:
            return False
        group = self.ids_of_device(bags)
        capacity = self.capacity(group * length)
        number = np.dtype(np.int32).itemsize  # that of its bag goes with each id
        return group * total + capacity * (number + weight) < capacity * row

    def ids_of_device(self, batch: int) -> int:
        """How many ids of a batch each device has to see to; with columns, those of its group."""
        return -(-batch // self.devices) * self.column_shards


def placement_of(call: str, split: Split, shape: Sequence[int]) -> Placement:
    """Check how a table is to be split, and say where its rows are then.

    Args:
      call: The call for the messages.
      split: What was asked for.
      shape: The rows and the sizes of a row's axes.

    Returns:
      The placement.

    Raises:
      TypeError: If the mesh is none.
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
    """The same placement of another number of rows.

    Args:
      call: The call for the message.
      placement: The placement.
      rows: The number.

    Returns:
      The new one.

    Raises:
      ValueError: If the rows are numbered in 32 bits, and are too many for that when they are filled up.
    """
    placement = dataclasses.replace(placement, rows=rows)
    if rows <= np.iinfo(np.int32).max < placement.stored_rows:
        raise ValueError(
            f"`{call}` must have rows that are numbered in 32 bits when they are filled up for {placement.shards} "
            f"devices, got {rows} rows. Leave out some, or use more of them."
        )
    return placement
