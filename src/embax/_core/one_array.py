"""OneArray: all rows in one ordinary array, in an order that a subclass chooses. A base for storages.

For instance, `Dense` keeps row `i` at position `i`. A storage that keeps the last row first has `positions` return
`rows - 1 - ids`: of 5 rows, the ids `[0, 4]` are at `[4, 0]`. Everything else is written once, here.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from .._base import distinct as _distinct
from .._base.axes import explicit_sharding, on_every_device
from .._base.by_bag import Held
from .._base.distinct import Distinct, Slots
from .._base.loops import varying_alike, with_auto_axes
from .._kernels import combine as _combine
from .._kernels import pool as _pool
from .._kernels import put as _put
from .._kernels import step as _step
from .._kernels import take as _take
from .own_rows import OwnRows
from .storage import Storage, WriteMode


class OneArray(Storage):
    """The rows in one ordinary JAX array: on one device, or sharded as the user or XLA chooses.

    Abstract: a subclass says by `positions`, `ids`, `to_rows` and `from_rows` in which order the rows are, and
    describes it by `descriptions`.
    """

    is_local: ClassVar[bool] = True
    owners_add: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = True
    pools_apart: ClassVar[bool] = False

    def rows_of(self, stored: int) -> int:
        """The same number: each stored row is a row of the table."""
        return stored

    def stored_rows(self, rows: int) -> int:
        """The same number: there is no padding."""
        return rows

    def with_rows(self, rows: int) -> Storage:
        """This storage, which does not depend on the number of rows."""
        return self

    def check(self, weight: PyTree) -> None:
        """Accept any weight."""

    @abc.abstractmethod
    def ids(self, positions: Array, rows: int) -> Array:
        """The ids of the rows stored at some positions: the inverse of `positions`."""

    @property
    def layout(self) -> PyTree:
        """The storage itself, which is compared by value."""
        return self

    # ---- Rows in and out.

    def take(
        self, leaf: Array, ids: Array, fill_value: float, *, linear: bool = False, given: Array | None = None
    ) -> Array:
        """Gather the rows."""
        if leaf.shape[0] == 0:  # XLA has no gather from nothing
            return jnp.full((*ids.shape, *leaf.shape[1:]), fill_value, leaf.dtype)
        sharding = explicit_sharding(ids, trailing=leaf.ndim - 1)
        places = self.positions(ids, leaf.shape[0])
        given = given if places is ids else None  # the kernel knows the order of ids only
        return _take.take(leaf, places, fill_value, sharding, linear=linear, given=given)

    def take_parts(self, plain: Sequence[Array], leaf: Array, ids: Array, fill_value: float) -> Sequence[Array]:
        """Read by a kernel, on a CPU."""
        if leaf.shape[0] == 0:
            return plain
        return _take.take_parts(plain, leaf, self.positions(ids, leaf.shape[0]), fill_value)

    def put(self, leaf: Array, ids: Array, values: Array, mode: WriteMode) -> Array:
        """Scatter the rows."""
        return _put.put(leaf, self.positions(ids, leaf.shape[0]), values, mode, explicit_sharding(leaf))

    def replace(
        self,
        leaf: Array,
        ids: Array,
        function: Callable[[Array, Array], Array],
        fill_value: float,
        given: Array | None = None,
    ) -> Array:
        """Gather the rows, call the function and scatter its result."""
        ids = on_every_device(ids)
        return self.put(leaf, ids, function(ids, self.take(leaf, ids, fill_value, given=given)), "set")

    # ---- Whole tables made of others.

    def created(self, fresh: Callable[[], Array]) -> Array:
        """The fresh rows themselves."""
        return self.from_rows(fresh())

    def overwritten(self, leaf: Array, of: Storage, others: Array) -> Array:
        """Concatenate the other weight's first rows and the remaining rows of this one."""
        return self.from_rows(_overwritten(self.to_rows(leaf), of.to_rows(others)))

    def resized(self, call: str, leaf: Array, rows: int, fresh: Callable[[], Array]) -> tuple[Array, Storage]:
        """Slice the rows, or append the fresh ones."""
        old = self.to_rows(leaf)
        new = old[:rows] if rows <= old.shape[0] else jnp.concatenate([old, fresh()])
        return self.from_rows(new), self

    def put_together(self, parts: Sequence[tuple[Storage, Array]]) -> Array:
        """Concatenate the rows of all parts."""
        if len(parts) == 1 and parts[0][0] == self:
            return parts[0][1]
        return self.from_rows(jnp.concatenate([storage.to_rows(leaf) for storage, leaf in parts]))

    def part(self, leaf: Array, start: int, rows: int) -> tuple[Array, Storage]:
        """Slice the rows; the weight itself if all are asked for."""
        whole = leaf.shape[0] == rows
        return (leaf if whole else self.from_rows(self.to_rows(leaf)[start : start + rows])), self

    # ---- What belongs to the ids of a batch.

    def flat(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Reshape; on explicit mesh axes the array is replicated first, since JAX cannot merge sharded axes."""
        return jnp.reshape(on_every_device(array), shape)

    def joined(self, arrays: Sequence[Array], fill_value: Any) -> Array:
        """Concatenate the arrays."""
        return jnp.concatenate(arrays)

    def parted(self, array: Array, lengths: Sequence[int]) -> list[Array]:
        """Split the array."""
        # One split: its transpose is one concatenation. The transpose of slices would be a sum of padded arrays.
        return list(jax.lax.split(array, lengths))

    # ---- The rows of a gradient.

    def scratch(self, rows: int) -> Slots:
        """Slots on a platform where they are faster than a sort, else None."""
        return _distinct.scratch(rows)

    def combine(
        self, slots: Slots, ids: Array, values: PyTree, rows: int, dim: tuple[int, ...]
    ) -> tuple[Slots, Distinct, Any]:
        """Sum by slots or by a sort, see `_base.distinct`."""
        return *_combined(slots, ids, values, rows), 0

    def gather(self, leaf: Array, ids: Array, dim: tuple[int, ...]) -> Array:
        """Gather the rows."""
        return _gathered(self, leaf, ids)

    def store(self, leaf: Array, ids: Array, values: Array, dim: tuple[int, ...], mode: WriteMode = "set") -> Array:
        """Scatter the rows."""
        return _stored(self, leaf, ids, values, mode)

    def add(self, leaf: Array, ids: Array, values: Array, distinct: bool) -> Array:
        """Scatter-add; a table narrower than float32 sums its duplicates in float32 first."""
        return _added(self, leaf, ids, values)

    def step_by_kernel(
        self,
        plain: Sequence[Array],
        arrays: Sequence[Array],
        ids: Array,
        values: Held,
        how: _step.Step,
        given: Any = None,
    ) -> list[Array]:
        """Run the kernel of the optimizer, on a CPU."""
        places = self.positions(ids, arrays[0].shape[0])
        if given is None or places is not ids:  # the kernel knows the order of ids only
            return _step.step(plain, arrays, places, values, how)
        return _step.step(plain, arrays, given.ids, values, how.after(given.zero), wrap=True)

    def laid_out(self, leaf: Array, dim: tuple[int, ...]) -> Array:
        """The leaf itself: its sharding is left to the user or XLA."""
        return leaf

    def everywhere(self, array: Array) -> Array:
        """The array itself: its sharding is left to the user or XLA."""
        return array

    # ---- Bags.

    def reads_bags(self, tangent: Array, ids: Array) -> bool:
        """Unless an array is on explicit mesh axes, which JAX can neither merge nor split."""
        return explicit_sharding(tangent) is None and explicit_sharding(ids) is None

    def bags_by_kernel(
        self,
        plain: Sequence[Array],
        table: Any,
        ids: Array,
        counted: Array,
        weights: Array | None,
        offsets: Array | None,
        given: Array | None = None,
        firsts: Sequence[int] = (0,),
    ) -> Sequence[Array]:
        """Sum by a kernel, on a CPU; tables with `max_norm` have no kernel."""
        if table.max_norm is not None:
            return plain
        places, nan = self.positions(ids, table.weight.shape[0]), table.out_of_range != "zero"
        given = given if places is ids else None
        how = {"nan": nan, "given": given, "firsts": firsts}
        return _pool.pool(plain, table.weight, places, counted, weights, offsets, **how)

    def summed_by(self, bags: Array, terms: Array, number: int) -> Array:
        """Scatter-add the terms into zeros."""
        start = jnp.zeros((number, *terms.shape[1:]), terms.dtype)
        return start.at[bags].add(terms, mode="drop", indices_are_sorted=True)

    # ---- Heads.

    def own_rows(self, stored: int) -> OwnRows:
        """All rows: one device reads the whole table."""
        return OwnRows(self, stored)

    def of_device(self, tokens: int, stored: int) -> tuple[int, int]:
        """All tokens and all rows."""
        return tokens, stored

    def aligned(self, weight: Array, *arrays: Array) -> tuple[Array, ...]:
        """Replicate the weight over explicit axes, and let all arrays vary over the same axes of a `shard_map`."""
        return varying_alike(on_every_device(weight), *arrays)

    def of_tokens(
        self,
        function: Callable[..., PyTree],
        weight: Array,
        batch: int,
        arrays: Sequence[Array],
        fills: Sequence[float],
    ) -> tuple[Array, ...]:
        """Call the function, with explicit mesh axes left to XLA."""
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
        """Call the function, with explicit mesh axes left to XLA."""
        specs = jax.typeof(weight).sharding.spec, jax.typeof(arrays[0]).sharding.spec
        of_weight, of_x = with_auto_axes(function, specs, (weight, *arrays))
        return of_weight, of_x.astype(arrays[0].dtype)

    def logits(self, of_rows: Callable[[Array, Array, Array], Array], weight: Array, x: Array) -> Array:
        """The logits of all rows in one call."""
        return of_rows(jnp.arange(weight.shape[0]), self.to_rows(weight), x)


# Jitted, so that a call outside of `jit` compiles one program rather than one for each operation.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _gathered(storage: OneArray, leaf: Array, ids: Array) -> Array:
    return storage.take(leaf, ids, 0)


@functools.partial(jax.jit, inline=True)
def _overwritten(rows: Array, others: Array) -> Array:
    length = min(rows.shape[0], others.shape[0])
    return jnp.concatenate([others[:length].astype(rows.dtype), rows[length:]])


@functools.partial(jax.jit, static_argnums=(0, 4), inline=True)
def _stored(storage: OneArray, leaf: Array, ids: Array, values: Array, mode: WriteMode) -> Array:
    return storage.put(leaf, ids, values.astype(leaf.dtype), mode)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _combined(slots: Slots, ids: Array, values: PyTree, rows: int) -> tuple[Slots, Distinct]:
    return _combine.combine(slots, ids, values, rows)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _added(storage: OneArray, leaf: Array, ids: Array, values: Array) -> Array:
    return storage.put(leaf, ids, values, "add")
