"""attend: multiply vectors by every row of a table, as the tied head of a language model does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Shaped
from numpy.typing import ArrayLike

from .._base.distinct import accumulator
from .._base.tangents import with_tangent
from .._core import ids as _ids
from .._core.lookup import clipped_rows
from .._core.read_rows import all_rows
from .._core.table import Table, with_weight, without_padding


def attend(
    table: Table, x: ArrayLike, *, mask_padding: bool = False, dtype: DTypeLike | None = None
) -> Float[Array, "*batch rows"]:
    """Multiply vectors by every row of a table: the logits of a tied head.

    `logits[b, r] = sum_d x[b, d] * row[r, d]`, with the rows as `lookup` reads them

    The rules of the table apply: rows are clipped to `max_norm`, padding rows get no gradient, and neither does a
    frozen table. `scale_grad_by_freq` counts ids, so it has no effect here. Sums run in float32 or wider.

    Time and memory follow the number of rows. The gradient is dense; `embax.value_and_grad` adds the rows that were
    looked up to it. For a loss, `embax.softmax_cross_entropy` avoids the logits.

    If the table is sharded, each device multiplies its own rows; if rows are split by columns, devices first exchange
    parts, so that each has some rows whole. No device ever holds the table. The logits are in row order. Each device
    gets the logits of a part of the batch, if the batch's first axis divides by the devices.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      mask_padding: Whether the logits of padding rows are minus infinity, so that they are never predicted.
      dtype: The dtype of the logits. Default: the promoted dtype of the table and `x`. A float8 dtype gives way to a
        wider one; two float8 dtypes give float32.

    Returns:
      One logit for each row, `(*batch, rows)`.

    Raises:
      TypeError: If the table or `x` is not of a floating-point dtype.
      ValueError: If `x` does not end with the axes of a row.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]), padding_idx=0)
      >>> embax.attend(table, [1.0, 1.0], mask_padding=True)
      Array([-inf,   3.,   7.], dtype=float32)
    """
    x = checked_vectors("embax.attend", table, x)
    weight = trained_whole(table)
    out = common_dtype(table, x) if dtype is None else jnp.dtype(dtype)
    rules = with_weight(table, None)
    return _of_all_rows(out, bool(mask_padding), rules, weight, x)


def _logits(
    dtype: np.dtype,
    mask_padding: bool,
    rules: Table,
    ids: Int[Array, " some"],
    weight: Float[Array, "some *dim"],
    x: Float[Array, "*batch_dim"],
) -> Float[Array, "*batch some"]:
    """Return the logits of some rows."""
    common = common_dtype(with_weight(rules, weight), x)
    rows = clipped_rows(rules, ids, weight).astype(common)
    axes = tuple(range(x.ndim - rows.ndim + 1, x.ndim)), tuple(range(1, rows.ndim))
    logits = jax.lax.dot_general(x.astype(common), rows, (axes, ((), ())), preferred_element_type=accumulator(common))
    if mask_padding and rules.padding_idx is not None:
        logits = jnp.where(_ids.is_padding(ids, rules.padding_idx), -np.inf, logits)
    return logits.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _of_all_rows(
    dtype: np.dtype,
    mask_padding: bool,
    rules: Table,
    weight: Float[Array, "stored *dim"],
    x: Float[Array, "*batch_dim"],
) -> Float[Array, "*batch rows"]:
    return rules.storage.logits(functools.partial(_logits, dtype, mask_padding, rules), weight, x)


def trained_whole(table: Table) -> Shaped[Array, "rows *dim"]:
    """Return the weight for a head that reads all rows: not clipped, with a gradient that follows the rules.

    Args:
      table: The table.

    Returns:
      The weight. Padding rows have no gradient, nor do the rows of a frozen table.
    """
    if table.freeze:
        return jax.lax.stop_gradient(table.weight)
    # The identity; it marks the gradient as dense by nature.
    weight = all_rows(table.weight)
    if table.padding_idx is None:
        return weight
    return _jitted_without_gradient_of_padding(with_weight(table, None), weight)


def _without_gradient_of_padding(rules: Table, weight: Shaped[Array, "rows *dim"]) -> Shaped[Array, "rows *dim"]:
    return with_tangent(functools.partial(without_padding, rules), jax.lax.stop_gradient(weight), [weight])


# Jitted, since eager JAX cannot transpose an operation that combines an array on explicit axes with one on no mesh.
_jitted_without_gradient_of_padding = jax.jit(_without_gradient_of_padding, inline=True)


def checked_vectors(call: str, table: Table, x: object) -> Float[Array, "*batch_dim"]:
    """Check vectors that are to be multiplied by the rows of a table.

    Args:
      call: The call, for error messages.
      table: The table.
      x: The caller's vectors.

    Returns:
      The vectors as an array.

    Raises:
      TypeError: If the table or the vectors are not of a floating-point dtype.
      ValueError: If they do not end with the axes of a row.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise TypeError(f"`{call}(table=...)` must be of a float dtype, got {table.dtype}. Cast its weight.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{call}(x=...)` must be of a float dtype, got {x.dtype}. Cast it.")
    if x.ndim < len(table.dim) or x.shape[x.ndim - len(table.dim) :] != table.dim:
        raise ValueError(
            f"`{call}(x=...)` must be of the shape (*batch, *{table.dim}), for the rows of {table!r}, got {x.shape}. "
            "Project it to the size of a row first."
        )
    return x


def common_dtype(table: Table, x: Float[Array, "*batch_dim"]) -> np.dtype:
    """Return the dtype in which vectors are multiplied by rows, whatever JAX's promotion setting.

    JAX does not promote dtypes of 8 bits or fewer. Here the wider dtype of the two decides. If both are that narrow, it
    is float32, since products and sums do not fit in 8 bits.
    """
    dtypes = {np.dtype(dtype) for dtype in (table.dtype, x.dtype)}
    wide = sorted((dtype for dtype in dtypes if jnp.finfo(dtype).bits >= 16), key=str)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(wide[0], wide[-1]) if wide else np.dtype(np.float32)
