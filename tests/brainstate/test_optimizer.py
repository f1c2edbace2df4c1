"""Training of brainstate states by optax: as dense training, in place, by the rows that were read."""

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax.optim import lift, rowwise_adagrad

WEIGHT = np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(6, 2)

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Model(brainstate.nn.Module):
    def __init__(self, rows=6, dim=2, **rules):
        super().__init__()
        weight = np.resize(WEIGHT, (rows, dim))
        self.embedding = embax.Embedding.from_pretrained(weight, **{"freeze": False, **rules})
        self.scale = brainstate.ParamState(jnp.asarray(np.linspace(1, 2, dim, dtype=np.float32)[None]))

    def update(self, ids):
        return ((self.embedding(ids) * self.scale.value - 0.5) ** 2).sum()


def batch(i, rows=6):
    return np.array([i % rows, (3 * i + 1) % rows, i % rows, -1])


COMPILE = {"eager": lambda fun: fun, "brainstate": brainstate.transform.jit, "embax": embax.brainstate.jit}


def train(model, tx, steps=8, grad=embax.brainstate.grad, compile_="embax"):
    weights = model.states(brainstate.ParamState)
    optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)

    @COMPILE[compile_]
    def step(ids):
        gradients, value = grad(model, weights, return_value=True)(ids)
        optimizer.update(gradients)
        return value

    return [step(batch(i)) for i in range(steps)], optimizer


def train_densely(model, tx, steps=8):
    """The same by brainstate and optax alone."""
    weights = model.states(brainstate.ParamState)
    opt_state = tx.init({key: state.value for key, state in weights.items()})

    @brainstate.transform.jit
    def step(ids, opt_state):
        gradients, value = brainstate.transform.grad(model, weights, return_value=True)(ids)
        params = {key: state.value for key, state in weights.items()}
        updates, opt_state = tx.update(gradients, opt_state, params)
        for key, new in optax.apply_updates(params, updates).items():
            weights[key].value = new
        return value, opt_state

    values = []
    for i in range(steps):
        value, opt_state = step(batch(i), opt_state)
        values.append(value)
    return values


