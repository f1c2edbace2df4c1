"""Table: a weight and the rules by which it is read."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Key, PyTree, Shaped

from .._base import check as _check
from .._base.arrays import as_jax
from .containers import flax_state as _flax
from .containers.held_rows import HeldRows, OfRows, is_label
from .dense import DENSE
from .layout import Layout, Split
from .storage import Storage, storage_on_mesh

PaddingRows = int | tuple[int, ...] | None
OutOfRange = Literal["error", "clip", "nan", "zero"]
Initializer = Callable[[Key[Array, ""], tuple[int, ...], Any], Array]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table(OfRows):
    """A weight and the rules by which it is read.

    A pytree whose one leaf is `weight`. The rules are static: they are compared by value, and another rule compiles
    another program. All operations are functions of tables and ids, such as `lookup`, `renormalize` and `resize`.

    The row-sparse gradient of a Table is a Table with the same rules, whose weight is a `RowGrad`. So gradients have
    the tree structure of the parameters; such a Table has the attributes and the arithmetic of its RowGrad.

    Args:
      weight: One row for each id, `(rows, *dim)`, of any dtype; NumPy arrays and nested lists become JAX arrays.
      padding_idx: A row, or a tuple of rows, in `[-rows, rows)`, that never gets a gradient and is never renormalised.
        Its value is not changed here; `Table.create` makes it zero. Stored as a number in `[0, rows)`. Default: none.
      max_norm: Rows are clipped to this norm, over all trailing axes, when they are read. Default: no limit.
      norm_type: The p of that norm, above 0 or infinity, dimensionless.
      scale_grad_by_freq: Divide the gradient of a row by the number of times its id occurs in the lookup call.
      freeze: The weight gets no gradient.
      out_of_range: What an id without a row reads. `"error"`: an IndexError where the ids are concrete, NaN (integer
        tables: 0) where they are traced, and an exact error under `jax.experimental.checkify.checkify` with its
        `index_checks`. `"clip"`: the nearest row. `"nan"`: NaN (integer tables: 0). `"zero"`: 0.
      storage: How the rows are stored; set by `embax.shard`. Default: one ordinary array.

    Raises:
      TypeError: If an argument is of the wrong type, or `max_norm` is given for an integer table.
      ValueError: If an argument is outside its range, or the weight is a scalar.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.ones((4, 2)), padding_idx=-1)
      >>> table
      Table(float32[4,2], padding_idx=3)
      >>> embax.lookup(table, [0, 3]).shape
      (2, 2)
    """

    weight: Shaped[Array, "rows *dim"]
    _: dataclasses.KW_ONLY
    padding_idx: PaddingRows = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    freeze: bool = False
    out_of_range: OutOfRange = "error"
    storage: Storage = DENSE

    def __post_init__(self):
        weight = self.weight
        if isinstance(weight, HeldRows):
            return self._check_of_rows(weight)
        if isinstance(weight, np.ndarray) or not (hasattr(weight, "shape") and hasattr(weight, "dtype")):
            weight = as_jax(weight)
        if weight.ndim < 1:
            raise ValueError("`embax.Table(weight=...)` must have an axis of rows, got a scalar. Pass (rows, *dim).")
        self.storage.check(weight)
        total = self.storage.rows_of(weight.shape[0])
        padding_idx, max_norm = self.padding_idx, self.max_norm
        if isinstance(padding_idx, tuple):
            rows = {_check.row("embax.Table(padding_idx=...)", row, total) for row in padding_idx}
            padding_idx = tuple(sorted(rows)) if len(rows) > 1 else rows.pop() if rows else None
        elif padding_idx is not None:
            padding_idx = _check.row("embax.Table(padding_idx=...)", padding_idx, total)
        if max_norm is not None:
            max_norm = _check.positive("embax.Table(max_norm=...)", max_norm)
            if not jnp.issubdtype(weight.dtype, jnp.inexact):
                raise TypeError(
                    f"`embax.Table(max_norm=...)` must be None for a table of integers, got {max_norm} for "
                    f"{weight.dtype}. Cast the weight to a float dtype."
                )
        checked = {
            "weight": weight,
            "padding_idx": padding_idx,
            "max_norm": max_norm,
            "norm_type": _check.positive("embax.Table(norm_type=...)", self.norm_type),
            "scale_grad_by_freq": _check.flag("embax.Table(scale_grad_by_freq=...)", self.scale_grad_by_freq),
            "freeze": _check.flag("embax.Table(freeze=...)", self.freeze),
            "out_of_range": _check.choice("embax.Table(out_of_range=...)", self.out_of_range, OutOfRange),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_of_rows(self, rows: HeldRows) -> None:
        """Check the rules of a gradient: make a table of zeros with them, of width 0."""
        rules: dict[str, PyTree] = {name: getattr(self, name) for name in _STATIC} | {"storage": DENSE}
        of_zeros = Table(jnp.zeros((rows.rows, 0)), **rules)
        object.__setattr__(self, "padding_idx", of_zeros.padding_idx)

    @classmethod
    def create(
        cls,
        key: Key[Array, ""],
        rows: int,
        dim: int | Sequence[int],
        *,
        init: Initializer | None = None,
        dtype: DTypeLike = jnp.float32,
        mesh: Any = None,
        axis: str | Sequence[str] = (),
        layout: Layout = "rows",
        columns: str | None = None,
        skew: float = 2.0,
        pool_at_owners: bool = False,
        **rules: Any,
    ) -> "Table":
        """Make a table of fresh rows; the padding row is zero.

        On a mesh, each device makes its own rows: the same rows as without a mesh, up to rounding.

        Args:
          key: A JAX random key.
          rows: The number of rows, 0 or more.
          dim: The size of a row, or the sizes of its axes.
          init: Called as `init(key, (rows, *dim), dtype)`, as `jax.nn.initializers` are. Default: normal with the
            standard deviation `1 / sqrt(dim)`, so that rows have a norm near 1.
          dtype: The dtype of the weight.
          mesh: The mesh over which the table is split, as by `embax.shard`. Default: none.
          axis: The mesh axis, or axes, over which rows are split; for the layout `"columns"`, the axis for columns.
          layout: How rows are split: `"rows"`, `"rows-cyclic"`, `"columns"` or `"replicated"`; see `embax.shard`.
          columns: With a layout of rows, a mesh axis over which columns are split as well.
          skew: The room for rows in one round, as a multiple of the mean number for an owner; 1 or more, dimensionless.
          pool_at_owners: Whether owners may sum the rows of a bag and send the sum instead of rows, if that is less.
          **rules: The rules of `Table`, by name.

        Returns:
          The table.

        Raises:
          TypeError: If a size is not a whole number, or a rule is unknown or of the wrong type.
          ValueError: If a size is negative, `init` returns another shape, or a rule is outside its range; with a mesh,
            also as `embax.shard`.

        Example:
          >>> import embax, jax
          >>> embax.Table.create(jax.random.key(0), rows=10_000, dim=64, padding_idx=0)
          Table(float32[10000,64], padding_idx=0)
        """
        rows = _check.size("embax.Table.create(rows=...)", rows)
        axes = tuple(dim) if isinstance(dim, Sequence) else (dim,)
        axes = tuple(_check.size("embax.Table.create(dim=...)", axis) for axis in axes)

        def fresh() -> Array:
            table = cls(fresh_rows("embax.Table.create", key, rows, axes, init, dtype), **rules)
            return with_zero_padding(table).weight

        storage = DENSE
        if mesh is not None:
            split = Split(mesh, axis, layout, columns, skew, pool_at_owners)
            storage = storage_on_mesh("embax.Table.create", split, (rows, *axes))
        return cls(storage.created(fresh), storage=storage, **rules)

    @property
    def placement(self) -> PyTree:
        """Where the rows are on a mesh, an `embax.sharding.Placement`; None without a mesh."""
        return self.storage.placement

    @property
    def rows(self) -> int:
        """Number of rows, without the padding that sharding adds."""
        weight = self.weight
        if isinstance(weight, HeldRows):
            return weight.rows
        return self.storage.rows_of(weight.shape[0])

    @property
    def dim(self) -> tuple[int, ...]:
        """The sizes of a row's axes."""
        weight = self.weight
        return weight.dim if isinstance(weight, HeldRows) else tuple(weight.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    def __repr__(self) -> str:
        weight = self.weight
        if isinstance(weight, HeldRows):
            return repr(weight)
        if hasattr(weight, "shape") and hasattr(weight, "dtype"):
            shape = self.storage.rows_of(weight.shape[0]), *weight.shape[1:]
            weight = f"{weight.dtype}[{','.join(map(str, shape))}]"
        fields = dataclasses.fields(self)[1:]
        rules = {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}
        if "storage" in rules:
            rules[self.storage.name] = rules.pop("storage")
        return f"Table({', '.join([str(weight), *(f'{name}={value!r}' for name, value in rules.items())])})"


_STATIC = tuple(field.name for field in dataclasses.fields(Table)[1:])
# The storage is no rule: it does not change what a lookup returns.
RULES = tuple(name for name in _STATIC if name != "storage")


class _OfGradient(tuple):
    """The static part of a gradient's Table, equal to its table's, so that a tree of labels fits both.

    It remembers the empty node of the gradient's rows: `_unflatten` puts it back where Equinox replaces the weight by
    None, and a map over a gradient gives one label for the weight.
    """

    rows: HeldRows


_WEIGHT = jax.tree_util.GetAttrKey("weight")


class _KeyOfRows:
    """The path entry of a gradient's rows: equal to `.weight`, but printed as nothing, since rows print their own."""

    name = _WEIGHT.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _KeyOfRows) or other == _WEIGHT

    def __hash__(self) -> int:
        return hash(_WEIGHT)

    def __str__(self) -> str:
        return ""


