"""Training of NNX modules by optax: as dense training, in place, by the rows that were read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

import embax
from embax.nnx import Embedding, Optimizer
from embax.optim import lift, rowwise_adagrad, rowwise_adam

WEIGHT = np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(6, 2)

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Model(nnx.Module):
    def __init__(self, rows=6, dim=2, **rules):
        weight = np.resize(WEIGHT, (rows, dim))
        self.embedding = Embedding.from_pretrained(weight, **{"freeze": False, **rules})
        self.scale = nnx.Param(jax.device_put(np.linspace(1, 2, dim, dtype=np.float32)[None]))

    def __call__(self, ids):
        return ((self.embedding(ids) * self.scale[...] - 0.5) ** 2).sum()


def batch(i, rows=6):
    return np.array([i % rows, (3 * i + 1) % rows, i % rows, -1])


def weights(model):
    return {"table": model.embedding.embedding.get_value(), "scale": model.scale.get_value()}


def train(model, optimizer, steps=8, value_and_grad=embax.nnx.value_and_grad, compiled=True, loss=Model.__call__):
    def step(model, optimizer, ids):
        value, gradient = value_and_grad(loss)(model, ids)
        optimizer.update(model, gradient)
        return value

    step = nnx.jit(step, donate_argnums=(0, 1)) if compiled else step
    return [step(model, optimizer, batch(i)) for i in range(steps)]


def assert_same_training(ours, theirs, values, expected):
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32
    for name, value in weights(theirs).items():
        np.testing.assert_allclose(weights(ours)[name], value, rtol=1e-5, atol=1e-6)


TX = {"sgd": lambda: optax.sgd(0.02), "adagrad": lambda: optax.adagrad(0.1)}
ALL = {"padding_idx": 1, "max_norm": 1.0, "scale_grad_by_freq": True}


@pytest.mark.parametrize(
    ("compiled", "tx", "rules"),
    [
        # Outside of jit, each operation is a program of its own; the tests of updates take fewer.
        pytest.param(False, "sgd", {}, marks=pytest.mark.exhaustive),
        pytest.param(True, "sgd", ALL, marks=pytest.mark.exhaustive),
        (True, "adagrad", ALL),
    ],
    ids=str,
)
def test_training_equals_nnx(compiled, tx, rules):
    ours, theirs = Model(**rules), Model(**rules)
    values = train(ours, Optimizer(ours, lift(TX[tx]())), compiled=compiled)
    expected = train(theirs, nnx.Optimizer(theirs, TX[tx](), wrt=nnx.Param), value_and_grad=nnx.value_and_grad)
    assert_same_training(ours, theirs, values, expected)
    assert values[-1] < values[0]
    assert isinstance(ours.embedding.embedding, nnx.Param)
    assert isinstance(ours.embedding.embedding.get_value(), jax.Array)


def test_dense_gradients_are_taken_too():
    ours, theirs = Model(padding_idx=1), Model(padding_idx=1)
    values = train(ours, Optimizer(ours, lift(TX["adagrad"]())), value_and_grad=nnx.value_and_grad)
    theirs_optimizer = nnx.Optimizer(theirs, TX["adagrad"](), wrt=nnx.Param)
    assert_same_training(ours, theirs, values, train(theirs, theirs_optimizer, value_and_grad=nnx.value_and_grad))


@pytest.mark.parametrize("value_and_grad", [embax.nnx.value_and_grad, nnx.value_and_grad])
def test_padding_and_frozen_rows_never_change(value_and_grad):
    tx = lift(optax.adamw(0.1, weight_decay=0.5))
    models = nnx.List([Model(padding_idx=1), Model(freeze=True)])
    loss = lambda models, ids: models[0](ids) + models[1](ids)  # noqa: E731
    train(models, Optimizer(models, tx), steps=6, value_and_grad=value_and_grad, loss=loss)
    with_padding, frozen = (weights(model) for model in models)
    changed = (np.asarray(with_padding["table"]) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    np.testing.assert_array_equal(frozen["table"], WEIGHT)
    assert (np.asarray(frozen["scale"]) != [[1.0, 2.0]]).all()


def test_rows_that_are_not_read_stay_unchanged():
    model = Model(rows=100)
    before = np.asarray(weights(model)["table"])
    train(model, Optimizer(model, lift(optax.adamw(0.1))), steps=2)
    changed = (np.asarray(weights(model)["table"]) != before).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [0, 1, 4, 99])


def test_transformations_for_tables_work():
    txs = {
        "rowwise_adam": rowwise_adam(0.1),
        "chain": optax.chain(
            embax.optim.clip_by_global_norm(1.0), lift(optax.adam(optax.cosine_decay_schedule(0.1, 100)))
        ),
        "multi_transform": optax.multi_transform(
            {"table": rowwise_adagrad(0.1), "rest": optax.adam(0.1)},
            lambda params: {key: "table" if "embedding" in key else "rest" for key in params},
        ),
    }
    models = nnx.Dict({name: Model() for name in txs})
    optimizers = nnx.Dict({name: Optimizer(models[name], tx) for name, tx in txs.items()})

    @nnx.jit(donate_argnums=(0, 1))
    def step(models, optimizers, ids):
        values = {}
        for name in txs:
            values[name], gradient = embax.nnx.value_and_grad(Model.__call__)(models[name], ids)
            optimizers[name].update(models[name], gradient)
        return values

    values = [step(models, optimizers, batch(i)) for i in range(8)]
    for name in txs:
        assert values[-1][name] < values[0][name], name


def of_batch(model):
    return model(batch(0))


@nnx.jit
def gradient_of(model):
    return embax.nnx.grad(of_batch)(model)


@nnx.jit(static_argnames=("fun", "grad"))
def step_once(model, optimizer, fun=of_batch, grad=embax.nnx.grad):
    """Update by the gradient of a function, in one program."""
    optimizer.update(model, grad(fun)(model))


def test_updates_are_returned_and_steps_counted():
    model = Model()
    optimizer = Optimizer(model, lift(optax.sgd(0.5)))
    assert isinstance(optimizer, nnx.Optimizer)
    assert isinstance(optimizer.step, nnx.OptState)
    before, gradient = weights(model), gradient_of(model)
    updates = optimizer.update(model, gradient)
    assert isinstance(updates["embedding"]["embedding"], embax.RowGrad)
    np.testing.assert_allclose(weights(model)["scale"], before["scale"] + updates["scale"], rtol=1e-6)  # float32
    optimizer.update(model, gradient)
    assert optimizer.step[...] == 2


def test_its_state_is_found_and_survives_split_and_merge():
    model = Model()
    optimizer = Optimizer(model, lift(optax.adam(0.1)))
    train(model, optimizer, steps=3)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(optimizer))}
    assert ("step",) in paths
    moments = [path for path in paths if path[-2:] == ("embedding", "weight")]
    assert {path[path.index("embedding") - 1] for path in moments} == {"mu", "nu"}
    assert all(path[0] in ("step", "opt_state") for path in paths)
    copy, twin = nnx.merge(*nnx.split(optimizer)), nnx.clone(model)
    copy = nnx.clone(copy)
    for one, of in (optimizer, model), (copy, twin):
        step_once(of, one)
    jax.tree.map(np.testing.assert_array_equal, weights(twin), weights(model))
    assert copy.step[...] == optimizer.step[...] == 4


def test_training_continues_from_a_checkpoint(tmp_path):
    tx = lift(optax.adam(0.1))
    whole = Model()
    expected = train(whole, Optimizer(whole, tx), steps=6)
    model = Model()
    optimizer = Optimizer(model, tx)
    train(model, optimizer, steps=3)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", nnx.to_pure_dict(nnx.state((model, optimizer))))
        checkpointer.wait_until_finished()
        fresh = nnx.eval_shape(lambda: (lambda model: (model, Optimizer(model, tx)))(Model()))
        abstract = nnx.state(fresh)
        restored = checkpointer.restore(tmp_path / "run", nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, restored)
    nnx.update(fresh, abstract)
    model, optimizer = fresh
    assert optimizer.step[...] == 3

    @nnx.jit
    def step(model, optimizer, ids):
        value, gradient = embax.nnx.value_and_grad(Model.__call__)(model, ids)
        optimizer.update(model, gradient)
        return value

    values = [step(model, optimizer, batch(i)) for i in range(3, 6)]
    np.testing.assert_allclose(values, expected[3:], rtol=1e-5)  # float32


def test_wrt_chooses_the_trained_variables():
    model = Model()
    optimizer = Optimizer(model, lift(optax.adamw(0.1)), wrt=nnx.PathContains("scale"))
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(optimizer)) if "embedding" in path]
    optimizer.update(model, gradient_of(model))
    np.testing.assert_array_equal(weights(model)["table"], WEIGHT)
    assert (weights(model)["scale"] != jnp.array([[1.0, 2.0]])).all()


def test_gradients_of_a_part():
    model = Model()
    table = nnx.PathContains("embedding")
    optimizer = Optimizer(model, rowwise_adagrad(0.1), wrt=table)
    step_once(model, optimizer, grad=lambda fun: embax.nnx.grad(fun, argnums=nnx.DiffState(0, table)))
    np.testing.assert_array_equal(weights(model)["scale"], [[1, 2]])
    assert (weights(model)["table"][0] != WEIGHT[0]).any()


def test_further_arguments_reach_the_transformation():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model = Model()
    optimizer = Optimizer(model, optax.chain(tx, lift(optax.sgd(0.1))))
    optimizer.update(model, gradient_of(model), value=3.0)
    assert seen[-1] == {"value": 3.0}
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Optimizer(model, lift(optax.sgd(0.1)), lr=3)


def test_tied_layers():
    class Tied(nnx.Module):
        def __init__(self):
            self.first, self.second = (Embedding.from_pretrained(WEIGHT, freeze=False, padding_idx=1) for _ in range(2))
            self.second.embedding = self.first.embedding

        def __call__(self, ids):
            return ((self.first(ids) + self.second((ids + 1) % 6)) ** 2).sum()

    def run(model, optimizer, value_and_grad):
        @nnx.jit
        def step(model, optimizer, ids):
            optimizer.update(model, value_and_grad(Tied.__call__)(model, ids)[1])

        for i in range(4):
            step(model, optimizer, batch(i))

    ours, theirs = Tied(), Tied()
    run(ours, Optimizer(ours, lift(optax.sgd(0.02))), embax.nnx.value_and_grad)
    run(theirs, nnx.Optimizer(theirs, optax.sgd(0.02), wrt=nnx.Param), nnx.value_and_grad)
    expected = theirs.first.embedding.get_value()
    np.testing.assert_allclose(ours.first.embedding.get_value(), expected, rtol=1e-5)  # float32
    run(ours, Optimizer(ours, lift(optax.adamw(0.1, weight_decay=0.5))), embax.nnx.value_and_grad)
    assert ours.second.embedding is ours.first.embedding
    np.testing.assert_array_equal(ours.first.embedding.get_value()[1], WEIGHT[1])


def test_rules_apply_only_if_all_layers_that_share_a_weight_have_them():
    a, b = Embedding.from_pretrained(WEIGHT, padding_idx=0), Embedding.from_pretrained(WEIGHT, freeze=False)
    b.embedding = a.embedding
    model = nnx.List([a, b])
    step_once(model, Optimizer(model, lift(optax.sgd(0.1))), lambda ms: (ms[0]([0, 1]) + ms[1]([0, 0])).sum())
    np.testing.assert_allclose(a.embedding.get_value(), WEIGHT - np.array([[0.2]] + [[0.0]] * 5), rtol=1e-6)  # float32


def test_rules_changed_after_the_start():
    model = Model()
    tx = lift(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)))
    optimizer = Optimizer(model, tx)
    gradient = nnx.grad(Model.__call__)(model, batch(0))
    model.embedding.padding_idx = 1
    optimizer.update(model, gradient)
    changed = (np.asarray(weights(model)["table"]) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    model.embedding.freeze = True
    before = weights(model)["table"]
    optimizer.update(model, gradient)
    np.testing.assert_array_equal(weights(model)["table"], before)
    optimizer = Optimizer(model, tx)
    optimizer.update(model, gradient)
    model.embedding.freeze = False
    match = r"must not have a table trained that was frozen when .*, got \['embedding'\]\['embedding'\]. Call"
    with pytest.raises(ValueError, match=match):
        optimizer.update(model, gradient)


def test_modules_without_a_table_are_trained_by_plain_optax():
    kernel = lambda *_: jnp.asarray(WEIGHT[:2, :1])  # noqa: E731
    ours, theirs = (nnx.Linear(2, 1, kernel_init=kernel, rngs=nnx.Rngs(0)) for _ in range(2))
    fun = lambda linear: (linear(jnp.ones((1, 2))) ** 2).sum()  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        step_once(ours, Optimizer(ours, optax.adam(0.1)), fun, nnx.grad)
        step_once(theirs, nnx.Optimizer(theirs, optax.adam(0.1), wrt=nnx.Param), fun, nnx.grad)
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.adamw(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_transformation_that_is_not_lifted_is_refused(tx):
    match = r"Optimizer\(tx=...\)` must take the RowGrads of .* \['embedding'\]\['embedding'\], .* Lift it: embax"
    with pytest.raises(TypeError, match=match):
        Optimizer(Model(), tx)


def test_bad_arguments():
    model = Model()
    with pytest.raises(TypeError, match=r"embax.nnx.Optimizer\(tx=...\)` must be an optax.Grad.*, got float. Pass one"):
        Optimizer(model, 0.1)
    optimizer, gradient = Optimizer(model, lift(optax.adam(0.1))), gradient_of(model)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'grads'"):
        optimizer.update(model)
    with pytest.raises(ValueError, match=r"'scale'.*'embedding'"):
        optimizer.update(model, nnx.State({"embedding": gradient["embedding"]}))
    rows = nnx.Param(gradient["embedding"]["embedding"].get_value())
    match = (
        r"Optimizer.update\(grads=...\)` must have a RowGrad for tables only, got one for \['scale'\].*tables=\.\.\."
    )
    with pytest.raises(ValueError, match=match):
        optimizer.update(model, nnx.State({"embedding": gradient["embedding"], "scale": rows}))
    assert optimizer.step[...] == 0
    np.testing.assert_array_equal(weights(model)["table"], WEIGHT)


def test_modules_in_a_list():
    ours, theirs = (nnx.List([Model(), Model()]) for _ in range(2))
    fun = lambda ms: ms[0](batch(0)) + 2 * ms[1](batch(1))  # noqa: E731
    step_once(ours, Optimizer(ours, lift(optax.adagrad(0.1))), fun)
    step_once(theirs, nnx.Optimizer(theirs, optax.adagrad(0.1), wrt=nnx.Param), fun, nnx.grad)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(weights(x)["table"], weights(y)["table"], rtol=1e-5)  # float32


def test_a_loop_of_steps():
    ours, theirs = Model(), Model()
    optimizer = Optimizer(ours, lift(optax.sgd(0.02)))

    @nnx.scan(in_axes=(nnx.Carry, 0))
    def run(carry, ids):
        model, optimizer = carry
        value, gradient = embax.nnx.value_and_grad(Model.__call__)(model, ids)
        optimizer.update(model, gradient)
        return carry, value

    _, values = run((ours, optimizer), jnp.stack([batch(i) for i in range(5)]))
    nnx_optimizer = nnx.Optimizer(theirs, optax.sgd(0.02), wrt=nnx.Param)
    expected = train(theirs, nnx_optimizer, steps=5, value_and_grad=nnx.value_and_grad)
    assert_same_training(ours, theirs, values, expected)
    assert optimizer.step[...] == 5


ROWS = 10**5

# All rules, and an optimizer with slots; and a gradient that does not depend on the rows, lest they are written before
# they are read.
MEMORY = {
    "adamw": (lift(optax.adamw(0.1)), Model.__call__, ALL),
    "sgd of a sum": (lift(optax.sgd(0.1)), lambda model, ids: model.embedding(ids).sum(), {}),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_of_a_step_follows_the_ids(case):
    tx, loss, rules = MEMORY[case]
    model = Model(rows=ROWS, dim=16, **rules)
    optimizer = Optimizer(model, tx)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, ids):
        value, gradient = embax.nnx.value_and_grad(loss)(model, ids)
        optimizer.update(model, gradient)
        return value

    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state((model, optimizer))))
    memory = step.lower(model, optimizer, jnp.arange(128)).compile().compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 128 * 16 * 4 * 10 < ROWS  # less than a byte a row
    assert memory.alias_size_in_bytes >= held
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1_000


def test_steps_update_in_place_and_compile_once():
    model, traced = Model(padding_idx=0, max_norm=1.0), []
    optimizer = Optimizer(model, lift(optax.adam(0.1)))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, ids):
        traced.append(None)
        optimizer.update(model, embax.nnx.grad(Model.__call__)(model, ids))

    for i in range(3):
        before = weights(model)["table"]
        step(model, optimizer, batch(i))
        assert before.is_deleted()
    assert len(traced) == 1
    assert optimizer.step[...] == 3
