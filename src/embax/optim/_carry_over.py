"""carry_over: convert the state of an optimizer for tables that changed in mid-training.

For instance, a table grows from 4 rows to 6 under Adam: rows 0 to 3 of both moments keep their values, rows 4 and 5
start as in a new state, and the step counter keeps its value.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath
from jaxtyping import ArrayLike, PyTree

from .._base.arrays import as_jax
from .._core.dense import DENSE
from .._core.scratch import is_with_slots, with_scratch, without_scratch
from .._core.storage import Storage
from .._core.table import Table, has_weight, is_table, with_weight
from .._features.collection import Collection
from .._features.made_for import MadeFor, differences, is_node, made_for
from .._features.stacks import cut_out, stacks_of
from .._gradients.chosen import tables_at
from ._states import chosen_at_start

_CALL = "embax.optim.carry_over"


def carry_over(state: PyTree, old_params: PyTree, new_params: PyTree, tx: optax.GradientTransformation) -> PyTree:
    """Return the state of a transformation for tables that changed since the state was made.

    Use it when a vocabulary grows, when a table is sharded or gets another layout, when a table is frozen or unfrozen,
    when its padding row changes, or when tables move to another Collection. Counters and the state of ordinary
    parameters are kept. For each table,

    - a row that existed before keeps its state, bit for bit;
    - a new row, and every row of a table that was not trained before, starts as `tx.init` makes it;
    - the state of removed rows, and of a table that is no longer trained, is dropped.

    A table is identified by its path in the tree, in a Collection by its name. An array chosen by the `tables=` of `tx`
    counts as a table.

    Args:
      state: The state of `tx`.
      old_params: The parameters that the state was made for, or their shapes as `jax.ShapeDtypeStruct`. Donated arrays
        may be passed, too: only their shapes are read.
      new_params: The parameters to continue with.
      tx: The transformation: a lifted one, or one that contains lifted ones.

    Returns:
      The state for `new_params`. Unchanged arrays are not copied.

    Raises:
      ValueError: If the state does not belong to `old_params`, or an ordinary parameter or a table's rows have another
        shape.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> params = {"words": embax.Table(jnp.zeros((4, 2)))}
      >>> tx = embax.optim.rowwise_adagrad(0.1)
      >>> state = tx.init(params)
      >>> gradient = {"words": embax.RowGrad([3], jnp.full((1, 2), 2.0), rows=4)}
      >>> _, state = jax.jit(tx.update)(gradient, state, params)
      >>> grown = {"words": embax.resize(params["words"], 6, jax.random.key(0))}
      >>> state = embax.optim.carry_over(state, params, grown, tx)
      >>> state.inner[0].sum_of_squares["words"].weight
      Array([0., 0., 0., 4., 0., 0.], dtype=float32)
    """
    new = tx.init(new_params)
    expected = jax.eval_shape(tx.init, jax.tree.map(_shape, old_params))
    old_params = tables_at(chosen_at_start(expected, old_params), old_params)
    new_params = tables_at(chosen_at_start(new, new_params), new_params)
    sizes = {table.path: table.dim for table in made_for(old_params).tables}
    for table in made_for(new_params).tables:
        if sizes.get(table.path, table.dim) != table.dim:
            raise ValueError(
                f"`{_CALL}(new_params=...)` must have tables with rows of the same shape as before, got "
                f"{table.dim} instead of {sizes[table.path]} for params{table.path}. Make the state anew."
            )
    _check_belongs(state, expected)
    owners = _owners(new_params, tx)
    old = _Old(without_scratch(state), _storages(old_params))
    storages = _storages(new_params)

    def carried(path: KeyPath, node: PyTree) -> PyTree:
        name = jax.tree_util.keystr(path)
        if isinstance(node, Collection):
            return _carried_collection(name, node, owners, old)
        if isinstance(node, Table):
            if f"{name}.weight" in owners:
                return _carried_rows(node, old.tables.get(name))
            return node if not has_weight(node) else with_weight(node, old.array(f"{name}.weight", node.weight))
        if (owner := owners.get(name)) is None or name not in old.arrays:
            return old.array(name, node)
        before = _table(old.arrays[name], old.storages.get(owner, DENSE))
        return _carried_rows(_table(node, storages[owner]), before).weight

    nodes, structure = jax.tree.flatten_with_path(without_scratch(new), is_leaf=is_node)
    return with_scratch(structure.unflatten([carried(*node) for node in nodes]), new)


class _Old:
    """The old state: its arrays and its tables by path."""

    def __init__(self, state: PyTree, storages: dict[str, Storage]):
        self.storages = storages  # the storages of the parameters' tables
        self.arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(state)[0]}
        self.tables: dict[str, Table] = {}
        for path, node in jax.tree.flatten_with_path(state, is_leaf=is_node)[0]:
            name = jax.tree_util.keystr(path)
            if isinstance(node, Collection):
                self.tables |= {f"{name}[{key!r}]": table for key, table in _members(node).items()}
            elif isinstance(node, Table) and has_weight(node):
                self.tables[name] = node

    def array(self, name: str, fresh: PyTree) -> PyTree:
        """The old array of this name, which has no rows of a table; the fresh array if there is no old one."""
        if name not in self.arrays:
            return fresh
        array = self.arrays[name]
        if jnp.shape(array) != jnp.shape(fresh):
            raise ValueError(
                f"`{_CALL}(new_params=...)` must have the ordinary parameters of old_params, got ones for which "
                f"`state{name}` is of the shape {jnp.shape(fresh)} instead of {jnp.shape(array)}. Make the state anew."
            )
        return _where(array, fresh)


def _check_belongs(state: PyTree, expected: PyTree) -> None:
    """Refuse a state that was not made for the old parameters."""
    lifted = [
        [node for node in jax.tree.leaves(tree, is_leaf=is_with_slots) if is_with_slots(node)]
        for tree in (state, expected)
    ]
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.flatten_with_path(tree)[0]}
        for tree in (without_scratch(state), without_scratch(expected))
    ]
    seen = [
        difference
        for node, of_params in zip(*lifted, strict=False)
        if isinstance(node.made_for, MadeFor)
        for difference in differences(node.made_for, of_params.made_for)
    ]
    seen += [
        f"{shapes[0].get(name)} for `state{name}`, which would be {shapes[1].get(name)}"
        for name in {**shapes[0], **shapes[1]}
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if seen:
        raise ValueError(
            f"`{_CALL}(old_params=...)` must be the parameters that `tx` made the state for, got other ones: "
            f"{seen[0]}. Pass the old parameters, or their shapes."
        )


def _carried_collection(name: str, node: Collection, owners: Mapping[str, str], old: _Old) -> Collection:
    """Carry over a Collection in a state, table by table."""
    members = node._members
    fresh = _members(node)
    stacks = []
    for number, stack in enumerate(node.stacks):
        path = f"{name}.stacks[{number}].weight"
        if path in owners:
            here = [member for member in members if member.stack == number]
            tables = {
                member.name: _carried_rows(fresh[member.name], old.tables.get(f"{name}[{member.name!r}]"))
                for member in here
            }
            (joined,) = stacks_of(tables, here, node.stacks)
            stacks.append(with_weight(stack, joined.weight))
        elif not has_weight(stack):
            stacks.append(stack)
        else:
            stacks.append(with_weight(stack, old.array(path, stack.weight)))
    return jax.tree.structure(node, is_leaf=is_table).unflatten(stacks)


def _carried_rows(fresh: Table, before: Table | None) -> Table:
    """Overwrite fresh rows by the old rows that both tables have."""
    if before is None:
        return fresh
    if (before.rows, before.storage, before.dtype) == (fresh.rows, fresh.storage, fresh.dtype):
        return with_weight(fresh, before.weight)
    return with_weight(fresh, fresh.storage.overwritten(fresh.weight, before.storage, before.weight))


def _where(array: PyTree, fresh: PyTree) -> PyTree:
    """Move an old array to the devices of the fresh one; on the same devices, its layout is kept."""
    if not all(isinstance(x, jax.Array) and not isinstance(x, Tracer) for x in (array, fresh)):
        return array
    before, after = ((x.sharding.device_set, getattr(x.sharding, "mesh", None)) for x in (array, fresh))
    if before == after:
        return array
    if fresh.committed:
        return jax.device_put(array, fresh.sharding)
    # Like the fresh array, make it uncommitted, so that it combines with arrays on any mesh.
    on_mesh = array.committed and array.is_fully_addressable and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return as_jax(np.asarray(array)) if on_mesh else array


def _members(collection: Collection) -> dict[str, Table]:
    """The tables of a Collection in a state, without tables that have no rows there."""
    return {
        member.name: cut_out(stack, member)
        for member in collection._members
        for stack in [collection.stacks[member.stack]]
        if isinstance(stack, Table) and has_weight(stack) and jnp.ndim(stack.weight)
    }


def _owners(params: PyTree, tx: optax.GradientTransformation) -> dict[str, str]:
    """Find the arrays of a state with an entry for each row of a table.

    Table 1 gets one row more, table 2 two rows more, and so on. An array of the state that grows by two belongs to
    table 2.

    Returns:
      The path of each such array in the state, with the path of its table in the parameters.
    """
    nodes, structure = jax.tree.flatten_with_path(params, is_leaf=is_table)
    names = [jax.tree_util.keystr(path) for path, _ in nodes]
    # In multiples that need no padding on a mesh, so that the stored rows grow by as much.
    step = math.lcm(*(x.storage.rows_at_once for _, x in nodes if isinstance(x, Table)))

    def shapes(more: bool) -> dict[str, tuple[int, ...]]:
        longer = []
        for number, (_, node) in enumerate(nodes, start=1):
            if isinstance(node, Table) and has_weight(node):
                rows = node.weight.shape[0] + more * number * step
                longer.append(with_weight(node, jax.ShapeDtypeStruct((rows, *node.dim), node.dtype)))
            else:
                longer.append(jax.tree.map(_shape, node))
        state = without_scratch(jax.eval_shape(tx.init, structure.unflatten(longer)))
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.flatten_with_path(state)[0]}

    few, many = shapes(False), shapes(True)
    return {name: names[(many[name][0] - few[name][0]) // step - 1] for name in few if few[name] != many[name]}


def _storages(params: PyTree) -> dict[str, Storage]:
    nodes, _ = jax.tree.flatten_with_path(params, is_leaf=is_table)
    return {jax.tree_util.keystr(path): node.storage for path, node in nodes if isinstance(node, Table)}


def _table(weight: ArrayLike, storage: Storage) -> Table:
    return with_weight(Table(jnp.zeros(0)), weight, storage=storage)


def _shape(leaf: PyTree) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) else None
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf), dtype, sharding=sharding if isinstance(sharding, NamedSharding) else None
    )
