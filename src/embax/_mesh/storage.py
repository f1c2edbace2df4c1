"""Sharded: the rows of a table split over the devices of a mesh, behind the contract of `_core.storage`."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._base.axes import is_explicit, laid_out
from .._base.by_bag import expanded
from .._base.distinct import Distinct, Slots, accumulator
from .._base.dtypes import index_dtype
from .._core.layout import Split
from .._core.own_rows import OwnRows
from .._core.storage import Storage, WriteMode
from .._core.table import Table
from . import bags as _bags
from . import placing as _placing
from . import relayout as _relayout
from . import sharded as _sharded
from .heads import ShardedRows, Tokens, on_owners
from .placement import Placement, placement_of, with_rows

PerToken: TypeAlias = Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Sharded(Storage):
    """Rows on a mesh.

    Args:
      placement: Which device owns which rows.
    """

    placement: Placement

    is_local: ClassVar[bool] = False
    owners_add: ClassVar[bool] = True
    in_blocks: ClassVar[bool] = False  # each device already handles its own rows only
    pools_apart: ClassVar[bool] = True  # ids stay with their bag's device, so features are not joined
    name: ClassVar[str] = "placement"

    def __repr__(self) -> str:
        return repr(self.placement)

    def rows_of(self, stored: int) -> int:
        """The rows of the placement, without the padding that sharding adds."""
        return self.placement.rows

    def stored_rows(self, rows: int) -> int:
        """The rows, with the padding that sharding adds."""
        return dataclasses.replace(self.placement, rows=rows).stored_rows

    def with_rows(self, rows: int) -> "Sharded":
        """The same layout for another number of rows."""
        return Sharded(dataclasses.replace(self.placement, rows=rows))

    def check(self, weight: Array) -> None:
        """Require the number of stored rows of the placement."""
        if weight.shape[0] != self.placement.stored_rows:
            raise ValueError(
                f"`embax.Table(weight=...)` must have the {self.placement.stored_rows} stored rows of its placement, "
                f"got {weight.shape[0]}. Make it with embax.shard."
            )

    def positions(self, ids: Array, rows: int) -> Array:
        """The stored positions, in blocks or cyclic."""
        return self.placement.positions(ids)

    @property
    def descriptions(self) -> tuple[str, ...]:
        """The placement; with its mesh; with its devices."""
        mesh = self.placement.mesh
        word = repr(self.placement)
        devices = [device.id for device in mesh.devices.flat] if isinstance(mesh, Mesh) else mesh
        return word, f"{word} of {mesh!r}", f"{word} of {mesh!r} with the devices {devices}"

    @property
    def layout(self) -> Hashable:
        """The mesh and how rows are split over it, whatever their number, skew and pooling."""
        return self.placement.mesh, self.placement.axes, self.placement.columns, self.placement.cyclic

    @property
    def rows_at_once(self) -> int:
        """The number of blocks of rows."""
        return self.placement.shards

    @property
    def on_explicit_axes(self) -> bool:
        """Whether the mesh has explicit axes."""
        return is_explicit(self.placement.mesh)

    # ---- Rows in and out.

    def take(
        self, leaf: Array, ids: Array, fill_value: float, *, linear: bool = False, given: Array | None = None
    ) -> Array:
        """Fetch the rows from their owners."""
        return _sharded.take(self.placement, leaf, ids, fill_value)

    def put(self, leaf: Array, ids: Array, values: Array, mode: WriteMode) -> Array:
        """Send the rows to their owners."""
        return _sharded.put(self.placement, leaf, ids, values, mode)

    def replace(
        self,
        leaf: Array,
        ids: Array,
        function: Callable[[Array, Array], Array],
        fill_value: float,
        given: Array | None = None,
    ) -> Array:
        """Fetch the rows, call the function, and send the result back."""
        ids = jnp.ravel(ids)
        return self.put(leaf, ids, function(ids, self.take(leaf, ids, fill_value)), "set")

    def to_rows(self, leaf: Array) -> Array:
        """Gather the whole table onto one device of each process."""
        rows = self.placement.rows
        if isinstance(leaf, Tracer):
            return self.take(leaf, jnp.arange(rows, dtype=index_dtype(rows)), 0)
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable:
            columns = (slice(None),) * (leaf.ndim - 1)
            return jnp.asarray(_placing.of_shards(self.placement, leaf)(slice(0, rows, 1), columns))
        everywhere = Placement(self.placement.mesh, (), None, False, rows)
        return _relayout.moved(self.placement, leaf, everywhere).addressable_data(0)

    def from_rows(self, values: Array | np.ndarray) -> Array:
        """Copy each device's rows to it; not under `jit`."""
        return _placing.stored(self.placement, _placing.of_array(values), values.shape, values.dtype)

    # ---- Whole tables made of others.

    def created(self, fresh: Callable[[], Array]) -> Array:
        """Have each device make its own rows."""
        # XLA can split the initialiser over blocks of rows, not over cyclic rows; and on explicit axes the initialiser
        # itself would have to name its sharding.
        mesh = self.placement.mesh
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        by_blocks = dataclasses.replace(self.placement, cyclic=False, mesh=mesh)

        def blocks() -> Array:
            weight = fresh()
            more = self.placement.stored_rows - weight.shape[0]
            weight = jnp.pad(weight, [(0, more), *[(0, 0)] * (weight.ndim - 1)])
            return laid_out(weight, by_blocks.sharding(weight.shape, weight.shape[1:]))

        weight = jax.jit(blocks)()
        if self.placement.cyclic:
            weight = _relayout.moved(by_blocks, weight, dataclasses.replace(by_blocks, cyclic=True))
        return jax.device_put(weight, self.placement.sharding(weight.shape, weight.shape[1:]))

    def moved(self, of: Storage, others: Array) -> Array:
        """Store the rows of another weight of any storage; each device gets its own rows only."""
        placement, before = self.placement, of.placement
        if before is not None and before.mesh == placement.mesh:
            weight = _relayout.moved(before, others, placement)
            return laid_out(weight, placement.sharding(weight.shape, weight.shape[1:]))
        if before is None:
            return self.from_rows(of.to_rows(others))
        reader = _placing.of_shards(before, others)
        return _placing.stored(placement, reader, (before.rows, *others.shape[1:]), others.dtype)

    def overwritten(self, leaf: Array, of: Storage, others: Array) -> Array:
        """Bring the common rows into this layout, and write them over the first rows."""
        common = self.with_rows(min(of.rows_of(others.shape[0]), self.placement.rows))
        weight = common.moved(of, others).astype(leaf.dtype)
        sharding: Any = leaf.sharding
        if common != self:
            # A copy, since `moved_into` donates it, and the caller may still use it as a parameter.
            weight = _relayout.moved_into(self.placement, jnp.copy(leaf), 0, common.placement, weight)
        return laid_out(weight, sharding)

    def resized(self, call: str, leaf: Array, rows: int, fresh: Callable[[], Array]) -> tuple[Array, Storage]:
        """Move rows to their new owners; each device makes its part of the fresh rows."""
        to, before = with_rows(call, self.placement, rows), self.placement.rows
        weight = _relayout.moved(self.placement, leaf, to)
        if rows > before:
            more = self.with_rows(rows - before)
            weight = _relayout.moved_into(to, weight, before, more.placement, more.created(fresh))
        return laid_out(weight, to.sharding(weight.shape, weight.shape[1:])), Sharded(to)

    def put_together(self, parts: Sequence[tuple[Storage, Array]]) -> Array:
        """Write one part after the other into an array of zeros."""
        if len(parts) == 1 and parts[0][0] == self:
            return parts[0][1]
        leaf = parts[0][1]
        shape = self.placement.stored_rows, *leaf.shape[1:]
        weight, start = jnp.zeros(shape, leaf.dtype, device=self.placement.sharding(shape, shape[1:])), 0
        for storage, leaf in parts:
            weight = _relayout.moved_into(self.placement, weight, start, storage.placement, leaf)
            start += storage.rows_of(leaf.shape[0])
        return weight

    def part(self, leaf: Array, start: int, rows: int) -> tuple[Array, Storage]:
        """Bring the rows into the layout of a table of their own."""
        to = self.with_rows(rows)
        return _relayout.moved(self.placement, leaf, to.placement, start), to

    # ---- What belongs to the ids of a batch.

    def flat(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Reshape; XLA keeps each entry on its device."""
        return jnp.reshape(array, shape)

    def joined(self, arrays: Sequence[Array], fill_value: Any) -> Array:
        """Concatenate on each device its own shards."""
        return _sharded.joined(self.placement, arrays, fill_value)

    def parted(self, array: Array, lengths: Sequence[int]) -> list[Array]:
        """Split on each device its own shard."""
        return _sharded.parted(self.placement, array, lengths)

    # ---- The rows of a gradient.

    def combine(
        self, slots: Slots, ids: Array, values: PyTree, rows: int, dim: tuple[int, ...]
    ) -> tuple[Slots, Distinct, Array | int]:
        """Sum at the owners. A second array travels as one more column of the first, in the same exchange."""
        if not isinstance(values, tuple):
            return slots, *_sharded.combine(self.placement, ids, expanded(ids, values), dim)
        wide = jnp.concatenate([values[0], values[1][:, None]], axis=1)
        distinct, crowded = _sharded.combine(self.placement, ids, wide, (wide.shape[1],))
        return slots, distinct._replace(values=(distinct.values[:, :-1], distinct.values[:, -1])), crowded

    def gather(self, leaf: Array, ids: Array, dim: tuple[int, ...]) -> Array:
        """Read rows on the devices of their ids: on their owners, unless an owner was overloaded."""
        if ids.shape[0] == 0:
            return jnp.zeros((0, *leaf.shape[1:]), leaf.dtype)
        return _sharded.gather_at_owners(self.placement, leaf, ids, dim)

    def store(self, leaf: Array, ids: Array, values: Array, dim: tuple[int, ...], mode: WriteMode = "set") -> Array:
        """Write rows: each owner its own ones, and the rows that others summed for it."""
        return _sharded.store_at_owners(self.placement, leaf, ids, values.astype(leaf.dtype), dim, mode)

    def add(self, leaf: Array, ids: Array, values: Array, distinct: bool) -> Array:
        """Add at the owners; if the weight is narrower than float32, they first sum duplicates in float32."""
        dim = leaf.shape[1:]
        if not distinct and jnp.finfo(leaf.dtype).bits >= 32:
            return self.put(leaf, ids, values, "add")
        if not distinct:
            (ids, values, _), _ = _sharded.combine(self.placement, ids, values, dim, jnp.float32)
        return self.store(leaf, ids, values, dim, "add")

    def laid_out(self, leaf: Array, dim: tuple[int, ...]) -> Array:
        """Shard the leaf like the weight; by columns only if its rows have the table's shape."""
        return laid_out(leaf, self.placement.sharding(leaf.shape, dim))

    def everywhere(self, array: Array) -> Array:
        """Replicate the array over the mesh."""
        return laid_out(array, NamedSharding(self.placement.mesh, PartitionSpec()))

    # ---- Bags.

    def pools(self, table: Table, bags: tuple[int, ...], length: int, weighted: bool) -> bool:
        """Pool at owners if rows are split by columns only, or if `pool_at_owners` is set and sends less."""
        return _bags.is_pooled_where_stored(table, bags, length, weighted)

    def pooled(
        self, table: Table, pool: Callable[..., Array], ids: Array, counted: Array, weights: Array | None
    ) -> Array:
        """Let each owner sum its rows of each bag."""
        return _bags.pooled_where_stored(table, pool, ids, counted, weights)

    def summed_by(self, bags: Array, terms: Array, number: int) -> Array:
        """Send each term to the device of its bag, and add there."""
        return _sharded.summed_by(self.placement, bags, terms, number)

    # ---- Heads.

    def own_rows(self, stored: int) -> OwnRows:
        """The rows of one device."""
        return ShardedRows(self, self.placement.rows)

    def of_device(self, tokens: int, stored: int) -> tuple[int, int]:
        """Tokens are split over replicas, rows over owners."""
        placement = self.placement
        return -(-tokens // placement.copies), -(-placement.block // placement.column_shards)

    def aligned(self, weight: Array, *arrays: Array) -> tuple[Array, ...]:
        """The arrays themselves: `on_owners` lays them out, and `shard_map` sums their derivatives."""
        return weight, *arrays

    def of_tokens(
        self, function: PerToken, weight: Array, batch: int, arrays: Sequence[Array], fills: Sequence[float]
    ) -> tuple[Array, ...]:
        """Call the function on each device, with the tokens split over replicas."""
        tokens = Tokens(self.placement, arrays[0].shape[:batch])
        given = map(tokens.laid_out, arrays, fills)
        found = on_owners(tokens, function, (tokens.spec,) * 3, weight, *given)
        return tuple(tokens.restored(values, arrays[0]) for values in found)

    def of_rows_and_tokens(
        self, function: PerToken, weight: Array, batch: int, arrays: Sequence[Array], fills: Sequence[float]
    ) -> tuple[Array, Array]:
        """Call the function on each device, and sum its second result over owners, a part of the tokens on each."""
        tokens, dtype = Tokens(self.placement, arrays[0].shape[:batch]), arrays[0].dtype

        def local(*args: Array) -> tuple[Array, Array]:
            of_weight, of_x = function(*args)
            return of_weight, tokens.summed(of_x).astype(dtype)

        specs = self.placement.spec(weight.shape, weight.shape[1:]), tokens.parted_spec
        of_weight, of_x = on_owners(tokens, local, specs, weight, *map(tokens.laid_out, arrays, fills))
        return of_weight, tokens.restored(of_x, arrays[0])

    def logits(self, of_rows: Callable[[Array, Array, Array], Array], weight: Array, x: Array) -> Array:
        """Multiply on each device its own rows; then swap, so that each has all logits of a part of the batch."""
        placement, stored = self.placement, weight.dtype
        if weight.size == 0:  # XLA has no collectives of empty arrays
            return of_rows(jnp.arange(placement.rows), jnp.zeros((placement.rows, *weight.shape[1:]), stored), x)
        tokens = Tokens(placement, x.shape[: x.ndim - weight.ndim + 1])

        def local(weight: Array, vectors: Array) -> tuple[Array]:
            own = self.own_rows(weight.shape[0])
            block = own.read(weight, jnp.zeros((), index_dtype(own.rows)), weight.shape[0])
            rows = block.rows.astype(stored)
            if own.filled_up:  # padding gets no gradient; by selection, since 0 * NaN is NaN
                exist = jnp.expand_dims(own.exist(block.ids), tuple(range(1, rows.ndim)))
                rows = jnp.where(exist, rows, jnp.zeros((), rows.dtype))
            return (tokens.joined(of_rows(block.ids, rows, vectors.astype(x.dtype))),)

        # The transpose sums the gradients of a vector over owners, so vectors are float32 or wider. It sums those of a
        # row over replicas: bfloat16 collectives exist, float8 ones do not, so float8 rows are widened, too.
        vectors = tokens.laid_out(x.astype(accumulator(x.dtype)))
        rows = weight.astype(accumulator(stored)) if jnp.finfo(stored).bits < 16 else weight
        (logits,) = on_owners(tokens, local, (tokens.parted_spec,), rows, vectors)
        return tokens.restored(logits, x)


def storage_of(call: str, split: Split, shape: Sequence[int]) -> Sharded:
    """Check how a table of a shape, `(rows, *dim)`, is to be split, and make its storage."""
    return Sharded(placement_of(call, split, shape))
