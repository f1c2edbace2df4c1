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


def assert_as_reference(weight, ids, **rules):
    table = Table(weight, **rules)
    after = jitted(table, jnp.asarray(ids))
    expected = reference.renormalize(weight, ids, **rules)
    np.testing.assert_allclose(after.weight, expected, rtol=RTOL)  # float32
    untouched = (expected == weight).all(tuple(range(1, weight.ndim)))
    np.testing.assert_array_equal(after.weight[untouched], weight[untouched])
    np.testing.assert_array_equal(table.weight, weight)
    assert jax.tree.structure(after) == jax.tree.structure(table)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_renormalize_of_each_rule(rules):
    assert_as_reference(WEIGHT, IDS["matrix"], **rules)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_renormalize_of_each_shape(ids):
    assert_as_reference(WEIGHT, ids, **RULES["all"])


@pytest.mark.parametrize("dim", [(), (0,), (2, 3)], ids=str)
def test_renormalize_of_rows_of_any_shape(dim):
    weight = np.random.default_rng(2).normal(scale=2, size=(5, *dim)).astype(np.float32)
    assert_as_reference(weight, np.array([0, -1, 0]), **RULES["all"])


@pytest.mark.parametrize("policy", ["error", "clip", "nan", "zero"])
def test_renormalize_writes_the_row_that_a_bad_id_reads_or_none(policy):
    ids = np.array([7, -8, 3, 2**31 - 1, -(2**31)])
    assert_as_reference(WEIGHT, ids, max_norm=0.5, out_of_range=policy)
    assert_as_reference(WEIGHT[:1], ids, max_norm=0.5, out_of_range=policy)


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


def test_renormalize_stores_what_lookup_reads():
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
    gradient = jax.grad(lambda table: (renormalize(table, ids).weight * cotangents).sum())(table)
    np.testing.assert_array_equal(gradient.weight, cotangents)
    _, tangent = jax.jvp(lambda table: renormalize(table, ids), (table,), (gradient,))
    np.testing.assert_array_equal(tangent.weight, cotangents)
    hessian = jax.hessian(lambda weight: (renormalize(Table(weight, max_norm=0.5), ids).weight ** 2).sum())(
        table.weight
    )
    np.testing.assert_array_equal(hessian.reshape(21, 21), 2 * np.eye(21))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_renormalize_then_lookup_keeps_the_gradients_of_both_lookups(wrap):
    rules, ids, again = {"max_norm": 0.5, "padding_idx": 2}, np.array([0, 2, 2, 1]), np.array([1, 1, 5, 2])
    cotangents = cotangent(ids)

    @wrap
    def loss(table):
        first = (lookup(table, ids) * cotangents).sum()
        return first + (lookup(renormalize(table, ids), again) * cotangents).sum()

    gradient = jax.grad(loss)(Table(WEIGHT, **rules)).weight
    expected = sum(reference.gradient(WEIGHT, i, cotangents, **rules) for i in (ids, again))
    np.testing.assert_allclose(gradient, expected, rtol=RTOL, atol=1e-6)  # float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_renormalize_settles(dtype):
    """Written back a hundred times, a row does not creep towards zero."""
    table = Table(jnp.asarray(WEIGHT, dtype), max_norm=1.5)
    once = renormalize(table, np.arange(7))
    often = jax.lax.fori_loop(0, 100, lambda _, table: renormalize(table, jnp.arange(7)), once)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(t.weight, np.float64) for t in (often, once)), rtol=rtol)
