"""Arrays of other layers that a predicate makes tables: gradients by rows, and lifted optimizers for only these."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import RowGrad, Table

WEIGHT = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
IDS = np.array([[3, 5, 3], [7, 3, 0]])
PARAMS = {"embed": {"w": jnp.asarray(WEIGHT)}, "out": jnp.ones((4, 2)), "bias": jnp.zeros(2)}


def is_embedding(path, leaf):
    return path[0].key == "embed"


def loss(params, ids):
    def of_example(ids):
        return jnp.sin(params["embed"]["w"][ids].mean(0, keepdims=True) @ params["out"] + params["bias"][None])

    return jax.vmap(of_example)(ids).sum() * jnp.take(params["embed"]["w"], ids, axis=0).sum()


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        yield


def test_gradients_of_chosen_arrays_are_rows():
    gradient = jax.jit(embax.grad(loss, on_dense="error", tables=is_embedding))(PARAMS, IDS)
    expected = jax.grad(loss)(PARAMS, IDS)
    assert isinstance(gradient["embed"]["w"], RowGrad)
    assert len(gradient["embed"]["w"].ids) == 12
    np.testing.assert_allclose(gradient["embed"]["w"].to_dense(), expected["embed"]["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient["out"], expected["out"], rtol=1e-5)
    with pytest.warns(embax.DenseGradientWarning, match=r"argument 0\['out'\].* is dense"):
        gradient = embax.grad(loss, tables=lambda path, leaf: leaf.ndim == 2)(PARAMS, IDS)
    np.testing.assert_allclose(gradient["out"], expected["out"], rtol=1e-5)


@pytest.mark.parametrize("make", [optax.adamw, embax.optim.rowwise_adagrad], ids=["adamw", "rowwise_adagrad"])
def test_rows_that_are_not_read_stay_with_their_state(make):
    tx = make(0.1) if make is optax.adamw else make(0.1, tables=is_embedding)
    tx = embax.optim.lift(tx, tables=is_embedding) if make is optax.adamw else tx
    tables = {"embed": {"w": Table(WEIGHT)}, "out": PARAMS["out"], "bias": PARAMS["bias"]}
    of_tables = embax.optim.lift(optax.adamw(0.1)) if make is optax.adamw else make(0.1)

    def by_table(params, ids):
        return loss({**params, "embed": {"w": params["embed"]["w"].weight}}, ids)

    def steps(loss, tx, params, **options):
        @jax.jit
        def step(params, state, ids):
            gradient = embax.grad(loss, on_dense="error", **options)(params, ids)
            updates, state = tx.update(gradient, state, params)
            return embax.apply_updates(params, updates), state

        state = tx.init(params)
        for ids in (IDS, IDS + 1):
            params, state = step(params, state, ids)
        return params, state

    ours, state = steps(loss, tx, PARAMS, tables=is_embedding)
    theirs, their_state = steps(by_table, of_tables, tables)
    touched = np.unique([IDS, IDS + 1])
    weight = np.asarray(ours["embed"]["w"])
    rest = np.setdiff1d(np.arange(50), touched)
    np.testing.assert_array_equal(weight[rest], WEIGHT[rest])
    assert (weight[touched] != WEIGHT[touched]).any(axis=1).all()
    np.testing.assert_array_equal(weight, theirs["embed"]["w"].weight)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(their_state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_equinox_model_trains_by_a_change_of_two_lines():
    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        linear: eqx.nn.Linear
        activation: object = jax.nn.relu

        def __call__(self, ids):
            return self.linear(self.activation(jax.vmap(self.embedding)(ids).mean(0)))

    keys = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Embedding(50, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1]))

    def loss(model, ids):
        return (jax.vmap(model)(ids) ** 2).sum()

    def tables(path, leaf):
        return path[0].name == "embedding"

    tx = embax.optim.lift(optax.adagrad(0.1), tables=tables)
    gradient = embax.grad(loss, on_dense="error", tables=tables)(model, IDS)
    expected = eqx.filter_grad(loss)(model, IDS)
    assert isinstance(gradient.embedding.weight, RowGrad)
    np.testing.assert_allclose(gradient.embedding.weight.to_dense(), expected.embedding.weight, rtol=1e-5, atol=1e-6)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, _ = tx.update(gradient, tx.init(params), params)
    new = embax.apply_updates(model, updates)
    dense = optax.adagrad(0.1)
    theirs, _ = dense.update(expected, dense.init(params), params)
    np.testing.assert_allclose(
        new.embedding.weight, eqx.apply_updates(model, theirs).embedding.weight, rtol=1e-5, atol=1e-6
    )


def test_rows_at_a_leaf_that_was_not_chosen_are_refused_by_name():
    gradient = embax.grad(loss, tables=is_embedding)(PARAMS, IDS)
    tx = embax.optim.lift(optax.adam(0.1))
    with pytest.raises(ValueError, match=r"got one at params\['embed'\]\['w'\], which is none"):
        tx.update(gradient, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"must choose arrays of floats with an axis of rows, got 3 at \"\['n'\]\""):
        embax.grad(lambda p: p["w"].sum(), tables=lambda *_: True)({"w": jnp.ones((3, 2)), "n": 3})
    with pytest.raises(TypeError, match=r"tables=.*must be a function of a path and a leaf, got 'embed'"):
        embax.grad(loss, tables="embed")
