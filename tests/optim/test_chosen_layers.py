"""Layers of Flax NNX, Equinox and brainstate themselves, trained by the rows that were read."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chosen_models import DIM, NAMES, ROWS, WEIGHT, BrainstateModel, EquinoxModel, NnxModel, tables
from flax import nnx
from jax.tree_util import keystr

import embax
import embax.equinox
import embax.nnx
from embax import RowGrad
from embax.optim import lift

RATE, DECAY = 0.1, 0.5
IDS = np.array([[3, 5, 3, -1], [7, 3, 1, ROWS - 2]])


def all_tables(path, leaf):
    return tables(path, leaf) or "ours" in keystr(path)


def adamw(tables=tables):
    return lift(optax.adamw(RATE, weight_decay=DECAY), tables=tables)


pytestmark = pytest.mark.usefixtures("users_promotion")


# For each framework: a model, a step in place, how to look at the compiled step, the weights and the moments by name,
# and the gradient that the framework itself gives.
class Nnx:
    def __init__(self):
        self.model = NnxModel()
        self.optimizer = embax.nnx.Optimizer(self.model, adamw())

        @nnx.jit(donate_argnums=(0, 1))
        def step(model, optimizer, ids):
            value, gradient = embax.nnx.value_and_grad(NnxModel.__call__, on_dense="error", tables=tables)(model, ids)
            assert isinstance(gradient["words"]["embedding"].get_value(), RowGrad)
            assert all(isinstance(gradient[name].get_value(), RowGrad) for name in NAMES[1:])
            optimizer.update(model, gradient)
            return value

        self.compiled = step.lower(self.model, self.optimizer, IDS).compile()

    def step(self, ids):
        self.optimizer = nnx.merge(*nnx.split(self.optimizer))  # as out of a checkpoint
        self.compiled(self.model, self.optimizer, ids)

    def memory(self):
        return self.compiled.compiled.memory_analysis()

    def weights(self):
        return by_name(nnx.to_pure_dict(nnx.state(self.model, nnx.Param)))

    def moments(self):
        state = self.optimizer.opt_state.inner[0]
        return [by_name(jax.tree.map(jnp.asarray, nnx.as_pure(moment))) for moment in (state.mu, state.nu)]

    def dense_gradient(self):
        return by_name(nnx.to_pure_dict(nnx.jit(nnx.grad(NnxModel.__call__))(self.model, IDS)))


class NnxState:
    """A model that is used as pure functions of its State, of which nobody knows that a layer of embax reads it."""

    def __init__(self):
        self.graph, self.params = nnx.split(NnxModel(), nnx.Param)
        tx = adamw(all_tables)
        self.state = tx.init(self.params)

        def step(params, state, ids):
            gradient = embax.grad(self.loss, on_dense="error", tables=all_tables)(params, ids)
            updates, state = tx.update(gradient, state, params)
            return embax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        self.compiled = step.lower(self.params, self.state, jnp.asarray(IDS)).compile()

    def loss(self, params, ids):
        return nnx.merge(self.graph, params)(ids)

    def step(self, ids):
        self.params, self.state = self.compiled(self.params, self.state, jnp.asarray(ids))

    def memory(self):
        return self.compiled.memory_analysis()

    def weights(self):
        return by_name(nnx.to_pure_dict(self.params))

    def moments(self):
        return [by_name(nnx.to_pure_dict(moment)) for moment in (self.state.inner[0].mu, self.state.inner[0].nu)]

    def dense_gradient(self):
        return by_name(nnx.to_pure_dict(jax.jit(jax.grad(self.loss))(self.params, IDS)))


class Equinox:
    def __init__(self):
        weight = jnp.asarray(WEIGHT)
        ours = embax.equinox.Embedding.from_pretrained(weight.copy(), freeze=False, padding_idx=1)
        arrays = eqx.nn.Embedding(weight=weight.copy()), weight.copy(), weight.copy()
        self.model = EquinoxModel(*arrays, ours, eqx.nn.Linear(DIM, 1, key=jax.random.key(0)))
        tx = adamw()
        self.state = tx.init(eqx.filter(self.model, eqx.is_inexact_array))

        @eqx.filter_jit(donate="all-except-first")
        def step(ids, model, state):
            gradient = embax.grad(EquinoxModel.__call__, on_dense="error", tables=tables)(model, ids)
            updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
            return embax.apply_updates(model, updates), state

        self.compiled = step.lower(jnp.asarray(IDS), self.model, self.state).compile()

    def step(self, ids):
        self.model, self.state = self.compiled(jnp.asarray(ids), self.model, self.state)

    def memory(self):
        return self.compiled.compiled.memory_analysis()

    def weights(self):
        return by_name(eqx.filter(self.model, eqx.is_array))

    def moments(self):
        return [by_name(moment) for moment in (self.state.inner[0].mu, self.state.inner[0].nu)]

    def dense_gradient(self):
        return by_name(eqx.filter_jit(eqx.filter_grad(EquinoxModel.__call__))(self.model, jnp.asarray(IDS)))


class Brainstate:
    def __init__(self):
        self.model = BrainstateModel()
        self.states = self.model.states(brainstate.ParamState)
        self.optimizer = embax.brainstate.Optimizer(adamw()).register_trainable_weights(self.states)

        @embax.brainstate.jit
        def step(ids):
            gradient = embax.brainstate.grad(self.model, self.states, on_dense="error", tables=tables)(ids)
            of_tables = gradient["words", "weight"], gradient["indexed",], gradient["tree",]["taken"]
            assert all(isinstance(rows, RowGrad) for rows in of_tables)
            self.optimizer.update(gradient)

        self.step = step

    def memory(self):
        return self.step.lower(IDS).compile().memory_analysis()

    def weights(self):
        return by_name({key: state.value for key, state in self.states.items()})

    def moments(self):
        state = self.optimizer.opt_state.value.inner[0]
        return [by_name(moment) for moment in (state.mu, state.nu)]

    def dense_gradient(self):
        return by_name(brainstate.transform.jit(brainstate.transform.grad(self.model, self.states))(IDS))


def by_name(tree):
    """The arrays with rows of a tree, by the names of the tables."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        for name in (*NAMES, "ours"):
            if name in keystr(path):
                found[name] = np.array(leaf)
    return found


