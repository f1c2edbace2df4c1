"""Heads of tables in float8: sums in float32, and gradients rounded once."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from closeness import assert_close
from head_cases import in_one_program
from meshes import usual_and_rest

import embax
from embax import Table, attend, lookup, sampled_softmax, softmax_cross_entropy

RNG = np.random.default_rng(4)
WEIGHT, X = RNG.normal(size=(20, 8)), RNG.normal(size=(6, 8))
LABELS = np.array([3, -100, 0, 19, 7, 3])
COTANGENT = RNG.normal(size=6).astype(np.float32)
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]
# The dtypes of table, vectors, and their logits.
PAIRS = [
    *((FLOAT8[0], wide, wide) for wide in ("float32", "bfloat16", "float16")),
    (FLOAT8[1], "float32", "float32"),
    *((wide, low, wide) for wide, low in zip(("float32", "bfloat16"), FLOAT8, strict=True)),
    (FLOAT8[1], FLOAT8[1], "float32"),
    (FLOAT8[0], FLOAT8[1], "float32"),
]
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.02}


def in_dtype(array, dtype):
    return array.astype(np.float32).astype(jnp.dtype(dtype))


def steps(dtype):
    """What rounding to a dtype, and sums of products in it, may come to."""
    return 4 * float(jnp.finfo(dtype).eps)


HEADS = [(*pair, ("attend", "loss")[i % 2]) for i, pair in enumerate(PAIRS)]
HEADS_TOO = [(*pair, ("loss", "attend")[i % 2]) for i, pair in enumerate(PAIRS)]


@pytest.mark.parametrize("cases", [HEADS, pytest.param(HEADS_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_values_and_gradients(cases):
    def gradients(head, table, x, *args):
        out, pull = jax.vjp(lambda table, x: head(table, x, *args), table, x)
        of_table, of_x = pull(jnp.reshape(COTANGENT, (6, *[1] * (out.ndim - 1))).astype(out.dtype) * jnp.ones_like(out))
        return out, of_table.weight, of_x

    loss = functools.partial(softmax_cross_entropy, chunk=7, **OPTIONS)
    calls = {}
    for stored, given, logits, head in cases:
        table, x = Table(in_dtype(WEIGHT, stored), padding_idx=2), in_dtype(X, given)
        call = (attend, table, x) if head == "attend" else (loss, table, x, LABELS)
        calls[stored, given, logits, head] = functools.partial(gradients, call[0]), *call[1:]
    for (stored, given, logits, head), (out, of_weight, of_x) in in_one_program(calls).items():
        name = f"{stored} {given} {head}"
        _, table, x, *_ = calls[stored, given, logits, head]
        wide = np.asarray(table.weight, np.float64), np.asarray(x, np.float64)
        if head == "attend":
            expected = reference.attend(*wide)
            cotangent = np.broadcast_to(COTANGENT[:, None], expected.shape)
            of_args = reference.attend_gradient(*wide, cotangent, padding_idx=2)
        else:
            expected = reference.cross_entropy(*wide, LABELS, padding_idx=2, **OPTIONS)[0]
            of_args = reference.cross_entropy_gradient(*wide, LABELS, COTANGENT, padding_idx=2, **OPTIONS)
        assert out.dtype == (logits if head == "attend" else "float32"), name
        assert (of_weight.dtype, of_x.dtype) == (table.dtype, x.dtype), name
        for value, other, dtype in zip(
            (out, of_weight, of_x), (expected, *of_args), (logits, stored, given), strict=True
        ):
            tolerance = max(steps(dtype), steps(logits))
            np.testing.assert_allclose(
                np.asarray(value, np.float64), other, rtol=tolerance, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize("dtype", FLOAT8)
def test_sums_run_in_float32(dtype):
    """4096 terms of one; in float8 they would add up to 16 or less."""

    def loss(table):
        return softmax_cross_entropy(table, np.ones((4096, 1), np.float32), np.zeros(4096, int), reduction="sum") / 16

    ones, table = Table(in_dtype(np.ones((1, 4096)), dtype)), Table(in_dtype(np.zeros((2, 1)), dtype))
    calls = {x: (attend, ones, in_dtype(np.ones(4096), x)) for x in (dtype, "bfloat16")}
    actual = in_one_program(calls | {"loss": (jax.grad(loss), table)})
    assert actual[dtype] == actual["bfloat16"] == 4096
    np.testing.assert_array_equal(np.asarray(actual["loss"].weight, np.float32), [[-128], [128]])


@pytest.mark.parametrize(
    ("dtype", "head"),
    usual_and_rest([("float8_e5m2", "tied")], itertools.product(FLOAT8, ("sampled", "tied"))),
)
def test_the_sampled_loss_and_tied_tables(dtype, head):
    ids = np.array([3, 5, 0, 19, 7, 3])

    def sampled(table):
        x = jnp.tanh(lookup(table, ids, jnp.float32))
        return sampled_softmax(table, x, LABELS, jax.random.key(0), samples=8, reduction="mean")

    def tied(table):
        return softmax_cross_entropy(table, jnp.tanh(lookup(table, ids)), LABELS, reduction="mean")

    low = Table(in_dtype(WEIGHT, dtype), padding_idx=2)
    wide = Table(low.weight.astype(np.float32), padding_idx=2)

    def value_and_gradient(table):
        value, gradient = embax.value_and_grad({"sampled": sampled, "tied": tied}[head])(table)
        return value, gradient.to_dense() if head == "sampled" else gradient.weight

    actual = in_one_program({"low": (value_and_gradient, low), "wide": (value_and_gradient, wide)})
    (value, gradient), (expected, other) = actual["low"], actual["wide"]
    np.testing.assert_allclose(value, expected, rtol=1e-6 if head == "sampled" else steps(dtype))
    assert gradient.dtype == low.dtype
    assert_close(gradient.astype(np.float32), other, rtol=steps(dtype), atol=steps(dtype))
