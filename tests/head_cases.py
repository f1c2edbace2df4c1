"""What the tests of the heads share: vectors and labels for the table of `cases`, and many cases in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import RULES

from embax import attend

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
_RNG = np.random.default_rng(7)
X = _RNG.normal(size=(2, 3, 3)).astype(np.float32)
LABELS = np.array([[2, 0, -1], [1, 2, 5]])
COTANGENT = _RNG.normal(size=(2, 3)).astype(np.float32)
BAD = np.array([[2, 7, -8], [1, 100, 0]])

# Options by which masking the padding rows shows, and those by which there is nothing to mask.
MASKED = {f"{name}, masked": {"mask_padding": True, **RULES[name]} for name in ("none", "padding_negative", "all")}


def in_one_program(calls):
    """The results of calls `{name: (function, *args)}`, by one program, since it is compiling that takes time."""

    @jax.jit
    def run(args):
        return {name: calls[name][0](*args[name]) for name in calls}

    return run({name: args for name, (_, *args) in calls.items()})


def assert_equal_trees(one, other, name="", **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


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
