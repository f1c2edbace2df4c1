"""RowGrad: the gradient, or an update, of some rows of a table, and how it is a pytree.

For instance, a loss that looks up the ids `[4, 1, 4]` of a table of a million rows has a gradient of 3 ids and 3 rows
of values, in which row 4 occurs twice. Its leaves are the values, `(3, *dim)`, and the ids as keys, `(3,)`; the number
of rows is static. `row_keys` makes the keys, `row_arithmetic` has the operators, and `row_sums` sums rows.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact, Int, Int32, PyTree

from .._base import check as _check
from .._base.by_bag import ByBag, Held
from .._core.containers.held_rows import bare, is_label
from .._core.table import Table
from . import row_checks, row_sums
from .row_arithmetic import RowArithmetic
from .row_keys import HINT, KEYS, decode, encode


class Given(NamedTuple):
    """Ids as the caller of a lookup gave them, for a kernel, which wraps them itself."""

    ids: Int[Array, " length"]  # those in [-rows, 0) count from the end; others outside of [0, rows) have no row
    zero: Int32[Array, ""]  # what computes with it waits for the loss


class _KindOfRowGrad(type):
    """The metaclass of RowGrad: a Table whose weight is a RowGrad counts as an instance, too."""

    def __instancecheck__(cls, instance: PyTree) -> bool:
        return super().__instancecheck__(bare(instance))

    def __repr__(cls) -> str:
        return f"<class 'embax.{cls.__name__}': {HINT}>"


class RowGrad(RowArithmetic, metaclass=_KindOfRowGrad):
    """The gradient of a table, held as the rows that were read.

    `dense[r] = sum of values[i] over all i with ids[i] == r`

    A pytree of static length: an id may occur many times, and the sentinel `rows` fills unused places.
    `embax.value_and_grad` makes it; the optimizers of `embax.optim` and `embax.apply_updates` take it. `g1 + g2`
    concatenates two gradients of one table, as do `g1 - g2` and `sum([g1, g2])`; `c * g`, `g / c` and `-g` scale one.

    The gradient of a Table is a Table with the same rules, whose weight is the RowGrad. So a tree of gradients has the
    structure of the parameters, and labels and masks fit both. Such a Table counts as a RowGrad, with its attributes
    and arithmetic. You may also pass a bare RowGrad in place of a Table; `dataclasses.replace(table,
    weight=RowGrad(...))` wraps it.

    The gradient of bags is held as one value for each bag (`held`), and `values` is computed when it is asked for.
    Sums, scaling, `psum` and native kernels work with one value for each bag. The leaves of the pytree are `values` and
    the ids, so a result of `jax.jit`, `jax.vmap` or `jax.tree.map` has a value for each id.

    Leading axes are lanes, each with a gradient of its own: `jax.vmap` makes them for gradients by example, and
    `jax.lax.scan` for the gradients of its steps. `g.sum(axis=0)` joins lanes to the gradient of their sum, for
    gradient accumulation. Optimizers and `apply_updates` take such sums, and refuse lanes.

    Plain arithmetic on the leaves, such as `jax.tree.map(jnp.add, g1, g2)`, would add up ids and so move rows. To
    prevent this, the ids are stored as random keys, for which JAX refuses arithmetic with a TypeError. A leaf of zeros,
    as `optax.tree.zeros_like` makes it, means that there are no ids.

    Args:
      ids: Row numbers in `[0, rows)`, or `rows` for no row, `(length,)`, of any integer dtype.
      values: One floating-point value for each id, `(length, *dim)`.
      rows: The number of rows of the table.

    Raises:
      TypeError: If the ids are not of an integer dtype, or the values not of a floating-point one.
      ValueError: If the shapes do not fit, or a concrete id is outside of `[0, rows]`. A traced id outside counts as
        no row.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> g = embax.RowGrad([4, 1, 4], jnp.ones((3, 2)), rows=1_000)
      >>> g
      RowGrad(3 ids of 1000 rows, float32[3,2])
      >>> (g + 2 * g).deduplicated().values[:3, 0]
      Array([3., 6., 0.], dtype=float32)
      >>> g.to_dense().shape
      (1000, 2)
    """

    __slots__ = ("_expanded", "_held", "_keys", "at_owners", "given", "rows")
    _expanded: Array | None  # the values once they were expanded, if they are concrete
    given: Given | None  # the same ids as a kernel may take them, in the program that computes the gradient
    rows: int

    def __init__(self, ids: Any, values: PyTree, rows: int):
        rows = _check.size("embax.RowGrad(rows=...)", rows)
        ids, values = row_checks.rows_given(ids, values, rows)
        _fill(self, encode(ids, rows), values, rows)

    @property
    def ids(self) -> Int[Array, "*lanes length"]:
        """Row numbers; the sentinel `rows` in unused places."""
        return decode(self._keys, self.rows)

    @property
    def values(self) -> PyTree:
        """One value for each id, `(*lanes, length, *dim)`."""
        if not isinstance(self._held, ByBag):
            return self._held
        if self._expanded is not None:
            return self._expanded
        values = self._held.expanded(self.ids)
        if not isinstance(values, Tracer):  # a tracer may belong to an inner program
            self._expanded = values
        return values

    @property
    def held(self) -> Held:
        """The values as they are stored, an array or, for bags, one value for each bag."""
        return self._held

    @property
    def lanes(self) -> tuple[int, ...]:
        """The sizes of the leading axes, `()` for a gradient without lanes."""
        return tuple(self._keys.shape[:-1])

    @property
    def dim(self) -> tuple[int, ...]:
        """The sizes of a row's axes."""
        held = self._held.values if isinstance(self._held, ByBag) else self._held
        return tuple(held.shape[self._keys.ndim :])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self._held.dtype

    def to_dense(self) -> Inexact[Array, "*lanes_rows_dim"]:
        """Return the gradient as an array of all rows; duplicates are summed in float32 or wider."""
        return row_sums.dense(self._keys, self.values, self.rows)

    def deduplicated(self) -> "RowGrad":
        """Return the gradient with each id once, in rising order, then `rows`; the length stays. Sums as `to_dense`."""
        keys, values = row_sums.distinct(self._keys, self.values, self.rows)
        return self._with(keys, values)

    def sum(self, axis: int | tuple[int, ...] | None = None) -> "RowGrad":
        """Return the sum of lanes: a gradient with the rows of all of them.

        `sum.to_dense() == to_dense().sum(axis)`, and the lengths add up.

        Args:
          axis: The lanes to sum over. Default: all.

        Returns:
          The gradient, without these axes.

        Raises:
          ValueError: If an axis is not one of lanes.

        Example:
          >>> import embax, jax, jax.numpy as jnp
          >>> table = embax.Table.create(jax.random.key(0), rows=1_000, dim=4)
          >>> def add(_, ids):  # a step of gradient accumulation
          ...     return None, embax.grad(lambda table: embax.lookup(table, ids).sum())(table)
          ...
          >>> jax.lax.scan(add, None, jnp.array([[3, 5], [5, 7]]))[1].sum(axis=0)
          RowGrad(4 ids of 1000 rows, float32[4,4])
        """
        lanes = len(self.lanes)
        axes = tuple(range(lanes)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
        if len({axis % max(lanes, 1) for axis in axes}) < len(axes) or not all(-lanes <= axis < lanes for axis in axes):
            raise ValueError(
                f"`embax.RowGrad.sum(axis=...)` must name axes of the lanes {self.lanes}, got {axis}. Rows are summed "
                "by to_dense().sum."
            )
        keys, values = row_sums.joined(self._keys, self.values, tuple(sorted(axis % lanes for axis in axes)))
        return self._with(keys, values, self.at_owners)

    def psum(self, axis_name: Any) -> "RowGrad":
        """Return the sum over a mapped axis, like `jax.lax.psum` for arrays: a gradient with the rows of all.

        Args:
          axis_name: The name of an axis of `jax.vmap` or `jax.shard_map`.

        Returns:
          The gradient, whole on every lane or device of the axis.

        Example:
          >>> import embax, jax, jax.numpy as jnp
          >>> def gradient(ids):
          ...     return embax.RowGrad(ids, jnp.ones((2, 1)), rows=4).psum("batch").to_dense()[:, 0]
          ...
          >>> jax.vmap(gradient, axis_name="batch")(jnp.array([[0, 1], [1, 3]]))[0]
          Array([1., 2., 0., 1.], dtype=float32)
        """
        words = jax.lax.all_gather(jax.random.key_data(self._keys), axis_name)
        keys = jax.random.wrap_key_data(words, impl=KEYS)
        if isinstance(self._held, ByBag):  # then there are no lanes
            groups = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name), self._held)
            return self._with(jnp.ravel(keys), groups.flat(keys), self.at_owners)
        values = jax.lax.all_gather(self.values, axis_name)
        return self._with(keys, values, self.at_owners).sum(axis=0)

    def _with(self, keys: PyTree, held: PyTree, at_owners: bool = False) -> Self:
        other = object.__new__(type(self))
        _fill(other, keys, held, self.rows, at_owners)
        return other

    def with_given(self, ids: Int[Array, " length"], zero: Int32[Array, ""]) -> Self:
        """Return the same gradient, with the ids as its `given`."""
        other = self._with(self._keys, self._held, self.at_owners)
        other.given = Given(ids, zero)
        return other

    def label(self) -> PyTree:
        """The label of the values, if the leaves are labels; else the node itself."""
        return self.values if is_label(self.values) and is_label(self._keys) else self

    def empty(self) -> "RowGrad":
        """The same node with None for its leaves."""
        return self._with(None, None, self.at_owners)

    def __repr__(self) -> str:
        held = self._held.values if isinstance(self._held, ByBag) else self._held
        if not (hasattr(held, "shape") and hasattr(held, "dtype")):
            return f"RowGrad(of {self.rows} rows, {held!r})"
        shape = ",".join(map(str, (*self._keys.shape, *held.shape[self._keys.ndim :])))
        lanes = f"lanes {self.lanes}, each of " if self.lanes else ""
        return f"RowGrad({lanes}{self._keys.shape[-1]} ids of {self.rows} rows, {held.dtype}[{shape}])"


