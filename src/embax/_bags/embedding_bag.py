"""embedding_bag: look up bags of ids and pool the rows of each, without an array of all rows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Int, Int32, Shaped

from .._base import check as _check
from .._base.arrays import as_jax
from .._base.distinct import accumulator
from .._core import ids as _ids
from .._core.table import Table
from .pool import BagLayout, Mode, divided, is_used, pool_rows
from .ragged import Ragged


def embedding_bag(table: Table, bags: Any, weights: Any = None, mode: Mode = "mean") -> Shaped[Array, "*bags_dim"]:
    """Look up bags of ids and pool the rows of each bag.

    With `x_i` the rows of a bag, as `lookup` reads them, and `w_i` their weights (default: ones):

    - `"mean"`, the default: `sum_i w_i x_i / sum_i w_i`
    - `"sum"`: `sum_i w_i x_i`
    - `"sqrtn"`: `sum_i w_i x_i / sqrt(sum_i w_i**2)`
    - `"max"`: the largest value in each column; the first of several equal ones gets the gradient

    Padding ids do not count, not even in a mean; an empty bag, or a bag of padding only, is zero. If the weights of a
    bag sum to 0 in a mean, or are all 0 in `"sqrtn"`, the result is NaN or infinite, as the formula says. All rules of
    the table apply, and `scale_grad_by_freq` counts within the call. Sums run in float32 or wider. The first three
    modes need no array of all rows.

    Args:
      table: The table to read, of a floating-point dtype.
      bags: A Ragged, or ids of the shape `(*bags, length)`.
      weights: A factor for each id, dimensionless: of the shape of the ids, or of `Ragged.values`. Differentiable.
        Default: none. Not with `"max"`.
      mode: How rows are pooled. Default: by their mean, as in torch.

    Returns:
      One vector for each bag, `(*bags, *dim)`, in the table's dtype.

    Raises:
      TypeError: If the ids are not of an integer dtype, the table or the weights not of a floating-point one, or if
        weights are given for `"max"`.
      ValueError: If the mode is unknown, or a shape does not fit.
      IndexError: If a concrete id has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.array([[0.0, 0.0], [1.0, 10.0], [3.0, 30.0]]), padding_idx=0)
      >>> embax.embedding_bag(table, [[1, 2, 0], [0, 0, 0]])
      Array([[ 2., 20.],
             [ 0.,  0.]], dtype=float32)
      >>> embax.embedding_bag(table, embax.Ragged.from_lists([[1, 2], [], [2, 2]]), mode="sum")
      Array([[ 4., 40.],
             [ 0.,  0.],
             [ 6., 60.]], dtype=float32)

    References:
      `torch.nn.EmbeddingBag`; `tf.nn.embedding_lookup_sparse` for sqrtn.
    """
    mode = _check.choice("embax.embedding_bag(mode=...)", mode, Mode)
    if not jnp.issubdtype(table.dtype, jnp.inexact):
        raise TypeError(f"`embax.embedding_bag(table=...)` must be of a float dtype, got {table.dtype}. Cast it.")
    layout, ids = layout_of("embax.embedding_bag(bags=...)", table, bags)
    weights = prepared_weights("embax.embedding_bag(weights=...)", weights, ids.shape, table, mode)
    return pool(table, ids, layout, weights, mode).astype(table.dtype)


def pool(
    table: Table, ids: _ids.Ids, layout: BagLayout, weights: Float[Array, "*batch"] | None, mode: Mode
) -> Shaped[Array, "*bags_dim"]:
    """`embedding_bag` of ids that `_ids.prepare` has checked.

    Args:
      table: The table.
      ids: The ids, flat or `(*bags, length)`.
      layout: Which ids belong to which bag.
      weights: A factor for each id, in the dtype of sums, or None.
      mode: How rows are pooled.

    Returns:
      One vector for each bag.
    """
    return _pool(table, ids, layout.offsets, weights, layout.shape, mode)


@functools.partial(jax.jit, static_argnames=("shape", "mode"), inline=True)  # one program for an eager call
def _pool(
    table: Table,
    ids: _ids.Ids,
    offsets: Int32[Array, " bags_and_1"] | None,
    weights: Float[Array, "*batch"] | None,
    shape: tuple[int, ...],
    mode: Mode,
) -> Shaped[Array, "*bags_dim"]:
    layout = BagLayout(shape, offsets)
    resolved = _ids.resolve(ids, table.rows, table.out_of_range)
    counted = is_used(layout, ids)
    # Unused places of a Ragged get the sentinel, so that `scale_grad_by_freq` does not count them as some row.
    resolved = jnp.where(counted, resolved, table.rows)
    counted = counted & ~_ids.is_padding(resolved, table.padding_idx)
    return divided(pool_rows(table, resolved, counted, weights, layout, mode), counted, weights, layout, mode)


class Read(NamedTuple):
    """The result of `read_bags`, with the ids that were read, so that a layer can store clipped rows."""

    pooled: Shaped[Array, "*bags_dim"]
    layout: BagLayout
    ids: _ids.Ids

    def named(self, table: Table) -> Int[Array, "*batch"]:
        """The row numbers of ids in bags; the sentinel `rows` for unused places."""
        named = _ids.resolve(self.ids, table.rows, table.out_of_range)
        return jnp.where(is_used(self.layout, self.ids), named, table.rows)


def read_bags(
    call: str,
    table: Table,
    input: Any,
    offsets: Any,
    per_sample_weights: Any,
    mode: Mode,
    include_last_offset: bool,
    dtype: DTypeLike | None = None,
) -> Read:
    """Read bags given as the arguments of `torch.nn.EmbeddingBag`.

    Args:
      call: The call, for error messages.
      table: The table.
      input: Ids of the shape `(*bags, length)`, or a Ragged; with offsets, `(ids,)`.
      offsets: Where each bag starts, `(bags,)`, or one more with `include_last_offset`; or None.
      per_sample_weights: A factor for each id, or None.
      mode: How rows are pooled.
      include_last_offset: Whether the last offset is the end of the last bag.
      dtype: The dtype of the output. Default: the table's.

    Returns:
      One vector for each bag, with the layout and the ids.

    Raises:
      TypeError: As `embedding_bag`, and for a Ragged with offsets.
      ValueError: As `embedding_bag` and `Ragged`.
      IndexError: As `embedding_bag`.
    """
    if offsets is not None:
        if isinstance(input, Ragged):
            raise TypeError(f"`{call}(offsets=...)` must be None for a Ragged, got {offsets!r}. It has its own.")
        input = Ragged.from_offsets(input, offsets, include_last_offset)
    if not jnp.issubdtype(table.dtype, jnp.inexact):
        raise TypeError(f"`{call}` must have a table of a float dtype, got {table.dtype}. Cast its weight.")
    layout, ids = layout_of(f"{call}(input=...)", table, input)
    weights = prepared_weights(f"{call}(per_sample_weights=...)", per_sample_weights, ids.shape, table, mode)
    return Read(pool(table, ids, layout, weights, mode).astype(dtype or table.dtype), layout, ids)


def layout_of(argument: str, table: Table, bags: Any) -> tuple[BagLayout, _ids.Ids]:
    """Check bags, and split them into layout and ids.

    Args:
      argument: The call and its argument, for error messages.
      table: The table to be read.
      bags: A Ragged, or ids of the shape `(*bags, length)`.

    Returns:
      The layout and the ids.

    Raises:
      TypeError: As `_ids.prepare`.
      ValueError: As `_ids.prepare`, and for a scalar.
      IndexError: As `_ids.prepare`.
    """
    if isinstance(bags, Ragged):
        # Only ids in bags are checked; with traced offsets, it is unknown which these are.
        used = 0 if isinstance(bags.offsets, Tracer) else bags.used
        return BagLayout((bags.bags,), bags.offsets), _ids.prepare(argument, bags.values, table, used=used)
    ids = _ids.prepare(argument, bags, table)
    if ids.ndim == 0:
        raise ValueError(f"`{argument}` must have an axis of ids, got a scalar. Pass (*bags, length), or a Ragged.")
    return BagLayout(ids.shape[:-1], None), ids


def prepared_weights(
    argument: str, weights: Any, shape: tuple[int, ...], table: Table, mode: Mode
) -> Float[Array, "*batch"] | None:
    """Check the weights of ids.

    Args:
      argument: The call and its argument, for error messages.
      weights: The caller's weights.
      shape: The shape of the ids.
      table: The table that is read.
      mode: How its rows are pooled.

    Returns:
      The weights in the dtype of sums, or None.

    Raises:
      TypeError: If they are not of a floating-point dtype, or the mode is `"max"`.
      ValueError: If their shape differs from the ids'.
    """
    if weights is None:
        return None
    if mode == "max":
        raise TypeError(f"`{argument}` must be None in mode 'max', got weights. Leave them out.")
    try:
        weights = as_jax(weights)
    except (ValueError, TypeError):
        if not isinstance(weights, list | tuple):
            raise
        raise ValueError(
            f"`{argument}` must be one for each id, got lists of different lengths. For an embax.Ragged, pass them in "
            "one list, as its values."
        ) from None
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"`{argument}` must be of a float dtype, got {weights.dtype}. Cast them.")
    if weights.shape != shape:
        raise ValueError(f"`{argument}` must be one for each id, {shape}, got shape {weights.shape}. Broadcast them.")
    return weights.astype(accumulator(table.dtype))
