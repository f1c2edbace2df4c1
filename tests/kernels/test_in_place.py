"""Updates by kernels write into the donated arrays: no copy of a table, and memory that follows the ids."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax._kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="kernels are not installed, or switched off")

ROWS = 100_000


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


TRANSFORMATIONS = {
    "sgd": lambda: embax.optim.lift(optax.sgd(0.1)),
    "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(0.1),
    "adam": lambda: embax.optim.lift(optax.adam(0.1)),
}


def step(tx, table, state, ids):
    gradient = embax.grad(lambda table: (embax.lookup(table, ids) ** 2).sum())(table)
    updates, state = tx.update(gradient, state, table)
    return embax.apply_updates(table, updates), state


def steps(tx, table, state, ids):
    return jax.lax.scan(lambda carry, ids: (step(tx, *carry, ids), None), (table, state), ids)[0]


def copies(program):
    """The copies of arrays with many rows in a program."""
    shapes = re.findall(r"= \(?(\S+?)\{?[^=]* copy(?:-start)?\(", program.as_text())
    return [shape for shape in shapes if f"[{ROWS}" in shape]


@pytest.mark.parametrize("run", [step, steps])
@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [("sgd", (16,), "bfloat16"), ("rowwise_adagrad", (16,), "float32"), ("adam", (2, 8), "float32")],
)
def test_a_donated_step_copies_no_table(run, name, dim, dtype):
    tx = TRANSFORMATIONS[name]()
    table = embax.Table(jnp.zeros((ROWS, *dim), dtype))
    ids = jax.ShapeDtypeStruct((256,) if run is step else (3, 256), jnp.int32)
    state = tx.init(table)
    compiled = jax.jit(lambda *args: run(tx, *args), donate_argnums=(0, 1)).lower(table, state, ids).compile()
    memory = compiled.memory_analysis()
    assert copies(compiled) == []
    assert memory.temp_size_in_bytes < 20 * 256 * 16 * 4
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes >= held - 64
    assert compiled.as_text().count('custom_call_target="embax_put"') >= (1 if name == "sgd" else 2)


@pytest.mark.parametrize("out_of_range", ["error", "zero", "clip"])
def test_rows_that_are_read_and_then_stored_clipped_copy_no_table(out_of_range):
    table = embax.Table(jnp.ones((ROWS, 16)), max_norm=1.0, out_of_range=out_of_range)

    def run(table, ids):
        return embax.lookup(table, ids), embax.renormalize(table, ids)

    compiled = jax.jit(run, donate_argnums=0).lower(table, jax.ShapeDtypeStruct((256,), jnp.int32)).compile()
    assert copies(compiled) == []
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 256 * 16 * 4


def test_arrays_that_are_not_donated_stay_unchanged():
    tx = TRANSFORMATIONS["adam"]()
    table = embax.Table(jnp.ones((8, 3)))
    state = tx.init(table)
    before = jax.tree.map(np.array, (table, state))
    jax.block_until_ready(jax.jit(lambda *args: step(tx, *args))(table, state, jnp.array([1, 1, 5])))
    jax.tree.map(np.testing.assert_array_equal, before, (table, state))


def test_rows_that_are_read_before_they_are_written_are_the_old_ones():
    @jax.jit
    def run(weight, ids):
        table = embax.Table(weight)
        update = embax.RowGrad(ids, jnp.ones((3, 2)), rows=8)
        return embax.apply_updates(table, update).weight, embax.lookup(table, ids), embax.lookup(table, ids + 1)

    new, *old = run(jnp.zeros((8, 2)), jnp.array([1, 2, 3]))
    assert all((rows == 0).all() for rows in old)
    np.testing.assert_array_equal(new[:, 0], [0, 1, 1, 1, 0, 0, 0, 0])


def test_many_steps_equal_xla():
    """Fifty steps of Adagrad in float64 NumPy, with duplicates."""
    random = np.random.default_rng(0)
    batches = random.integers(0, 20, (50, 32))
    tx = embax.optim.lift(optax.adagrad(0.1))
    weight = random.normal(size=(20, 4)).astype(np.float32)
    table = embax.Table(jnp.asarray(weight))
    found, _ = jax.jit(lambda table, ids: steps(tx, table, tx.init(table), ids))(table, jnp.asarray(batches, jnp.int32))
    weight, sums = weight.astype(np.float64), np.full((20, 4), 0.1)
    for ids in batches:
        gradient = np.zeros_like(weight)
        np.add.at(gradient, ids, 2 * weight[ids])
        sums += gradient**2
        weight -= np.where(gradient != 0, 0.1 * gradient / np.sqrt(sums + 1e-7), 0)
    np.testing.assert_allclose(found.weight, weight, rtol=1e-4, atol=1e-5)
