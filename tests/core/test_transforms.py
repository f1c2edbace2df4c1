"""Lookup under every JAX transformation and their compositions, against derivatives that the reference gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import IDS, RULES, WEIGHT, cotangent

from embax import Table, lookup, renormalize

with_rules = pytest.mark.parametrize("rules", [{}, RULES["all"]], ids=["none", "all"])
TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32

# Each lane of a batch repeats ids, so that counts over all lanes would differ from counts a lane.
LANES = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


def loss(table, ids, cotangents):
    """A loss whose every derivative depends on the rows that are read."""
    return (jnp.sin(lookup(table, ids)) * cotangents).sum()


def expected_gradient(weight, ids, cotangents, **rules):
    return reference.gradient(weight, ids, np.cos(reference.lookup(weight, ids, **rules)) * cotangents, **rules)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@with_rules
@pytest.mark.parametrize("ids_axis", [0, 1])
def test_vmap_over_ids_is_one_call_a_lane(rules, ids_axis):
    ids, table, cotangents = np.moveaxis(LANES, 0, ids_axis), Table(WEIGHT, **rules), cotangent(LANES)
    read = jax.jit(jax.vmap(lookup, in_axes=(None, ids_axis)))
    assert_close(read(table, ids), [reference.lookup(WEIGHT, lane, **rules) for lane in LANES])
    gradient = jax.jit(jax.grad(lambda table: (read(table, ids) * cotangents).sum()))(table).weight
    pairs = list(zip(LANES, cotangents, strict=True))
    assert_close(gradient, sum(reference.gradient(WEIGHT, *pair, **rules) for pair in pairs))
    per_lane = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, ids_axis, 0)))(table, ids, cotangents).weight
    assert_close(per_lane, [expected_gradient(WEIGHT, *pair, **rules) for pair in pairs])


@with_rules
@pytest.mark.parametrize("ids_axis", [None, 0])
def test_vmap_over_tables(rules, ids_axis):
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]])
    tables = jax.tree.map(lambda _: weights, Table(WEIGHT, **rules))
    ids = LANES if ids_axis == 0 else LANES[0]
    lanes = list(LANES) if ids_axis == 0 else [LANES[0]] * 3
    out = jax.vmap(lookup, in_axes=(0, ids_axis))(tables, ids)
    assert_close(out, [reference.lookup(*lane, **rules) for lane in zip(weights, lanes, strict=True)])
    cotangents = cotangent(LANES)
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, ids_axis, 0)))(tables, ids, cotangents).weight
    lanes = zip(weights, lanes, cotangents, strict=True)
    assert_close(gradients, [expected_gradient(*lane, **rules) for lane in lanes])


@with_rules
def test_vmap_of_vmap(rules):
    ids = np.stack([LANES, LANES[::-1]])
    out = jax.vmap(jax.vmap(lookup, (None, 0)), (None, 0))(Table(WEIGHT, **rules), ids)
    assert_close(out, reference.lookup(WEIGHT, ids, **rules))


@with_rules
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_grad(rules, wrap):
    ids = IDS["matrix"]
    gradient = jax.grad(wrap(functools.partial(loss, ids=ids, cotangents=cotangent(ids))))(Table(WEIGHT, **rules))
    assert_close(gradient.weight, expected_gradient(WEIGHT, ids, cotangent(ids), **rules))


@with_rules
def test_grad_of_jit_of_a_remat_with_a_policy(rules):
    ids, cotangents = IDS["matrix"], cotangent(IDS["matrix"])
    policy = jax.checkpoint_policies.nothing_saveable
    wrapped = jax.jit(jax.checkpoint(loss, policy=policy))
    gradient = jax.jit(jax.grad(lambda table: wrapped(table, ids, cotangents)))(Table(WEIGHT, **rules)).weight
    assert_close(gradient, expected_gradient(WEIGHT, ids, cotangents, **rules))


@with_rules
def test_jvp_and_linearize(rules):
    ids, table = IDS["negative"], Table(WEIGHT, **rules)
    tangent = Table(np.random.default_rng(3).normal(size=WEIGHT.shape).astype(np.float32), **rules)
    jacobian = reference.jacobian(WEIGHT, ids, **rules)
    expected = np.tensordot(jacobian, np.asarray(tangent.weight, np.float64), 2)
    read = functools.partial(lookup, ids=ids)
    out, pushed = jax.jvp(read, (table,), (tangent,))
    assert_close(out, reference.lookup(WEIGHT, ids, **rules))
    assert_close(pushed, expected)
    assert_close(jax.linearize(read, table)[1](tangent), expected)


@with_rules
@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_jacobian(rules, derivative):
    ids = IDS["negative"]
    jacobian = jax.jit(derivative(lambda weight: lookup(Table(weight, **rules), ids)))(WEIGHT)
    assert_close(jacobian, reference.jacobian(WEIGHT, ids, **rules))


@with_rules
@pytest.mark.parametrize(
    "derivative",
    [jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacrev(jax.jacfwd(f))],
    ids=["hessian", "reverse_over_reverse", "reverse_over_forward"],
)
def test_second_derivatives(rules, derivative):
    ids, cotangents = IDS["negative"], cotangent(IDS["negative"])
    hessian = jax.jit(derivative(lambda weight: loss(Table(weight, **rules), ids, cotangents)))(WEIGHT)
    jacobian = reference.jacobian(WEIGHT, ids, **rules).reshape(cotangents.size, WEIGHT.size)
    curvature = -np.sin(reference.lookup(WEIGHT, ids, **rules)) * cotangents
    expected = jacobian.T @ (curvature.reshape(-1, 1) * jacobian)
    assert_close(hessian, expected.reshape(WEIGHT.shape * 2))


@with_rules
@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_grad_of_scan_counts_a_step(rules, remat):
    cotangents = cotangent(LANES)
    step_loss = jax.checkpoint(loss) if remat else loss

    def total(table):
        def step(sum_, step_inputs):
            return sum_ + step_loss(table, *step_inputs), lookup(table, step_inputs[0])

        return jax.lax.scan(step, 0.0, (LANES, cotangents))

    gradient, rows = jax.jit(jax.grad(total, has_aux=True))(Table(WEIGHT, **rules))
    pairs = zip(LANES, cotangents, strict=True)
    assert_close(gradient.weight, sum(expected_gradient(WEIGHT, *pair, **rules) for pair in pairs))
    assert_close(rows, reference.lookup(WEIGHT, LANES, **rules))


def test_scan_carries_a_table():
    def step(table, ids):
        table = renormalize(table, ids)
        return table, lookup(table, ids)

    table, rows = jax.lax.scan(step, Table(WEIGHT, max_norm=1.5, padding_idx=2), LANES)
    rules = {"max_norm": 1.5, "padding_idx": 2}
    assert_close(rows, reference.lookup(WEIGHT, LANES, **rules))
    assert_close(table.weight, reference.renormalize(WEIGHT, LANES, **rules))


@with_rules
def test_control_flow(rules):
    table = Table(WEIGHT, **rules)
    expected = reference.lookup(WEIGHT, LANES, **rules)
    assert_close(jax.lax.map(functools.partial(lookup, table), LANES), expected)
    branches = [lambda ids: lookup(table, ids), lambda ids: -lookup(table, ids)]
    assert_close(jax.lax.switch(1, branches, LANES), -expected)
    total = jax.lax.fori_loop(0, 3, lambda i, sum_: sum_ + lookup(table, jnp.asarray(LANES)[i]), jnp.zeros((4, 3)))
    assert_close(total, expected.sum(0))


@with_rules
def test_grad_of_vmap_of_remat_of_jit(rules):
    cotangents, table = cotangent(LANES), Table(WEIGHT, **rules)
    lanes = jax.vmap(jax.checkpoint(jax.jit(loss)), in_axes=(None, 0, 0))
    gradient = jax.jit(jax.grad(lambda table: lanes(table, LANES, cotangents).sum()))(table).weight
    pairs = zip(LANES, cotangents, strict=True)
    assert_close(gradient, sum(expected_gradient(WEIGHT, *pair, **rules) for pair in pairs))


def test_eval_shape_needs_no_values():
    table = Table(jax.ShapeDtypeStruct((5, 2, 3), jnp.bfloat16), max_norm=1.0, padding_idx=-1)
    out = jax.eval_shape(lookup, table, jax.ShapeDtypeStruct((4,), jnp.int8))
    assert (out.shape, out.dtype) == ((4, 2, 3), jnp.bfloat16)
