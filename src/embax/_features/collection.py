"""Collection: named features over named tables; tables of equal width, dtype and rules are stored as one.

For instance, "film" with 100 rows and "genre" with 20 rows of the same width are one stack of 120 rows. An id 3 of
"genre" reads row 103 of the stack.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped
from numpy.typing import ArrayLike

from .._bags import embedding_bag as _bag
from .._bags import pool as _pool
from .._bags.ragged import Ragged
from .._base import check as _check
from .._core import ids as _ids
from .._core.containers import flax_state as _flax
from .._core.dense import DENSE
from .._core.lookup import read_parts
from .._core.table import Table, with_weight
from .stacks import Member, cut_out, members_of, stacks_of


@dataclasses.dataclass(frozen=True)
class Feature:
    """One input of a Collection: which table it reads, and how its ids are pooled.

    Args:
      name: Its key in a batch and in the results.
      table: The name of the table that it reads. Several features may read one table.
      mode: `"mean"`, `"sum"`, `"sqrtn"` or `"max"`, as in `embedding_bag`. Default: no pooling, one row for each id, as
        in `lookup`.

    Raises:
      ValueError: If the mode is unknown.

    Example:
      >>> import embax
      >>> embax.Feature("genres", table="genre", mode="mean")
      Feature(name='genres', table='genre', mode='mean')
    """

    name: str
    table: str
    mode: _pool.Mode | None = None

    def __post_init__(self):
        if self.mode is not None:
            _check.choice("embax.Feature(mode=...)", self.mode, _pool.Mode)


class _Input(NamedTuple):
    """The ids of a feature."""

    feature: Feature
    stack: int
    ids: Int[Array, "*batch"]  # row numbers in the stack; its number of rows is the sentinel
    counted: Bool[Array, "*batch"]  # which ids count when they are pooled
    all_count: bool  # whether all do, whatever they are
    weights: Float[Array, "*batch"] | None
    layout: _pool.BagLayout


class Collection:
    """Named features over named tables, read in one call.

    Tables of the same width, dtype and rules, except padding rows, are stored as one. So a hundred tables cost one
    gather, and in training one search for duplicates and one scatter. `collection["film"]` is the table of this name.
    `unstack` converts a tree with the collection's structure, such as a gradient or an optimizer's state, to one with
    the names of tables.

    The tables may be sharded, if all have the same layout over the same axes of one mesh. `embax.shard` of a collection
    shards all of its tables at once.

    A pytree whose leaves are the stored tables: `embax.value_and_grad`, `embax.optim` and `embax.apply_updates` take it
    like a Table. Features share a gather if they are pooled in bags of one length; so do features with a Ragged, those
    of mode `"max"`, and those that are not pooled.

    Args:
      tables: The tables by name.
      features: The features.

    Raises:
      TypeError: If a table is not a Table, or a table of integers is to be pooled.
      ValueError: If two features have the same name, a feature reads an unknown table, or two tables have different
        layouts, one on a mesh and the other not included.

    Example:
      >>> import embax, jax
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> tables = {
      ...     "film": embax.Table.create(keys[0], rows=100, dim=8),
      ...     "genre": embax.Table.create(keys[1], rows=20, dim=8, padding_idx=0),
      ... }
      >>> features = [embax.Feature("film", "film"), embax.Feature("genres", "genre", mode="mean")]
      >>> collection = embax.Collection(tables, features)
      >>> collection
      Collection(film: 100 rows, genre: 20 rows; 2 features; stored as Table(float32[120,8], padding_idx=100))
      >>> out = collection({"film": [4, 7], "genres": [[1, 3], [2, 0]]})
      >>> out["film"].shape, out["genres"].shape
      ((2, 8), (2, 8))
    """

    __slots__ = ("_features", "_members", "stacks")
    stacks: tuple[PyTree, ...]
    _members: tuple[Member, ...]
    _features: tuple[Feature, ...]

    def __init__(self, tables: Mapping[str, Table], features: Iterable[Feature]):
        features = tuple(features)
        for name, table in tables.items():
            if not isinstance(table, Table):
                raise TypeError(
                    f"`embax.Collection(tables=...)` must be Tables, got {type(table).__name__} for {name!r}. "
                    "Pass embax.Table(weight)."
                )
        names = [feature.name for feature in features]
        for feature in features:
            if (times := names.count(feature.name)) > 1:
                raise ValueError(
                    f"`embax.Collection(features=...)` must have names of their own, got {feature.name!r} {times} "
                    "times. Rename one."
                )
            if feature.table not in tables:
                raise ValueError(
                    f"`embax.Collection(features=...)` must read a table of the collection, got {feature.table!r} for "
                    f"{feature.name!r}. There are {_listed(tables)}."
                )
            dtype = tables[feature.table].dtype
            if feature.mode is not None and not jnp.issubdtype(dtype, jnp.inexact):
                raise TypeError(
                    f"`embax.Collection(features=...)` must pool the rows of a table of floats, got {dtype} for "
                    f"{feature.name!r}. Cast the table, or leave out the mode."
                )
        members = members_of("embax.Collection(tables=...)", tables)
        _fill(self, stacks_of(dict(tables), members), members, features)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features."""
        return self._features

    @property
    def tables(self) -> dict[str, PyTree]:
        """The tables by name; in a gradient, the gradients of the tables."""
        return {member.name: cut_out(self.stacks[member.stack], member) for member in self._members}

    def __getitem__(self, name: str) -> PyTree:
        for member in self._members:
            if member.name == name:
                return cut_out(self.stacks[member.stack], member)
        names = [member.name for member in self._members]
        raise KeyError(f"`embax.Collection` has no table {name!r}. There are {_listed(names)}.")

    def __call__(
        self, batch: Mapping[str, ArrayLike | Ragged], weights: Mapping[str, ArrayLike] | None = None
    ) -> dict[str, Shaped[Array, "..."]]:
        """Read all features.

        Args:
          batch: The ids of each feature: an array of any shape and integer dtype; for a pooled feature
            `(*bags, length)`, or a Ragged.
          weights: For any of the pooled features, a factor for each id, as in `embedding_bag`.

        Returns:
          For each feature, the rows, `(*ids.shape, *dim)`, or one vector for each bag, `(*bags, *dim)`.

        Raises:
          TypeError: As `lookup` and `embedding_bag`.
          ValueError: As `embedding_bag`, and if a feature is missing or unknown.
          IndexError: As `lookup`.
        """
        weights = {} if weights is None else weights
        names = [feature.name for feature in self._features]
        if set(batch) != set(names) or not set(weights) <= set(names):
            raise ValueError(
                f"`embax.Collection(batch, weights)` must have the features {_listed(names)}, got {_listed(batch)} "
                f"and weights for {_listed(weights)}. Pass all of them, and no others."
            )
        inputs = [self._input(feature, batch[feature.name], weights.get(feature.name)) for feature in self._features]
        out: dict[str, Array] = {}
        for _, group in itertools.groupby(
            sorted(enumerate(map(self._kind, inputs)), key=lambda x: x[1]), lambda x: x[1]
        ):
            parts = [inputs[i] for i, _ in group]
            table = self.stacks[parts[0].stack]
            out.update(zip([part.feature.name for part in parts], _read_together(table, parts), strict=True))
        return {name: out[name] for name in names}

    def _input(self, feature: Feature, ids: object, weights: object) -> _Input:
        """Check the ids of a feature, and convert them to rows of its stack."""
        member = next(member for member in self._members if member.name == feature.table)
        stack = self.stacks[member.stack]
        shape = jax.ShapeDtypeStruct((member.rows, *stack.dim), stack.dtype)
        own = with_weight(stack, shape, storage=DENSE)
        call = f"embax.Collection(batch[{feature.name!r}])"
        if feature.mode is None:
            if weights is not None or isinstance(ids, Ragged):
                raise TypeError(
                    f"`{call}` must be an array and have no weights, as the feature is not pooled, got "
                    f"{type(ids).__name__}. Give the feature a mode."
                )
            layout, ids = _pool.BagLayout((), None), _ids.prepare(call, ids, own)
            checked = None
        else:
            layout, ids = _bag.layout_of(call, own, ids)
            checked = _bag.prepared_weights(
                f"embax.Collection(weights[{feature.name!r}])", weights, ids.shape, own, feature.mode
            )
        rows = _ids.resolve(ids, member.rows, stack.out_of_range)
        counted = _pool.is_used(layout, ids) & ~_ids.is_padding(rows, member.padding_idx)
        all_count = layout.offsets is None and member.padding_idx is None
        exists = (rows >= 0) & (rows < member.rows)
        if feature.mode is not None:
            exists &= counted
        rows = jnp.where(exists, rows + member.start, stack.rows)
        return _Input(feature, member.stack, rows, counted, all_count, checked, layout)

    def _kind(self, part: _Input) -> tuple[PyTree, ...]:
        """A key that is equal for features that can be read together."""
        mode = part.feature.mode
        how = "rows" if mode is None else "max" if mode == "max" else "sum"
        length = -1 if mode is None or part.layout.offsets is not None else part.ids.shape[-1]
        # Frequencies are counted within a feature. A storage may want Ragged features one by one (`pools_apart`).
        stack = self.stacks[part.stack]
        apart = stack.storage.pools_apart and part.layout.offsets is not None
        alone = part.feature.name if stack.scale_grad_by_freq or apart else ""
        return part.stack, how, length, part.weights is not None, alone

    def __repr__(self) -> str:
        members = ", ".join(f"{member.name}: {member.rows} rows" for member in self._members)
        stacks = ", ".join(map(repr, self.stacks))
        return f"Collection({members}; {len(self._features)} features; stored as {stacks})"


