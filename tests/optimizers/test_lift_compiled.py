"""What a compiled training step holds: memory that follows the ids, everything in place, no needless compilation."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import Table
from embax.optim import clip_by_global_norm, lift, rowwise_adagrad, rowwise_adam

DIM, IDS = 16, 128
FEW, MANY = 10**4, 10**6

OPTIMIZERS = {
    "sgd": lift(optax.sgd(0.1)),
    "momentum": lift(optax.sgd(0.1, 0.9)),
    "adagrad": lift(optax.adagrad(0.1)),
    "adam": lift(optax.adam(0.1)),
    "adamw": lift(optax.adamw(0.1)),
    "rmsprop": lift(optax.rmsprop(0.1)),
    "lion": lift(optax.lion(0.1)),
    "rowwise_adagrad": rowwise_adagrad(0.1),
    "rowwise_adam": rowwise_adam(0.1),
    "clip_then_adam": optax.chain(clip_by_global_norm(1.0), lift(optax.adam(0.1))),
    "clip_in_adam": lift(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))),
    "multi_transform_outside": optax.multi_transform(
        {"sparse": lift(optax.adam(0.1)), "dense": optax.adam(0.1)}, {"table": "sparse", "bias": "dense"}
    ),
    "apply_if_finite_inside": lift(optax.apply_if_finite(optax.adam(0.1), 3)),
    "apply_if_finite_outside": optax.apply_if_finite(lift(optax.adam(0.1)), 3),
}


def nonlinear(params, ids):
    return jnp.square(embax.lookup(params["table"], ids) + jnp.tanh(params["bias"])).mean()


def linear(params, ids):
    return embax.lookup(params["table"], ids).sum() + params["bias"].sum()


# Memory is assigned before machine code is made, which need not be good.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

LOSSES = {"nonlinear": nonlinear, "linear": linear}


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def train_step(tx, loss, params, state, ids):
    value, gradients = embax.value_and_grad(loss, on_dense="error")(params, ids)
    updates, state = tx.update(gradients, state, params)
    return embax.apply_updates(params, updates), state, value


@functools.cache
def compiled(name, loss, rows, dtype="float32", padding_idx=None):
    """The compiled step of abstract arguments; and the bytes of all that have a table's rows."""
    weight = jax.ShapeDtypeStruct((rows, DIM), jnp.dtype(dtype))
    params = {"table": Table(weight, padding_idx=padding_idx), "bias": jax.ShapeDtypeStruct((1, DIM), jnp.float32)}
    tx = OPTIMIZERS[name]
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(functools.partial(train_step, tx, LOSSES[loss]), donate_argnums=(0, 1))
    lowered = step.lower(params, state, jax.ShapeDtypeStruct((IDS,), jnp.int32))
    program = lowered.compile(compiler_options=_QUICK)
    large = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.shape[:1] == (rows,)]
    return program, sum(leaf.size * leaf.dtype.itemsize for leaf in large)


def copies(program, rows):
    """The instructions, anywhere in the program, that make a second array of the table's rows."""
    pattern = r"^\s*(?:ROOT )?%?[\w.-]+ = (\(?\w+\[.*?) (copy|copy-start|convert|broadcast|concatenate|pad)\("
    found = re.findall(pattern, program.as_text(), re.MULTILINE)
    return [f"{name} {shape}" for shape, name in found if f"[{rows}," in shape or f"[{rows}]" in shape]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_of_a_step_follows_the_ids(name, loss):
    few, many = (compiled(name, loss, rows)[0].memory_analysis() for rows in (FEW, MANY))
    assert few.temp_size_in_bytes == many.temp_size_in_bytes <= 100 * IDS * DIM * 4


def test_an_array_that_is_not_donated_is_seen_as_a_copy():
    def add(weight, ids):
        return weight.at[ids].add(1)

    args = jax.ShapeDtypeStruct((MANY, DIM), jnp.float32), jax.ShapeDtypeStruct((IDS,), jnp.int32)
    kept, donated = (jax.jit(add, donate_argnums=which).lower(*args).compile() for which in ((), (0,)))
    assert copies(kept, MANY)
    assert not copies(donated, MANY)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tables_and_state_are_written_in_place(name, loss):
    program, large = compiled(name, loss, MANY)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= large >= MANY * DIM * 4
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    assert not copies(program, MANY)


@pytest.mark.parametrize("name", ["sgd", "adamw", "rowwise_adagrad"])
def test_a_padding_row_costs_no_memory(name):
    few, many = (compiled(name, "nonlinear", rows, padding_idx=7)[0].memory_analysis() for rows in (FEW, MANY))
    assert few.temp_size_in_bytes == many.temp_size_in_bytes <= 100 * IDS * DIM * 4


@pytest.mark.parametrize("name", ["sgd", "adam", "rowwise_adagrad", "clip_then_adam", "apply_if_finite_outside"])
def test_steps_compile_once(name, caplog):
    tx = OPTIMIZERS[name]
    params = {"table": Table(jnp.ones((50, DIM))), "bias": jnp.zeros((1, DIM))}
    state = tx.init(params)
    step = jax.jit(functools.partial(train_step, tx, nonlinear), donate_argnums=(0, 1))
    batches = [np.random.default_rng(i).integers(0, 50, IDS) for i in range(4)]
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        params, state, _ = step(params, state, batches[0])
        before = len(caplog.records)
        for ids in batches[1:]:
            params, state, _ = step(params, state, ids)
    assert before
    assert len(caplog.records) == before
