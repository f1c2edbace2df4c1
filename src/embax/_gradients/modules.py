"""Which leaves of a tree are not differentiated, since they are no parameters of an Equinox module.

For instance, of a module with a table, a bias and `jax.nn.relu`, the function is left out; of the dict `{"step": 3}`,
which is no module, nothing is left out, and JAX itself refuses the integer.
"""

import sys

import jax
from jaxtyping import PyTree

from .._core.table import Table, is_table


def fixed_leaves(tree: PyTree) -> list[bool]:
    """Tell which leaves of a tree are part of an Equinox module, and no arrays of floats.

    A module is a pytree whose leaves may be functions, flags and settings, so that JAX cannot differentiate for it as
    it is. `equinox.filter_grad` leaves these out, and this is its rule. Outside of modules, JAX's own holds.

    Args:
      tree: PyTree tree.

    Returns:
      One answer a leaf, a Table being one.
    """
    equinox = sys.modules.get("equinox")  # where nobody has imported it, there is no module
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
