"""sampled_softmax: the loss of a head over a few rows of a table, drawn at random."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Bool, Float, Int, Key

from . import _candidates, _check, _ids
from ._attend import common_dtype
from ._candidates import Candidates
from ._cross_entropy import checked_batch, over_last
from ._dedupe import accumulator
from ._lookup import lookup
from ._table import Table


def sampled_softmax(
    table: Table,
    x: Any,
    labels: Any,
    key: Key[Array, ""],
    *,
    samples: int,
    candidates: Candidates = "log_uniform",
    remove_accidental_hits: bool = True,
) -> Float[Array, "*batch"]:
    """Return the cross-entropy of each label among rows drawn at random: a loss for training over very many rows.

    `loss[b] = log(exp(s_label) + sum_c exp(s_c)) - s_label`, with `s_r = sum_d x[b, d] * row[r, d] - log(q_r)` and
    `q_r = 1 - (1 - P(r)) ** samples`, the chance that `r` is among the candidates `c`

    The candidates are drawn with replacement and shared by all vectors of a call; each counts once, however often it
    was drawn. The more samples, the nearer the loss and its gradient are to those of `softmax_cross_entropy` with
    `mask_padding`; to judge a model, use that. Rows are read by `lookup`, so that under `embax.value_and_grad` the
    gradient of the table holds the rows of labels and candidates. Memory follows the smaller of `samples` and the rows,
    time the samples.

    Padding rows are not predicted: a candidate that is one does not count, and a token that has one for its label has
    the loss 0, and no gradient.

    Args:
      table: The table, of a floating-point dtype.
      x: Vectors `(*batch, *dim)` of a floating-point dtype; the trailing axes are those of a row.
      labels: The right row of each vector, `(*batch)`, by the rules of `lookup` for ids. Where a traced one has no row,
        the loss is NaN, and nothing has a gradient of it; by `out_of_range="zero"` its logit is 0.
      key: A JAX random key, a new one each step.
      samples: How many rows are drawn, 1 or more.
      candidates: How they are drawn. `"log_uniform"`: by Zipf's law, for rows in falling order of frequency,
        `P(r) = log((r + 2) / (r + 1)) / log(rows + 1)`. `"uniform"`: all alike. A `Unigram`: by given counts; a label
        that it never draws is not corrected, so that `q_r = 1`.
      remove_accidental_hits: Whether a candidate does not count for vectors whose label it is.

    Returns:
      The losses in nats, `(*batch)`, in float32 or wider.

    Raises:
      TypeError: If an argument is of the wrong type or dtype.
      ValueError: If the trailing axes of `x` are not those of a row, the others not those of the labels, `samples` is
        less than 1, or `candidates` is unknown or of another number of rows.
      IndexError: If a concrete label has no row and `table.out_of_range` is `"error"`.

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
    x, labels = checked_batch(call, table, x, labels)
    labels = _laid_out_as(x, labels)
    candidates = _candidates.checked_candidates(f"{call}(candidates=...)", candidates, table.rows)
    samples = _check.integer(f"{call}(samples=...)", samples)
    if samples < 1:
        raise ValueError(f"`{call}(samples=...)` must be at least 1, got {samples}. Pass how many rows to draw.")
    remove_hits = _check.flag(f"{call}(remove_accidental_hits=...)", remove_accidental_hits)
    drawn, is_first = _candidates.draw_distinct(key, candidates, samples, table.rows)
    wide = accumulator(common_dtype(table, x))
    valid = (labels >= 0) & (labels < table.rows) | (table.out_of_range == "zero")
    counted = valid & ~_ids.is_padding(labels, table.padding_idx)
    # What does not count is left out by selection, here and in the gradient: 0 * NaN is NaN.
    vectors = jnp.where(jnp.expand_dims(counted, tuple(range(labels.ndim, x.ndim))), x, 0).astype(wide)
    of_label = _products(vectors, lookup(table, labels, wide), labels.ndim)
    of_label = jnp.where(counted, of_label - _log_chance(candidates, labels, samples, table.rows).astype(wide), 0)
    dim = tuple(range(labels.ndim, x.ndim)), tuple(range(1, 1 + len(table.dim)))
    others = jax.lax.dot_general(vectors, lookup(table, drawn, wide), (dim, ((), ())))
    others -= over_last(_log_chance(candidates, drawn, samples, table.rows).astype(wide), others.ndim)
    others = jnp.where(_left_out(table, labels, drawn, is_first, remove_hits), -np.inf, others)
    loss = jnp.where(counted, _cross_entropy(of_label, others), 0)
    return jnp.where(valid, loss, np.nan)


def _laid_out_as(x: Float[Array, "*batch_dim"], labels: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """Lay labels out as their vectors, where axes are explicit, which meet only if they are laid out alike."""
    sharding = _ids.explicit_sharding(x)
    if sharding is None:
        return labels
    return reshard(labels, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: labels.ndim])))


def _products(vectors: Float[Array, "*batch_dim"], rows: Float[Array, "*batch_dim"], batch: int) -> Array:
    return jnp.sum(vectors * rows, axis=tuple(range(batch, rows.ndim)))


def _cross_entropy(of_label: Float[Array, "*batch"], others: Float[Array, "*batch samples"]) -> Float[Array, "*batch"]:
    """Return the cross-entropy of the first of these logits."""
    largest = jnp.maximum(of_label, jnp.max(others, axis=-1, initial=-np.inf))
    largest = jax.lax.stop_gradient(largest)
    total = jnp.exp(of_label - largest) + jnp.sum(jnp.exp(others - largest[..., None]), axis=-1)
    return largest - of_label + jnp.log(total)


def _left_out(
    table: Table,
    labels: Int[Array, "*batch"],
    drawn: Int[Array, " samples"],
    is_first: Bool[Array, " samples"],
    remove_hits: bool,
) -> Bool[Array, "*batch samples"]:
    """Tell which candidates do not count: padding, all but one of equals, and labels."""
    of_all = _ids.is_padding(drawn, table.padding_idx) | ~is_first
    of_all = over_last(of_all, labels.ndim + 1)
    if not remove_hits:
        return of_all
    return of_all | (labels[..., None] == over_last(drawn, labels.ndim + 1).astype(labels.dtype))


def _log_chance(candidates: Candidates, ids: Int[Array, "*batch"], samples: int, rows: int) -> Float[Array, "*batch"]:
    """Return the logarithm of how likely each row is among the candidates; 0 where it never is."""
    chance = _candidates.probability(candidates, ids, rows)
    drawn = -jnp.expm1(float(samples) * jnp.log1p(-chance))
    return jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, drawn, 1)), 0)
