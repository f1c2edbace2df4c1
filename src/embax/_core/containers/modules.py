"""A registry of modules that hold tables in their framework's own parameters, such as those of Flax NNX.

A framework's package registers its modules. So `embax.shard` and `unshard` take models of any framework, and import
none.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..table import Table

OfTable = Callable[[Table], Table]

_KINDS: dict[type, Callable[[str, Any, OfTable], Any]] = {}


def register(kind: type, with_tables: Callable[[str, Any, OfTable], Any]) -> None:
    """Register a type of modules.

    Args:
      kind: The type.
      with_tables: Called as `with_tables(call, module, function)`; returns a copy of the module with the function
        applied to each of its tables. `call` is for error messages.
    """
    _KINDS[kind] = with_tables


def is_module(node: object) -> bool:
    """Whether a node is a module of a registered type."""
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
    """Copy the arrays of a tree, or only those that `of` shares: a compiled step may overwrite donated arrays."""
    others = None if of is None else {id(leaf) for leaf in jax.tree.leaves(of)}

    def copy(leaf: PyTree) -> PyTree:
        return jnp.copy(leaf) if isinstance(leaf, jax.Array) and (others is None or id(leaf) in others) else leaf

    return jax.tree.map(copy, tree)
