"""Labels of a loss: which tokens count, and the losses of those reduced to one number."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._base import check as _check
from .._core import ids as _ids
from .._core.table import Table
from .attend import checked_vectors

Reduction = Literal["none", "mean", "sum"]
# Stands for the label of a token that does not count. Labels are never wrapped, so it is that of no row.
NOT_COUNTED = -1


def checked_batch(
    call: str, table: Table, x: object, labels: object, ignore_index: object, mask_padding: bool
) -> tuple[Float[Array, "*batch_dim"], Int[Array, "*batch"]]:
    """Check vectors and the label of each, and tell which tokens count.

    Args:
      call: The call for the messages.
      table: The table whose rows the labels name.
      x: What the caller gave as vectors.
      labels: What the caller gave as labels.
      ignore_index: What the caller gave as the label of tokens that do not count, or None.
      mask_padding: Whether tokens do not count either whose label is a padding row.

    Returns:
      Both as arrays. Labels are row numbers, `rows` or more where there is no row, and `NOT_COUNTED`.

    Raises:
      TypeError: If the table or the vectors are not of a floating-point dtype, or the labels not of an integer one.
      ValueError: If the shapes do not fit.
      IndexError: If a concrete label has no row, does count, and `table.out_of_range` is `"error"`.
    """
    x = checked_vectors(call, table, x)
    if ignore_index is not None:
        ignore_index = _check.integer(f"{call}(ignore_index=...)", ignore_index)
    given = _ids.as_array(labels)
    labels = _ids.prepare(f"{call}(labels=...)", given, table, wrap=False, ignored=ignore_index)
    batch = x.shape[: x.ndim - len(table.dim)]
    if labels.shape != batch:
        raise ValueError(
            f"`{call}(labels=...)` must be one a vector, of the shape {batch}, got {labels.shape}. "
            "Give each vector its label."
        )
    labels = _ids.resolve(labels, table.rows, table.out_of_range, wrap=False)
    if mask_padding and table.padding_idx is not None:
        labels = jnp.where(_ids.is_padding(labels, table.padding_idx), NOT_COUNTED, labels)
    # By the labels as they were given: those of a wide dtype are cut to the table's rows by now.
    left_out = _equal(given, ignore_index)
    return x, labels if left_out is None else jnp.where(left_out, NOT_COUNTED, labels)


def _equal(labels: _ids.Ids, number: int | None) -> Bool[Array, "*batch"] | None:
    """Tell the labels of this number; None where their dtype does not hold it."""
    if number is None or not jnp.iinfo(labels.dtype).min <= number <= jnp.iinfo(labels.dtype).max:
        return None
    return jnp.asarray(labels == number)


def have_loss(table: Table, rows: int, labels: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Tell the tokens that count and have a loss that is a number, so that there is a gradient.

    Args:
      table: The table whose rules hold.
      rows: Its number of rows.
      labels: Labels as `checked_batch` gives them.

    Returns:
      One truth value a token.
    """
    return (labels >= 0) & ((labels < rows) | (table.out_of_range == "zero"))


def masked(
    table: Table, rows: int, labels: Int[Array, "*batch"], losses: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Put 0 in the place of the losses of tokens that do not count, and NaN where a label has no row.

    Args:
      table: The table whose rules hold.
      rows: Its number of rows.
      labels: Labels as `checked_batch` gives them.
      losses: A number for each; of any value where it is left out.

    Returns:
      The losses.
    """
    # By selection, here and so in the gradient: 0 * NaN is NaN.
    without_a_row = jnp.where(labels == NOT_COUNTED, 0, np.nan).astype(losses.dtype)
    return jnp.where(have_loss(table, rows, labels), losses, without_a_row)


def reduced(losses: Float[Array, "*batch"], labels: Int[Array, "*batch"], reduction: Reduction) -> Float[Array, "..."]:
    """Reduce losses to one number.

    Args:
      losses: The losses, 0 for tokens that do not count.
      labels: Labels as `checked_batch` gives them.
      reduction: How.

    Returns:
      The losses, or their sum, or that divided by the number of tokens that count; by 1 where there are none.
    """
    if reduction == "none":
        return losses
    total = jnp.sum(losses)
    if reduction == "sum":
        return total
    number = jnp.sum(labels != NOT_COUNTED, dtype=jnp.int32)  # as float32, it would not count beyond 2**24
    return total / jnp.maximum(number, 1).astype(total.dtype)
