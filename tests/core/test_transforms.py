"""Lookup under every JAX transformation and their compositions, against derivatives that the reference gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import IDS, RULES, WEIGHT, cotangent

from embax import Table, lookup, renormalize

NONE, ALL = {}, RULES["all"]
with_rules = pytest.mark.parametrize("rules", [NONE, ALL], ids=["none", "all"])


def in_pairs(names, *pairs):
    """Those rules with those options; a pair that shows nothing new is left to the exhaustive runs, as `rest`."""
    return pytest.mark.parametrize(names, pairs)


def rest(*pair):
    return pytest.param(*pair, marks=pytest.mark.exhaustive)


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


@in_pairs(("rules", "ids_axis"), (NONE, 1), (ALL, 0), rest(NONE, 0), rest(ALL, 1))
def test_vmap_over_ids_is_one_call_a_lane(rules, ids_axis):
    ids, table, cotangents = np.moveaxis(LANES, 0, ids_axis), Table(WEIGHT, **rules), cotangent(LANES)
    read = jax.vmap(lookup, in_axes=(None, ids_axis))

    @jax.jit
    def all_of(table, ids):
        gradient = jax.grad(lambda table: (read(table, ids) * cotangents).sum())(table).weight
        per_lane = jax.vmap(jax.grad(loss), in_axes=(None, ids_axis, 0))(table, ids, cotangents).weight
        return read(table, ids), gradient, per_lane

    rows, gradient, per_lane = all_of(table, ids)
    assert_close(rows, [reference.lookup(WEIGHT, lane, **rules) for lane in LANES])
    pairs = list(zip(LANES, cotangents, strict=True))
    assert_close(gradient, sum(reference.gradient(WEIGHT, *pair, **rules) for pair in pairs))
    assert_close(per_lane, [expected_gradient(WEIGHT, *pair, **rules) for pair in pairs])


@in_pairs(("rules", "ids_axis"), (NONE, 0), (ALL, None), (ALL, 0), rest(NONE, None))
def test_vmap_over_tables(rules, ids_axis):
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]])
    tables = jax.tree.map(lambda _: weights, Table(WEIGHT, **rules))
    ids = LANES if ids_axis == 0 else LANES[0]
    lanes = list(LANES) if ids_axis == 0 else [LANES[0]] * 3
    cotangents = cotangent(LANES)

    @jax.jit
    def both(tables, ids):
        gradients = jax.vmap(jax.grad(loss), in_axes=(0, ids_axis, 0))(tables, ids, cotangents)
        return jax.vmap(lookup, in_axes=(0, ids_axis))(tables, ids), gradients.weight

    out, gradients = both(tables, ids)
    assert_close(out, [reference.lookup(*lane, **rules) for lane in zip(weights, lanes, strict=True)])
    lanes = zip(weights, lanes, cotangents, strict=True)
    assert_close(gradients, [expected_gradient(*lane, **rules) for lane in lanes])


@with_rules
def test_vmap_of_vmap(rules):
    ids = np.stack([LANES, LANES[::-1]])
    out = jax.jit(jax.vmap(jax.vmap(lookup, (None, 0)), (None, 0)))(Table(WEIGHT, **rules), ids)
    assert_close(out, reference.lookup(WEIGHT, ids, **rules))


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit_of_a_remat_with_a_policy": lambda f: jax.jit(
        jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)
    ),
}


@with_rules
def test_grad(rules):
    ids, cotangents = IDS["matrix"], cotangent(IDS["matrix"])
    fixed = functools.partial(loss, ids=ids, cotangents=cotangents)
    grads = {name: jax.grad(wrap(fixed)) for name, wrap in WRAPS.items()}
    gradients = jax.jit(lambda table: {name: grad(table) for name, grad in grads.items()})(Table(WEIGHT, **rules))
    for name, gradient in gradients.items():
        expected = expected_gradient(WEIGHT, ids, cotangents, **rules)
        np.testing.assert_allclose(gradient.weight, expected, **TOLERANCE, err_msg=name)


def test_grad_outside_of_jit():
    ids, cotangents = IDS["matrix"], cotangent(IDS["matrix"])
    gradient = jax.grad(loss)(Table(WEIGHT, **NONE), ids, cotangents)
    assert_close(gradient.weight, expected_gradient(WEIGHT, ids, cotangents))


@with_rules
def test_jvp_and_linearize(rules):
    ids, table = IDS["negative"], Table(WEIGHT, **rules)
    tangent = Table(np.random.default_rng(3).normal(size=WEIGHT.shape).astype(np.float32), **rules)
    jacobian = reference.jacobian(WEIGHT, ids, **rules)
    expected = np.tensordot(jacobian, np.asarray(tangent.weight, np.float64), 2)
    read = functools.partial(lookup, ids=ids)

    @jax.jit
    def both(table, tangent):
        return *jax.jvp(read, (table,), (tangent,)), jax.linearize(read, table)[1](tangent)

    out, pushed, linear = both(table, tangent)
    assert_close(out, reference.lookup(WEIGHT, ids, **rules))
    assert_close(pushed, expected)
    assert_close(linear, expected)


@with_rules
def test_jacobian(rules):
    def read(weight):
        return lookup(Table(weight, **rules), IDS["negative"])

    expected = reference.jacobian(WEIGHT, IDS["negative"], **rules)
    for jacobian in jax.jit(lambda weight: [jax.jacfwd(read)(weight), jax.jacrev(read)(weight)])(WEIGHT):
        assert_close(jacobian, expected)


SECOND = {
    "hessian": jax.hessian,
    "reverse_over_reverse": lambda f: jax.jacrev(jax.jacrev(f)),
    "reverse_over_forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


@with_rules
def test_second_derivatives(rules):
    ids, cotangents = IDS["negative"], cotangent(IDS["negative"])

    def of_weight(weight):
        return loss(Table(weight, **rules), ids, cotangents)

    hessians = jax.jit(lambda weight: {name: derive(of_weight)(weight) for name, derive in SECOND.items()})(WEIGHT)
    jacobian = reference.jacobian(WEIGHT, ids, **rules).reshape(cotangents.size, WEIGHT.size)
    curvature = -np.sin(reference.lookup(WEIGHT, ids, **rules)) * cotangents
    expected = (jacobian.T @ (curvature.reshape(-1, 1) * jacobian)).reshape(WEIGHT.shape * 2)
    for name, hessian in hessians.items():
        np.testing.assert_allclose(hessian, expected, **TOLERANCE, err_msg=name)


@in_pairs(("rules", "remat"), (NONE, True), (ALL, False), rest(NONE, False), rest(ALL, True))
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

    table = Table(WEIGHT, max_norm=1.5, padding_idx=2)
    table, rows = jax.jit(lambda table: jax.lax.scan(step, table, LANES))(table)
    rules = {"max_norm": 1.5, "padding_idx": 2}
    assert_close(rows, reference.lookup(WEIGHT, LANES, **rules))
    assert_close(table.weight, reference.renormalize(WEIGHT, LANES, **rules))


@with_rules
def test_control_flow(rules):
    table = Table(WEIGHT, **rules)
    expected = reference.lookup(WEIGHT, LANES, **rules)

    @jax.jit
    def all_of(table):
        branches = [lambda ids: lookup(table, ids), lambda ids: -lookup(table, ids)]
        return (
            jax.lax.map(functools.partial(lookup, table), LANES),
            jax.lax.switch(1, branches, LANES),
            jax.lax.fori_loop(0, 3, lambda i, sum_: sum_ + lookup(table, jnp.asarray(LANES)[i]), jnp.zeros((4, 3))),
        )

    mapped, switched, total = all_of(table)
    assert_close(mapped, expected)
    assert_close(switched, -expected)
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
