"""softmax_cross_entropy: the loss of a head over all rows of a table, without an array of all logits.

A loop over blocks of rows keeps, for each token, the largest logit `m` so far and the sum of `exp(logit - m)`. If a
block raises `m`, the sum is rescaled. For instance, the logits 1, 3, 2 and 5 in blocks of two:

    block 1 and 3    m = 3, sum = exp(-2) + 1 = 1.135
    block 2 and 5    m = 5, sum = 1.135 exp(-2) + exp(-3) + 1 = 1.203
    result           log-sum-exp = 5 + log(1.203) = 5.185

The backward pass computes each block's logits again. On a mesh, each owner loops over its own rows, and the owners join
their `m` and sums by the same rescaling.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.distinct import accumulator
from .._base.loops import zeros_as
from .._base.row_blocks import over_blocks
from .._base.tangents import with_tangent
from .._core import ids as _ids
from .._core.lookup import clipped_rows
from .._core.own_rows import Block, OwnRows
from .._core.table import PaddingRows, Table, with_weight
from . import labels as _labels
from .attend import common_dtype, trained_whole
from .labels import NOT_COUNTED, Reduction

# Logits of a block, 2 MB in float32, so that a block stays in the second-level cache from one product to the next. In
# benchmarks/heads.py, a quarter or four times as much changes the time by less than a tenth.
_BLOCK = 2**19
_LEAST_ROWS = 128  # with many tokens; a product with fewer rows is slow


class _Terms(NamedTuple):
    """The static arguments of the loss."""

    chunk: int
    mask_padding: bool
    label_smoothing: float
    z_loss: float


def softmax_cross_entropy(
    table: Table,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    chunk: int | None = None,
    mask_padding: bool = False,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "none",
) -> Float[Array, "..."]:
    """Return the cross-entropy of each label under the softmax over all rows: the loss of a language model's head.

    `loss[b] = log(sum_r exp(logits[b, r])) - logits[b, labels[b]]`, with the logits of `attend`

    A token does not count if its label is `ignore_index`, or if `mask_padding` is set and its label is a padding row.
    Its loss is 0, and it adds nothing to the gradients of the table and of `x`, even if its vector is NaN.

    The logits of all rows are never in memory: they are computed block by block, and again in the backward pass.
    Temporary memory follows the number of tokens and the block, not the rows; time is near that of the direct way. The
    gradient of the table is dense, and the table's rules apply, as in `attend`.

    If the table is sharded, each device goes through its own rows, for the tokens of all owners. Only values per token
    are summed over owners: largest logits, normalisers, and the gradient of `x`. A batch is gathered over the table's
    mesh axes, so it is best split over other axes, or over all.

    Works under `jit`, `vmap`, `scan`, `checkpoint`, `grad`, and forward over reverse, such as `jax.hessian`. There is
    no forward mode for the loss itself: `jax.jvp` and `jax.jacfwd` are refused. Use the logits of `attend` for these.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      labels: The right row of each vector, `(*batch)`, of any integer dtype: a number in `[0, rows)` or `ignore_index`.
        Unlike ids of a lookup, negative labels do not count from the end. A traced label without a row has the loss NaN
        and no gradient; with `out_of_range="zero"` its logit is 0, and with `"clip"` the nearest row is the label.
      chunk: The rows of a block, 1 or more; on a mesh, the rows that a device multiplies at once. Default: such that a
        block of logits fits a processor's cache.
      mask_padding: Whether padding rows are left out: they are never predicted, and a token whose label is one does not
        count.
      ignore_index: The label of tokens that do not count. None: there is no such label. Default: torch's.
      label_smoothing: The share of the target probability, from 0 to 1, that is spread evenly over all rows, as in
        torch; with `mask_padding`, over all rows except padding.
      z_loss: The weight of `log(sum_r exp(logits[b, r])) ** 2`, which is added to the loss of each token, 0 or more.
        PaLM was trained with 1e-4.
      reduction: `"none"`: one loss for each token. `"sum"`: the sum of the losses. `"mean"`: the sum divided by the
        number of tokens that count. If no token counts, the mean is 0 and has no gradient; torch returns NaN.

    Returns:
      The losses in nats, `(*batch)` or one number by `reduction`, in float32 or wider.

    Raises:
      TypeError: If the table or `x` is not of a floating-point dtype, the labels are not of an integer one, or an
        option is of the wrong type.
      ValueError: If `x` does not end with the axes of a row, its other axes differ from the labels', or an option is
        outside its range.
      IndexError: If a concrete label that counts has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]), padding_idx=0)
      >>> embax.softmax_cross_entropy(table, [[1.0, 1.0], [1.0, 1.0]], [2, 0], mask_padding=True).round(4)
      Array([0.0181, 0.    ], dtype=float32)
      >>> embax.softmax_cross_entropy(table, [[1.0, 1.0], [1.0, 1.0]], [2, -100], reduction="mean").round(4)
      Array(0.019, dtype=float32)

    References:
      Wijmans et al., Cut your losses in large-vocabulary language models, 2024, https://arxiv.org/abs/2411.09009.
      Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, https://arxiv.org/abs/1805.02867.
      Szegedy et al., Rethinking the Inception architecture for computer vision, 2016, https://arxiv.org/abs/1512.00567,
      section 7.
      Chowdhery et al., PaLM: scaling language modeling with pathways, 2022, https://arxiv.org/abs/2204.02311,
      section 5.
    """
    call = "embax.softmax_cross_entropy"
    mask_padding = _check.flag("embax.softmax_cross_entropy(mask_padding=...)", mask_padding)
    x, labels = _labels.checked_batch(call, table, x, labels, ignore_index, mask_padding)
    terms = _Terms(
        _rows_of_block(chunk, labels.size, table),
        mask_padding,
        _check.not_negative(f"{call}(label_smoothing=...)", label_smoothing, most=1),
        _check.not_negative(f"{call}(z_loss=...)", z_loss),
    )
    reduction = _check.choice(f"{call}(reduction=...)", reduction, Reduction)
    # The gradient of padding rows is zeroed block by block instead.
    weight = trained_whole(dataclasses.replace(table, padding_idx=None))
    weight, x, labels = table.storage.aligned(weight, x, labels)
    return _jitted(terms, reduction, with_weight(table, None), weight, x, labels)


def _rows_of_block(chunk: int | None, tokens: int, table: Table) -> int:
    tokens, rows = table.storage.of_device(tokens, table.rows)
    if chunk is None:
        width = max(tokens, int(np.prod(table.dim)), 1)
        chunk = max(_BLOCK // width, _LEAST_ROWS)
    chunk = _check.integer("embax.softmax_cross_entropy(chunk=...)", chunk)
    if chunk < 1:
        raise ValueError(
            f"`embax.softmax_cross_entropy(chunk=...)` must be at least 1, got {chunk}. Pass the rows of a block."
        )
    return max(min(chunk, rows), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(terms: _Terms, rules: Table, weight: Array, x: Array, labels: Array) -> Array:
    return _losses_fwd(terms, rules, weight, x, labels)[0]


def _reduced(terms: _Terms, reduction: Reduction, *args: PyTree) -> Array:
    return _labels.reduced(_losses(terms, *args), args[-1], reduction)


# Jitted, so that an eager call compiles one program.
_jitted = jax.jit(_reduced, static_argnums=(0, 1), inline=True)


def _losses_fwd(terms: _Terms, *args: PyTree) -> tuple[Array, tuple[PyTree, ...]]:
    rules, weight, *of_batch = args
    forward, batch = functools.partial(_forward, terms, rules), of_batch[1].ndim
    of_tokens = rules.storage.of_tokens(forward, weight, batch, of_batch, (0, NOT_COUNTED))
    loss, *normalizer = of_tokens
    return loss, (*args, *normalizer)


def _losses_bwd(terms: _Terms, saved: tuple[PyTree, ...], cotangent: Array) -> tuple[None, Array, Array, None]:
    rules, weight, x, labels, *of_tokens = (*saved, cotangent)
    backward, arrays = functools.partial(_backward, terms, rules), (x, labels, *of_tokens)
    fills = 0, NOT_COUNTED, *[0] * len(of_tokens)
    of_weight, of_x = rules.storage.of_rows_and_tokens(backward, weight, labels.ndim, arrays, fills)
    return None, of_weight, of_x, None


_losses.defvjp(_losses_fwd, _losses_bwd)


def _forward(terms: _Terms, rules: Table, weight: Array, x: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Return the losses, the largest logits `m` and the normalisers `sum_r exp(logits[r] - m)`, `(*batch)` each.

    `m` and the sum are kept apart: with large logits, `m + log(sum)` would lose digits of the logarithm.
    """
    own, wide = rules.storage.own_rows(weight.shape[0]), accumulator(common_dtype(with_weight(rules, weight), x))
    logits_of, places = _logits_of(terms.mask_padding, rules, weight, x), own.places(labels)
    of_label, of_all = _targets(terms, rules, own.rows)

    def step(start: Int[Array, ""], size: int, carry: PyTree) -> PyTree:
        largest, total, target, sum_of_rows = carry
        block = own.read(weight, start, size)
        rows, logits, left_out = logits_of(block)
        # The result does not depend on which number is subtracted, so the largest has no derivative.
        higher = jnp.maximum(largest, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        # If all rows so far are masked, 0 is subtracted instead of -inf: inf - inf is NaN.
        finite = _finite(higher)
        total = total * jnp.exp(largest - finite) + jnp.sum(jnp.exp(logits - finite[..., None]), axis=-1)
        place, last = places - block.first, logits.shape[-1] - 1
        picked = jnp.take_along_axis(logits, jnp.clip(place, 0, last)[..., None], axis=-1, mode="clip")[..., 0]
        target += jnp.where((place >= 0) & (place <= last), of_label * picked, 0)
        if of_all:  # the sum of all logits is the product with the sum of all rows
            missing = None if left_out is None else jnp.expand_dims(left_out, tuple(range(1, rows.ndim)))
            rows = rows.astype(wide)
            sum_of_rows += jnp.sum(rows if missing is None else jnp.where(missing, 0, rows), axis=0)
        return higher, total, target, sum_of_rows

    zeros, sum_of_rows = zeros_as(x, labels.shape, wide), zeros_as(x, x.shape[labels.ndim :] if of_all else (), wide)
    start = zeros - np.inf, zeros, zeros, sum_of_rows
    largest, total, target, sum_of_rows = over_blocks(step, weight.shape[0], terms.chunk * own.parts, start)
    if of_all:
        axes = tuple(range(labels.ndim, x.ndim)), tuple(range(sum_of_rows.ndim))
        target += of_all * _dot(x.astype(wide), sum_of_rows, *axes, wide)
    largest, total, target = _of_all_owners(own, largest, total, target)
    loss = largest - target + jnp.log(total)
    if terms.z_loss:
        loss += terms.z_loss * (largest + jnp.log(total)) ** 2
    return _labels.masked(rules, own.rows, labels, loss), largest, total


def _targets(terms: _Terms, rules: Table, rows: int) -> tuple[float, float]:
    """Return the target probability of the label, and the share that label smoothing gives to each predicted row."""
    predicted = rows - (len(_ids.padding_rows(rules.padding_idx)) if terms.mask_padding else 0)
    return 1 - terms.label_smoothing, terms.label_smoothing / max(predicted, 1)


def _of_all_owners(own: OwnRows, largest: Array, total: Array, target: Array) -> tuple[Array, Array, Array]:
    """Join the results of all owners for the same tokens. Only one owner has the label, the others' targets are 0."""
    highest = own.highest(largest)
    return highest, own.summed(total * jnp.exp(largest - _finite(highest))), own.summed(target)


def _backward(
    terms: _Terms, rules: Table, weight: Array, x: Array, labels: Array, *of_tokens: Array
) -> tuple[Array, Array]:
    """Return the gradients of this device's weight and, summed over this device's rows, of `x` (in a wide dtype)."""
    largest, total, g = of_tokens
    own = rules.storage.own_rows(weight.shape[0])
    counted = _labels.have_loss(rules, own.rows, labels)
    # Tokens that do not count are replaced, also their vectors: 0 * NaN is NaN.
    batch = tuple(range(labels.ndim))
    vectors = jnp.where(jnp.expand_dims(counted, tuple(range(labels.ndim, x.ndim))), x, jnp.zeros((), x.dtype))
    largest, g = jnp.where(counted, _finite(largest), 0), jnp.where(counted, g, 0)
    total = jnp.where(counted & (total != 0), total, 1)
    of_normalizer = g / total
    if terms.z_loss:
        of_normalizer *= 1 + 2 * terms.z_loss * (largest + jnp.log(total))
    logits_of, places, wide = _logits_of(terms.mask_padding, rules, weight, vectors), own.places(labels), g.dtype
    of_label, of_all = _targets(terms, rules, own.rows)

    def step(start: Int[Array, ""], size: int, carry: PyTree) -> PyTree:
        of_weight, of_x = carry
        block = own.read(weight, start, size)
        rows, logits, left_out = logits_of(block)
        here = (
            over_last(jnp.arange(rows.shape[0], dtype=labels.dtype), logits.ndim) == (places - block.first)[..., None]
        )
        error = jnp.exp(logits - largest[..., None]) * of_normalizer[..., None]
        error -= jnp.where(here, of_label * g[..., None], 0)
        if of_all:
            error -= _without(left_out, of_all * g[..., None])
        of_x += _dot(error, rows.astype(wide), (labels.ndim,), (0,), wide)
        of_rows = own.summed_over_replicas(_dot(error, vectors.astype(wide), batch, batch, wide))
        if rules.padding_idx is not None or own.filled_up:
            no_gradient = _ids.is_padding(block.ids, rules.padding_idx) | ~own.exist(block.ids)
            of_rows = jnp.where(jnp.expand_dims(no_gradient, tuple(range(1, of_rows.ndim))), 0, of_rows)
        return own.write(of_weight, of_rows.astype(weight.dtype), start, size), of_x

    start = zeros_as(x, weight.shape, weight.dtype), zeros_as(x, x.shape, wide)
    return over_blocks(step, weight.shape[0], terms.chunk * own.parts, start)


def _logits_of(
    mask_padding: bool, rules: Table, weight: Float[Array, "stored *part"], x: Float[Array, "*batch_dim"]
) -> Callable[[Block], tuple[Float[Array, "block *dim"], Float[Array, "*batch block"], Bool[Array, " block"] | None]]:
    """Make a function that returns a block's clipped rows, their logits, and which rows are not predicted, or None."""
    own, common = rules.storage.own_rows(weight.shape[0]), common_dtype(with_weight(rules, weight), x)
    vectors, wide = x.astype(common), accumulator(common)
    axes = tuple(range(x.ndim - weight.ndim + 1, x.ndim)), tuple(range(1, weight.ndim))
    masked = rules.padding_idx if mask_padding else None

    def logits_of(block: Block) -> tuple[Array, Array, Array | None]:
        rows = clipped_rows(rules, block.ids, _without_gradient_of_padding(rules, block)).astype(common)
        logits = _dot(vectors, rows, *axes, wide)
        if masked is None and not own.filled_up:
            return rows, logits, None
        left_out = _ids.is_padding(block.ids, masked) | ~own.exist(block.ids)
        return rows, jnp.where(over_last(left_out, logits.ndim), -np.inf, logits), left_out

    return logits_of


def _without_gradient_of_padding(rules: Table, block: Block) -> Float[Array, "block *dim"]:
    """Return the rows of a block; derivatives of any order are zero for padding rows."""
    if rules.padding_idx is None:
        return block.rows
    function = functools.partial(_zeros_for_padding, rules.padding_idx)
    return with_tangent(function, jax.lax.stop_gradient(block.rows), [block.rows], [block.ids])


def _zeros_for_padding(padding_idx: PaddingRows, rows: Float[Array, "block *dim"], ids: Int[Array, " block"]) -> Array:
    is_padding = jnp.expand_dims(_ids.is_padding(ids, padding_idx), tuple(range(1, rows.ndim)))
    return jnp.where(is_padding, jnp.zeros((), rows.dtype), rows)


def _without(left_out: Bool[Array, " block"] | None, values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replace values of rows that are not predicted by 0; the last axis has the rows, or size 1."""
    return values if left_out is None else jnp.where(over_last(left_out, values.ndim), 0, values)


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...], dtype: np.dtype) -> Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=dtype)


def _finite(largest: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    return jnp.where(largest == -np.inf, 0, largest)


def over_last(values: Shaped[Array, " last"], ndim: int) -> Shaped[Array, "*ones last"]:
    """Prepend axes of size 1, so that values broadcast along the last axis."""
    return jnp.expand_dims(values, tuple(range(ndim - 1)))
