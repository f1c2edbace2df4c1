"""Leaves of Equinox modules that are not differentiated: functions, flags and settings.

For instance, in a module with a table, a bias and `jax.nn.relu`, the function is left out. The dict `{"step": 3}` is no
module: nothing in it is left out, and JAX itself raises an error for the integer.
"""

import sys

import jax
from jaxtyping import PyTree

from .._core.table import Table, is_table


def fixed_leaves(tree: PyTree) -> list[bool]:
    """Tell which leaves are not differentiated: leaves of an Equinox module that are not float arrays.

    This is the rule of `equinox.filter_grad`. Outside of modules, every leaf is differentiated, or refused by JAX.

    Args:
      tree: A pytree.

    Returns:
      One answer for each leaf; a Table counts as a leaf.
    """
    equinox = sys.modules.get("equinox")  # if nobody has imported it, there are no modules
    if equinox is None:
        return [False] * len(jax.tree.leaves(tree, is_leaf=is_table))
    answers: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Table | equinox.Module)):
        if isinstance(node, equinox.Module):
            leaves = jax.tree.leaves(node, is_leaf=is_table)
            answers += [not (is_table(leaf) or equinox.is_inexact_array(leaf)) for leaf in leaves]
        else:
            answers.append(False)
    return answers
