"""softmax_cross_entropy against float64 NumPy, and against optax on the logits of attend: values, dtypes, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ROWS, RULES, WEIGHT
from closeness import assert_close
from head_cases import (
    BAD,
    COTANGENT,
    FLOAT32,
    LABELS,
    MASKED,
    X,
    in_one_program,
    losses_and_gradients,
    of_optax,
)

from embax import Table, softmax_cross_entropy


def ours(**options):
    return functools.partial(losses_and_gradients, functools.partial(softmax_cross_entropy, **options))


def value_and_gradients(*args, **options):
    """The losses, and the gradients of the weight and of `x`."""
    return jax.device_get(jax.jit(ours(**options))(*args))


def case(weight=WEIGHT, x=X, labels=LABELS, cotangent=COTANGENT, *, mask_padding=False, chunk=None, **rules):
    return (weight, x, labels, cotangent), {"mask_padding": mask_padding, "chunk": chunk}, rules


def check(cases):
    """Losses and gradients of cases `{name: case(...)}` are those of the reference."""
    actual = in_one_program(
        {
            name: (ours(**options), Table(weight, **rules), *others)
            for name, ((weight, *others), options, rules) in cases.items()
        }
    )
    for name, ((weight, x, labels, cotangent), options, rules) in cases.items():
        mask_padding = options["mask_padding"]
        expected, _ = reference.cross_entropy(weight, x, labels, mask_padding, **rules)
        gradients = reference.cross_entropy_gradient(weight, x, labels, cotangent, mask_padding, **rules)
        assert_close(actual[name], (expected, *gradients), name, **FLOAT32)


# `attend` reads the same rows by every rule.
SOME_RULES = {name: RULES[name] for name in ("frequency", "freeze", "norm_half", "all")} | MASKED


@pytest.mark.parametrize("options", [SOME_RULES, pytest.param(RULES, marks=pytest.mark.exhaustive)], ids=["", "all"])
def test_values_and_gradients_by_every_rule(options):
    check({name: case(**options) for name, options in options.items()})


# Rows of a block, of a table of 7, and whether padding rows are masked.
SIZES = {1: True, 3: False, 7: True, 1000: False}
SIZES_TOO = {1: False, 2: True, 3: True, 6: False, 7: False, 8: True, 1000: True}


@pytest.mark.parametrize("sizes", [SIZES, pytest.param(SIZES_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_every_size_of_a_block(sizes):
    check({f"chunk {size}": case(chunk=size, mask_padding=masked, **RULES["all"]) for size, masked in sizes.items()})


def test_several_padding_rows():
    check({"several": case(chunk=2, mask_padding=True, padding_idx=(0, 2, -1))})


def test_traced_labels_without_a_row():
    def case_of(policy, chunk=None, mask_padding=False):
        options = {"chunk": chunk, "mask_padding": mask_padding, "padding_idx": 1, "max_norm": 1.5}
        return case(labels=BAD, out_of_range=policy, **options)

    cases = {policy: case_of(policy) for policy in ("clip", "nan")}
    check(cases | {f"{policy}, masked": case_of(policy, chunk=2, mask_padding=True) for policy in ("error", "zero")})


def test_nothing_of_a_token_without_a_label_reaches_the_gradient():
    """Not even NaN in its vector, or in its cotangent."""
    x, cotangent = X.copy(), COTANGENT.copy()
    x[0, 1], cotangent[0, 1] = np.nan, np.nan
    calls = {policy: (ours(), Table(WEIGHT, out_of_range=policy), x, BAD, cotangent) for policy in ("error", "nan")}
    for policy, (loss, of_weight, of_x) in in_one_program(calls).items():
        assert np.isnan(loss[0, 1]), policy
        assert np.isfinite(of_weight).all(), policy
        np.testing.assert_array_equal(of_x[0, 1], 0, policy)


def test_nothing_of_a_masked_token_reaches_the_gradient():
    x, cotangent = X.copy(), COTANGENT.copy()
    x[0, 0], cotangent[0, 0] = np.inf, np.nan
    loss, of_weight, of_x = value_and_gradients(Table(WEIGHT, padding_idx=2), x, LABELS, cotangent, mask_padding=True)
    assert loss[0, 0] == 0
    assert np.isfinite(of_weight).all()
    np.testing.assert_array_equal(of_x[0, 0], 0)
    np.testing.assert_array_equal(of_weight[2], 0)


# The number of rows, and whether padding rows are masked; blocks are of 1024 rows.
AS_OPTAX = [(1024, True), (2500, False)]
AS_OPTAX_TOO = [(1, True), (1, False), (300, True), (300, False), (1024, False), (2500, True)]


@pytest.mark.parametrize("cases", [AS_OPTAX, pytest.param(AS_OPTAX_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_cross_entropy_equals_optax_on_the_logits_of_attend(cases):
    calls = {}
    for rows, mask_padding in cases:
        rng = np.random.default_rng(rows)
        table = Table(rng.normal(size=(rows, 16)).astype(np.float32), padding_idx=rows // 2, max_norm=3.0)
        x, labels = rng.normal(size=(20, 16)).astype(np.float32), rng.integers(0, rows, 20)
        labels = labels[labels != rows // 2] if mask_padding else labels
        arguments = table, x[: len(labels)], labels, np.full(len(labels), 1 / max(len(labels), 1), np.float32)
        name, plain = f"{rows} rows, masked: {mask_padding}", functools.partial(of_optax, mask_padding=mask_padding)
        calls[name] = (ours(chunk=1024, mask_padding=mask_padding), *arguments)
        calls[f"{name}, optax"] = (functools.partial(losses_and_gradients, plain), *arguments)
    actual = in_one_program(calls)
    for name in list(calls)[::2]:
        assert_close(actual[name], actual[f"{name}, optax"], name, **FLOAT32)


def test_large_logits_do_not_overflow():
    weight = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [1e4, 0]], np.float32)
    given = np.array([0, 1]), np.ones(2, np.float32)
    eye = np.eye(2, dtype=np.float32)
    check({"positive": case(weight, eye, *given, chunk=2), "negative": case(weight, -eye, *given, chunk=1)})


def test_one_row_has_no_loss():
    weight, x = np.full((1, 2), 3.0, np.float32), np.array([[1e4, 7.0], [0.1, 0.3]], np.float32)
    loss, of_weight, of_x = value_and_gradients(Table(weight), x, np.zeros(2, int), np.ones(2, np.float32))
    for exact in loss, of_weight, of_x:
        np.testing.assert_array_equal(exact, 0)


def test_all_rows_masked():
    table = Table(WEIGHT[:2], padding_idx=(0, 1), out_of_range="zero")
    labels = np.array([0, 1, 2])
    loss, of_weight, of_x = value_and_gradients(table, X[0], labels, np.ones(3, np.float32), mask_padding=True)
    np.testing.assert_array_equal(loss, [0, 0, -np.inf])
    np.testing.assert_array_equal(of_weight, 0)
    np.testing.assert_array_equal(of_x, 0)


def test_no_tokens():
    calls = {}
    for shape in (0,), (2, 0), (0, 3):
        x, cotangent = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
        calls[str(shape)] = ours(), Table(WEIGHT), x, np.zeros(shape, int), cotangent
    for name, (loss, of_weight, of_x) in in_one_program(calls).items():
        assert (loss.shape, of_x.shape) == (calls[name][-1].shape, calls[name][2].shape)
        np.testing.assert_array_equal(of_weight, np.zeros_like(WEIGHT), name)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_rows(tokens):
    table, x = Table(np.zeros((0, 3), np.float32)), np.ones((tokens, 3), np.float32)
    loss, of_weight, of_x = value_and_gradients(table, x, np.zeros(tokens, int), np.ones(tokens, np.float32))
    assert np.isnan(loss).all()
    assert of_weight.shape == (0, 3)
    np.testing.assert_array_equal(of_x, np.zeros((tokens, 3)))


def test_rows_of_any_axes():
    cases, shapes = {}, {"scalars": ((), (4,)), "zero": ((0,), (4,)), "axes": ((2, 3), (2, 2)), "one": ((3,), ())}
    for name, (dim, batch) in shapes.items():
        rng = np.random.default_rng(0)
        weight, x = (rng.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((5,), batch))
        labels, cotangent = rng.integers(0, 5, batch), np.asarray(rng.normal(size=batch), np.float32)
        chunk = 2 if name == "axes" else None
        cases[name] = case(weight, x, labels, cotangent, chunk=chunk, padding_idx=1, max_norm=1.0)
    check(cases)


@pytest.mark.parametrize("labels", [LABELS.tolist(), LABELS.astype(np.int8), jnp.asarray(LABELS)], ids=type)
def test_labels_of_any_kind_without_jit(labels):
    loss = softmax_cross_entropy(Table(WEIGHT), X.tolist(), labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference.cross_entropy(WEIGHT, X, LABELS)[0], **FLOAT32)


# ---- Dtypes.


# The dtypes of a table and of vectors.
LOW_PRECISION = {
    ("bfloat16", "bfloat16"): 1e-2,
    ("float16", "float16"): 2e-3,
    ("float32", "bfloat16"): 1e-2,
    ("bfloat16", "float32"): 1e-2,
    ("float16", "bfloat16"): 1e-2,
}
LOW = list(LOW_PRECISION)


@pytest.mark.parametrize("pairs", [LOW[:2], pytest.param(LOW[2:], marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_low_precision_is_rounded_once(pairs):
    rng = np.random.default_rng(3)
    weight, x = rng.normal(size=(50, 8)), rng.normal(size=(6, 8))
    labels, cotangent = rng.integers(0, 50, 6), rng.normal(size=6).astype(np.float32)
    calls = {}
    for stored, given in pairs:
        table = Table(weight.astype(np.float32).astype(stored), max_norm=2.0)
        chunk = 7 if stored == given else 10  # of 50 rows, with a rest and without
        calls[stored, given] = ours(chunk=chunk), table, x.astype(np.float32).astype(given), labels, cotangent
    for dtypes, (loss, of_weight, of_x) in in_one_program(calls).items():
        tolerance, name, (_, table, given, *_) = LOW_PRECISION[dtypes], " ".join(dtypes), calls[dtypes]
        assert (loss.dtype, of_weight.dtype, of_x.dtype) == (jnp.float32, table.dtype, given.dtype), name
        wide = np.asarray(table.weight, np.float64), np.asarray(given, np.float64)
        gradients = reference.cross_entropy_gradient(*wide, labels, cotangent, max_norm=2.0)
        expected = reference.cross_entropy(*wide, labels, max_norm=2.0)[0]
        np.testing.assert_allclose(loss, expected, rtol=tolerance, err_msg=name)
        for one, other in zip((of_weight, of_x), gradients, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=tolerance, atol=tolerance, err_msg=name)


def test_sums_of_low_precision_run_in_float32():
    """4096 tokens that each add 1 to one row; in bfloat16 they would add up to 256."""
    tokens = 4096
    table, x = Table(np.zeros((2, 1), "bfloat16")), np.ones((tokens, 1), "bfloat16")
    labels, cotangent = np.zeros(tokens, int), np.full(tokens, 2, np.float32)
    _, of_weight, _ = value_and_gradients(table, x, labels, cotangent)
    np.testing.assert_array_equal(np.asarray(of_weight, np.float32), [[-tokens], [tokens]])


def test_float64_stays_float64():
    with jax.enable_x64(True):
        loss, of_weight, of_x = value_and_gradients(
            Table(WEIGHT.astype(np.float64), max_norm=1.5), X.astype(np.float64), LABELS, COTANGENT.astype(np.float64)
        )
        assert loss.dtype == of_weight.dtype == of_x.dtype == np.float64
        np.testing.assert_allclose(loss, reference.cross_entropy(WEIGHT, X, LABELS, max_norm=1.5)[0], rtol=1e-12)


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.softmax_cross_entropy(")
    with pytest.raises(
        IndexError, match=name + r"labels=...\)` must be in \[0, 7\) or ignore_index=-100, .* got 7 at position"
    ):
        softmax_cross_entropy(table, X, BAD)
    with pytest.raises(TypeError, match=name + r"labels=...\)` must be of an integer dtype, got float32"):
        softmax_cross_entropy(table, X, np.zeros((2, 3), np.float32))
    with pytest.raises(
        ValueError, match=name + r"labels=...\)` must be one for each vector, of the shape \(2, 3\), got \(3,\)"
    ):
        softmax_cross_entropy(table, X, [0, 1, 2])
    with pytest.raises(ValueError, match=name + r"x=...\)` must be of the shape"):
        softmax_cross_entropy(table, X[..., :2], LABELS)
    with pytest.raises(TypeError, match=name + r"x=...\)` must be of a float dtype, got int"):
        softmax_cross_entropy(table, LABELS, LABELS)
    with pytest.raises(TypeError, match=name + r"table=...\)` must be of a float dtype, got int"):
        softmax_cross_entropy(Table(np.ones((ROWS, 3), np.int32)), X, LABELS)
    with pytest.raises(ValueError, match=name + r"chunk=...\)` must be at least 1, got 0"):
        softmax_cross_entropy(table, X, LABELS, chunk=0)
    with pytest.raises(TypeError, match=name + r"chunk=...\)` must be a whole number, got 1.5"):
        softmax_cross_entropy(table, X, LABELS, chunk=1.5)
    with pytest.raises(TypeError, match=name + r"mask_padding=...\)` must be a bool, got 1"):
        softmax_cross_entropy(table, X, LABELS, mask_padding=1)
