"""Layers of the frameworks whose vocabulary grows during training, and their optimizers."""

import itertools

import brainstate
import brainunit
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from meshes import usual_and_rest

import embax
import embax.equinox
import embax.nnx
from embax import RowGrad, Table

ROWS, GROWN, DIM = 5, 8, 3
KEY = jax.random.key(0)
WEIGHT = np.random.default_rng(0).normal(size=(GROWN, DIM)).astype(np.float32)
TXS = {
    "adam": embax.optim.lift(optax.adam(0.1)),
    "momentum": embax.optim.lift(optax.sgd(0.1, 0.9)),
    "rowwise": embax.optim.rowwise_adagrad(0.1),
    "chain": optax.chain(embax.optim.clip_by_global_norm(1.0), embax.optim.lift(optax.sgd(0.1, 0.9))),
}
REFUSED = r"`embax.optim.\S+.update\(state=...\)` must belong to .* had 5 rows, and has 8 now.*optimizer.carry_over"

pytestmark = pytest.mark.usefixtures("standard_promotion")


def rest(key, shape, dtype):
    """The rows that a grown table is to have."""
    return jnp.asarray(WEIGHT[-shape[0] :], dtype)


def ones(_, shape, dtype):
    return jnp.asarray(np.ones(shape, dtype))


def table_of(rows, **rules):
    return Table(WEIGHT[:rows], **{"padding_idx": 1, **rules})


@nnx.jit(donate_argnums=(0, 1))
def nnx_step(model, optimizer, ids):
    optimizer.update(model, embax.nnx.grad(lambda model: (model(ids) ** 2).sum())(model))


# For each framework: a model with a layer of a table; the layer grown; its optimizer; a step; what the optimizer does.
class Nnx:
    def __init__(self, rows, tx, **rules):
        self.layer = embax.nnx.Embedding.from_table(table_of(rows, **rules))
        self.model = nnx.Sequential(self.layer, nnx.Linear(DIM, 1, kernel_init=ones, rngs=nnx.Rngs(0)))
        self.optimizer = embax.nnx.Optimizer(self.model, tx)

    def step(self, ids):
        gradient = embax.nnx.grad(lambda model: (model(np.asarray(ids)) ** 2).sum())(self.model)
        self.optimizer.update(self.model, gradient)

    def compile(self):
        self.step = lambda ids: nnx_step(self.model, self.optimizer, np.asarray(ids))

    def carry_over(self):
        self.optimizer.carry_over(self.model)

    def result(self):
        return jax.tree.leaves((nnx.state(self.model), nnx.state(self.optimizer)))


class Brainstate:
    def __init__(self, rows, tx, **rules):
        self.layer = embax.Embedding.from_table(table_of(rows, **rules))
        self.scale = brainstate.ParamState(jnp.ones((1, DIM)))
        self.weights = {"table": self.layer.weight, "scale": self.scale}
        self.optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(self.weights)

    def step(self, ids):
        loss = lambda: ((self.layer(jnp.asarray(ids)) * self.scale.value) ** 2).sum()  # noqa: E731
        self.optimizer.update(embax.brainstate.grad(loss, self.weights)())

    def compile(self):
        step = embax.brainstate.jit(lambda ids: type(self).step(self, ids))
        self.step = lambda ids: step(np.asarray(ids))

    def carry_over(self):
        assert self.optimizer.carry_over(self.weights) is self.optimizer

    def result(self):
        return jax.tree.leaves((self.layer.weight.value, self.scale.value, self.optimizer.opt_state.value))


FRAMEWORKS = {"nnx": Nnx, "brainstate": Brainstate}


@pytest.mark.parametrize(
    ("framework", "name"),
    usual_and_rest(
        [("nnx", "chain"), ("brainstate", "rowwise")],
        itertools.product(FRAMEWORKS, TXS),
    ),
)
def test_training_of_a_grown_table_equals_one_that_was_always_large(framework, name):
    small, large = (FRAMEWORKS[framework](rows, TXS[name]) for rows in (ROWS, GROWN))
    for model in (small, large):
        model.compile()
        for _ in range(2):
            model.step([0, 2, 2, 1])
    small.layer.resize(GROWN, KEY, init=rest)
    assert (small.layer.num_embeddings, small.layer.padding_idx) == (GROWN, 1)
    with pytest.raises(ValueError, match=REFUSED):
        small.step([0, 2, 2, 1])
    small.carry_over()
    for model in (small, large):
        model.step([7, 0, 7, 1])
    for ours, theirs in zip(small.result(), large.result(), strict=True):
        # Scratch has other positions, of no meaning.
        if ours.dtype != jnp.int32:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_carry_over_to_an_unfrozen_table_and_another_padding_row(framework):
    model = FRAMEWORKS[framework](ROWS, TXS["momentum"], freeze=True)
    model.compile()
    model.step([0, 2])
    np.testing.assert_array_equal(model.layer.table.weight, WEIGHT[:ROWS])
    model.layer.freeze, model.layer.padding_idx = False, 3
    model.compile()  # brainstate traces no second time for other rules
    with pytest.raises(ValueError, match=r"carry_over"):
        model.step([0, 2])
    model.carry_over()
    model.step([0, 3])
    moved = np.abs(np.asarray(model.layer.table.weight) - WEIGHT[:ROWS]).sum(1) > 0
    assert moved.tolist() == [True, False, False, False, False]