FRAMEWORKS = {"nnx": Nnx, "nnx.State": NnxState, "equinox": Equinox, "brainstate": Brainstate}


@pytest.mark.parametrize(
    "framework", [pytest.param(x, marks=pytest.mark.exhaustive if x == "nnx.State" else ()) for x in FRAMEWORKS]
)
def test_a_step_trains_the_rows_that_were_read_in_place(framework):
    ours = FRAMEWORKS[framework]()
    memory = ours.memory()
    assert memory.temp_size_in_bytes < ROWS  # less than a byte a row
    assert memory.alias_size_in_bytes >= 4 * 3 * ROWS * DIM * 4  # of four tables and their moments
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000
    before, gradients = ours.weights(), ours.dense_gradient()
    np.testing.assert_array_equal(before["words"], WEIGHT)
    read = np.unique(IDS % ROWS)
    ours.step(IDS)
    for name, weight in ours.weights().items():
        rows = read[read != 1] if name == "ours" else read  # but its padding row
        gradient = gradients[name][rows]
        step = gradient / (np.abs(gradient) + 1e-8) + DECAY * WEIGHT[rows]  # the first one of AdamW
        np.testing.assert_allclose(weight[rows], WEIGHT[rows] - RATE * step, rtol=1e-4, atol=1e-5)  # float32
    ours.step((IDS + 1) % ROWS)
    rest = np.setdiff1d(np.arange(ROWS), [read, (read + 1) % ROWS])
    weights, moments = ours.weights(), ours.moments()
    for name in (*NAMES, "ours"):
        np.testing.assert_array_equal(weights[name][rest], WEIGHT[rest])
        assert (weights[name] != WEIGHT).any(axis=1).sum() > len(read)
        for moment in moments:
            assert not moment[name][rest].any()
            assert moment[name].any()


def grown(weight, rows):
    return np.concatenate([weight, WEIGHT[len(weight) : rows]])


class NnxHead(nnx.Module):
    """Few parameters: what is of interest is the table that grows, and another one."""

    def __init__(self, rows):
        weight = jnp.asarray(WEIGHT[:rows])
        self.words = nnx.Embed(rows, DIM, embedding_init=lambda *_: weight, rngs=nnx.Rngs(0))
        self.head = nnx.Param(jnp.asarray(WEIGHT[0]))

    def __call__(self, ids):
        return ((self.words(ids) * self.head) ** 2).sum()


class BrainstateHead(brainstate.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.words = brainstate.nn.Embedding(rows, DIM, embedding_init=jnp.asarray(WEIGHT[:rows]))
        self.head = brainstate.ParamState(jnp.asarray(WEIGHT[0]))

    def update(self, ids):
        return ((self.words(ids) * self.head.value) ** 2).sum()


def nnx_training(rows, tx):
    """A model, what grows its layer, its optimizer, and a step."""
    model = NnxHead(rows)
    optimizer = embax.nnx.Optimizer(model, tx)

    def grow(rows):
        model.words.embedding.set_value(jnp.asarray(grown(model.words.embedding[...], rows)))

    @nnx.jit
    def step(model, optimizer, ids):
        optimizer.update(model, embax.nnx.grad(NnxHead.__call__, tables=tables)(model, ids))

    return (
        grow,
        lambda: optimizer.carry_over(model),
        lambda ids: step(model, optimizer, ids),
        lambda: nnx.state((model.words, optimizer)),
    )


def brainstate_training(rows, tx):
    model = BrainstateHead(rows)
    states = model.states(brainstate.ParamState)
    optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(states)

    def grow(rows):
        model.words.weight.value = jnp.asarray(grown(model.words.weight.value, rows))

    @embax.brainstate.jit
    def step(ids):
        optimizer.update(embax.brainstate.grad(model, states, tables=tables)(ids))

    return (
        grow,
        lambda: optimizer.carry_over(states),
        step,
        lambda: (model.words.weight.value, optimizer.opt_state.value),
    )


@pytest.mark.parametrize("training", [nnx_training, brainstate_training])
def test_a_table_that_grows(training):
    def by_kind(params):
        return jax.tree.map_with_path(lambda path, _: "rows" if tables(path, None) else "rest", params)

    kinds = {"rows": lift(optax.adam(0.1), tables=tables), "rest": lift(optax.sgd(0.1))}
    tx = optax.chain(embax.optim.clip_by_global_norm(1.0), optax.multi_transform(kinds, by_kind))
    grow, carry_over, step, result = training(5, tx)
    step(np.array([0, 2, 2]))
    grow(6)
    with pytest.raises(ValueError, match=r"words.* had 5 rows, and has 6 now"):
        step(np.array([0]))
    before = jax.tree.map(np.array, result())
    carry_over()
    moments = [
        (x, y)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(result()), strict=True)
        if x.shape == (5, DIM) and y.shape == (6, DIM)
    ]
    assert len(moments) == 2
    for old, new in moments:
        np.testing.assert_array_equal(new[:5], old)
        assert not new[5].any()
    step(np.array([0, 4]))
