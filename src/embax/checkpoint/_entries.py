"""Entries: the arrays of a tree by name.

For instance, `{"params": {"film": Table(...)}, "step": 3}` has the entries "params/film/weight" and "step". A table in
a Collection has its own name, as if it were not stacked.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._core.containers.stored_rows import StoredRows
from .._core.scratch import Scratch
from .._core.table import Table, has_weight
from .._features.collection import Collection
from .._features.made_for import MadeFor
from .._features.stacks import cut_out
from .._gradients.row_grad import RowGrad
from .._mesh.placement import Placement

# Dtypes that TensorStore, and so Orbax, does not know.
_UNKNOWN = {"object", "uint2", "uint4", "float8_e4m3"}


class Entry(NamedTuple):
    """One array of a tree, or some of its rows, which are a table."""

    name: str  # the names of the nodes above it, joined by "/"
    value: PyTree  # an array, a shape or a number
    placement: Placement | None = None  # the placement of a sharded table
    start: int = 0  # the first row of the table in `value`
    rows: int | None = None  # the number of rows; None if it is not a table


def entries_of(call: str, tree: PyTree) -> list[Entry]:
    """List the arrays of a tree.

    Args:
      call: The call, for error messages.
      tree: A pytree. The tables of a Collection are listed one by one.

    Returns:
      The entries, in the order of the tree's leaves.

    Raises:
      TypeError: If a leaf is not an array, random key or number.
      ValueError: If two leaves have the same name.
    """
    entries = _entries(call, tree, ())
    taken: set[str] = set()
    nodes = {"/".join(parts[:n]) for entry in entries for parts in [entry.name.split("/")] for n in range(len(parts))}
    for name in (entry.name for entry in entries):
        if name in taken or name in nodes:
            raise ValueError(f"`{call}` must have a name of its own for each leaf, got {name!r} twice. Rename a node.")
        taken.add(name)
    return entries


def _entries(call: str, tree: PyTree, above: tuple[PyTree, ...]) -> list[Entry]:
    found = []
    for path, node in jax.tree.flatten_with_path(tree, is_leaf=is_node)[0]:
        path = (*above, *path)
        name = _name(path) or "tree"
        if isinstance(node, Collection):
            for member in node._members:
                stack, of_member = node.stacks[member.stack], (*path, jax.tree_util.DictKey(member.name))
                if isinstance(stack, Table) and has_weight(stack) and stack.placement is not None:
                    name = _name(of_member)
                    found.append(Entry(name, stack.weight, stack.placement, member.start, member.rows))
                else:
                    found += _entries(call, cut_out(stack, member), of_member)
        elif isinstance(node, Table | StoredRows):
            if isinstance(node, StoredRows) or has_weight(node):
                found.append(_of_rows(name, node))
        elif isinstance(node, Scratch):
            continue
        elif _can_be_written(node):
            found.append(Entry(name, node))
        else:
            raise TypeError(
                f"`{call}` must have a tree of arrays, random keys and numbers, got {_kind(node)} for {name!r}. "
                "Leave it out."
            )
    return found


def _of_rows(name: str, table: Table | StoredRows) -> Entry:
    """The entry of a table: its stored rows if it is sharded, else its rows in row order."""
    storage, weight = table.storage, table.weight
    if storage.placement is None:
        in_order = jax.eval_shape(storage.to_rows, weight) if _is_shape(weight) else storage.to_rows(weight)
        return Entry(name, in_order, None, 0, table.rows)
    return Entry(name, weight, storage.placement, 0, table.rows)


def _is_shape(weight: PyTree) -> bool:
    return isinstance(weight, jax.ShapeDtypeStruct)


def is_node(node: object) -> bool:
    """Whether a node is treated as a whole: a table, a Collection, scratch memory; but not a gradient."""
    return isinstance(node, Table | StoredRows | Collection | Scratch) and not isinstance(node, RowGrad)


def _can_be_written(value: PyTree) -> bool:
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return isinstance(value, float | complex) or (isinstance(value, int) and -(2**63) <= value < 2**63)
    if is_key(value):
        return True
    dtype = np.dtype(value.dtype)
    return dtype.kind not in "USMm" and dtype.names is None and dtype.name not in _UNKNOWN


def _kind(value: PyTree) -> str:
    if hasattr(value, "dtype"):
        return f"an array of {value.dtype}"
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__


def is_key(value: PyTree) -> bool:
    """Whether a leaf is an array of random keys."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def described(entry: Entry) -> dict[str, PyTree]:
    """The shape, without the padding that sharding adds, and the dtype of an entry, as saved and compared."""
    shape = np.shape(entry.value)
    if entry.placement is not None:
        shape = (entry.rows, *shape[1:])
    dtype = entry.value.dtype if hasattr(entry.value, "dtype") else np.asarray(entry.value).dtype
    return {"shape": list(shape), "dtype": str(dtype)}


def is_empty(entry: Entry) -> bool:
    """Whether an entry has size 0, which Orbax does not accept."""
    return math.prod(described(entry)["shape"]) == 0


def descriptions_of(tree: PyTree) -> dict[str, MadeFor]:
    """List the MadeFor records of the optimizers' states in a tree, by name."""
    nodes, _ = jax.tree.flatten_with_path(tree, is_leaf=_is_description)
    return {_name(path): node for path, node in nodes if _is_description(node)}


def with_descriptions(tree: PyTree, saved: dict[str, str]) -> PyTree:
    """Put saved MadeFor records into a tree; None for those that were not saved."""

    def put(path: KeyPath, node: PyTree) -> PyTree:
        if not _is_description(node):
            return node
        text = saved.get(_name(path))
        return None if text is None else MadeFor.from_json(text, node)

    return jax.tree.map_with_path(put, tree, is_leaf=_is_description)


def _is_description(node: object) -> bool:
    """Whether a node of a tree is a MadeFor record."""
    return isinstance(node, MadeFor)


def _name(path: KeyPath) -> str:
    # The path entry of a gradient's rows prints as nothing, and is left out.
    return jax.tree_util.keystr(tuple(key for key in path if str(key)), simple=True, separator="/")


def by_blocks(placement: Placement, rows: int) -> Placement:
    """The layout in which rows are written and read: in row order, with one block for each device.

    Args:
      placement: The table's own placement.
      rows: The number of rows.

    Returns:
      A placement on the same mesh.
    """
    axes = (*placement.axes, *(name for name in placement.mesh.axis_names if name not in placement.axes))
    return dataclasses.replace(placement, axes=axes, columns=None, cyclic=False, rows=rows)