def unstack(tree: PyTree) -> PyTree:
    """Replace each Collection in a tree by a dictionary of its tables.

    For checkpoints that should not depend on how tables are stored: of parameters, gradients and optimizers' states.

    Args:
      tree: A pytree.

    Returns:
      The same tree, with dictionaries for Collections.

    Example:
      >>> import embax, jax.numpy as jnp, optax
      >>> tables = {"film": embax.Table(jnp.ones((4, 2))), "user": embax.Table(jnp.zeros((3, 2)))}
      >>> params = {"rows": embax.Collection(tables, [embax.Feature("film", "film")])}
      >>> embax.unstack(params)
      {'rows': {'film': Table(float32[4,2]), 'user': Table(float32[3,2])}}
      >>> embax.restack(embax.unstack(params), like=params)["rows"]["user"]
      Table(float32[3,2])
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_collection)
    return structure.unflatten([leaf.tables if _is_collection(leaf) else leaf for leaf in leaves])


def restack(tree: PyTree, like: PyTree) -> PyTree:
    """Undo `unstack`: replace dictionaries of tables by Collections.

    Args:
      tree: A tree from `unstack`, possibly with other values.
      like: A tree with the structure before `unstack`.

    Returns:
      A tree like `like`, with the values of `tree`.

    Raises:
      ValueError: If the structures differ.
    """
    leaves, structure = jax.tree.flatten(like, is_leaf=_is_collection)
    for leaf, value in zip(leaves, structure.flatten_up_to(tree), strict=True):
        if _is_collection(leaf) and set(value) != (names := {member.name for member in leaf._members}):
            raise ValueError(
                f"`embax.restack(tree=...)` must have the tables {_listed(sorted(names))}, got {_listed(value)}. "
                "Pass what embax.unstack returned."
            )
    values = [
        _fill(object.__new__(Collection), stacks_of(value, leaf._members, leaf.stacks), leaf._members, leaf._features)
        if _is_collection(leaf)
        else value
        for leaf, value in zip(leaves, structure.flatten_up_to(tree), strict=True)
    ]
    return structure.unflatten(values)


def _is_collection(node: object) -> TypeGuard["Collection"]:
    return isinstance(node, Collection)


def _fill(
    collection: Collection, stacks: Iterable[PyTree], members: tuple[Member, ...], features: tuple[Feature, ...]
) -> Collection:
    collection.stacks, collection._members, collection._features = tuple(stacks), members, features
    return collection


jax.tree_util.register_pytree_with_keys(
    Collection,
    lambda c: (
        tuple((jax.tree_util.GetAttrKey(f"stacks[{i}]"), stack) for i, stack in enumerate(c.stacks)),
        (c._members, c._features),
    ),
    lambda static, stacks: _fill(object.__new__(Collection), stacks, *static),
    lambda c: (c.stacks, (c._members, c._features)),
)


def _to_state_dict(collection: Collection) -> PyTree:
    """The state for `flax.serialization`: the tables' states by name, whatever the stacks."""
    return {name: _flax.to_state(table) for name, table in collection.tables.items()}


