"""Clipping by the norm of all gradients, those of tables among them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._base import check as _check
from .._base import distinct as _dedupe
from .._core.held_rows import around, bare
from .._core.table import Table
from .._features.made_for import MadeFor, check_made_for, made_for
from .._gradients.apply import norm_of_distinct, refuse_lanes
from .._gradients.row_grad import RowGrad, is_trained


class ClipByGlobalNormState(NamedTuple):
    """What the norm of gradients with duplicates needs."""

    slots: tuple[_dedupe.Slots, ...]  # int32 (rows,) for each table; None if not trained, or sorted
    made_for: MadeFor | None = None  # the tables that it belongs to; None from a version that did not note them


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down, where their common norm is above a limit.

    `g -> g * min(1, max_norm / norm)`, `norm` being `embax.global_norm` of all gradients. As
    `optax.clip_by_global_norm`, for trees in which a RowGrad may stand; chain it before a lifted transformation.

    Args:
      max_norm: The largest norm that is left as it is, in units of the gradient.

    Returns:
      The transformation. Its state holds scratch space of 4 bytes a row, where duplicates are summed by slots. It
      belongs to the tables that it was made for, as that of `lift`.

    Raises:
      TypeError: If the limit is not a number.
      ValueError: If it is not positive. In `update`: if a gradient has lanes, or the state was made for other tables.

    Example:
      >>> import embax, optax
      >>> tx = optax.chain(embax.optim.clip_by_global_norm(1.0), embax.optim.lift(optax.adam(1e-3)))
    """
    max_norm = _check.positive("embax.optim.clip_by_global_norm(max_norm=...)", max_norm)

    def init(params: Any) -> Any:
        leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Table))
        tables = [leaf for leaf in leaves if isinstance(leaf, Table)]
        slots = tuple(_dedupe.scratch(t.rows) if is_trained(t) else None for t in tables)
        return ClipByGlobalNormState(slots, made_for(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        call, of_gradients = "embax.optim.clip_by_global_norm(...).update", params is None
        now = made_for(updates if of_gradients else params)
        check_made_for(call, state.made_for, now, of_gradients=of_gradients)
        as_given, structure = jax.tree.flatten(updates, is_leaf=lambda node: isinstance(node, RowGrad | Table))
        leaves = [bare(leaf) for leaf in as_given]
        slots, distinct, number = [*jax.tree.map(jnp.asarray, state.slots)], [], 0  # NumPy's, out of a file
        for leaf in leaves:
            if isinstance(leaf, RowGrad):
                refuse_lanes(call, leaf)
            if isinstance(leaf, RowGrad) and leaf.values.shape[0]:
                slots[number], summed = _dedupe.combine(slots[number], leaf.ids, leaf.values, leaf.rows)
                distinct.append(summed.values)
            elif isinstance(leaf, Table):
                distinct.extend(jax.tree.leaves(leaf))
            elif not isinstance(leaf, RowGrad):
                distinct.append(leaf)
            number += isinstance(leaf, RowGrad | Table)
        norm = norm_of_distinct(distinct)
        factor = jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)
        clipped = [
            factor * leaf if isinstance(leaf, RowGrad) else jax.tree.map(lambda x: x * factor.astype(x.dtype), leaf)
            for leaf in leaves
        ]
        clipped = [around(*pair) for pair in zip(as_given, clipped, strict=True)]
        return structure.unflatten(clipped), ClipByGlobalNormState(tuple(slots), state.made_for)

    return optax.GradientTransformation(init, update)
