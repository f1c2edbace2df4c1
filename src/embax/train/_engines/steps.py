"""Steps of the XLA engine: the gradients of the pairs of some segments, and the update of the vectors of their words.

Skip-gram, for the segment "the king holds the crown" with a window of 2 and two noise words shared by the segment: five
input vectors `x`, and seven output vectors `t`, give a matrix of 5 x 7 products. A weight says how much each product
counts: 1 for neighbours, 1/2 for words two apart, 0 beyond; and for the noise words, `negative / 2` times the weight of
all pairs of a word. word2vec.c draws a width for each window instead, and noise for each pair; the expected weights are
the same. Pairs across the end of a segment are lost; the others of the same distance make up for them.

All products of a step use the same vectors, and the gradients of a row are summed. A frequent word would move too far:
if "the" occurs in 300 pairs, at a rate of 0.025 it would move by 300 x 0.025 = 7.5 times its mean gradient. The loss of
a row has a curvature of at most `sum w s (1 - s) |t|^2` along any direction, with `s` the logistic function of each
product and `w` its weight. So the rate of a row is at most 1 / that sum, the step at which Newton's method would stop.
Where the label of a product has a probability below 1/4, its curvature counts more, see `_LEAST`: without that, few
words that share sub-words diverge at a rate of 0.1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from ..._heads.candidates import draw_pieces
from .engine import Model

# Keeps the logarithm of a loss finite.
_TINY = np.float32(1e-30)
# The curvature `s (1 - s)` of a product whose label is improbable is nearly 0, but it grows along a long move. So its
# curvature counts as at least a quarter of the probability of the other label: in the limit 1/4, the largest value of
# `s (1 - s)`.
_LEAST = np.float32(0.25)
# The most noise words of a segment, unless it has more words. With more negatives, each of them weighs more.
_MOST_NOISE = 256
# The least words of a segment.
_SHORTEST = 16


class Plan(NamedTuple):
    """The static options of a step."""

    model: Model
    window: int
    negative: int
    length: int  # words of a segment
    noise: int  # noise words of a segment
    longest: int = 0  # the most pieces of a word; 0 without sub-words
    width: int = 0  # pieces that are handled together, see `_pool`


class Drawn(NamedTuple):
    """The words of some segments, and the random numbers drawn for them."""

    tokens: Int32[Array, "*steps segments length"]  # row numbers; the number of rows is padding
    sequences: Int32[Array, "*steps segments length"]  # equal for words of one sequence; other numbers for padding
    noise: Int32[Array, "*steps segments noise"]
    widths: Int32[Array, "*steps segments length"] | None  # of the windows of a CBOW


class Terms(NamedTuple):
    """The gradients of some segments, as functions of the rates of their rows, and the curvature for each row."""

    of_inputs: Callable[[Array | None], Array]  # (segments, length, dim)
    of_outputs: Callable[[Array | None], Array]  # (segments, length + noise, dim)
    curvatures: tuple[Float32[Array, "segments length"], Float32[Array, "segments targets"]]
    loss: Float32[Array, "2"]  # summed over pairs, and the number of pairs


def plan_of(model: Model, window: int, negative: int) -> Plan:
    """Choose the length of segments and the number of their noise words.

    A skip-gram pair at the largest distance, `window`, survives the cuts with a chance of at least 2/3. A window of
    CBOW that is cut loses words, so its segments are longer.
    """
    needed = 3 * window + 1 if model == "skipgram" else 8 * window
    length = max(_SHORTEST, -(-needed // 8) * 8)
    return Plan(model, window, negative, length, max(length, min(negative, _MOST_NOISE)))


def draw(
    plan: Plan, key: Key[Array, ""], ends: UInt32[Array, " rows"], tokens: Int32[Array, "*steps segments length"]
) -> Drawn:
    """Decode the segments of a call, and draw the noise of all its steps at once."""
    rows = ends.shape[0]
    begins, is_word = tokens < 0, tokens != rows
    ids = jnp.where(begins, ~tokens, tokens)
    apart = -1 - np.arange(plan.length, dtype=np.int32)  # padding is in no sequence, not even with other padding
    sequences = jnp.cumsum(begins.astype(jnp.int32), axis=-1)
    sequences = jnp.where(is_word, sequences, np.expand_dims(apart, tuple(range(tokens.ndim - 1))))
    key_noise, key_widths = jax.random.split(key)
    noise = draw_pieces(key_noise, ends, (*tokens.shape[:-1], plan.noise))
    widths = None
    if plan.model == "cbow":
        widths = jax.random.randint(key_widths, tokens.shape, 1, plan.window + 1, jnp.int32)
    return Drawn(ids, sequences, noise, widths)


def terms(
    plan: Plan, x: Float32[Array, "segments length dim"], t: Float32[Array, "segments targets dim"], drawn: Drawn
) -> Terms:
    """The gradients of some segments.

    Args:
      plan: The options.
      x: The input vectors of the words.
      t: The output vectors of the words, and of the noise words behind them.
      drawn: The segments.

    Returns:
      The gradients.
    """
    same = drawn.sequences[:, :, None] == drawn.sequences[:, None, :]
    if drawn.widths is None:
        return _skipgram(plan, x, t, same)
    return _cbow(plan, x, t, same, drawn.widths)


def _skipgram(plan: Plan, x: Array, t: Array, same: Bool[Array, "segments length length"]) -> Terms:
    # Axes: s segments, j and i words as input and as output, t outputs with noise, d dim.
    near = jnp.where(same, _band(plan)[None], np.float32(0))
    pairs = jnp.sum(near, axis=2)
    of_noise = jnp.broadcast_to(
        (pairs * np.float32(plan.negative / plan.noise))[:, :, None], (*x.shape[:2], plan.noise)
    )
    weight = jnp.concatenate([near, of_noise], axis=2)
    sign = np.where(np.arange(t.shape[1]) < plan.length, 1, -1).astype(np.float32)[None, None]
    products = jnp.einsum("sjd,std->sjt", x, t)
    wrong = 1 / (1 + jnp.exp(sign * products))  # how far the probability of each label is from 1
    pull = weight * wrong
    bend = pull * jnp.maximum(1 - wrong, _LEAST)
    pull = pull * sign
    curvatures = (
        jnp.einsum("sjt,st->sj", bend, jnp.sum(t * t, axis=2)),
        jnp.einsum("sjt,sj->st", bend, jnp.sum(x * x, axis=2)),
    )
    loss = jnp.stack([-jnp.sum(weight * jnp.log(jnp.maximum(1 - wrong, _TINY))), jnp.sum(pairs)])

    def of_inputs(rates: Array | None) -> Array:
        return jnp.einsum("sjt,std->sjd", pull if rates is None else pull * rates[:, :, None], t)

    def of_outputs(rates: Array | None) -> Array:
        pulls = pull if rates is None else pull * rates[:, None, :]
        # Without the barrier XLA multiplies by a transposed view, which takes several times as long on a CPU.
        return jnp.einsum("stj,sjd->std", jax.lax.optimization_barrier(jnp.swapaxes(pulls, 1, 2)), x)

    return Terms(of_inputs, of_outputs, curvatures, loss)


def _cbow(plan: Plan, x: Array, t: Array, same: Bool[Array, "segments length length"], widths: Array) -> Terms:
    # Axes: s segments, i centres, j contexts, m noise, d dim.
    places = np.arange(plan.length, dtype=np.int32)
    distance = np.abs(places[:, None] - places)
    inside = same & (distance > 0)[None] & (distance[None] <= widths[:, :, None])
    contexts = inside.astype(jnp.float32)
    number = jnp.sum(contexts, axis=2)
    has_context = (number > 0).astype(jnp.float32)
    mean = jnp.einsum("sij,sjd->sid", contexts / jnp.maximum(number, 1)[:, :, None], x)
    own, noise = t[:, : plan.length], t[:, plan.length :]
    of_noise = has_context[:, :, None] * np.float32(plan.negative / plan.noise)
    wrong = 1 / (1 + jnp.exp(jnp.sum(mean * own, axis=2)))
    wrong_noise = 1 / (1 + jnp.exp(-jnp.einsum("sid,smd->sim", mean, noise)))
    pull, pull_noise = has_context * wrong, -of_noise * wrong_noise
    bend = pull * jnp.maximum(1 - wrong, _LEAST)
    bend_noise = -pull_noise * jnp.maximum(1 - wrong_noise, _LEAST)
    # Each context gets the whole error of the mean, as in word2vec.c. All contexts of a window move together, so the
    # mean moves as far as each of them, and the curvature of the mean bounds the rate of each.
    of_mean = bend * jnp.sum(own * own, axis=2) + jnp.einsum("sim,sm->si", bend_noise, jnp.sum(noise * noise, axis=2))
    squares = jnp.sum(mean * mean, axis=2)
    curvatures = (
        jnp.einsum("sij,si->sj", contexts, of_mean),
        jnp.concatenate([bend * squares, jnp.einsum("sim,si->sm", bend_noise, squares)], axis=1),
    )
    error = pull[:, :, None] * own + jnp.einsum("sim,smd->sid", pull_noise, noise)
    loss = has_context * jnp.log(jnp.maximum(1 - wrong, _TINY))
    loss_noise = of_noise * jnp.log(jnp.maximum(1 - wrong_noise, _TINY))
    loss = jnp.stack([-jnp.sum(loss) - jnp.sum(loss_noise), jnp.sum(has_context)])

    def of_inputs(rates: Array | None) -> Array:
        # The rows of a symmetric distance, so that no matrix is transposed: `contexts` of centres, by context.
        by_context = jnp.swapaxes(contexts if rates is None else contexts * rates[:, None, :], 1, 2)
        return jnp.einsum("sji,sid->sjd", jax.lax.optimization_barrier(by_context), error)

    def of_outputs(rates: Array | None) -> Array:
        pulls, pulls_noise = pull, pull_noise
        if rates is not None:
            pulls, pulls_noise = pull * rates[:, : plan.length], pull_noise * rates[:, None, plan.length :]
        by_noise = jax.lax.optimization_barrier(jnp.swapaxes(pulls_noise, 1, 2))
        return jnp.concatenate([pulls[:, :, None] * mean, jnp.einsum("smi,sid->smd", by_noise, mean)], axis=1)

    return Terms(of_inputs, of_outputs, curvatures, loss)


def _band(plan: Plan) -> Float32[np.ndarray, "length length"]:
    """The weight of each pair of places in a segment: the expected one of word2vec.c, made up for lost pairs."""
    places = np.arange(plan.length)
    distance = np.abs(places[:, None] - places)
    drawn = np.maximum(plan.window + 1 - distance, 0) / plan.window
    uncut = plan.length / (plan.length - distance)
    return np.where(distance > 0, drawn * uncut, 0).astype(np.float32)
