"""Labels of a loss: check them, find the tokens that count, and reduce their losses."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._base import check as _check
from .._core import ids as _ids
from .._core.table import Table
from .attend import checked_vectors

Reduction = Literal["none", "mean", "sum"]
# The label of tokens that do not count. Labels are never wrapped, so it names no row.
NOT_COUNTED = -1


def checked_batch(
    call: str, table: Table, x: object, labels: object, ignore_index: object, mask_padding: bool
) -> tuple[Float[Array, "*batch_dim"], Int[Array, "*batch"]]:
    """Check vectors and their labels, and mark the tokens that do not count.

    Args:
      call: The call, for error messages.
      table: The table whose rows the labels name.
      x: The caller's vectors.
      labels: The caller's labels.
      ignore_index: The caller's label of tokens that do not count, or None.
      mask_padding: Whether tokens whose label is a padding row do not count, either.

    Returns:
      Both as arrays. A label is a row number, `rows` or more if it has no row, or `NOT_COUNTED`.

    Raises:
      TypeError: If the table or the vectors are not of a floating-point dtype, or the labels not of an integer one.
      ValueError: If the shapes do not fit.
      IndexError: If a concrete label that counts has no row, and `table.out_of_range` is `"error"`.
    """
    x = checked_vectors(call, table, x)
    if ignore_index is not None:
        ignore_index = _check.integer(f"{call}(ignore_index=...)", ignore_index)
    given = _ids.as_array(labels)
    labels = _ids.prepare(f"{call}(labels=...)", given, table, wrap=False, ignored=ignore_index)
    batch = x.shape[: x.ndim - len(table.dim)]
    if labels.shape != batch:
        raise ValueError(
            f"`{call}(labels=...)` must be one for each vector, of the shape {batch}, got {labels.shape}. "
            "Give each vector its label."
        )
    labels = _ids.resolve(labels, table.rows, table.out_of_range, wrap=False)
    if mask_padding and table.padding_idx is not None:
        labels = jnp.where(_ids.is_padding(labels, table.padding_idx), NOT_COUNTED, labels)
    # Compare the caller's own labels: `_ids.prepare` has narrowed wide dtypes by now.
    left_out = _equal(given, ignore_index)
    return x, labels if left_out is None else jnp.where(left_out, NOT_COUNTED, labels)


def _equal(labels: _ids.Ids, number: int | None) -> Bool[Array, "*batch"] | None:
    """Which labels equal `number`; None if their dtype cannot hold it."""
    if number is None or not jnp.iinfo(labels.dtype).min <= number <= jnp.iinfo(labels.dtype).max:
        return None
    return jnp.asarray(labels == number)


def have_loss(table: Table, rows: int, labels: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Which tokens count and have a loss that is not NaN, so that they have a gradient.

    Args:
      table: The table with the rules.
      rows: Its number of rows.
      labels: Labels from `checked_batch`.

    Returns:
      One bool for each token.
    """
    return (labels >= 0) & ((labels < rows) | (table.out_of_range == "zero"))


def masked(
    table: Table, rows: int, labels: Int[Array, "*batch"], losses: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Replace the losses of tokens that do not count by 0, and of labels without a row by NaN.

    Args:
      table: The table with the rules.
      rows: Its number of rows.
      labels: Labels from `checked_batch`.
      losses: A loss for each token, arbitrary where it is replaced.

    Returns:
      The losses.
    """
    # By selection, so that the gradient selects, too: 0 * NaN is NaN.
    without_a_row = jnp.where(labels == NOT_COUNTED, 0, np.nan).astype(losses.dtype)
    return jnp.where(have_loss(table, rows, labels), losses, without_a_row)


def reduced(losses: Float[Array, "*batch"], labels: Int[Array, "*batch"], reduction: Reduction) -> Float[Array, "..."]:
    """Reduce losses to one number.

    Args:
      losses: The losses, 0 for tokens that do not count.
      labels: Labels from `checked_batch`.
      reduction: `"none"`, `"sum"` or `"mean"`.

    Returns:
      The losses, their sum, or their sum divided by the number of tokens that count, at least 1.
    """
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    if reduction == "sum":
        return total
    number = jnp.sum(labels != NOT_COUNTED, dtype=jnp.int32)  # float32 counts only up to 2**24
    return total / jnp.maximum(number, 1).astype(total.dtype)