def _flatten(table: Table) -> tuple[tuple[Any], tuple[PyTree, ...]]:
    weight = table.weight
    rules = tuple(getattr(table, name) for name in _STATIC)
    rows = weight.empty() if isinstance(weight, HeldRows) else table.__dict__.get("_rows")
    if rows is not None:
        rules = _OfGradient(rules)
        rules.rows = rows
    return (weight,), rules


def _flatten_with_keys(table: Table) -> tuple[tuple[Any], tuple[PyTree, ...]]:
    (weight,), rules = _flatten(table)
    return ((_KeyOfRows() if isinstance(weight, HeldRows) else _WEIGHT, weight),), rules


def _unflatten(rules: tuple[PyTree, ...], children: Iterable[Any]) -> Table:
    # Without __init__ and its checks: JAX and Equinox rebuild pytrees with None, bools and shapes in place of arrays.
    table = object.__new__(Table)
    (weight,) = children
    if isinstance(rules, _OfGradient):
        weight = rules.rows if weight is None else weight.label() if isinstance(weight, HeldRows) else weight
        if is_label(weight):
            object.__setattr__(table, "_rows", rules.rows)
    object.__setattr__(table, "weight", weight)
    for name, rule in zip(_STATIC, rules, strict=True):
        object.__setattr__(table, name, rule)
    return table


