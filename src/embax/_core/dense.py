"""Dense: the rows of a table in one array, in the order of their ids. A base of storages with another order."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from .._base import distinct as _distinct
from .._base.axes import explicit_sharding, on_every_device
from .._base.distinct import Distinct, Slots
from .._base.loops import varying_alike, with_auto_axes
from .._kernels import combine as _combine
from .._kernels import pool as _pool
from .._kernels import put as _put
from .._kernels import step as _step
from .._kernels import take as _take
from .own_rows import OwnRows
from .storage import Storage, WriteMode


@dataclasses.dataclass(frozen=True)
class Dense(Storage):
    """The rows in one array, as any other array of JAX: on one device, or laid out by the user or by XLA.

    A storage of one array in another order overrides `positions`, `ids`, `to_rows` and `from_rows`.
    """

    is_local: ClassVar[bool] = True
    owners_add: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = True
    pools_apart: ClassVar[bool] = False

    def rows_of(self, stored: int) -> int:
        """As many."""
        return stored

    def stored_rows(self, rows: int) -> int:
        """As many."""
        return rows

    def with_rows(self, rows: int) -> Storage:
        """The same, whatever its rows."""
        return self

    def check(self, weight: PyTree) -> None:
        """Any weight can be stored so."""

    def positions(self, ids: Array, rows: int) -> Array:
        """The ids themselves."""
        return ids

    def ids(self, positions: Array, rows: int) -> Array:
        """Which rows are stored at some positions."""
        return positions

    @property
    def descriptions(self) -> tuple[str, ...]:
        """As a user would say, who has heard of meshes only."""
        return ("no mesh",)

    @property
    def layout(self) -> PyTree:
        """The storage itself."""
        return self

    @property
    def noted(self) -> str | None:
        """Nothing, of rows in the order of their ids."""
        return None if type(self) is Dense else super().noted

    # ---- Rows in and out.

    def take(self, leaf: Array, ids: Array, fill_value: float, *, linear: bool = False) -> Array:
        """Gather them."""
        if leaf.shape[0] == 0:  # XLA has no gather from nothing
            return jnp.full((*ids.shape, *leaf.shape[1:]), fill_value, leaf.dtype)
        sharding = explicit_sharding(ids, trailing=leaf.ndim - 1)
        return _take.take(leaf, self.positions(ids, leaf.shape[0]), fill_value, sharding, linear=linear)

    def put(self, leaf: Array, ids: Array, values: Array, mode: WriteMode) -> Array:
        """Scatter them."""
        return _put.put(leaf, self.positions(ids, leaf.shape[0]), values, mode, explicit_sharding(leaf))

    def replace(self, leaf: Array, ids: Array, function: Callable[[Array, Array], Array], fill_value: float) -> Array:
        """Gather and scatter them."""
        ids = on_every_device(ids)
        return self.put(leaf, ids, function(ids, self.take(leaf, ids, fill_value)), "set")

    def to_rows(self, leaf: PyTree) -> PyTree:
        """As it is."""
        return leaf

    def from_rows(self, values: PyTree) -> Array:
        """As it is, on the default device if it was on none."""
        return jnp.asarray(values) if isinstance(values, np.ndarray) else values

    def held(self, leaf: PyTree) -> PyTree:
        """As it is, in the order of ids."""
        return leaf if type(self) is Dense else super().held(leaf)

    # ---- Whole tables made of others.

    def created(self, fresh: Callable[[], Array]) -> Array:
        """As they are made."""
        return self.from_rows(fresh())

    def overwritten(self, leaf: Array, of: Storage, others: Array) -> Array:
        """Concatenate the rows of both."""
        rows, others = self.to_rows(leaf), of.to_rows(others)
        length = min(rows.shape[0], others.shape[0])
        return self.from_rows(jnp.concatenate([others[:length].astype(leaf.dtype), rows[length:]]))

    def resized(self, call: str, leaf: Array, rows: int, fresh: Callable[[], Array]) -> tuple[Array, Storage]:
        """Slice or concatenate."""
        old = self.to_rows(leaf)
        new = old[:rows] if rows <= old.shape[0] else jnp.concatenate([old, fresh()])
        return self.from_rows(new), self

    def put_together(self, parts: Sequence[tuple[Storage, Array]]) -> Array:
        """Concatenate."""
        if len(parts) == 1 and parts[0][0] == self:
            return parts[0][1]
        return self.from_rows(jnp.concatenate([storage.to_rows(leaf) for storage, leaf in parts]))

    def part(self, leaf: Array, start: int, rows: int) -> tuple[Array, Storage]:
        """Slice."""
        whole = leaf.shape[0] == rows
        return (leaf if whole else self.from_rows(self.to_rows(leaf)[start : start + rows])), self

    # ---- What belongs to the ids of a batch.

    def flat(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Reshape, on every device where axes are explicit."""
        return jnp.reshape(on_every_device(array), shape)

    def joined(self, arrays: Sequence[Array], fill_value: Any) -> Array:
        """Concatenate."""
        return jnp.concatenate(arrays)

    def parted(self, array: Array, lengths: Sequence[int]) -> list[Array]:
        """Split."""
        # By one split, of which the derivative is one concatenation; that of slices is a sum of as many arrays.
        return list(jax.lax.split(array, lengths))

    # ---- The rows of a gradient.

    def scratch(self, rows: int) -> Slots:
        """Slots, where these are the fastest way."""
        return _distinct.scratch(rows)

    def combine(
        self, slots: Slots, ids: Array, values: PyTree, rows: int, dim: tuple[int, ...]
    ) -> tuple[Slots, Distinct, Any]:
        """Sum by slots or by a sort."""
        return *_combined(slots, ids, values, rows), 0

    def gather(self, leaf: Array, ids: Array, dim: tuple[int, ...]) -> Array:
        """Gather them."""
        return _gathered(self, leaf, ids)

    def store(self, leaf: Array, ids: Array, values: Array, dim: tuple[int, ...], mode: WriteMode = "set") -> Array:
        """Scatter them."""
        return _stored(self, leaf, ids, values, mode)

    def add(self, leaf: Array, ids: Array, values: Array, distinct: bool) -> Array:
        """Scatter-add."""
        return _added(self, leaf, ids, values)

    def step_by_kernel(
        self, plain: Sequence[Array], arrays: Sequence[Array], ids: Array, values: Array, how: _step.Step
    ) -> list[Array]:
        """There is one on a CPU."""
        return _step.step(plain, arrays, self.positions(ids, arrays[0].shape[0]), values, how)

    def laid_out(self, leaf: Array, dim: tuple[int, ...]) -> Array:
        """As it is."""
        return leaf

    def everywhere(self, array: Array) -> Array:
        """As it is."""
        return array

    # ---- Bags.

    def bags_by_kernel(
        self, plain: Array, table: Any, ids: Array, counted: Array, weights: Array | None, offsets: Array | None
    ) -> Array:
        """There is one on a CPU, which knows nothing of norms."""
        if table.max_norm is not None:
            return plain
        places, nan = self.positions(ids, table.weight.shape[0]), table.out_of_range != "zero"
        return _pool.pool(plain, table.weight, places, counted, weights, offsets, nan=nan)

    def summed_by(self, bags: Array, terms: Array, number: int) -> Array:
        """Scatter-add into zeros."""
        start = jnp.zeros((number, *terms.shape[1:]), terms.dtype)
        return start.at[bags].add(terms, mode="drop", indices_are_sorted=True)

    # ---- Heads.

    def own_rows(self, stored: int) -> OwnRows:
        """All of them."""
        return OwnRows(self, stored)

    def of_device(self, tokens: int, stored: int) -> tuple[int, int]:
        """All of them."""
        return tokens, stored

    def aligned(self, weight: Array, *arrays: Array) -> tuple[Array, ...]:
        """The weight on every device, and all varying over the same axes of a `shard_map`."""
        return varying_alike(on_every_device(weight), *arrays)

    def of_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Array,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Array, ...]:
        """Call it, with explicit axes left to XLA."""
        spec = PartitionSpec(*jax.typeof(arrays[0]).sharding.spec[:batch])
        return with_auto_axes(function, (spec,) * 3, (weight, *arrays))

    def of_rows_and_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Array,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Array, Array]:
        """Call it, with explicit axes left to XLA."""
        specs = jax.typeof(weight).sharding.spec, jax.typeof(arrays[0]).sharding.spec
        of_weight, of_x = with_auto_axes(function, specs, (weight, *arrays))
        return of_weight, of_x.astype(arrays[0].dtype)

    def logits(self, of_rows: Callable[[Array, Array, Array], Array], weight: Array, x: Array) -> Array:
        """Those of all rows at once."""
        return of_rows(jnp.arange(weight.shape[0]), self.to_rows(weight), x)


DENSE = Dense()

# Compiled as one program each where they are called without jit.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _gathered(storage: Dense, leaf: Array, ids: Array) -> Array:
    return storage.take(leaf, ids, 0)


@functools.partial(jax.jit, static_argnums=(0, 4), inline=True)
def _stored(storage: Dense, leaf: Array, ids: Array, values: Array, mode: WriteMode) -> Array:
    return storage.put(leaf, ids, values.astype(leaf.dtype), mode)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _combined(slots: Slots, ids: Array, values: PyTree, rows: int) -> tuple[Slots, Distinct]:
    return _combine.combine(slots, ids, values, rows)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _added(storage: Dense, leaf: Array, ids: Array, values: Array) -> Array:
    return storage.put(leaf, ids, values, "add")
