"""Scratch memory: arrays that are reused from step to step but mean nothing, so that no checkpoint saves them.

A node of a tree tells of it in one of two ways:

    class ScratchArray(Scratch)     the whole node is scratch memory
    @has_slots                      the field `slots` of a NamedTuple is
    class LiftState(NamedTuple)
"""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


class Scratch:
    """Base of pytree nodes that checkpoints leave out: each storage makes scratch memory of its own, or none."""

    __slots__ = ()


_WITH_SLOTS: set[type] = set()


def has_slots(state: type) -> type:
    """Decorate the NamedTuple of a state whose `slots`, a tuple of arrays or None, are scratch memory."""
    _WITH_SLOTS.add(state)
    return state


def is_with_slots(node: object) -> bool:
    """Whether a node is such a state."""
    return type(node) in _WITH_SLOTS


def without_scratch(tree: PyTree) -> PyTree:
    """Remove the slots of states."""
    return jax.tree.map(
        lambda node: node._replace(slots=()) if is_with_slots(node) else node, tree, is_leaf=is_with_slots
    )


def with_scratch(tree: PyTree, like: PyTree) -> PyTree:
    """Put slots back, as zeros of the shapes that another tree has."""

    def put_back(node: PyTree, of_like: PyTree) -> PyTree:
        if not is_with_slots(node):
            return node
        return node._replace(slots=tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for x in of_like.slots))

    return jax.tree.map(put_back, tree, like, is_leaf=is_with_slots)
