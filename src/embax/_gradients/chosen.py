"""The `tables=` argument: a caller's predicate that chooses plain arrays, of other libraries' layers, as tables.

For instance, with `tables=lambda path, leaf: leaf.ndim == 2`, the tree on the left is treated as the one on the right:

    {"embed": float32[1000, 4], "bias": float32[4]}    {"embed": Table(float32[1000, 4]), "bias": float32[4]}
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jaxtyping import PyTree

from .._core.containers.held import held
from .._core.table import Table, is_table, with_weight

# Called with the path of a leaf, as in `jax.tree_util.tree_map_with_path`, and the leaf.
Chooser = Callable[[Any, Any], bool]


def checked(call: str, tables: Any) -> Chooser | None:
    """Return a caller's predicate or None; raise a TypeError for anything else."""
    if tables is not None and not callable(tables):
        raise TypeError(
            f"`{call}(tables=...)` must be a function of a path and a leaf, got {tables!r}. Pass such as "
            "lambda path, leaf: leaf.ndim == 2."
        )
    chooser: Any = tables
    return chooser


def is_chosen(call: str, tables: Chooser | None, path: Sequence[PyTree], leaf: PyTree) -> bool:
    """Tell whether the predicate chooses a leaf as the weight of a table.

    Args:
      call: The call, for the error message.
      tables: The predicate, or None to choose nothing.
      path: The path of the leaf.
      leaf: The leaf. A Table is never chosen: it is a table already.

    Returns:
      True if it is chosen.

    Raises:
      ValueError: If a chosen leaf is not a float array with an axis of rows.
    """
    if tables is None or leaf is None or isinstance(leaf, Table) or not tables(tuple(path), leaf):
        return False
    is_array = hasattr(leaf, "dtype") and jax.tree_util.all_leaves([leaf])  # a brainunit.Quantity is a node, no leaf
    if not (is_array and jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.ndim):
        raise ValueError(
            f"`{call}(tables=...)` must choose arrays of floats with an axis of rows, got {_short(leaf)} at "
            f"{keystr(tuple(path))!r}. Choose by the dtype and the number of axes, too."
        )
    return True


def _short(leaf: PyTree) -> str:
    if not hasattr(leaf, "dtype"):
        return repr(leaf)
    kind = "" if jax.tree_util.all_leaves([leaf]) else f"{type(leaf).__name__} of "
    return f"{kind}{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def with_tables(
    call: str, tables: Chooser | None, tree: PyTree, path: Sequence[PyTree] = (), leaves: tuple[type, ...] = ()
) -> PyTree:
    """Wrap each chosen leaf of a tree in a Table.

    Args:
      call: The call, for error messages.
      tables: The predicate, or None to choose nothing.
      tree: The tree.
      path: The path of `tree` within the caller's tree; the predicate gets paths that begin with it.
      leaves: Further types to treat as leaves.

    Returns:
      The tree with Tables.

    Raises:
      ValueError: If a chosen leaf is not a float array with an axis of rows.
    """
    return jax.tree.map_with_path(
        lambda inside, leaf: Table(leaf) if is_chosen(call, tables, (*path, *inside), leaf) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, (Table, *leaves)),
    )


def tables_at(names: Collection[str], tree: PyTree) -> PyTree:
    """Wrap each leaf in a Table whose path, written by `keystr`, is among `names`."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if isinstance(leaf, Table) or keystr(path) not in names else Table(leaf),
        tree,
        is_leaf=is_table,
    )


def with_gradients(as_given: PyTree, like: PyTree, gradients: PyTree) -> PyTree:
    """Wrap the gradients of chosen leaves in Tables, as `with_tables` wrapped the leaves.

    Args:
      as_given: The parameters before `with_tables`.
      like: The parameters after it.
      gradients: A tree with the structure of `as_given`.

    Returns:
      The gradients, with the structure of `like`.
    """
    leaves, structure = jax.tree.flatten(like, is_leaf=is_table)
    before = structure.flatten_up_to(as_given)
    return structure.unflatten(
        with_weight(leaf, x) if isinstance(leaf, Table) and not isinstance(b, Table) and x is not None else x
        for leaf, b, x in zip(leaves, before, structure.flatten_up_to(gradients), strict=True)
    )


def without_tables(as_given: PyTree, like: PyTree, tree: PyTree) -> PyTree:
    """Remove the Tables that `with_tables` added.

    Args:
      as_given: The parameters, or a tree of their structure, before `with_tables`.
      like: The same tree after it.
      tree: A tree with a node for each Table of `like`.

    Returns:
      The tree, with a bare weight or RowGrad for each of those Tables.
    """
    leaves, structure = jax.tree.flatten(like, is_leaf=is_table)
    before = structure.flatten_up_to(as_given)
    return structure.unflatten(
        held(x) if isinstance(leaf, Table) and not isinstance(b, Table) and isinstance(x, Table) else x
        for leaf, b, x in zip(leaves, before, structure.flatten_up_to(tree), strict=True)
    )
