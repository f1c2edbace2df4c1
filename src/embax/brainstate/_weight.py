"""Weights of brainstate's layers: initialisers of two kinds, arrays, and Quantities with a unit."""

import inspect
from collections.abc import Callable
from typing import TypeAlias

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, Shaped
from numpy.typing import ArrayLike

from .._base.arrays import as_jax
from .._core.containers.held import held, table_of
from .._core.containers.stored_rows import StoredRows
from .._core.table import with_zero_padding

Weight: TypeAlias = "jax.Array | brainunit.Quantity | StoredRows"  # StoredRows for a sharded table
Init: TypeAlias = Callable[..., PyTree] | ArrayLike | brainstate.nn.init.Initializer  # or a weight


def initial_weight(init: object, shape: tuple[int, ...]) -> Weight:
    """Make the initial weight of a layer.

    Args:
      init: An initialiser: brainstate's `init(shape)`, or JAX's `init(key, shape, dtype)`, recognised by a first
        parameter named `key`. Or an array, NumPy array, Quantity, State, nested list or number to broadcast. Values
        without a dtype get brainstate's float dtype.
      shape: `(rows, *dim)`.

    Returns:
      An array of that shape, or a Quantity of one; StoredRows unchanged.

    Raises:
      TypeError: If the values are not numbers.
      ValueError: If `init` is None, or the shape does not broadcast to `shape`.
    """
    value = _call(init, shape) if callable(init) else init
    value = value.value if isinstance(value, brainstate.State) else value
    if value is None:
        raise ValueError(
            "`embax.Embedding(embedding_init=...)` must be an initialiser or an array, got None. "
            "Leave it out for LecunUniform()."
        )
    mantissa, unit = split_unit(value)
    if not hasattr(mantissa, "dtype"):
        mantissa = np.asarray(mantissa)
        if mantissa.dtype.kind in "iuf":
            mantissa = mantissa.astype(brainstate.environ.dftype())
    if not jnp.issubdtype(mantissa.dtype, jnp.number):
        raise TypeError(
            f"`embax.Embedding(embedding_init=...)` must give numbers, got {mantissa.dtype} from {init!r}. "
            "Pass an initialiser (not its class), or an array."
        )
    if isinstance(mantissa, StoredRows) and mantissa.shape == shape:
        return with_unit(mantissa, unit)
    try:
        weight = jnp.broadcast_to(as_jax(mantissa), shape)
    except ValueError:
        raise ValueError(
            f"`embax.Embedding(embedding_init=...)` must give a shape that broadcasts to {shape}, got "
            f"{tuple(mantissa.shape)}. Pass (num_embeddings, *embedding_size)."
        ) from None
    return with_unit(weight, unit)


def split_unit(value: PyTree) -> tuple[PyTree, brainunit.Unit | None]:
    """Split a value into its numbers and its unit, None if it is not a Quantity."""
    return (value.mantissa, value.unit) if isinstance(value, brainunit.Quantity) else (value, None)


def with_unit(value: PyTree, unit: brainunit.Unit | None) -> PyTree:
    """Undo `split_unit`."""
    return value if unit is None else brainunit.Quantity(value, unit=unit)


def in_unit(value: PyTree, unit: brainunit.Unit | None) -> PyTree:
    """Convert a value to a number in a unit; a plain number is in this unit already.

    Args:
      value: A number, a Quantity or None.
      unit: The unit of the table, or None.

    Returns:
      A number, or None.

    Raises:
      brainunit.UnitMismatchError: If the value is a Quantity of another dimension.
    """
    return value.to_decimal(unit or brainunit.UNITLESS) if isinstance(value, brainunit.Quantity) else value


def _call(init: Callable[..., PyTree], shape: tuple[int, ...]) -> PyTree:
    # Initialisers divide by the fans, which are 0 for an empty table; so it is cut out of a larger one.
    full = tuple(max(1, size) for size in shape)
    if _takes_key(init):
        value = init(brainstate.random.split_key(), full, brainstate.environ.dftype())
    else:
        value = init(full)
    if full == shape or np.shape(split_unit(value)[0]) != full:
        return value
    return value[tuple(slice(size) for size in shape)]


def _takes_key(init: Callable[..., PyTree]) -> bool:
    try:
        parameters = inspect.signature(init).parameters
    except (TypeError, ValueError):  # a callable in C without a signature
        return False
    return next(iter(parameters), None) == "key"


def zero_row(weight: Weight, row: int) -> Weight:
    """Set one row to zero, in the weight's unit.

    Args:
      weight: `(rows, *dim)`.
      row: The row.

    Returns:
      A new weight.
    """
    mantissa, unit = split_unit(weight)
    if isinstance(mantissa, StoredRows):
        return held(with_zero_padding(table_of(mantissa, padding_idx=row)))
    return with_unit(_with_zeros(mantissa, row), unit)


@jax.jit  # one program for an eager call
def _with_zeros(rows: Shaped[Array, "rows *dim"], row: int | Int[Array, ""]) -> Shaped[Array, "rows *dim"]:
    return rows.at[row].set(0)