jax.tree_util.register_pytree_with_keys(Table, _flatten_with_keys, _unflatten, _flatten)
_flax.register(Table, _flax.of_table, _flax.to_table)


def rules_of(table: Table) -> dict[str, PyTree]:
    """The rules of a table by name, as arguments of Table."""
    return {name: getattr(table, name) for name in RULES}


def has_weight(table: Table) -> bool:
    """Whether a Table has a weight or its shape. Equinox puts None in its place, and optax.masked a MaskedNode."""
    return hasattr(table.weight, "shape")


def shared_rules(tables: Iterable[Table]) -> Table:
    """Return the rules that an optimizer must follow for a weight that several tables share.

    A row is trained if one of the tables trains it, so padding and freezing hold only where all tables agree.

    Args:
      tables: One table or more, of one weight.

    Returns:
      A Table of that weight, with `padding_idx` and `freeze`.
    """
    tables = list(tables)
    paddings = {table.padding_idx for table in tables}
    padding_idx = paddings.pop() if len(paddings) == 1 else None
    freeze = all(table.freeze for table in tables)
    return Table(tables[0].weight, padding_idx=padding_idx, freeze=freeze, storage=tables[0].storage)


def is_table(node: object) -> TypeGuard[Table]:
    """Whether a node of a tree is a Table: for `is_leaf=` of the functions of `jax.tree`."""
    return isinstance(node, Table)


def with_weight(table: Table, weight: PyTree, **rules: Any) -> Table:
    """A Table with another weight, of any kind and unchecked: a gradient, a shape, None. `rules` replace some rules."""
    static = {name: getattr(table, name) for name in _STATIC} | rules
    return _unflatten(tuple(static.values()), (weight,))


def fresh_rows(
    call: str, key: Key[Array, ""], rows: int, dim: tuple[int, ...], init: Initializer | None, dtype: DTypeLike
) -> Shaped[Array, "rows *dim"]:
    """Make rows by an initialiser, and check the shape that it returns."""
    if init is None:
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"`{call}(init=...)` must be given for a table of integers, got None for {jnp.dtype(dtype)}. "
                "Pass init(key, shape, dtype)."
            )
        init = jax.nn.initializers.normal(stddev=1 / math.sqrt(max(1, math.prod(dim))))
    weight = init(key, (rows, *dim), dtype)
    if weight.shape != (rows, *dim):
        raise ValueError(
            f"`{call}(init=...)` must give the shape it is asked for, {(rows, *dim)}, got {weight.shape}. "
            "Use its `shape` argument."
        )
    return as_jax(weight)  # an initialiser may give a NumPy array


def with_zero_padding(table: Table) -> Table:
    """Set the padding rows of a table to zero."""
    return table if table.padding_idx is None else dataclasses.replace(table, weight=_cleared(table))


@jax.jit  # one program for a table that is made outside of one
def _cleared(table: Table) -> Shaped[Array, "rows *dim"]:
    return without_padding(table, table.weight)


def without_padding(
    table: Table, values: Shaped[Array, "rows *dim"], instead: Any = None
) -> Shaped[Array, "rows *dim"]:
    """Put zeros, or the rows of another array, in place of the padding rows.

    By a selection over all rows, which are all new here anyway: a scatter into a sharded array would also write a row
    of the next shard (jaxlib 0.10.2).

    Args:
      table: The table with the rules.
      values: An array like its weight.
      instead: An array of the same shape, or None for zeros.

    Returns:
      A new array, laid out as the old one.
    """
    if table.padding_idx is None:
        return values
    padding = table.storage.positions(jnp.asarray(table.padding_idx), table.storage.rows_of(values.shape[0]))
    is_padding = jnp.isin(jnp.arange(values.shape[0]), padding)
    mask = jnp.expand_dims(is_padding, tuple(range(1, values.ndim)))
    return jnp.where(mask, jnp.zeros((), values.dtype) if instead is None else instead, values)
