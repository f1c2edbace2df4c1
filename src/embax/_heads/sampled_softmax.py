"""sampled_softmax: the loss of a head over a few rows of a table, drawn at random.

A softmax over the label and some random candidates would favour rows that are rarely drawn, so each logit is reduced by
the logarithm of the chance `q` that its row is a candidate. For instance, 64 draws from 100,000 rows by Zipf's law:

    row 0         P = 0.0602     q = 1 - (1 - P)^64 = 0.981    its logit grows by -log(q) = 0.02
    row 99,999    P = 8.7e-07    q = 5.6e-05                   its logit grows by 9.8

A row that was drawn several times counts once, since `q` is the chance to be drawn at all.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Bool, Float, Int, Key
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.distinct import accumulator
from .._core import ids as _ids
from .._core.lookup import read
from .._core.table import Table
from . import candidates as _candidates
from . import labels as _labels
from .attend import common_dtype
from .candidates import Candidates
from .cross_entropy import over_last
from .labels import NOT_COUNTED, Reduction


def sampled_softmax(
    table: Table,
    x: ArrayLike,
    labels: ArrayLike,
    key: Key[Array, ""],
    *,
    samples: int,
    candidates: Candidates = "log_uniform",
    remove_accidental_hits: bool = True,
    ignore_index: int | None = -100,
    z_loss: float = 0.0,
    reduction: Reduction = "none",
) -> Float[Array, "..."]:
    """Return the cross-entropy of each label among rows drawn at random: a training loss for tables of very many rows.

    `loss[b] = log(exp(s_label) + sum_c exp(s_c)) - s_label`, with `s_r = sum_d x[b, d] * row[r, d] - log(q_r)` and
    `q_r = 1 - (1 - P(r)) ** samples`, the chance that `r` is among the candidates `c`

    The candidates are drawn with replacement and shared by all vectors of a call; each counts once, however often it
    was drawn. With more samples, loss and gradient approach those of `softmax_cross_entropy` with `mask_padding`, which
    is the loss to evaluate a model by. Rows are read by `lookup`, so the gradient of the table has only the rows of
    labels and candidates. Memory follows the smaller of `samples` and the rows, time follows `samples`.

    Padding rows are never predicted: they do not count as candidates. A token does not count if its label is a padding
    row or `ignore_index`: its loss is 0, and it adds nothing to any gradient, even if its vector is NaN.

    There is no `label_smoothing`, which needs the logits of all rows.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      labels: The right row of each vector, `(*batch)`, of any integer dtype: a number in `[0, rows)` or `ignore_index`.
        Unlike ids of a lookup, negative labels do not count from the end. A traced label without a row has the loss NaN
        and no gradient; with `out_of_range="zero"` its logit is 0, and with `"clip"` the nearest row is the label.
      key: A JAX random key, a new one for each step.
      samples: The number of rows to draw, 1 or more.
      candidates: The distribution. `"log_uniform"`: Zipf's law, for rows in falling order of frequency,
        `P(r) = log((r + 2) / (r + 1)) / log(rows + 1)`. `"uniform"`: all rows alike. A `Unigram`: given counts; a label
        that it never draws is not corrected, so that `q_r = 1`.
      remove_accidental_hits: Whether a candidate is left out for vectors whose label it is.
      ignore_index: The label of tokens that do not count. None: there is no such label. Default: torch's.
      z_loss: The weight of `log(exp(s_label) + sum_c exp(s_c)) ** 2`, which is added to the loss of each token, 0 or
        more.
      reduction: `"none"`: one loss for each token. `"sum"`: the sum of the losses. `"mean"`: the sum divided by the
        number of tokens that count. If no token counts, the mean is 0 and has no gradient; torch returns NaN.

    Returns:
      The losses in nats, `(*batch)` or one number by `reduction`, in float32 or wider.

    Raises:
      TypeError: If an argument is of the wrong type or dtype.
      ValueError: If `x` does not end with the axes of a row, its other axes differ from the labels', `samples` is less
        than 1, `candidates` is unknown or of another number of rows, `z_loss` is negative, or `reduction` is unknown.
      IndexError: If a concrete label that counts has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax
      >>> table = embax.Table.create(jax.random.key(0), rows=100_000, dim=8)
      >>> x = jax.random.normal(jax.random.key(1), (4, 8))
      >>> def loss(table):
      ...     return embax.sampled_softmax(table, x, [3, 1, 4, 1], jax.random.key(2), samples=64).mean()
      ...
      >>> jax.jit(embax.grad(loss))(table)
      RowGrad(68 ids of 100000 rows, float32[68,8])

    References:
      Bengio and Senecal, Adaptive importance sampling to accelerate training of a neural probabilistic language model,
      2008, https://doi.org/10.1109/TNN.2007.912312.
      Jean et al., On using very large target vocabulary for neural machine translation, 2015,
      https://arxiv.org/abs/1412.2007, equation 8.
    """
    call = "embax.sampled_softmax"
    x, labels = _labels.checked_batch(call, table, x, labels, ignore_index, mask_padding=True)
    labels = _laid_out_as(x, labels)
    candidates = _candidates.checked_candidates(f"{call}(candidates=...)", candidates, table.rows)
    samples = _check.integer(f"{call}(samples=...)", samples)
    if samples < 1:
        raise ValueError(f"`{call}(samples=...)` must be at least 1, got {samples}. Pass how many rows to draw.")
    remove_hits = _check.flag(f"{call}(remove_accidental_hits=...)", remove_accidental_hits)
    z_loss = _check.not_negative(f"{call}(z_loss=...)", z_loss)
    reduction = _check.choice(f"{call}(reduction=...)", reduction, Reduction)
    drawn, is_first = _candidates.draw_distinct(key, candidates, samples, table.rows)
    wide = accumulator(common_dtype(table, x))
    if table.out_of_range == "clip":  # labels are clipped already, but the sentinel must not be
        table = dataclasses.replace(table, out_of_range="nan")
    counted = _labels.have_loss(table, table.rows, labels)
    # Tokens that do not count are replaced, so that the gradient selects, too: 0 * NaN is NaN.
    vectors = jnp.where(jnp.expand_dims(counted, tuple(range(labels.ndim, x.ndim))), x, jnp.zeros((), x.dtype))
    vectors, named = vectors.astype(wide), labels != NOT_COUNTED
    of_label = _products(vectors, read(table, jnp.where(named, labels, table.rows), wide, named), labels.ndim)
    of_label = jnp.where(counted, of_label - _log_chance(candidates, labels, samples, table.rows).astype(wide), 0)
    dim = tuple(range(labels.ndim, x.ndim)), tuple(range(1, 1 + len(table.dim)))
    others = jax.lax.dot_general(vectors, read(table, drawn, wide), (dim, ((), ())))
    others -= over_last(_log_chance(candidates, drawn, samples, table.rows).astype(wide), others.ndim)
    others = jnp.where(_left_out(table, labels, drawn, is_first, remove_hits), -np.inf, others)
    loss = _labels.masked(table, table.rows, labels, _cross_entropy(of_label, others, z_loss))
    return _labels.reduced(loss, labels, reduction)


def _laid_out_as(x: Float[Array, "*batch_dim"], labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """Shard labels as their vectors on explicit axes, where JAX combines only arrays of equal sharding."""
    sharding = _ids.explicit_sharding(x)
    if sharding is None:
        return labels
    return reshard(labels, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: labels.ndim])))


def _products(vectors: Float[Array, "*batch_dim"], rows: Float[Array, "*batch_dim"], batch: int) -> Array:
    return jnp.sum(vectors * rows, axis=tuple(range(batch, rows.ndim)))


def _cross_entropy(
    of_label: Float[Array, "*batch"], others: Float[Array, "*batch samples"], z_loss: float
) -> Float[Array, "*batch"]:
    """Return the cross-entropy of the label's logit among all logits, plus the z-loss."""
    largest = jnp.maximum(of_label, jnp.max(others, axis=-1, initial=-np.inf))
    largest = jax.lax.stop_gradient(largest)
    total = jnp.exp(of_label - largest) + jnp.sum(jnp.exp(others - largest[..., None]), axis=-1)
    loss = largest - of_label + jnp.log(total)
    return loss + z_loss * (largest + jnp.log(total)) ** 2 if z_loss else loss


def _left_out(
    table: Table,
    labels: Int[Array, "*batch"],
    drawn: Int[Array, " samples"],
    is_first: Bool[Array, " samples"],
    remove_hits: bool,
) -> Bool[Array, "*#batch #samples"]:
    """Which candidates do not count: padding rows, repeated draws and, for each vector, its own label."""
    of_all = _ids.is_padding(drawn, table.padding_idx) | ~is_first
    of_all = over_last(of_all, labels.ndim + 1)
    if not remove_hits:
        return of_all
    return of_all | (labels[..., None] == over_last(drawn, labels.ndim + 1).astype(labels.dtype))


def _log_chance(candidates: Candidates, ids: Int[Array, "*batch"], samples: int, rows: int) -> Float[Array, "*batch"]:
    """Return the logarithm of the chance that a row is among the candidates; 0 for a row that is never drawn."""
    chance = _candidates.probability(candidates, ids, rows)
    drawn = -jnp.expm1(float(samples) * jnp.log1p(-chance))
    return jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, drawn, 1)), 0)
