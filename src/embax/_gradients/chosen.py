"""Leaves that are read as tables though no Table holds them: those of other layers, which a caller chooses.

For instance, with `tables=lambda path, leaf: leaf.ndim == 2`, the tree on the left is taken for the one on the right:

    {"embed": float32[1000, 4], "bias": float32[4]}    {"embed": Table(float32[1000, 4]), "bias": float32[4]}
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jaxtyping import PyTree

from .._core.held import held
from .._core.table import Table, is_table, with_weight

# Called with the path of a leaf, as `jax.tree_util.tree_map_with_path` gives it, and the leaf.
Chooser = Callable[[Any, Any], bool]


def checked(call: str, tables: Any) -> Chooser | None:
    """Return a predicate that a caller gave, or None; raise a TypeError for anything else."""
    if tables is not None and not callable(tables):
        raise TypeError(
            f"`{call}(tables=...)` must be a function of a path and a leaf, got {tables!r}. Pass such as "
            "lambda path, leaf: leaf.ndim == 2."
        )
    chooser: Any = tables
    return chooser


def is_chosen(call: str, tables: Chooser | None, path: Sequence[PyTree], leaf: PyTree) -> bool:
    """Tell whether a leaf is to be taken for the weight of a table.

    Args:
      call: The call for the message.
      tables: The predicate, or None for no leaf.
      path: The path of the leaf.
      leaf: The leaf; a Table is one already.

    Returns:
      Whether it is.

    Raises:
      ValueError: If it is chosen and is no array of floats with an axis of rows.
    """
    if tables is None or leaf is None or isinstance(leaf, Table) or not tables(tuple(path), leaf):
        return False
    is_array = hasattr(leaf, "dtype") and jax.tree_util.all_leaves([leaf])  # of brainunit, a Quantity is a node
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
    """Put a Table in the place of each chosen leaf of a tree.

    Args:
      call: The call for messages.
      tables: The predicate, or None for no leaf.
      tree: The tree.
      path: Where it stands in the tree that the predicate is to see the paths of.
      leaves: Types that are leaves besides those of JAX.

    Returns:
      The tree with Tables.

    Raises:
      ValueError: If a leaf is chosen that is no array of floats with an axis of rows.
    """
    return jax.tree.map_with_path(
        lambda inside, leaf: Table(leaf) if is_chosen(call, tables, (*path, *inside), leaf) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, (Table, *leaves)),
    )


def tables_at(names: Collection[str], tree: PyTree) -> PyTree:
    """Put a Table in the place of each leaf of a tree whose path, as `keystr` writes it, is one of some names."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if isinstance(leaf, Table) or keystr(path) not in names else Table(leaf),
        tree,
        is_leaf=is_table,
    )


def with_gradients(as_given: PyTree, like: PyTree, gradients: PyTree) -> PyTree:
    """Put gradients into the form that `with_tables` has given the parameters.

    Args:
      as_given: The parameters before.
      like: The same afterwards.
      gradients: A tree of the structure of the parameters before.

    Returns:
      The gradients, with a Table around those of chosen leaves.
    """
    leaves, structure = jax.tree.flatten(like, is_leaf=is_table)
    before = structure.flatten_up_to(as_given)
    return structure.unflatten(
        with_weight(leaf, x) if isinstance(leaf, Table) and not isinstance(b, Table) and x is not None else x
        for leaf, b, x in zip(leaves, before, structure.flatten_up_to(gradients), strict=True)
    )


def without_tables(as_given: PyTree, like: PyTree, tree: PyTree) -> PyTree:
    """Take the Tables away again that `with_tables` has put into a tree.

    Args:
      as_given: The parameters, or a tree of their structure, before.
      like: The same afterwards.
      tree: A tree with a node for each Table of `like`.

    Returns:
      The tree with the weight of each such Table, as a layer holds it.
    """
    leaves, structure = jax.tree.flatten(like, is_leaf=is_table)
    before = structure.flatten_up_to(as_given)
    return structure.unflatten(
        held(x) if isinstance(leaf, Table) and not isinstance(b, Table) and isinstance(x, Table) else x
        for leaf, b, x in zip(leaves, before, structure.flatten_up_to(tree), strict=True)
    )
