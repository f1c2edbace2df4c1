"""lift: equal to dense training or to a float64 lazy reference; rows that were not read keep their bits."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference as reference
import pytest
from closeness import bits
from optim_steps import Together, host, take_step

import embax
from embax import RowGrad, Table
from embax.optim import lift, rowwise_adagrad, rowwise_adam

ROWS, DIM, IDS = 20, 3, 64
PADDING = 4
warmup = optax.linear_schedule(0.0, 0.3, 20)

# The transformations to lift, and the rule of the lazy reference for each.
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
# These behave like another one, or are tested together with lift's state.
LIKE_ANOTHER = {"nesterov", "adam_schedule", "rmsprop", "clip_adam", "multi_transform", "apply_if_finite"}
ALL = Together({name: tx for name, (tx, _) in CASES.items() if name not in LIKE_ANOTHER})
REST = Together({name: CASES[name][0] for name in LIKE_ANOTHER})
EACH = [pytest.param(name, marks=pytest.mark.exhaustive if name in LIKE_ANOTHER else ()) for name in CASES]


def with_others(name):
    """The transformations among which this one is run."""
    return REST if name in LIKE_ANOTHER else ALL


def some(*names):
    return Together({name: CASES[name][0] for name in names})


pytestmark = pytest.mark.usefixtures("standard_promotion")


def weight(dtype="float32", shape=(ROWS, DIM), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def params_of(**more):
    return {"table": Table(weight(), padding_idx=PADDING), "bias": np.ones(2, np.float32), **more}


def gradient(step, shape=(ROWS, DIM), length=IDS):
    """A gradient of about half of the rows, the padding row and unused places among them."""
    rng = np.random.default_rng(100 + step)
    some_rows = np.append(rng.permutation(shape[0])[: shape[0] // 2], [PADDING, shape[0]])
    values = rng.normal(size=(length, *shape[1:])).astype(np.float32)
    return RowGrad(rng.choice(some_rows, length), values, rows=shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    """A weight that is not a table."""

    weight: Any


def loss(params, ids, targets):
    rows = params["table"].weight[ids] if isinstance(params["table"], Dense) else embax.lookup(params["table"], ids)
    return jnp.square(rows * params["bias"].mean() - targets).mean()


EQUAL_TO_DENSE = {
    "sgd": optax.sgd(0.5),
    "schedule": optax.sgd(optax.linear_schedule(0.0, 1.0, 50)),
    "adagrad": optax.adagrad(0.1),
    "global_norm_adagrad": optax.chain(optax.clip_by_global_norm(0.05), optax.adagrad(0.1)),
    "clip_sgd": optax.chain(optax.clip(0.01), optax.sgd(1.0)),
}


@functools.cache
def trained_100_steps(names):
    """The weights, the biases and the losses by transformation: lifted, and dense."""
    txs = {name: EQUAL_TO_DENSE[name] for name in names}
    runs = {name: (lift(tx), Table, embax.value_and_grad, embax.apply_updates) for name, tx in txs.items()}
    runs |= {f"dense {name}": (tx, Dense, jax.value_and_grad, optax.apply_updates) for name, tx in txs.items()}
    params = {name: {"table": run[1](weight()), "bias": np.ones(2, np.float32)} for name, run in runs.items()}
    state = jax.jit(lambda params: {name: tx.init(params[name]) for name, (tx, *_) in runs.items()})(params)

    @jax.jit
    def step(carry, ids, targets):
        out = {}
        for name, (tx, _, value_and_grad, apply) in runs.items():
            params, state = carry[name]
            value, gradients = value_and_grad(loss)(params, ids, targets)
            updates, state = tx.update(gradients, state, params)
            out[name] = (apply(params, updates), state), value
        return {name: x for name, (x, _) in out.items()}, {name: x for name, (_, x) in out.items()}

    carry = {name: (params[name], state[name]) for name in runs}
    rng, targets, values = np.random.default_rng(1), weight(seed=2), []
    for _ in range(100):
        ids = rng.integers(0, rng.integers(2, ROWS), IDS)
        carry, value = step(carry, ids, targets[ids])
        values.append(value)
    return {
        name: (params["table"].weight, params["bias"], np.array([value[name] for value in values]))
        for name, (params, _) in carry.items()
    }


USUAL = ("sgd", "adagrad", "global_norm_adagrad")
REST_OF_DENSE = ("schedule", "clip_sgd")


@pytest.mark.parametrize("name", [*USUAL, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in REST_OF_DENSE)])
def test_equals_dense_training_over_100_steps(name):
    trained = trained_100_steps(USUAL if name in USUAL else REST_OF_DENSE)
    sparse, dense = trained[name], trained[f"dense {name}"]
    for ours, theirs in zip(sparse, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # float32
    assert sparse[2][-10:].mean() < sparse[2][:10].mean()


@functools.cache
def weights_of_30_steps(txs):
    """The weight of the table by case, before the first step and after each."""
    params = txs.of_all(params_of)
    states, weights = txs.start(params), [{name: weight() for name in params}]
    for i in range(30):
        of = {"table": gradient(i), "bias": np.zeros(2, np.float32)}
        params, states = txs.step(params, states, txs.of_all(lambda of=of: of))
        weights.append({name: np.array(params[name]["table"].weight) for name in params})
    return weights


@pytest.mark.parametrize("name", EACH)
def test_equals_the_lazy_reference(name):
    expected = reference.Lazy(weight(), CASES[name][1], PADDING, 1.0 if name == "clip_adagrad" else None)
    weights = [by_case[name] for by_case in weights_of_30_steps(with_others(name))]
    for i, (before, after) in enumerate(itertools.pairwise(weights)):
        of_table = gradient(i)
        touched = expected.step(np.asarray(of_table.ids), of_table.values)
        np.testing.assert_allclose(after[touched], expected.weight[touched], rtol=1e-4, atol=2e-5)  # float32
        others = sorted(set(range(ROWS)) - set(touched))
        assert len(others) >= ROWS // 2 - 1
        assert PADDING in others
        assert after.dtype == np.float32
        assert after[others].tobytes() == before[others].tobytes()


ODD = np.array([-0.0, np.nan, 1e-45, -np.inf, 3e38], np.float32)
READ = [1, 7, 9]


def owned(state):
    """The leaves of a state that have an entry for each row."""
    return [leaf for leaf in jax.tree.leaves(state) if np.ndim(leaf) and leaf.shape[0] == ROWS]


def fill(leaf):
    """Put -0.0, NaN, a denormal number and infinity into all rows but those that are read."""
    if not (np.ndim(leaf) and leaf.shape[0] == ROWS):
        return leaf
    odd = np.resize(ODD, leaf.shape).astype(leaf.dtype)
    odd[READ] = np.asarray(leaf)[READ]
    return odd


def gradient_of_few_rows():
    ids = np.resize([7, PADDING, 9, 7, ROWS, 1, PADDING], IDS)
    of_table = RowGrad(ids, np.full((IDS, DIM), 0.5, np.float32), rows=ROWS)
    return {"table": of_table, "bias": np.zeros(2, np.float32)}


@functools.cache
def step_among_odd_rows(txs):
    """The parameters and the state by case, before and after a step of few rows."""
    params = txs.of_all(lambda: host({**params_of(), "table": Table(fill(weight()), padding_idx=PADDING)}))
    states = {name: x._replace(inner=jax.tree.map(fill, x.inner)) for name, x in txs.start(params).items()}
    before = host((params, states))
    return before, host(txs.step(params, states, txs.of_all(gradient_of_few_rows)))


def assert_only_read_rows_change(name, before, after):
    others = [row for row in range(ROWS) if row not in READ]
    old, new = ([params["table"].weight, *owned(state.inner)] for params, state in (before, after))
    for x, y in zip(old, new, strict=True):
        assert y[others].tobytes() == x[others].tobytes()
    assert (new[0][READ] != old[0][READ]).all() == (name not in ("schedule", "adam_schedule", "inject"))


@pytest.mark.parametrize("name", EACH)
def test_rows_that_were_not_read_and_their_state_keep_their_bits(name):
    before, after = ((params[name], states[name]) for params, states in step_among_odd_rows(with_others(name)))
    assert_only_read_rows_change(name, before, after)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_rows_that_were_not_read_keep_their_bits_without_jit(name):
    before = tuple(x[name] for x in step_among_odd_rows(ALL)[0])
    after = take_step(CASES[name][0], *jax.tree.map(jnp.asarray, before), gradient_of_few_rows())
    assert_only_read_rows_change(name, before, host(after))


def test_ordinary_leaves_train_like_without_tables():
    names = ("schedule", "adamw", "rowwise_adagrad")
    txs = Together({kind + name: CASES[name][0] for name in names for kind in ("mixed ", "plain ")})

    def tree(name, table, bias, more):
        return {"bias": bias, "more": [np.float32(more)]} | ({"table": table} if name.startswith("mixed") else {})

    params = {name: tree(name, Table(weight()), weight(seed=3), 1) for name in txs.txs}
    gradients = [{name: tree(name, gradient(i), weight(seed=4 + i), 0.3) for name in txs.txs} for i in range(3)]
    params, _ = txs.run(params, gradients)
    for name in names:
        mixed, plain = params["mixed " + name], params["plain " + name]
        for ours, theirs in (mixed["bias"], plain["bias"]), (mixed["more"][0], plain["more"][0]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)  # float32


def test_frozen_and_integer_tables_pass_through_without_state():
    txs = some("sgd", "clip_adagrad", "rowwise_adam")

    def others():
        return {"frozen": Table(weight(), freeze=True), "whole": Table(np.arange(6).reshape(3, 2))}

    def total(params):
        read = [embax.lookup(table, [1, 2, 2]).sum() for table in (params["table"], *params["a"].values())]
        return sum(read) + params["bias"].sum()

    params = txs.of_all(lambda: {"a": others(), **params_of()})
    states, alone = txs.start(params), jax.eval_shape(txs.start, txs.of_all(params_of))
    of = jax.jit(embax.grad(total))(params["sgd"])
    after, _ = txs.step(params, states, txs.of_all(lambda: of))
    for name in txs.txs:
        shapes, shapes_alone = ([leaf.shape for leaf in jax.tree.leaves(x[name])] for x in (states, alone))
        assert shapes == shapes_alone, name
        assert bits(after[name]["a"]) == bits(others()), name
        assert bits(after[name]["table"]) != bits(weight()), name


@pytest.mark.parametrize("length", [0, IDS])
def test_a_gradient_without_rows_changes_no_row(length):
    names = ("sgd", "adamw", "clip_adagrad", "rowwise_adam")
    ones = np.ones(2, np.float32)
    params, states = ALL.run(ALL.of_all(params_of), [ALL.of_all(lambda: {"table": gradient(0), "bias": ones})])
    before = host((params, states))
    ids = np.resize([ROWS, PADDING, ROWS], length)
    nothing = {"table": RowGrad(ids, np.full((length, DIM), np.nan, np.float32), rows=ROWS), "bias": ones}
    after = ALL.step(params, states, ALL.of_all(lambda: nothing))
    for name in names:
        (params, state), (new_params, new_state) = ((x[0][name], x[1][name]) for x in (before, after))
        assert bits(new_params["table"]) == bits(params["table"]), name
        assert bits(owned(new_state.inner)) == bits(owned(state.inner)), name
        assert (new_params["bias"] != params["bias"]).all(), name


def test_empty_and_small_tables():
    shapes = {"sgd": [(ROWS, 0), (1, 1)], "adamw": [(0, DIM), (1, 1)], "rowwise_adam": [(0, DIM), (ROWS, 0)]}
    cases = {(name, shape): CASES[name][0] for name, of_name in shapes.items() for shape in of_name}
    params, gradients, ones = {}, {}, np.ones(2, np.float32)
    for name, shape in cases:
        ids = [0] * min(shape[0], 2)
        params[name, shape] = {"table": Table(weight(shape=shape)), "bias": ones}
        of_table = RowGrad(ids, np.ones((len(ids), shape[1]), np.float32), rows=shape[0])
        gradients[name, shape] = {"table": of_table, "bias": ones}
    after, _ = Together(cases).run(params, [gradients])
    for name, shape in cases:
        assert after[name, shape]["table"].weight.shape == shape, name
        assert np.isfinite(after[name, shape]["table"].weight).all(), (name, shape)
        assert (after[name, shape]["bias"] != ones).all(), (name, shape)


def test_rows_of_any_number_of_axes():
    shapes = {"sgd": (7, 2, 3), "adagrad": (7,), "adamw": (7, 2, 3), "rowwise_adam": (7, 2, 3)}
    cases = {(name, shape): CASES[name][0] for name, shape in shapes.items()}
    bias = np.zeros(2, np.float32)
    params = {case: {"table": Table(weight(shape=case[1])), "bias": bias} for case in cases}
    gradients = [{case: gradient(i, shape=case[1], length=9) for case in cases} for i in range(3)]
    trees = [{case: {"table": x, "bias": bias} for case, x in of.items()} for of in gradients]
    params, _ = Together(cases).run(params, trees)
    for name, shape in cases:
        expected = reference.Lazy(weight(shape=shape), CASES[name][1])
        for of in gradients:
            expected.step(np.asarray(of[name, shape].ids), of[name, shape].values)
        np.testing.assert_allclose(
            params[name, shape]["table"].weight, expected.weight, rtol=1e-4, atol=1e-5, err_msg=str((name, shape))
        )  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """Tables as fields of a dataclass, in a dict and beside ordinary leaves."""

    words: Any
    others: dict[str, Any]


def test_several_tables_anywhere_in_a_tree():
    txs = some("sgd", "adamw")
    shapes = {"a": (ROWS, DIM), "b": (ROWS, DIM), "c": (9, 2)}

    def model(a, b, c):
        return Model(a, {"deep": {"b": b, "none": None, "c": c}, "bias": np.ones(2, np.float32)})

    gradients = [
        {key: gradient(10 * i + ord(key), shape=shape, length=9) for key, shape in shapes.items()} for i in range(4)
    ]
    params = txs.of_all(lambda: model(*(Table(weight(shape=shape)) for shape in shapes.values())))
    params, _ = txs.run(params, [txs.of_all(lambda of=of: model(**of)) for of in gradients])
    for name in txs.txs:
        deep = params[name].others["deep"]
        for key, table in {"a": params[name].words, "b": deep["b"], "c": deep["c"]}.items():
            expected = reference.Lazy(weight(shape=shapes[key]), CASES[name][1])
            for of in gradients:
                expected.step(np.asarray(of[key].ids), of[key].values)
            np.testing.assert_allclose(
                table.weight, expected.weight, rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}"
            )  # float32
