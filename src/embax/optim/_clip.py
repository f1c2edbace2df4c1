"""clip_by_global_norm: clip gradients by their common norm, with RowGrads among them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from .._base import check as _check
from .._base import distinct as _dedupe
from .._core.containers.held_rows import around, bare
from .._core.scratch import has_slots
from .._core.table import Table, is_table
from .._features.made_for import MadeFor, check_made_for, made_for
from .._gradients.apply import norm_of_distinct, refuse_lanes
from .._gradients.row_grad import RowGrad, is_trained
from .._kernels.combine import combine


@has_slots
class ClipByGlobalNormState(NamedTuple):
    """Scratch memory that sums duplicates, since the norm is of their sums."""

    slots: tuple[_dedupe.Slots, ...]  # int32 (rows,) for each table; None if not trained, or sorted
    made_for: MadeFor | None = None  # the tables of the state; None in checkpoints of older versions


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down if their common norm is above a limit.

    `g -> g * min(1, max_norm / norm)`, where `norm` is `embax.global_norm` of all gradients. Like
    `optax.clip_by_global_norm`, for trees that may hold RowGrads. Chain it before a lifted transformation.

    Args:
      max_norm: The largest norm that is not scaled, in units of the gradient.

    Returns:
      The transformation. Like the state of `lift`, its state belongs to the tables that it was made for. If duplicates
      are summed by slots, it holds scratch memory of 4 bytes a row. For an array chosen by `tables=`, ids are sorted.

    Raises:
      TypeError: If the limit is not a number.
      ValueError: If it is not positive. In `update`: if a gradient has lanes, or the state was made for other tables.

    Example:
      >>> import embax, optax
      >>> tx = optax.chain(embax.optim.clip_by_global_norm(1.0), embax.optim.lift(optax.adam(1e-3)))
    """
    max_norm = _check.positive("embax.optim.clip_by_global_norm(max_norm=...)", max_norm)

    def init(params: PyTree) -> PyTree:
        leaves = jax.tree.leaves(params, is_leaf=is_table)
        tables = [leaf for leaf in leaves if isinstance(leaf, Table)]
        slots = tuple(_dedupe.scratch(t.rows) if is_trained(t) else None for t in tables)
        return ClipByGlobalNormState(slots, made_for(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        call, of_gradients = "embax.optim.clip_by_global_norm(...).update", params is None
        now = made_for(updates if of_gradients else params)
        check_made_for(call, state.made_for, now, of_gradients=of_gradients)
        nodes, structure = jax.tree.flatten_with_path(updates, is_leaf=lambda node: isinstance(node, RowGrad | Table))
        as_given = [leaf for _, leaf in nodes]
        leaves = [bare(leaf) for leaf in as_given]
        slots: list[_dedupe.Slots] = [*jax.tree.map(jnp.asarray, state.slots)]  # NumPy arrays if restored from a file
        numbers = _numbers(nodes, params, len(slots))
        distinct = []
        for leaf, number in zip(leaves, numbers, strict=True):
            if isinstance(leaf, RowGrad):
                refuse_lanes(call, leaf)
            if isinstance(leaf, RowGrad) and leaf.ids.shape[0]:
                kept, summed = combine(None if number is None else slots[number], leaf.ids, leaf.held, leaf.rows)
                if number is not None:
                    slots[number] = kept
                distinct.append(summed.values)
            elif isinstance(leaf, Table):
                distinct.extend(jax.tree.leaves(leaf))
            elif not isinstance(leaf, RowGrad):
                distinct.append(leaf)
        norm = norm_of_distinct(distinct)
        factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
        clipped = [
            factor * leaf if isinstance(leaf, RowGrad) else jax.tree.map(lambda x: x * factor.astype(x.dtype), leaf)
            for leaf in leaves
        ]
        clipped = [around(*pair) for pair in zip(as_given, clipped, strict=True)]
        return structure.unflatten(clipped), ClipByGlobalNormState(tuple(slots), state.made_for)

    return optax.GradientTransformation(init, update)


def _numbers(nodes: Sequence[tuple[KeyPath, PyTree]], params: PyTree, slots: int) -> list[int | None]:
    """For each gradient, the number of its table's slots; None if it has none, such as a chosen array."""
    if params is None:
        is_of_table = [isinstance(leaf, RowGrad | Table) for _, leaf in nodes]
    else:
        of_params, _ = jax.tree.flatten_with_path(params, is_leaf=is_table)
        names = {keystr(path) for path, node in of_params if isinstance(node, Table)}
        is_of_table = [keystr(path) in names for path, _ in nodes]
    if sum(is_of_table) != slots:
        return [None] * len(nodes)
    numbers = iter(range(slots))
    return [next(numbers) if is_ else None for is_ in is_of_table]
