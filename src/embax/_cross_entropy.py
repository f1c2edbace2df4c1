"""softmax_cross_entropy: the loss of a head over all rows of a table, without the logits of all rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from . import _check, _ids
from ._attend import checked_vectors, common_dtype, trained_whole
from ._dedupe import accumulator
from ._layouts import varying_alike, with_auto_axes, zeros_as
from ._lookup import clipped_rows
from ._placed_heads import Block, OwnRows, Tokens, on_owners
from ._row_blocks import over_blocks
from ._table import Table, with_weight

# Numbers in a block of logits, 2 MB of float32, and in the rows of one: a block stays in the second-level cache from
# the product to the exponentials and on to the next product. See benchmarks/heads.py; a quarter of it or four times
# as much makes a difference of less than a tenth.
_BLOCK = 2**19
_LEAST_ROWS = 128  # of many tokens, lest a product be too thin to be fast


def softmax_cross_entropy(
    table: Table, x: Any, labels: Any, *, chunk: int | None = None, mask_padding: bool = False
) -> Float[Array, "*batch"]:
    """Return the cross-entropy of each label under the softmax over all rows: the loss of a language model's head.

    `loss[b] = log(sum_r exp(logits[b, r])) - logits[b, labels[b]]`, with the logits of `attend`

    The logits are never held: they are computed for one block of rows after the other, in the backward pass again.
    Temporary memory follows the tokens and the block, not the rows; time is near that of the plain way. The gradient of
    the table is of all rows, and `embax.value_and_grad` treats it as that of `attend`, as it does the table's rules.

    Of a table on a mesh, each device goes through its own rows in blocks, for the vectors of all devices with other
    rows, and only what there is of a token is summed over these: largest logits, normalisers, and the gradient of `x`.
    So a batch is best split over other mesh axes than the table, or over all; it is gathered over the table's.

    Works under `jit`, `vmap`, `scan`, `checkpoint`, `grad` and what is forward over reverse, `jax.hessian` among it. It
    has no forward-mode derivative of its own, so that `jax.jvp` and `jax.jacfwd` are refused: for those, take the
    logits of `attend`.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      labels: The right row of each vector, `(*batch)`, by the rules of `lookup` for ids. Where a traced one has no row,
        the loss is NaN, and neither the table nor `x` has a gradient of it; by `out_of_range="zero"` its logit is 0.
      chunk: The rows of a block, 1 or more; on a mesh, those that a device multiplies at once. Default: by the number
        of tokens, so that a block fits a processor's cache.
      mask_padding: Whether padding rows are left out, as rows that are never predicted and as labels: a token that has
        one for its label has the loss 0, and no gradient.

    Returns:
      The losses in nats, `(*batch)`, in float32 or wider.

    Raises:
      TypeError: If the table or `x` is not of a floating-point dtype, or the labels not of an integer one.
      ValueError: If the trailing axes of `x` are not those of a row, the others not those of the labels, or `chunk` is
        less than 1.
      IndexError: If a concrete label has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]), padding_idx=0)
      >>> embax.softmax_cross_entropy(table, [[1.0, 1.0], [1.0, 1.0]], [2, 0], mask_padding=True).round(4)
      Array([0.0181, 0.    ], dtype=float32)

    References:
      Wijmans et al., Cut your losses in large-vocabulary language models, 2024, https://arxiv.org/abs/2411.09009.
      Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, https://arxiv.org/abs/1805.02867.
    """
    x, labels = checked_batch("embax.softmax_cross_entropy", table, x, labels)
    mask_padding = _check.flag("embax.softmax_cross_entropy(mask_padding=...)", mask_padding)
    chunk = _rows_of_block(chunk, labels.size, table)
    # The padding row's gradient is left out block by block instead.
    weight = trained_whole(dataclasses.replace(table, padding_idx=None))
    if table.placement is None:
        weight, x, labels = varying_alike(_ids.on_every_device(weight), x, labels)
    return _jitted(chunk, mask_padding, with_weight(table, None), weight, x, labels)


def checked_batch(call: str, table: Table, x: Any, labels: Any) -> tuple[Array, Int[Array, "*batch"]]:
    """Check vectors and the label of each.

    Args:
      call: The call for the messages.
      table: The table whose rows the labels name.
      x: What the caller gave as vectors.
      labels: What the caller gave as labels.

    Returns:
      Both as arrays; row numbers as `_ids.resolve` gives them.

    Raises:
      TypeError: If the table or the vectors are not of a floating-point dtype, or the labels not of an integer one.
      ValueError: If the shapes do not fit.
      IndexError: If a concrete label has no row and `table.out_of_range` is `"error"`.
    """
    x = checked_vectors(call, table, x)
    labels = _ids.prepare(f"{call}(labels=...)", labels, table)
    batch = x.shape[: x.ndim - len(table.dim)]
    if labels.shape != batch:
        raise ValueError(
            f"`{call}(labels=...)` must be one a vector, of the shape {batch}, got {labels.shape}. "
            "Give each vector its label."
        )
    return x, _ids.resolve(labels, table.rows, table.out_of_range)


def _rows_of_block(chunk: int | None, tokens: int, table: Table) -> int:
    rows = table.rows
    if table.placement is not None:  # those of a device
        tokens = -(-tokens // table.placement.copies)
        rows = -(-table.placement.block // table.placement.column_shards)
    if chunk is None:
        width = max(tokens, int(np.prod(table.dim)), 1)
        chunk = max(_BLOCK // width, _LEAST_ROWS)
    chunk = _check.integer("embax.softmax_cross_entropy(chunk=...)", chunk)
    if chunk < 1:
        raise ValueError(
            f"`embax.softmax_cross_entropy(chunk=...)` must be at least 1, got {chunk}. Pass the rows of a block."
        )
    return max(min(chunk, rows), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(chunk: int, mask_padding: bool, rules: Table, weight: Array, x: Array, labels: Array) -> Array:
    return _losses_fwd(chunk, mask_padding, rules, weight, x, labels)[0]


# Inlined, and compiled once for calls without jit.
_jitted = jax.jit(_losses, static_argnums=(0, 1), inline=True)


def _losses_fwd(chunk: int, mask_padding: bool, *args: Any) -> tuple[Array, Any]:
    rules, weight, x, labels = args
    forward = functools.partial(_forward, chunk, mask_padding, rules)
    if rules.placement is None:
        of_token = PartitionSpec(*jax.typeof(x).sharding.spec[: labels.ndim])
        of_tokens = with_auto_axes(forward, (of_token,) * 3, (weight, x, labels))
    else:
        tokens = Tokens(rules.placement, labels.shape)
        given = tokens.laid_out(x), tokens.laid_out(labels, rules.placement.rows)
        of_tokens = on_owners(tokens, forward, (tokens.spec,) * 3, weight, *given)
        of_tokens = tuple(tokens.restored(values, x) for values in of_tokens)
    loss, *normalizer = of_tokens
    return loss, (*args, *normalizer)


def _losses_bwd(chunk: int, mask_padding: bool, saved: Any, cotangent: Array) -> tuple[None, Array, Array, None]:
    rules, weight, x, labels, *of_tokens = (*saved, cotangent)
    backward = functools.partial(_backward, chunk, mask_padding, rules)
    if rules.placement is None:
        specs = jax.typeof(weight).sharding.spec, jax.typeof(x).sharding.spec
        of_weight, of_x = with_auto_axes(backward, specs, (weight, x, labels, *of_tokens))
        return None, of_weight, of_x.astype(x.dtype), None
    tokens = Tokens(rules.placement, labels.shape)

    def local(*args: Array) -> tuple[Array, Array]:
        of_weight, of_x = backward(*args)
        return of_weight, tokens.summed(of_x).astype(x.dtype)

    given = tokens.laid_out(x), tokens.laid_out(labels, rules.placement.rows), *map(tokens.laid_out, of_tokens)
    specs = rules.placement.spec(weight.shape, weight.shape[1:]), tokens.parted_spec
    of_weight, of_x = on_owners(tokens, local, specs, weight, *given)
    return None, of_weight, tokens.restored(of_x, x), None


_losses.defvjp(_losses_fwd, _losses_bwd)


def _forward(
    chunk: int, mask_padding: bool, rules: Table, weight: Array, x: Array, labels: Array
) -> tuple[Array, Array, Array]:
    """Return the losses, the largest logits `m` and the normalisers `sum_r exp(logits[r] - m)`, `(*batch)` each.

    These are two, since of large logits `m + log(sum)` would lose the logarithm's digits.
    """
    own, wide = OwnRows.of(rules, weight), accumulator(common_dtype(with_weight(rules, weight), x))
    logits_of, places = _logits_of(mask_padding, rules, weight, x), own.places(labels)

    def step(start: Any, size: int, carry: Any) -> Any:
        largest, total, of_label = carry
        block = own.read(weight, start, size)
        logits = logits_of(block)[1]
        # Any number of the size of the logits would do in place of the largest, so it has no derivative.
        higher = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        # Where all rows so far are masked, nothing is subtracted: infinity less itself is NaN.
        finite = _finite(higher)
        total = total * jnp.exp(largest - finite) + jnp.sum(jnp.exp(logits - finite[..., None]), axis=-1)
        place, last = places - block.first, logits.shape[-1] - 1
        picked = jnp.take_along_axis(logits, jnp.clip(place, 0, last)[..., None], axis=-1, mode="clip")[..., 0]
        return higher, total, jnp.where((place >= 0) & (place <= last), picked, of_label)

    zeros = zeros_as(x, labels.shape, wide)
    carry = over_blocks(step, weight.shape[0], chunk * own.parts, (zeros - np.inf, zeros, zeros))
    largest, total, of_label = _of_all_owners(own, *carry)
    loss = largest - of_label + jnp.log(total)
    loss = jnp.where(_is_row(rules, own.rows, labels), loss, np.nan)
    if mask_padding:
        loss = jnp.where(_ids.is_padding(labels, rules.padding_idx), 0, loss)
    return loss, largest, total


def _of_all_owners(own: OwnRows, largest: Array, total: Array, of_label: Array) -> tuple[Array, Array, Array]:
    """Join what the devices that have other rows have found of the same tokens; only one of them has the label."""
    highest = own.highest(largest)
    return highest, own.summed(total * jnp.exp(largest - _finite(highest))), own.summed(of_label)


def _backward(
    chunk: int, mask_padding: bool, rules: Table, weight: Array, x: Array, labels: Array, *of_tokens: Array
) -> tuple[Array, Array]:
    """Return the gradients of the weight, and of `x` by the rows that are here, which is wide."""
    largest, total, g = of_tokens
    own = OwnRows.of(rules, weight)
    counted = _is_row(rules, own.rows, labels)
    if mask_padding:
        counted &= ~_ids.is_padding(labels, rules.padding_idx)
    # By selection, also of the vectors: 0 * NaN is NaN.
    batch = tuple(range(labels.ndim))
    vectors = jnp.where(jnp.expand_dims(counted, tuple(range(labels.ndim, x.ndim))), x, 0)
    largest, g = jnp.where(counted, _finite(largest), 0), jnp.where(counted, g, 0)
    of_normalizer = g / jnp.where(counted & (total != 0), total, 1)
    logits_of, places, wide = _logits_of(mask_padding, rules, weight, vectors), own.places(labels), g.dtype

    def step(start: Any, size: int, carry: Any) -> Any:
        of_weight, of_x = carry
        block = own.read(weight, start, size)
        rows, logits = logits_of(block)
        here = (
            over_last(jnp.arange(rows.shape[0], dtype=labels.dtype), logits.ndim) == (places - block.first)[..., None]
        )
        error = jnp.exp(logits - largest[..., None]) * of_normalizer[..., None] - jnp.where(here, g[..., None], 0)
        of_x += _dot(error, rows.astype(wide), (labels.ndim,), (0,), wide)
        of_rows = own.summed_over_copies(_dot(error, vectors.astype(wide), batch, batch, wide))
        if rules.padding_idx is not None or own.filled_up:
            left_out = _ids.is_padding(block.ids, rules.padding_idx) | ~own.exist(block.ids)
            of_rows = jnp.where(jnp.expand_dims(left_out, tuple(range(1, of_rows.ndim))), 0, of_rows)
        return own.write(of_weight, of_rows.astype(weight.dtype), start, size), of_x

    start = zeros_as(x, weight.shape, weight.dtype), zeros_as(x, x.shape, wide)
    return over_blocks(step, weight.shape[0], chunk * own.parts, start)


def _logits_of(
    mask_padding: bool, rules: Table, weight: Float[Array, "stored *part"], x: Float[Array, "*batch_dim"]
) -> Callable[[Block], tuple[Float[Array, "block *dim"], Float[Array, "*batch block"]]]:
    """Make the function that gives the rows of a block as they are read, and their logits."""
    own, common = OwnRows.of(rules, weight), common_dtype(with_weight(rules, weight), x)
    vectors, wide = x.astype(common), accumulator(common)
    axes = tuple(range(x.ndim - weight.ndim + 1, x.ndim)), tuple(range(1, weight.ndim))
    masked = rules.padding_idx if mask_padding else None

    def logits_of(block: Block) -> tuple[Array, Array]:
        rows = clipped_rows(rules, block.ids, block.rows).astype(common)
        logits = _dot(vectors, rows, *axes, wide)
        if masked is not None or own.filled_up:
            left_out = _ids.is_padding(block.ids, masked) | ~own.exist(block.ids)
            logits = jnp.where(over_last(left_out, logits.ndim), -np.inf, logits)
        return rows, logits

    return logits_of


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...], dtype: np.dtype) -> Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=dtype)


def _finite(largest: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.where(largest == -np.inf, 0, largest)


def over_last(values: Shaped[Array, " last"], ndim: int) -> Shaped[Array, "*ones last"]:
    """Give values of the last axis leading ones of size 1."""
    return jnp.expand_dims(values, tuple(range(ndim - 1)))


def _is_row(rules: Table, rows: int, labels: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Tell the labels of which there is a loss."""
    return (labels >= 0) & (labels < rows) | (rules.out_of_range == "zero")
