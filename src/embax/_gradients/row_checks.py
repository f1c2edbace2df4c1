"""Checks of the arguments of a RowGrad, and of the other operand of its arithmetic.

For instance, `RowGrad([4, 9], ones, rows=5)` raises a ValueError that names 9 and its position, 1. `g + array` raises a
TypeError that names `embax.apply_updates`, and `g * array` raises a ValueError.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact, Integer, PyTree

from .._base.arrays import as_jax

_Ids = Integer[Array | np.ndarray, " length"]


def rows_given(ids: Any, values: PyTree, rows: int) -> tuple[_Ids, Inexact[Array, "length *dim"]]:
    """Return the ids and values given to `embax.RowGrad` as arrays; raise an error if they are wrong."""
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids, np.int32 if len(ids) == 0 else None)
    values = as_jax(values)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`embax.RowGrad(ids=...)` must be of an integer dtype, got {ids.dtype}. Cast them.")
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        raise TypeError(f"`embax.RowGrad(values=...)` must be of a float dtype, got {values.dtype}. Cast them.")
    if ids.ndim != 1 or values.shape[:1] != ids.shape:
        raise ValueError(
            "`embax.RowGrad(ids=..., values=...)` must be of the shapes (length,) and (length, *dim), got "
            f"{ids.shape} and {values.shape}. Flatten the ids, and give one value for each."
        )
    if not isinstance(ids, Tracer):
        ids = np.asarray(ids)  # NumPy compares integers of different dtypes exactly
        bad = (ids < 0) | (ids > rows)
        if bad.any():
            position = int(bad.argmax())
            raise ValueError(
                f"`embax.RowGrad(ids=...)` must be in [0, {rows}], {rows} for none, got {int(ids[position])} at "
                f"position {position}. Wrap negative ids, and leave out those without a row."
            )
    return ids, values


def refuse_array(other: PyTree) -> None:
    """Raise a TypeError if an array is added to a RowGrad, as `optax.apply_updates` would do."""
    if hasattr(other, "shape"):
        raise TypeError(
            f"`RowGrad + ...` must be of another RowGrad, got an array of the shape {other.shape}. Apply updates with "
            "embax.apply_updates, put transformations inside of embax.optim.lift, or add to_dense()."
        )


def is_factor(factor: PyTree, call: str) -> bool:
    """Return whether a gradient can be scaled by `factor`; raise a ValueError for an array that is no scalar."""
    if not hasattr(factor, "shape") and not isinstance(factor, int | float):
        return False
    if jnp.ndim(factor):
        raise ValueError(
            f"`{call}` must have a scalar factor, got shape {jnp.shape(factor)}. Scale `values` for a factor an id."
        )
    return True
