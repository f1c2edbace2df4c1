"""Lookups, bags and updates by kernels under every transformation of JAX, against plain indexing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from kernels_used import calls, in_program

import embax
from embax._kernels.library import library
from embax._kernels.take import take

pytestmark = pytest.mark.skipif(library() is None, reason="kernels are not installed, or switched off")

RANDOM = np.random.default_rng(0)
WEIGHT = jnp.asarray(RANDOM.normal(size=(50, 4)), jnp.float32)
IDS = jnp.asarray(RANDOM.integers(0, 50, (6, 8)), jnp.int32)


def read(weight, ids):
    return embax.lookup(embax.Table(weight), ids)


def bag(weight, ids):
    return embax.embedding_bag(embax.Table(weight), ids, mode="sum")


def plain_read(weight, ids):
    return weight[ids]


def plain_bag(weight, ids):
    return weight[ids].sum(-2)


FUNCTIONS = {"take": (read, plain_read), "pool": (bag, plain_bag)}


def cubed(function):
    return lambda weight, ids: (function(weight, ids) ** 3).sum()


def second(function):
    def product(weight, ids):
        return jax.jvp(lambda weight: jax.grad(cubed(function))(weight, ids), (weight,), (2 * weight,))[1]

    return product


def scanned(function):
    def loss(weight, ids):
        return jax.lax.scan(lambda total, ids: (total + cubed(function)(weight, ids), None), 0.0, ids)[0]

    return jax.grad(loss)


# Which transformation, and whether the kernel is to run under it.
TRANSFORMATIONS = {
    "jit": (lambda f: f, True),
    "vmap": (lambda f: jax.vmap(f, (None, 0)), True),
    "vmap of another axis": (lambda f: jax.vmap(f, (None, 1), 1), True),
    "vmap twice": (lambda f: lambda w, i: jax.vmap(jax.vmap(f, (None, 0)), (None, 0))(w, i.reshape(3, 2, 8)), True),
    "vmap of tables": (lambda f: lambda w, i: jax.vmap(f)(jnp.stack([w, 2 * w]), i[:2]), False),
    "vmap of one batch for tables": (lambda f: lambda w, i: jax.vmap(f, (0, None))(jnp.stack([w, 2 * w]), i), False),
    "grad": (lambda f: jax.grad(cubed(f)), True),
    "grad of vmap": (lambda f: jax.grad(cubed(jax.vmap(f, (None, 0)))), True),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(cubed(f)), (None, 0)), True),
    "jvp": (lambda f: lambda w, i: jax.jvp(lambda w: f(w, i), (w,), (2 * w,)), True),
    "linearize": (lambda f: lambda w, i: jax.linearize(lambda w: f(w, i), w)[1](2 * w), None),
    "hessian-vector product": (second, True),
    "grad of scan": (scanned, True),
    "grad of remat": (lambda f: jax.grad(jax.checkpoint(cubed(f))), True),
    "while": (lambda f: lambda w, i: jax.lax.fori_loop(0, 6, lambda k, x: x + f(w, i[k]), f(w, i[0])), True),
    "cond": (lambda f: lambda w, i: jax.lax.cond(i[0, 0] >= 0, lambda: f(w, i), lambda: 2 * f(w, i)), True),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_result_equals_indexing(transformation):
    transform, by_kernel = TRANSFORMATIONS[transformation]

    def both(weight, ids):
        return {name: [transform(f)(weight, ids) for f in pair] for name, pair in FUNCTIONS.items()}

    program = jax.jit(both).lower(WEIGHT, IDS).compile()
    results, kernels = calls(program, WEIGHT, IDS)
    for name, (found, expected) in results.items():
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), found, expected)
        if by_kernel is not None:
            assert bool(kernels) == by_kernel
            assert (f'"embax_{name}"' in program.as_text()) == by_kernel


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eager_call_runs_one_kernel_and_disable_jit_none(name):
    function, plain = FUNCTIONS[name]
    found, kernels = calls(function, WEIGHT, IDS)
    assert kernels == 1
    np.testing.assert_allclose(found, plain(WEIGHT, IDS), rtol=1e-6)
    with jax.disable_jit():
        found, kernels = calls(function, WEIGHT, IDS)
    assert kernels == 0
    np.testing.assert_allclose(found, plain(WEIGHT, IDS), rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_of_one_read_is_the_call_of_a_kernel(name):
    """XLA hands a program that it estimates at 1,000 operations or more to a thread of its own."""
    ids = jax.ShapeDtypeStruct((1024, 16), np.int32)
    program = jax.jit(FUNCTIONS[name][0]).lower(WEIGHT, ids).compile()
    assert f'"embax_{name}"' in program.as_text()
    assert "fusion" not in program.as_text()
    assert program.cost_analysis()["flops"] < 1000


def weighted(weight, ids, weights):
    return embax.embedding_bag(embax.Table(weight, padding_idx=3), ids, weights, mode="mean")


def test_weighted_bags_under_vmap():
    weights = jnp.asarray(RANDOM.uniform(1, 2, (6, 8)), jnp.float32)

    @jax.jit
    def run(ids, weights):
        return jax.vmap(weighted, (None, 0, 0))(WEIGHT, ids, weights), jax.vmap(weighted, (None, 0, None))(
            WEIGHT, ids, weights[0]
        )

    found, kernels = calls(run, IDS[:, None], weights[:, None])
    assert kernels == 2
    for out, factors in zip(found, (weights, weights[:1]), strict=True):
        factors = jnp.where(IDS != 3, factors, 0)
        expected = jnp.einsum("blr,bl->br", WEIGHT[IDS], factors) / factors.sum(1, keepdims=True)
        np.testing.assert_allclose(out[:, 0], expected, rtol=2e-5)


def test_ragged_bags_under_vmap_equal_each_lane():
    offsets = jnp.array([[0, 3, 8], [2, 2, 5]], jnp.int32)

    def pooled(ids, offsets):
        return embax.embedding_bag(embax.Table(WEIGHT), embax.Ragged(ids, offsets), mode="sum")

    found = jax.jit(jax.vmap(pooled))(IDS[:2], offsets)
    for lane in range(2):
        rows = np.asarray(WEIGHT)[IDS[lane]]
        expected = [rows[a:b].sum(0) for a, b in itertools.pairwise(offsets[lane])]
        np.testing.assert_allclose(found[lane], expected, rtol=2e-6, atol=1e-6)


def step(tx):
    def run(table, state, ids):
        gradient = embax.grad(lambda table: (embax.lookup(table, ids) ** 2).sum())(table)
        updates, state = tx.update(gradient, state, table)
        return embax.apply_updates(table, updates), state

    return run


def test_derivative_through_an_update_equals_indexing():
    """The order in which a kernel sums rows is its own; a value and its derivative may not be of two orders."""
    tx = embax.optim.lift(optax.adagrad(0.1))

    def after(weight):
        table = embax.Table(weight)
        return (step(tx)(table, tx.init(table), IDS[0])[0].weight ** 2).sum()

    def plainly(weight):
        gradient = jax.grad(lambda w: (w[IDS[0]] ** 2).sum())(weight)
        return ((weight - 0.1 * gradient / jnp.sqrt(gradient**2 + 0.1 + 1e-7)) ** 2).sum()

    for found, expected in zip(
        jax.jit(jax.value_and_grad(after))(WEIGHT), jax.value_and_grad(plainly)(WEIGHT), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_checkify_names_the_bad_id_before_any_nan(mode):
    table = embax.Table(WEIGHT)
    run = checkify.checkify(jax.jit(lambda ids: embax.embedding_bag(table, ids, mode=mode)), errors=checkify.all_checks)
    assert run(IDS)[0].get() is None
    assert "index 77 is out of bounds for axis 0 with size 50" in run(IDS.at[2, 3].set(77))[0].get()


def test_checkify_names_the_bad_id_of_a_gradient():
    loss = jax.grad(lambda weight, ids: read(weight, ids).sum())
    run = checkify.checkify(jax.jit(loss), errors=checkify.index_checks)
    assert run(WEIGHT, IDS)[0].get() is None
    assert "index 77 is out of bounds" in run(WEIGHT, IDS.at[2, 3].set(77))[0].get()


def test_deduplicated_ids_rise():
    gradient = embax.RowGrad(IDS[0], jnp.ones((8, 4)), rows=50)
    ids = jax.jit(lambda gradient: gradient.deduplicated().ids)(gradient)
    np.testing.assert_array_equal(ids, np.sort(ids))


def test_nothing_of_xla_is_left_beside_a_kernel():
    table, tx = embax.Table(WEIGHT), embax.optim.rowwise_adagrad(0.1)
    program = jax.jit(step(tx)).lower(table, tx.init(table), IDS[0]).compile().as_text()
    assert " gather(" not in program
    assert " scatter(" not in program
    assert in_program(step(tx), table, tx.init(table), IDS[0]) == ["take", "combine", "take", "put", "put"]


def test_transposed_read_equals_indexing():
    """As the read of a tangent would be; the core reads these in plain JAX."""
    add = jax.jit(lambda rows: jax.linear_transpose(lambda weight: take(weight, IDS[0], 0), WEIGHT)(rows)[0])
    found = add(jnp.ones((8, 4)))
    np.testing.assert_array_equal(found, np.zeros((50, 4), np.float32) + np.bincount(IDS[0], minlength=50)[:, None])
