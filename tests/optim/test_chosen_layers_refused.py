"""The paths that a predicate of tables sees in each framework, and what it may not choose."""

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chosen_models import DIM, BrainstateModel, NnxModel, tables
from flax import nnx
from jax.tree_util import DictKey, keystr

import embax
import embax.nnx
from embax.optim import lift

pytestmark = pytest.mark.usefixtures("users_promotion")


def test_the_paths_that_a_predicate_sees():
    seen = []

    def look(path, leaf):
        seen.append((path, leaf.shape))
        return False

    gradient = embax.nnx.grad(NnxModel.__call__, tables=look)
    nnx.eval_shape(lambda: gradient(NnxModel(5), jnp.array([1])))
    assert ((DictKey("words"), DictKey("embedding")), (5, DIM)) in seen
    assert len(seen) == 5  # all Params but that of embax's own layer
    for_gradient, seen[:] = seen[:], []
    embax.nnx.Optimizer(NnxModel(5), lift(optax.sgd(0.1), tables=look))
    assert set(seen) == set(for_gradient)
    seen.clear()
    model = BrainstateModel(5)
    states = model.states(brainstate.ParamState)
    jax.eval_shape(embax.brainstate.grad(model, states, tables=look), np.array([1]))
    assert ((DictKey(("words", "weight")),), (5, DIM)) in seen
    assert ((DictKey(("tree",)), DictKey("taken")), (5, DIM)) in seen
    for_gradient, seen[:] = seen[:], []
    embax.brainstate.Optimizer(lift(optax.sgd(0.1), tables=look)).register_trainable_weights(states)
    assert set(seen) == set(for_gradient)


def test_optimizers_and_grad_refuse_wrong_choices_by_name():
    model, ids = NnxModel(5), np.array([1])
    gradient = nnx.jit(embax.nnx.grad(NnxModel.__call__, tables=tables))(model, ids)
    for tx in (lift(optax.adam(0.1)), lift(optax.adam(0.1), tables=lambda path, leaf: "words" in keystr(path))):
        optimizer = embax.nnx.Optimizer(model, tx)
        with pytest.raises(ValueError, match=r"RowGrad for tables only, got one for \['indexed'\],.*tables="):
            optimizer.update(model, gradient)
    with pytest.raises(TypeError, match=r"`embax.nnx.grad\(tables=...\)` must be a function of .*, got 'words'"):
        embax.nnx.grad(NnxModel.__call__, tables="words")
    counts = nnx.Dict(words=nnx.Param(jnp.arange(3)))
    with pytest.raises(ValueError, match=r"must choose arrays of floats with .*, got int32\[3\] at \"\['words'\]\""):
        embax.nnx.grad(lambda counts: 0.0, tables=tables, allow_int=True)(counts)
    with pytest.raises(ValueError, match=r"lift\(tables=...\)` must choose .*, got int32\[3\] at \"\['words'\]\""):
        embax.nnx.Optimizer(counts, lift(optax.adam(0.1), tables=tables))


def test_optimizers_and_grad_refuse_wrong_choices_by_name_in_brainstate():
    model, ids = BrainstateModel(5), np.array([1])
    states = model.states(brainstate.ParamState)
    gradient = brainstate.transform.jit(embax.brainstate.grad(model, states, tables=tables))(ids)
    for tx in (lift(optax.adam(0.1)), lift(optax.adam(0.1), tables=lambda path, leaf: "words" in keystr(path))):
        optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(states)
        with pytest.raises(ValueError, match=r"RowGrad for tables only, got one for \[\('indexed',\)\],.*tables="):
            optimizer.update(gradient)
    plain = embax.brainstate.Optimizer(optax.adam(0.1)).register_trainable_weights({"a": model.indexed})
    with pytest.raises(ValueError, match=r"RowGrad for tables only, got one for \['a'\],.*tables="):
        plain.update({"a": gradient["indexed",]})
    with pytest.raises(TypeError, match=r"`embax.brainstate.grad\(tables=...\)` must be a function of .*, got 'words'"):
        embax.brainstate.grad(model, states, tables="words")
    scalar = {"words": brainstate.ParamState(jnp.ones(()))}
    with pytest.raises(ValueError, match=r"got float32\[\] at \"\['words'\]\""):
        embax.brainstate.grad(lambda: 0.0, scalar, check_states=False, tables=tables)()
    with_unit = {"words": brainstate.ParamState(jnp.ones((3, 2)) * brainunit.mV)}
    with pytest.raises(ValueError, match=r"got Quantity of float32\[3,2\] at \"\['words'\]\""):
        embax.brainstate.grad(lambda: 0.0, with_unit, check_states=False, tables=tables)()
    optimizer = embax.brainstate.Optimizer(lift(optax.adam(0.1), tables=tables))
    with pytest.raises(ValueError, match=r"must choose tables without a unit, got a Quantity in mV at \['words'\]"):
        optimizer.register_trainable_weights(with_unit)


def test_dense_gradient_of_a_chosen_array_warns():
    def of_all_rows():
        return (state.value**2).sum()

    state = brainstate.ParamState(jnp.ones((5, 2)))
    with pytest.warns(embax.DenseGradientWarning, match=r"grad_states\['words'\].* is dense"):
        gradient = embax.brainstate.grad(of_all_rows, {"words": state}, tables=tables)()
    np.testing.assert_array_equal(gradient["words"], 2 * np.ones((5, 2)))
    optimizer = embax.brainstate.Optimizer(lift(optax.sgd(0.25), tables=tables))
    optimizer.register_trainable_weights({"words": state}).update(gradient)
    np.testing.assert_array_equal(state.value, np.full((5, 2), 0.5))
    param = nnx.Dict(words=nnx.Param(jnp.ones((5, 2))))
    with pytest.warns(embax.DenseGradientWarning, match=r"argument 0\['words'\].* is dense"):
        gradient = embax.nnx.grad(lambda param: (param.words[...] ** 2).sum(), tables=tables)(param)
    embax.nnx.Optimizer(param, lift(optax.sgd(0.25), tables=tables)).update(param, gradient)
    np.testing.assert_array_equal(param.words[...], np.full((5, 2), 0.5))
