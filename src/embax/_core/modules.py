"""Modules that hold tables in a form of their framework, and are no pytrees with Tables: how their tables are replaced.

A framework registers its modules, so that `embax.shard` and `unshard` take models of any of them, and load none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .table import Table

OfTable = Callable[[Table], Table]

_KINDS: dict[type, Callable[[str, Any, OfTable], Any]] = {}


def register(kind: type, with_tables: Callable[[str, Any, OfTable], Any]) -> None:
    """Teach a kind of module.

    Args:
      kind: The type of the modules.
      with_tables: Called with the name of the call for messages, a module and a function of a Table; gives a copy of
        the module, in which the function has been applied to each table.
    """
    _KINDS[kind] = with_tables


def is_module(node: object) -> bool:
    """Whether a node is a module of a kind that was registered."""
    return isinstance(node, tuple(_KINDS))


def with_tables(call: str, module: object, function: OfTable) -> PyTree:
    """Copy a module, and apply a function to each of its tables.

    Args:
      call: The call for messages.
      module: A module.
      function: The function.

    Returns:
      The copy.
    """
    kind = next(kind for kind in type(module).__mro__ if kind in _KINDS)
    return _KINDS[kind](call, module, function)


def copied(tree: PyTree, of: Any = None) -> PyTree:
    """Copy the arrays of a tree, or those that another one has, too: a step may be given them to write into."""
    others = None if of is None else {id(leaf) for leaf in jax.tree.leaves(of)}

    def copy(leaf: PyTree) -> PyTree:
        return jnp.copy(leaf) if isinstance(leaf, jax.Array) and (others is None or id(leaf) in others) else leaf

    return jax.tree.map(copy, tree)
