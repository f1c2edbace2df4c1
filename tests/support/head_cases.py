"""What the tests of the heads share: vectors and labels for the table of `cases`, and many cases in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from cases import ROWS, RULES

from embax import Unigram, attend, sampled_softmax
from embax._heads import candidates as _candidates

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
_RNG = np.random.default_rng(7)
X = _RNG.normal(size=(2, 3, 3)).astype(np.float32)
LABELS = np.array([[2, 0, 6], [1, 2, 5]])
COTANGENT = _RNG.normal(size=(2, 3)).astype(np.float32)
BAD = np.array([[2, 7, -1], [1, 100, 0]])
IGNORING = np.array([[2, -100, 6], [1, 2, -100]])
# The terms of the loss besides that of the label.
TERMS = {"label_smoothing": 0.3, "z_loss": 0.1}

# Options by which masking the padding rows shows, and those by which there is nothing to mask.
MASKED = {f"{name}, masked": {"mask_padding": True, **RULES[name]} for name in ("none", "padding_negative", "all")}


def in_one_program(calls):
    """The results of calls `{name: (function, *args)}`, in NumPy, by one program: it is compiling that takes time."""

    @jax.jit
    def run(args):
        return {name: calls[name][0](*args[name]) for name in calls}

    return jax.device_get(run({name: args for name, (_, *args) in calls.items()}))


def of_optax(table, x, labels, mask_padding=False):
    """The cross-entropy by the logits of `attend`."""
    logits = attend(table, x, mask_padding=mask_padding)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))


def losses_and_gradients(loss, table, x, labels, cotangent, **options):
    """The losses of a head, and the gradients of the weight and of `x`."""
    losses, pull = jax.vjp(lambda table, x: loss(table, x, labels, **options), table, x)
    of_table, of_x = pull(cotangent)
    return losses, of_table.weight, of_x


# ---- What is drawn for sampled_softmax.

KEY = jax.random.key(3)
SAMPLED = functools.partial(sampled_softmax, key=KEY, samples=6)
COUNTS = np.array([100, 0, 9, 50, 1, 3, 20])
CANDIDATES = {"log_uniform": "log_uniform", "uniform": "uniform", "unigram": Unigram.from_counts(COUNTS)}


def probabilities_of(name, rows=ROWS):
    """By the formulas, in float64."""
    if name == "uniform":
        return np.full(rows, 1 / rows)
    if name == "log_uniform":
        return np.log((np.arange(rows) + 2) / (np.arange(rows) + 1)) / np.log(rows + 1)
    weights = np.where(COUNTS > 0, COUNTS**0.75, 0)
    return weights / weights.sum()


@functools.cache
def drawn_of(name, samples):
    """What `KEY` draws from the table of `cases`."""
    return np.asarray(jax.jit(lambda key: _candidates.draw(key, CANDIDATES[name], samples, ROWS))(KEY))


def expected_loss(weight, x, labels, name, samples, remove_hits=True, **rules):
    drawn = drawn_of(name, samples)
    return reference.sampled_softmax(weight, x, labels, drawn, probabilities_of(name), remove_hits, **rules)
