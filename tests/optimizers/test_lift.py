"""lift: equal to dense training or to a float64 lazy reference; rows that were not read keep their bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference as reference
import pytest

import embax
from embax import RowGrad, Table
from embax.optim import lift, rowwise_adagrad, rowwise_adam

ROWS, DIM, IDS = 20, 3, 64
PADDING = 4
warmup = optax.linear_schedule(0.0, 0.3, 20)

# What is run lifted, and the rule of the lazy reference for it.
CASES = {
    "sgd": (lift(optax.sgd(0.1)), reference.sgd(0.1)),
    "schedule": (lift(optax.sgd(warmup)), reference.sgd(warmup)),
    "momentum": (lift(optax.sgd(0.1, 0.9)), reference.sgd(0.1, 0.9)),
    "nesterov": (lift(optax.sgd(0.1, 0.9, nesterov=True)), reference.sgd(0.1, 0.9, nesterov=True)),
    "adagrad": (lift(optax.adagrad(0.1)), reference.adagrad(0.1)),
    "adam": (lift(optax.adam(0.1)), reference.adam(0.1)),
    "adam_schedule": (lift(optax.adam(warmup)), reference.adam(warmup)),
    "adamw": (lift(optax.adamw(0.1, weight_decay=0.2)), reference.adam(0.1, weight_decay=0.2)),
    "rmsprop": (lift(optax.rmsprop(0.01)), reference.rmsprop(0.01)),
    "lion": (lift(optax.lion(0.01)), reference.lion(0.01)),
    "clip_adam": (lift(optax.chain(optax.clip(1.0), optax.adam(0.1))), reference.adam(0.1, limit=1.0)),
    "clip_adagrad": (
        lift(optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.1))),
        reference.adagrad(0.1),
    ),
    "inject": (lift(optax.inject_hyperparams(optax.adam)(learning_rate=warmup)), reference.adam(warmup)),
    "multi_transform": (
        lift(
            optax.multi_transform(
                {"sparse": optax.adam(0.1), "dense": optax.sgd(0.1)}, {"table": "sparse", "bias": "dense"}
            )
        ),
        reference.adam(0.1),
    ),
    "apply_if_finite": (lift(optax.apply_if_finite(optax.adam(0.1), 3)), reference.adam(0.1)),
    "rowwise_adagrad": (rowwise_adagrad(0.1), reference.rowwise_adagrad(0.1)),
    "rowwise_adam": (rowwise_adam(0.1), reference.rowwise_adam(0.1)),
}
every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def weight(dtype="float32", shape=(ROWS, DIM), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradient(step, dtype="float32", shape=(ROWS, DIM), length=IDS):
    """A gradient of about half of the rows, the padding row and unused places among them."""
    rng = np.random.default_rng(100 + step)
    some_rows = np.append(rng.permutation(shape[0])[: shape[0] // 2], [PADDING, shape[0]])
    values = rng.normal(size=(length, *shape[1:]))
    return RowGrad(rng.choice(some_rows, length), jnp.asarray(values, dtype), rows=shape[0])


def stepper(tx):
    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return embax.apply_updates(params, updates), state

    return step


def bits(tree):
    """The bytes of each leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def loss(params, ids, targets):
    rows = params["table"].weight[ids] if isinstance(params["table"], Dense) else embax.lookup(params["table"], ids)
    return jnp.square(rows * params["scale"] - targets).mean()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    """A weight that is not a table."""

    weight: Any


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.5),
        optax.sgd(optax.linear_schedule(0.0, 1.0, 50)),
        optax.adagrad(0.1),
        optax.chain(optax.clip_by_global_norm(0.05), optax.adagrad(0.1)),
        optax.chain(optax.clip(0.01), optax.sgd(1.0)),
    ],
    ids=["sgd", "schedule", "adagrad", "global_norm_adagrad", "clip_sgd"],
)
def test_equals_dense_training_over_100_steps(tx):
    def run(tx, table, value_and_grad, apply):
        params = {"table": table, "scale": jnp.ones((1, DIM))}
        state = tx.init(params)

        @jax.jit
        def step(params, state, ids, targets):
            value, gradients = value_and_grad(loss)(params, ids, targets)
            updates, state = tx.update(gradients, state, params)
            return apply(params, updates), state, value

        rng, targets, values = np.random.default_rng(1), weight(seed=2), []
        for _ in range(100):
            ids = rng.integers(0, rng.integers(2, ROWS), IDS)
            params, state, value = step(params, state, ids, targets[ids])
            values.append(value)
        return params["table"].weight, params["scale"], np.array(values)

    sparse = run(lift(tx), Table(weight()), embax.value_and_grad, embax.apply_updates)
    dense = run(tx, Dense(weight()), jax.value_and_grad, optax.apply_updates)
    for ours, theirs in zip(sparse, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # float32
    assert sparse[2][-10:].mean() < sparse[2][:10].mean()


@every
def test_equals_the_lazy_reference(name):
    tx, rule = CASES[name]
    params = {"table": Table(weight(), padding_idx=PADDING), "bias": jnp.ones(2)}
    expected = reference.Lazy(weight(), rule, PADDING, 1.0 if name == "clip_adagrad" else None)
    state, step = tx.init(params), stepper(tx)
    for i in range(30):
        before = np.asarray(params["table"].weight)
        of_table = gradient(i)
        params, state = step(params, state, {"table": of_table, "bias": jnp.zeros(2)})
        touched = expected.step(np.asarray(of_table.ids), of_table.values)
        after = np.asarray(params["table"].weight)
        np.testing.assert_allclose(after[touched], expected.weight[touched], rtol=1e-4, atol=2e-5)  # float32
        others = sorted(set(range(ROWS)) - set(touched))
        assert len(others) >= ROWS // 2 - 1
        assert PADDING in others
        assert after[others].tobytes() == before[others].tobytes()


ODD = np.array([-0.0, np.nan, 1e-45, -np.inf, 3e38], np.float32)


def owned(state):
    """The leaves of a state that have an entry for each row."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.ndim(leaf) and leaf.shape[0] == ROWS]


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *(pytest.param(name, lambda f: jax.jit(f, donate_argnums=(0, 1)), id=f"donated-{name}") for name in CASES),
        *(pytest.param(name, lambda f: f, id=f"eager-{name}") for name in ("sgd", "adamw", "rowwise_adagrad")),
    ],
)
def test_rows_that_were_not_read_and_their_state_keep_their_bits(name, wrap):
    tx, _ = CASES[name]

    @wrap
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return embax.apply_updates(params, updates), state

    def fill(leaf):  # -0.0, NaN, a denormal number and infinity in all rows but those that are read
        if not (jnp.ndim(leaf) and leaf.shape[0] == ROWS):
            return leaf
        odd = jnp.asarray(np.resize(ODD, leaf.shape)).astype(leaf.dtype)
        is_read = jnp.isin(jnp.arange(ROWS), jnp.array([1, 7, 9]))
        return jnp.where(jnp.expand_dims(is_read, range(1, leaf.ndim)), leaf, odd)

    params = {"table": Table(fill(weight()), padding_idx=PADDING), "bias": jnp.ones(2)}
    state = tx.init(params)
    state = state._replace(inner=jax.tree.map(fill, state.inner))
    of_table = RowGrad([7, PADDING, 9, 7, ROWS, 1, PADDING], jnp.full((7, DIM), 0.5), rows=ROWS)
    others = [row for row in range(ROWS) if row not in (1, 7, 9)]
    before = [np.array(leaf) for leaf in (params["table"].weight, *owned(state.inner))]
    params, state = step(params, state, {"table": of_table, "bias": jnp.zeros(2)})
    after = [np.asarray(leaf) for leaf in (params["table"].weight, *owned(state.inner))]
    for old, new in zip(before, after, strict=True):
        assert new[others].tobytes() == old[others].tobytes()
    assert (after[0][[1, 7, 9]] != before[0][[1, 7, 9]]).all() == (name not in ("schedule", "adam_schedule", "inject"))


@pytest.mark.parametrize(
    "name", ["schedule", "nesterov", "adamw", "apply_if_finite", "rowwise_adagrad", "rowwise_adam"]
)
def test_ordinary_leaves_equal_those_without_tables(name):
    tx, _ = CASES[name]
    mixed = {"table": Table(weight()), "bias": weight(seed=3), "more": [jnp.ones(())]}
    plain = {"bias": mixed["bias"], "more": mixed["more"]}
    mixed_state, plain_state, step = tx.init(mixed), tx.init(plain), stepper(tx)
    for i in range(3):
        of_plain = {"bias": weight(seed=4 + i), "more": [jnp.full((), 0.3)]}
        mixed, mixed_state = step(mixed, mixed_state, {"table": gradient(i), **of_plain})
        plain, plain_state = step(plain, plain_state, of_plain)
    for key in plain:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mixed[key], plain[key])  # float32


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adagrad", "rowwise_adam"])
def test_frozen_and_integer_tables_pass_through_without_state(name):
    tx, _ = CASES[name]
    others = {"frozen": Table(weight(), freeze=True), "whole": Table(jnp.arange(6).reshape(3, 2))}
    params = {"a": others, "table": Table(weight()), "bias": jnp.ones(2)}
    state = tx.init(params)
    alone = tx.init({"table": params["table"], "bias": params["bias"]})
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(alone)]

    def total(params):
        read = [embax.lookup(table, [1, 2, 2]).sum() for table in (params["table"], *params["a"].values())]
        return sum(read) + params["bias"].sum()

    _, gradients = embax.value_and_grad(total)(params)
    after, state = stepper(tx)(params, state, gradients)
    assert bits(after["a"]) == bits(others)
    assert bits(after["table"]) != bits(params["table"])


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adagrad", "rowwise_adam"])
@pytest.mark.parametrize("ids", [[], [ROWS, PADDING, ROWS]], ids=str)
def test_a_gradient_without_rows_changes_no_row(name, ids):
    tx, _ = CASES[name]
    params = {"table": Table(weight(), padding_idx=PADDING), "bias": jnp.ones(2)}
    state, step = tx.init(params), stepper(tx)
    params, state = step(params, state, {"table": gradient(0), "bias": jnp.ones(2)})
    nothing = RowGrad(ids, jnp.full((len(ids), DIM), jnp.nan), rows=ROWS)
    after, after_state = step(params, state, {"table": nothing, "bias": jnp.ones(2)})
    assert bits(after["table"]) == bits(params["table"])
    assert bits(owned(after_state.inner)) == bits(owned(state.inner))
    assert (after["bias"] != params["bias"]).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "rowwise_adam"])
@pytest.mark.parametrize("shape", [(0, DIM), (ROWS, 0), (1, 1)], ids=str)
def test_empty_and_small_tables(name, shape):
    tx, _ = CASES[name]
    params = {"table": Table(weight(shape=shape)), "bias": jnp.ones(2)}
    of_table = RowGrad([0] * min(shape[0], 2), jnp.ones((min(shape[0], 2), shape[1])), rows=shape[0])
    after, _ = stepper(tx)(params, tx.init(params), {"table": of_table, "bias": jnp.ones(2)})
    assert after["table"].weight.shape == shape
    assert np.isfinite(after["table"].weight).all()
    assert (after["bias"] != params["bias"]).all()


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adamw", "lion", "rowwise_adam"])
@pytest.mark.parametrize("shape", [(7, 2, 3), (7,)], ids=str)
def test_rows_of_any_number_of_axes(name, shape):
    tx, rule = CASES[name]
    params = {"table": Table(weight(shape=shape)), "bias": jnp.ones(2)}
    expected = reference.Lazy(weight(shape=shape), rule, None, 1.0 if name == "clip_adagrad" else None)
    state, step = tx.init(params), stepper(tx)
    for i in range(3):
        of_table = gradient(i, shape=shape, length=9)
        params, state = step(params, state, {"table": of_table, "bias": jnp.zeros(2)})
        expected.step(np.asarray(of_table.ids), of_table.values)
    np.testing.assert_allclose(params["table"].weight, expected.weight, rtol=1e-4, atol=1e-5)  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """Tables as fields of a dataclass, in a dict and beside ordinary leaves."""

    words: Any
    others: dict[str, Any]


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adam", "rowwise_adagrad"])
def test_several_tables_anywhere_in_a_tree(name):
    tx, rule = CASES[name]
    shapes = {"a": (ROWS, DIM), "b": (ROWS, DIM), "c": (9, 2)}
    expected = {key: reference.Lazy(weight(shape=shape), rule) for key, shape in shapes.items()}
    tables = {key: Table(weight(shape=shape)) for key, shape in shapes.items()}
    params = Model(tables["a"], {"deep": {"b": tables["b"], "none": None, "c": tables["c"]}, "bias": jnp.ones(2)})
    state, step = tx.init(params), stepper(tx)
    for i in range(4):
        of = {key: gradient(10 * i + len(key), shape=shape, length=9) for key, shape in shapes.items()}
        gradients = Model(of["a"], {"deep": {"b": of["b"], "none": None, "c": of["c"]}, "bias": jnp.ones(2)})
        params, state = step(params, state, gradients)
        for key, table in expected.items():
            table.step(np.asarray(of[key].ids), of[key].values)
    deep = params.others["deep"]
    for key, table in {"a": params.words, "b": deep["b"], "c": deep["c"]}.items():
        np.testing.assert_allclose(table.weight, expected[key].weight, rtol=1e-4, atol=1e-5)  # float32