def row_grad(ids: Int[Array, " length"], values: Held, rows: int, *, at_owners: bool = False) -> RowGrad:
    """`RowGrad` without its checks; any id outside of `[0, rows)` means no row, and values may be a `ByBag`."""
    if isinstance(values, ByBag):  # of a table that may be a part of another one
        values = dataclasses.replace(values, rows=rows)
    return _fill(object.__new__(RowGrad), encode(ids, rows), values, rows, at_owners)


def no_rows(table: Table) -> RowGrad:
    """The gradient of a table that was not read: length 0; float32 for a table of integers."""
    dtype = table.dtype if jnp.issubdtype(table.dtype, jnp.inexact) else jnp.float32
    return row_grad(jnp.zeros(0, jnp.int32), jnp.zeros((0, *table.dim), dtype), table.rows)


def _fill(gradient: RowGrad, keys: Any, held: PyTree, rows: int, at_owners: bool = False) -> RowGrad:
    gradient._keys, gradient._held, gradient.rows, gradient.at_owners = keys, held, rows, at_owners
    gradient._expanded, gradient.given = None, None
    return gradient


def _rebuilt(static: tuple[int, bool], values: PyTree, keys: Any) -> PyTree:
    # If a map turned both leaves into labels, the gradient becomes one label, as the chosen array has one. Bools stay,
    # since Equinox filters a tree by bools and rebuilds it afterwards.
    if is_label(values) and is_label(keys) and not isinstance(values, bool | np.bool_):
        return values
    return _fill(object.__new__(RowGrad), keys, values, *static)


jax.tree_util.register_pytree_with_keys(
    RowGrad,
    # The values come first, since optax takes the first leaf's dtype for the tree's. They have the path of the weight,
    # so that labels by path fit both.
    lambda gradient: (
        ((jax.tree_util.GetAttrKey("weight"), gradient.values), (jax.tree_util.GetAttrKey("ids"), gradient._keys)),
        (gradient.rows, gradient.at_owners),
    ),
    # JAX rebuilds pytrees with None, bools and shapes in place of arrays.
    lambda static, leaves: _rebuilt(static, *leaves),
    lambda gradient: ((gradient.values, gradient._keys), (gradient.rows, gradient.at_owners)),
)


def is_trained(table: Table) -> bool:
    """Whether a table has a gradient at all: it is not frozen, and of floats."""
    return not table.freeze and hasattr(table.weight, "dtype") and jnp.issubdtype(table.dtype, jnp.inexact)