def _from_state_dict(collection: Collection, state: PyTree) -> Collection:
    return restack(_flax.from_state(collection.tables, state, "tables"), collection)


_flax.register(Collection, _to_state_dict, _from_state_dict)


def _read_together(table: Table, parts: Sequence[_Input]) -> list[Shaped[Array, "..."]]:
    """Read features with equal `_kind` in one lookup."""
    if parts[0].feature.mode is None:
        ids = table.storage.joined([jnp.ravel(part.ids) for part in parts], table.rows)
        cut = read_parts(table, ids, [part.ids.size for part in parts])
        return [jnp.reshape(own, (*part.ids.shape, *table.dim)) for own, part in zip(cut, parts, strict=True)]
    # `counted` and the ids already leave out padding, and `padding_idx` of the stack would name rows of others.
    table = dataclasses.replace(table, padding_idx=None)
    layout, sizes = _joined([part.layout for part in parts], [part.ids.shape for part in parts])
    fills = {"ids": table.rows, "counted": False, "weights": 0}
    ids, counted, weights = (
        _flat(table, [getattr(part, name) for part in parts], layout, fill_value) for name, fill_value in fills.items()
    )
    if layout.offsets is None:
        layout = _pool.BagLayout(counted.shape[:1], None)
    if all(part.all_count for part in parts):  # XLA would not find out from many parts
        counted = jnp.ones(counted.shape, bool)
    mode = "max" if parts[0].feature.mode == "max" else "sum"
    total = _pool.pool_rows(table, ids, counted, weights, layout, mode)
    # A Ragged feature that is read by itself has no bags of other features, so there is nothing to split.
    alone = table.storage.pools_apart and layout.offsets is not None
    cut = [total] if alone else table.storage.parted(total, sizes)
    cut = [own[: math.prod(part.layout.shape)] for own, part in zip(cut, parts, strict=True)]
    if mode == "sum" and len(parts) > 1:  # a kernel writes each array by itself, and not all of them into one
        firsts = [0, *itertools.accumulate(sizes)][:-1]
        cut = table.storage.bags_by_kernel(cut, table, ids, counted, weights, layout.offsets, firsts=firsts)
    out = []
    for own, part in zip(cut, parts, strict=True):
        own = jnp.reshape(own, (*part.layout.shape, *table.dim))
        own = _pool.divided(own, part.counted, part.weights, part.layout, part.feature.mode or "sum")
        out.append(own.astype(table.dtype))
    return out


def _joined(layouts: Sequence[_pool.BagLayout], shapes: Sequence[tuple[int, ...]]) -> tuple[_pool.BagLayout, list[int]]:
    """Concatenate the bags of several features; returns their layout, and the number of bags of each feature."""
    sizes = [math.prod(layout.shape) for layout in layouts]
    ragged = [layout.offsets for layout in layouts if layout.offsets is not None]
    if not ragged:
        return _pool.BagLayout((sum(sizes),), None), sizes
    starts = [0, *itertools.accumulate(shape[0] for shape in shapes)][:-1]
    offsets = jnp.concatenate([own + start for own, start in zip(ragged, starts, strict=True)])
    # The unused places of each feature, except the last, become one further bag, which is cut off later.
    sizes = [size + 1 for size in sizes]
    sizes[-1] -= 1
    return _pool.BagLayout((offsets.shape[0] - 1,), offsets), sizes


def _flat(table: Table, arrays: Sequence[PyTree], layout: _pool.BagLayout, fill_value: float) -> PyTree:
    if arrays[0] is None:
        return None
    if layout.offsets is not None:
        return jnp.concatenate(arrays)
    arrays = [jnp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1])) for x in arrays]
    return table.storage.joined(arrays, fill_value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
