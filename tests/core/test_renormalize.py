"""Renormalize against the reference: which rows it writes, its gradient, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import IDS, RULES, WEIGHT, cotangent

from embax import Table, lookup, renormalize

RTOL = 2e-6  # float32
jitted = jax.jit(renormalize)


@jax.jit
def renormalize_each(cases):
    return {name: renormalize(*case) for name, case in cases.items()}


def assert_as_reference(cases):
    """Named cases `(weight, ids, rules)` in one program, for it takes longer to compile than to run."""
    tables = {name: Table(weight, **rules) for name, (weight, _, rules) in cases.items()}
    results = renormalize_each({name: (tables[name], ids) for name, (_, ids, _) in cases.items()})
    for name, (weight, ids, rules) in cases.items():
        after, expected = results[name], reference.renormalize(weight, ids, **rules)
        np.testing.assert_allclose(after.weight, expected, rtol=RTOL, err_msg=name)  # float32
        untouched = (expected == weight).all(tuple(range(1, weight.ndim)))
        np.testing.assert_array_equal(np.asarray(after.weight)[untouched], weight[untouched], err_msg=name)
        np.testing.assert_array_equal(tables[name].weight, weight, err_msg=name)
        assert jax.tree.structure(after) == jax.tree.structure(tables[name]), name


def test_renormalize_of_each_rule():
    assert_as_reference({name: (WEIGHT, IDS["matrix"], rules) for name, rules in RULES.items()})


def test_renormalize_of_each_shape():
    shapes = "scalar", "vector", "negative", "empty_matrix", "same"
    assert_as_reference({name: (WEIGHT, IDS[name], RULES["all"]) for name in shapes})


def test_renormalize_of_rows_of_any_shape():
    weights = [
        np.random.default_rng(2).normal(scale=2, size=(5, *dim)).astype(np.float32) for dim in [(), (0,), (2, 3)]
    ]
    assert_as_reference({str(weight.shape): (weight, np.array([0, -1, 0]), RULES["all"]) for weight in weights})


def test_renormalize_treats_bad_ids_like_lookup():
    ids = np.array([7, -8, 3, 2**31 - 1, -(2**31)])
    assert_as_reference(
        {
            f"{policy}, {len(weight)} rows": (weight, ids, {"max_norm": 0.5, "out_of_range": policy})
            for policy in ("error", "clip", "nan", "zero")
            for weight in (WEIGHT, WEIGHT[:1])
        }
    )


def test_renormalize_of_no_rows():
    table = Table(jnp.zeros((0, 2)), max_norm=1.0)
    assert renormalize(table, []).weight.shape == jitted(table, jnp.array([0])).weight.shape == (0, 2)
    with pytest.raises(ValueError, match=r"`embax.renormalize\(ids=...\)` must be empty for a table without rows"):
        renormalize(Table(jnp.zeros((0, 2)), max_norm=1.0, out_of_range="clip"), jnp.array([0]))


def test_renormalize_without_max_norm_or_frozen_gives_the_table_itself():
    for rules in {}, {"max_norm": 0.5, "freeze": True}:
        table = Table(WEIGHT, **rules)
        assert renormalize(table, [0, 1]) is table
    with pytest.raises(IndexError, match="got 7 at position"):
        renormalize(Table(WEIGHT), [7])


def test_renormalize_stores_the_rows_that_lookup_returns():
    table, ids = Table(WEIGHT, max_norm=1.5), np.arange(7)
    stored = renormalize(table, ids)
    np.testing.assert_allclose(stored.weight, lookup(table, ids), rtol=2e-7)  # float32
    np.testing.assert_allclose(lookup(stored, ids), stored.weight, rtol=2e-7)  # float32


def test_renormalize_under_vmap():
    lanes = np.array([[0, 0, 1], [6, 2, -1]])
    weights = np.stack([WEIGHT, 3 * WEIGHT])
    rules = {"max_norm": 1.5, "padding_idx": 2}
    for axis, tables in (None, WEIGHT), (0, weights):
        tables = jax.tree.map(lambda _, tables=tables: jnp.asarray(tables), Table(WEIGHT, **rules))
        out = jax.vmap(renormalize, in_axes=(axis, 0))(tables, lanes).weight
        for lane, weight in enumerate(weights if axis == 0 else [WEIGHT, WEIGHT]):
            np.testing.assert_allclose(
                out[lane], reference.renormalize(weight, lanes[lane], **rules), rtol=RTOL
            )  # float32


def test_renormalize_passes_derivatives_straight_through():
    table, ids = Table(WEIGHT, max_norm=0.5, padding_idx=0), [1, 2, 2]
    cotangents = np.random.default_rng(1).normal(size=WEIGHT.shape).astype(np.float32)

    @jax.jit
    def derivatives(table):
        gradient = jax.grad(lambda table: (renormalize(table, ids).weight * cotangents).sum())(table)
        _, tangent = jax.jvp(lambda table: renormalize(table, ids), (table,), (gradient,))
        squares = lambda weight: (renormalize(Table(weight, max_norm=0.5), ids).weight ** 2).sum()  # noqa: E731
        return gradient, tangent, jax.hessian(squares)(table.weight)

    gradient, tangent, hessian = derivatives(table)
    np.testing.assert_array_equal(gradient.weight, cotangents)
    np.testing.assert_array_equal(tangent.weight, cotangents)
    np.testing.assert_array_equal(hessian.reshape(21, 21), 2 * np.eye(21))


def test_renormalize_then_lookup_keeps_the_gradients_of_both_lookups():
    rules, ids, again = {"max_norm": 0.5, "padding_idx": 2}, np.array([0, 2, 2, 1]), np.array([1, 1, 5, 2])
    cotangents = cotangent(ids)

    def loss(table):
        first = (lookup(table, ids) * cotangents).sum()
        return first + (lookup(renormalize(table, ids), again) * cotangents).sum()

    wraps = {"plain": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint}
    table = Table(WEIGHT, **rules)
    gradients = jax.jit(lambda table: {name: jax.grad(wrap(loss))(table) for name, wrap in wraps.items()})(table)
    expected = sum(reference.gradient(WEIGHT, i, cotangents, **rules) for i in (ids, again))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient.weight, expected, rtol=RTOL, atol=1e-6, err_msg=name)  # float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_renormalize_settles(dtype):
    """Written back a hundred times, a row does not creep towards zero."""
    table = Table(jnp.asarray(WEIGHT, dtype), max_norm=1.5)
    once = renormalize(table, np.arange(7))
    ids = np.arange(7)
    often = jax.jit(lambda table: jax.lax.fori_loop(0, 100, lambda _, table: renormalize(table, ids), table))(once)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(t.weight, np.float64) for t in (often, once)), rtol=rtol)