def assert_same_training(ours, theirs, values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32
    for key, state in theirs.states(brainstate.ParamState).items():
        np.testing.assert_allclose(ours.states(brainstate.ParamState)[key].value, state.value, rtol=1e-5, atol=1e-6)


TX = {"sgd": lambda: optax.sgd(0.02), "adagrad": lambda: optax.adagrad(0.1)}
ALL = {"padding_idx": 1, "max_norm": 1.0, "scale_grad_by_freq": True}


@pytest.mark.parametrize(
    ("compile_", "tx", "rules"),
    [
        ("eager", "sgd", {}),
        ("brainstate", "adagrad", ALL),
        ("embax", "sgd", ALL),
        pytest.param("embax", "adagrad", {}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_training_equals_dense_training(compile_, tx, rules):
    ours, theirs, steps = Model(**rules), Model(**rules), 3 if compile_ == "eager" else 8
    values, _ = train(ours, lift(TX[tx]()), steps, compile_=compile_)
    assert_same_training(ours, theirs, values, train_densely(theirs, TX[tx](), steps))
    assert values[-1] < values[0]
    assert isinstance(ours.embedding.weight.value, jax.Array)


def test_dense_gradients_are_taken_too():
    ours, theirs = Model(padding_idx=1), Model(padding_idx=1)
    values, _ = train(ours, lift(TX["adagrad"]()), grad=brainstate.transform.grad)
    assert_same_training(ours, theirs, values, train_densely(theirs, TX["adagrad"]()))


@pytest.mark.parametrize("grad", [embax.brainstate.grad, brainstate.transform.grad])
def test_padding_and_frozen_rows_never_change(grad):
    class Both(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.with_padding, self.frozen = Model(padding_idx=1), Model(freeze=True)

        def update(self, ids):
            return self.with_padding(ids) + self.frozen(ids)

    model = Both()
    train(model, lift(optax.adamw(0.1, weight_decay=0.5)), grad=grad)
    changed = (np.asarray(model.with_padding.embedding.weight.value) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    np.testing.assert_array_equal(model.frozen.embedding.weight.value, WEIGHT)
    assert (np.asarray(model.frozen.scale.value) != [[1.0, 2.0]]).all()


def test_rows_that_are_not_read_stay_unchanged():
    model = Model(rows=100)
    before = np.asarray(model.embedding.weight.value)
    train(model, lift(optax.adamw(0.1)), steps=2)
    changed = (np.asarray(model.embedding.weight.value) != before).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [0, 1, 4, 99])


def test_transformations_for_tables_work():
    txs = {
        "rowwise_adam": embax.optim.rowwise_adam(0.1),
        "chain": optax.chain(
            embax.optim.clip_by_global_norm(1.0), lift(optax.adam(optax.cosine_decay_schedule(0.1, 100)))
        ),
        "multi_transform": optax.multi_transform(
            {"table": rowwise_adagrad(0.1), "rest": optax.adam(0.1)},
            lambda params: {key: "table" if "embedding" in key else "rest" for key in params},
        ),
    }
    models = {name: Model() for name in txs}
    weights = {name: model.states(brainstate.ParamState) for name, model in models.items()}
    optimizers = {
        name: embax.brainstate.Optimizer(tx).register_trainable_weights(weights[name]) for name, tx in txs.items()
    }

    @embax.brainstate.jit
    def step(ids):
        values = {}
        for name, model in models.items():
            gradients, values[name] = embax.brainstate.grad(model, weights[name], return_value=True)(ids)
            optimizers[name].update(gradients)
        return values

    values = [step(batch(i)) for i in range(8)]
    for name in txs:
        assert values[-1][name] < values[0][name], name


@pytest.mark.parametrize("tied_before", [True, False])
def test_tied_layers(tied_before):
    class Tied(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = embax.Embedding(6, 2, embedding_init=WEIGHT, padding_idx=1)
            self.second = embax.Embedding(6, 2, embedding_init=WEIGHT, padding_idx=1)
            if tied_before:
                self.second.weight = self.first.weight

        def update(self, ids):
            return ((self.first(ids) + self.second(ids + 1)) ** 2).sum()

    ours, theirs = Tied(), Tied()
    for model in ours, theirs:
        model.second.weight = model.first.weight
    assert len(ours.states()) == 1
    values, _ = train(ours, lift(optax.sgd(0.02)), steps=4)
    assert_same_training(ours, theirs, values, train_densely(theirs, optax.sgd(0.02), steps=4))
    if not tied_before:
        return
    decayed = Tied()
    decayed.second.weight = decayed.first.weight
    train(decayed, lift(optax.adamw(0.1, weight_decay=0.5)), steps=4)
    np.testing.assert_array_equal(decayed.first.weight.value[1], ours.first.weight.value[1])


def step_once(optimizer, fun, weights, **options):
    """Update by the gradient of a function, in one program."""
    embax.brainstate.jit(lambda: optimizer.update(embax.brainstate.grad(fun, weights, **options)()))()


def test_layer_tied_to_the_weight_of_another_module():
    output = brainstate.ParamState(jnp.asarray(WEIGHT))
    embedding = embax.Embedding(6, 2)
    embedding.weight = output
    weights = {"shared": output}
    optimizer = embax.brainstate.Optimizer(rowwise_adagrad(0.1)).register_trainable_weights(weights)
    step_once(optimizer, lambda: embedding([1]).sum(), weights)
    np.testing.assert_allclose(output.value[1], WEIGHT[1] - 0.1, rtol=1e-6)  # float32
    np.testing.assert_array_equal(output.value[2:], WEIGHT[2:])


def test_rules_apply_only_if_all_layers_that_share_a_weight_have_them():
    a, b = embax.Embedding(6, 2, padding_idx=0, freeze=True), embax.Embedding(6, 2)
    b.weight = a.weight
    weights = {"shared": a.weight}
    before = np.array(a.weight.value)
    optimizer = embax.brainstate.Optimizer(lift(optax.sgd(0.1))).register_trainable_weights(weights)
    step_once(optimizer, lambda: (a([0, 1]) + b([0, 0])).sum(), weights)
    np.testing.assert_allclose(a.weight.value, before - np.array([[0.2]] + [[0.0]] * 5), rtol=1e-6)  # float32


def test_weight_with_a_unit():
    weight = (WEIGHT + 3) * brainunit.ms
    embedding = embax.Embedding.from_pretrained(weight, padding_idx=1, freeze=False)
    frozen = embax.Embedding(6, 2, embedding_init=WEIGHT * brainunit.ms, freeze=True)
    weights = {"a": embedding.weight, "b": frozen.weight}
    optimizer = embax.brainstate.Optimizer(optax.adamw(0.1, weight_decay=0.5)).register_trainable_weights(weights)
    before = np.array(embedding.weight.value.mantissa)
    step_once(optimizer, lambda: ((embedding([0, 1]) + frozen([1, 2])) / brainunit.ms).sum(), weights)
    value = embedding.weight.value
    assert value.unit == brainunit.ms
    changed = (value.mantissa != before).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    np.testing.assert_array_equal(frozen.weight.value.mantissa, WEIGHT)


def test_states_that_hold_trees():
    class Tree(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = embax.Embedding.from_pretrained(WEIGHT, freeze=False)
            self.out = brainstate.nn.Linear(2, 3, w_init=np.full((2, 3), 0.5, np.float32))

        def update(self, ids):
            with jax.numpy_rank_promotion("allow"):
                return (self.out(self.embedding(ids)) ** 2).sum()

    model = Tree()
    weights = model.states(brainstate.ParamState)
    assert any(isinstance(state.value, dict) for state in weights.values())
    values, _ = train(model, lift(optax.adam(0.05)))
    assert values[-1] < values[0]


def test_optimizer_state_is_listed_among_states():
    _, optimizer = train(Model(), lift(optax.adam(0.1)), steps=1)
    assert isinstance(optimizer, brainstate.graph.Node)
    assert isinstance(optimizer.opt_state, brainstate.LongTermState)
    assert list(optimizer.states()) == [("opt_state",)]
    assert list(brainstate.graph.states(optimizer)) == [("opt_state",)]

    class Trainer(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.optimizer = optimizer

    assert list(Trainer().states()) == [("optimizer", "opt_state")]
    assert "Optimizer" in repr(optimizer)
    copy = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(optimizer))
    jax.tree.map(np.testing.assert_array_equal, copy.opt_state.value, optimizer.opt_state.value)


def test_training_continues_from_a_stored_state():
    tx = lift(optax.adam(0.1))
    whole, _ = train(Model(), tx, steps=6)
    model = Model()
    _, optimizer = train(model, tx, steps=3)
    stored = jax.tree.map(np.asarray, optimizer.opt_state.value)
    weights = model.states(brainstate.ParamState)
    fresh = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)
    fresh.opt_state.value = stored

    @embax.brainstate.jit
    def step(ids):
        gradients, value = embax.brainstate.grad(model, weights, return_value=True)(ids)
        fresh.update(gradients)
        return value

    values = [step(batch(i)) for i in range(3, 6)]
    np.testing.assert_allclose(values, whole[3:], rtol=1e-5)  # float32


def test_a_loop_of_steps():
    ours, theirs = Model(), Model()
    weights = ours.states(brainstate.ParamState)
    optimizer = embax.brainstate.Optimizer(lift(optax.sgd(0.02))).register_trainable_weights(weights)

    def step(ids):
        gradients, value = embax.brainstate.grad(ours, weights, return_value=True)(ids)
        optimizer.update(gradients)
        return value

    values = brainstate.transform.for_loop(step, jnp.stack([batch(i) for i in range(5)]))
    assert_same_training(ours, theirs, values, train_densely(theirs, optax.sgd(0.02), steps=5))


ROWS = 10**5

# All rules, and optimizers with slots and without; and a gradient that does not depend on the rows, lest they are
# written before they are read, and the whole table is copied.
RULES = {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
MEMORY = {
    "sgd": (lift(optax.sgd(0.1)), Model.update, RULES),
    "adamw": (lift(optax.adamw(0.1)), Model.update, {}),
    "rowwise_adagrad": (rowwise_adagrad(0.1), Model.update, {}),
    "sum": (lift(optax.sgd(0.1)), lambda model, ids: model.embedding(ids).sum(), {}),
}


@pytest.mark.parametrize("case", ["sgd", pytest.param("adamw", marks=pytest.mark.exhaustive), "rowwise_adagrad", "sum"])
def test_memory_of_a_step_follows_the_ids(case):
    tx, loss, rules = MEMORY[case]
    model = Model(rows=ROWS, dim=16, **rules)
    weights = model.states(brainstate.ParamState)
    optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)

    @embax.brainstate.jit
    def step(ids):
        fun = lambda ids: loss(model, ids)  # noqa: E731
        gradients, value = embax.brainstate.grad(fun, weights, return_value=True, check_states=False)(ids)
        optimizer.update(gradients)
        return value

    held = sum(x.nbytes for x in jax.tree.leaves(optimizer.opt_state.value)) + model.embedding.weight.value.nbytes
    memory = step.lower(jnp.arange(128)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 128 * 16 * 4 * 10 < ROWS  # less than a byte a row
    assert memory.alias_size_in_bytes >= held
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1_000


def test_step_updates_in_place():
    model = Model()
    before = model.embedding.weight.value
    train(model, lift(optax.adam(0.1)), steps=1)
    assert before.is_deleted()


def test_more_states_can_be_registered():
    a, b = embax.Embedding(6, 2), brainstate.ParamState(jnp.ones(2))
    optimizer = embax.brainstate.Optimizer(lift(optax.adam(0.1)))
    optimizer.register_trainable_weights({"a": a.weight})
    state = optimizer.opt_state
    optimizer.register_trainable_weights({"b": b, "b too": b})
    assert optimizer.opt_state is state
    update = embax.brainstate.jit(optimizer.update)
    gradients = {"a": embax.RowGrad([1], np.ones((1, 2), np.float32), rows=6), "b": jnp.ones(2)}
    update(gradients)
    np.testing.assert_allclose(np.abs(b.value - 1), 0.1, rtol=1e-4)  # float32
    update({**gradients, "b too": gradients["b"]})
    np.testing.assert_allclose(np.abs(b.value - 1), 0.2, rtol=1e-2)  # float32, as Adam


def test_changed_rules():
    model = Model()
    weights = model.states(brainstate.ParamState)
    tx = lift(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)))
    optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)
    gradients = brainstate.transform.grad(model, weights)(batch(0))
    model.embedding.padding_idx = 1
    optimizer.update(gradients)
    changed = (np.asarray(model.embedding.weight.value) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    model.embedding.freeze = True
    before = model.embedding.weight.value
    optimizer.update(gradients)
    assert model.embedding.weight.value is before
    optimizer.register_trainable_weights(weights)
    optimizer.update(gradients)
    assert model.embedding.weight.value is before
    model.embedding.freeze = False
    with pytest.raises(ValueError, match="was frozen when it was registered"):
        optimizer.update(gradients)
    optimizer.register_trainable_weights(weights)
    optimizer.update(gradients)
    assert (model.embedding.weight.value[0] != before[0]).all()


def test_plain_optax_trains_ordinary_states():
    state = brainstate.ParamState(jnp.ones(2))
    optimizer = embax.brainstate.Optimizer(optax.sgd(0.5)).register_trainable_weights({"x": state})
    optimizer.update({"x": jnp.ones(2)})
    np.testing.assert_array_equal(state.value, [0.5, 0.5])


def test_integer_weight_is_left_alone():
    embedding = embax.Embedding.from_pretrained(np.arange(6).reshape(3, 2), freeze=False)
    scale = brainstate.ParamState(jnp.ones(()))
    weights = {"table": embedding.weight, "scale": scale}
    optimizer = embax.brainstate.Optimizer(lift(optax.adamw(0.1))).register_trainable_weights(weights)
    step_once(optimizer, lambda: (embedding([1]).astype(jnp.float32) * scale.value).sum(), weights, allow_int=True)
    np.testing.assert_array_equal(embedding.weight.value, np.arange(6).reshape(3, 2))
    assert scale.value < 1
