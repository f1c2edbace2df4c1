"""attend: a vector against every row of a table, as the head of a language model does."""

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

    The rules of the table hold: rows are clipped to `max_norm`, the padding row gets no gradient, and a frozen table
    gets none. `scale_grad_by_freq` is about ids, and has no say here. Sums run in float32 or wider.

    Time, memory and gradient are of all rows, so `embax.value_and_grad` gives a table that is used here a dense
    gradient, to which it adds the rows that were looked up. For a loss, `embax.softmax_cross_entropy` does without the
    logits.

    Of a table on a mesh, each device multiplies its own rows; where columns are split, the devices that have parts of
    the same rows first exchange these, so that each has some of the rows whole. The table is never on one device. The
    logits are in the order of the ids, and each device gets those of a part of the batch, if its first axis divides by
    the devices.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      mask_padding: Whether the logits of padding rows are minus infinity, so that none is ever predicted.
      dtype: The dtype of the logits. Default: what the dtypes of the table and of `x` promote to; of a float8 one and a
        wider one, the wider one, and of two float8 ones, float32.

    Returns:
      One logit a row, `(*batch, rows)`.

    Raises:
      TypeError: If the table or `x` is not of a floating-point dtype.
      ValueError: If the trailing axes of `x` are not those of a row.

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
    """Return the weight for what reads all of its rows: unclipped, with the gradient that the rules leave it.

    Args:
      table: The table.

    Returns:
      The values of the weight. The padding row has no gradient, and of a frozen table no row has one.
    """
    if table.freeze:
        return jax.lax.stop_gradient(table.weight)
    # The identity, which marks the gradient.
    weight = all_rows(table.weight)
    if table.padding_idx is None:
        return weight
    return _jitted_without_gradient_of_padding(with_weight(table, None), weight)


def _without_gradient_of_padding(rules: Table, weight: Shaped[Array, "rows *dim"]) -> Shaped[Array, "rows *dim"]:
    return with_tangent(functools.partial(without_padding, rules), jax.lax.stop_gradient(weight), [weight])


# On explicit axes, JAX pulls back through no operation outside of jit that meets what is on no mesh.
_jitted_without_gradient_of_padding = jax.jit(_without_gradient_of_padding, inline=True)


def checked_vectors(call: str, table: Table, x: object) -> Float[Array, "*batch_dim"]:
    """Check vectors that are to be multiplied by the rows of a table.

    Args:
      call: The call for the messages.
      table: The table.
      x: What the caller gave.

    Returns:
      The vectors as an array.

    Raises:
      TypeError: If the table or the vectors are not of a floating-point dtype.
      ValueError: If their trailing axes are not those of a row.
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
    """Return the dtype in which vectors meet the rows of a table, whatever JAX is told about promotion.

    JAX promotes no dtype of 8 bits or fewer by itself. Here the wider one of two decides, and if both are so narrow, it
    is float32, as their products and sums fit in neither.
    """
    dtypes = {np.dtype(dtype) for dtype in (table.dtype, x.dtype)}
    wide = sorted((dtype for dtype in dtypes if jnp.finfo(dtype).bits >= 16), key=str)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(wide[0], wide[-1]) if wide else np.dtype(np.float32)