def test_a_layer_that_an_nnx_model_gains():
    model = nnx.Dict(a=embax.nnx.Embedding.from_table(table_of(ROWS)))
    optimizer = embax.nnx.Optimizer(model, TXS["momentum"])
    model["b"] = embax.nnx.Embedding.from_table(table_of(GROWN))
    optimizer.carry_over(model)

    @nnx.jit
    def step(model, optimizer):
        gradient = embax.nnx.grad(lambda model: (model["a"](0) + model["b"](7)).sum())(model)
        optimizer.update(model, gradient)

    step(model, optimizer)
    assert np.abs(np.asarray(model["b"].embedding[...]) - WEIGHT).sum(1).nonzero()[0].tolist() == [7]


def test_states_that_brainstate_gains_and_loses():
    layers = {name: embax.Embedding.from_table(table_of(ROWS)) for name in "abc"}
    weights = {name: layer.weight for name, layer in layers.items()}
    optimizer = embax.brainstate.Optimizer(TXS["momentum"])
    with pytest.raises(ValueError, match=r"carry_over` must follow register_trainable_weights"):
        optimizer.carry_over(weights)
    optimizer.register_trainable_weights({"a": weights["a"], "b": weights["b"]})
    optimizer.update({name: RowGrad([0], WEIGHT[:1], rows=ROWS) for name in "ab"})
    optimizer.carry_over({"b": weights["b"], "c": weights["c"]})
    trace = optimizer.opt_state.value.inner[0].trace
    assert set(trace) == {"b", "c"}
    assert np.asarray(trace["b"].weight)[0].any()
    assert not np.asarray(trace["c"].weight).any()
    with pytest.raises(TypeError, match=r"carry_over\(states=...\)` must be a dict of States, got list"):
        optimizer.carry_over([weights["b"]])
    optimizer.update({name: RowGrad([0], WEIGHT[:1], rows=ROWS) for name in "bc"})


def test_the_modules_of_equinox():
    tx, model = TXS["adam"], embax.equinox.Embedding(weight=WEIGHT[:ROWS], padding_idx=-1)
    grown = model.resized(GROWN, KEY, init=rest)
    assert (model.num_embeddings, grown.num_embeddings, grown.table.padding_idx) == (ROWS, GROWN, ROWS - 1)
    np.testing.assert_array_equal(grown.weight, WEIGHT)
    of = lambda model: eqx.filter(model, eqx.is_inexact_array)  # noqa: E731
    gradient = embax.grad(lambda model: (model(jnp.array([0, 2])) ** 2).sum())
    _, state = jax.jit(lambda model: tx.update(gradient(model), tx.init(of(model)), of(model)))(model)
    with pytest.raises(ValueError, match=r"params.table had 5 rows, and has 8 now"):
        jax.eval_shape(lambda model: tx.update(gradient(model), state, of(model)), grown)
    carried = embax.optim.carry_over(state, of(model), of(grown), tx)
    np.testing.assert_array_equal(np.asarray(carried.inner[0].mu.weight)[:ROWS], state.inner[0].mu.weight)
    jax.eval_shape(lambda model: tx.update(gradient(model), carried, of(model)), grown)


def test_padding_row_counted_from_the_end_stays_the_same_row():
    layer = embax.nnx.Embedding(ROWS, DIM, padding_idx=-1, rngs=nnx.Rngs(0))
    layer.resize(GROWN, KEY)
    assert layer.padding_idx == ROWS - 1


def test_a_weight_with_a_unit_grows():
    layer = embax.Embedding.from_pretrained(WEIGHT[:ROWS] * brainunit.mV, freeze=False)
    layer.resize(GROWN)
    assert layer.weight.value.unit == brainunit.mV
    np.testing.assert_array_equal(np.asarray(layer.weight.value.mantissa)[:ROWS], WEIGHT[:ROWS])
    layer.resize(2)
    assert layer([0, 1]).shape == (2, DIM)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_ordinary_parameter_of_another_shape_is_refused(framework):
    model = FRAMEWORKS[framework](ROWS, TXS["adam"])
    if framework == "nnx":
        model.model.layers[1] = nnx.Linear(DIM, 2, kernel_init=ones, rngs=nnx.Rngs(0))
    else:
        model.scale.value = jnp.ones((2, DIM))
    with pytest.raises(ValueError, match=r"carry_over\((old|new)_params=...\)` must"):
        model.carry_over()
