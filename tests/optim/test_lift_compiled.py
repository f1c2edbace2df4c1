"""The compiled training step: memory depends on the ids, arrays are updated in place, nothing compiles twice."""

import functools
import itertools
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

DIM, IDS, ROWS = 3, 128, 10**6

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
    return jnp.square(embax.lookup(params["table"], ids) + jnp.tanh(params["bias"].sum())).mean()


def linear(params, ids):
    return embax.lookup(params["table"], ids).sum() + params["bias"].sum()


LOSSES = {"nonlinear": nonlinear, "linear": linear}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def train_step(tx, loss, params, state, ids):
    value, gradients = embax.value_and_grad(loss, on_dense="error")(params, ids)
    updates, state = tx.update(gradients, state, params)
    return embax.apply_updates(params, updates), state, value


def compiled(name, loss, padding_idx=None):
    """The compiled step of abstract arrays; and the bytes of all that have a table's rows."""
    weight = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32)
    params = {"table": Table(weight, padding_idx=padding_idx), "bias": jax.ShapeDtypeStruct((2,), jnp.float32)}
    tx = OPTIMIZERS[name]
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(functools.partial(train_step, tx, LOSSES[loss]), donate_argnums=(0, 1))
    program = step.lower(params, state, jax.ShapeDtypeStruct((IDS,), jnp.int32)).compile()
    large = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.shape[:1] == (ROWS,)]
    return program, sum(leaf.size * leaf.dtype.itemsize for leaf in large)


def copies(program, rows):
    """The instructions, anywhere in the program, that make a second array of the table's rows."""
    pattern = r"^\s*(?:ROOT )?%?[\w.-]+ = (\(?\w+\[.*?) (copy|copy-start|convert|broadcast|concatenate|pad)\("
    found = re.findall(pattern, program.as_text(), re.MULTILINE)
    return [f"{name} {shape}" for shape, name in found if f"[{rows}," in shape or f"[{rows}]" in shape]


# Each way through `lift` with either loss and with or without a padding row: sgd is scaled, clip_in_adam and
# apply_if_finite_inside are joint, the others go row by row, as do most of those that are left out here.
CASES = [
    ("sgd", "nonlinear", None),
    ("sgd", "linear", 7),
    ("adamw", "nonlinear", 7),
    ("rowwise_adam", "linear", None),
    ("clip_then_adam", "linear", None),
    ("clip_in_adam", "nonlinear", None),
    ("apply_if_finite_inside", "linear", None),
    ("apply_if_finite_outside", "nonlinear", None),
]
OTHERS = [
    pytest.param(*case, marks=pytest.mark.exhaustive)
    for case in itertools.product(OPTIMIZERS, LOSSES, (None, 7))
    if case not in CASES
]


@pytest.mark.parametrize(("name", "loss", "padding_idx"), CASES + OTHERS)
def test_a_step_writes_in_place_and_its_memory_follows_the_ids(name, loss, padding_idx):
    program, large = compiled(name, loss, padding_idx)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes <= 100 * IDS * DIM * 4 < ROWS  # less than a byte a row
    assert memory.alias_size_in_bytes >= large >= ROWS * DIM * 4
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    assert not copies(program, ROWS)


def test_copies_finds_an_array_that_is_not_donated():
    def add(weight, ids):
        return weight.at[ids].add(1)

    args = jax.ShapeDtypeStruct((ROWS, DIM), jnp.float32), jax.ShapeDtypeStruct((IDS,), jnp.int32)
    kept, donated = (jax.jit(add, donate_argnums=which).lower(*args).compile() for which in ((), (0,)))
    assert copies(kept, ROWS)
    assert not copies(donated, ROWS)


def test_steps_compile_once(caplog):
    names = ("sgd", "rowwise_adagrad", "clip_then_adam", "apply_if_finite_outside")

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, ids):
        return {name: train_step(OPTIMIZERS[name], nonlinear, *carry[name], ids)[:2] for name in names}

    def kinds(carry):
        return {name: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(carry[name])] for name in names}

    carry = {}
    for name in names:
        params = {"table": Table(np.ones((50, DIM), np.float32)), "bias": jnp.asarray(np.zeros(2, np.float32))}
        carry[name] = params, OPTIMIZERS[name].init(params)
    before = kinds(carry)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        carry = step(carry, np.random.default_rng(0).integers(0, 50, IDS))
        compiled_before = len(caplog.records)
        for i in range(1, 4):
            carry = step(carry, np.random.default_rng(i).integers(0, 50, IDS))
    for name in names:
        assert kinds(carry)[name] == before[name], name
    assert compiled_before
    assert len(caplog.records) == compiled_before
