"""What the optimizer of brainstate states refuses: plain transformations, and arguments that do not fit."""

import brainstate
import jax.numpy as jnp
import optax
import pytest

import embax
from embax.optim import lift

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1),
        optax.adamw(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), lift(optax.adam(0.1))),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "clip"],
)
@pytest.mark.parametrize("freeze", [False, True])
def test_plain_optax_is_refused_for_an_embedding(tx, freeze):
    embedding, optimizer = embax.Embedding(6, 2, freeze=freeze), embax.brainstate.Optimizer(tx)
    with pytest.raises(TypeError, match=r"must take the RowGrads of the Embeddings' weights \['table'\].*lift\(tx\)"):
        optimizer.register_trainable_weights({"table": embedding.weight})
    assert optimizer.opt_state is None


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"tx=...\)` must be an optax.GradientTransformation, got function"):
        embax.brainstate.Optimizer(optax.sgd)
    embedding, plain = embax.Embedding(6, 2), brainstate.ParamState(jnp.ones((6, 2)))
    optimizer = embax.brainstate.Optimizer(lift(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="must follow register_trainable_weights"):
        optimizer.update({})
    with pytest.raises(TypeError, match="must be a dict of States, got list"):
        optimizer.register_trainable_weights([embedding.weight])
    with pytest.raises(TypeError, match="must have a State for each key, got Embedding for 'a'"):
        optimizer.register_trainable_weights({"a": embedding})
    fake = embax.Embedding(6, 2, param_type=brainstate.FakeState)
    with pytest.raises(TypeError, match="must have a State for each key, got FakeState for 'a'"):
        optimizer.register_trainable_weights({"a": fake.weight})
    optimizer.register_trainable_weights({"a": embedding.weight, "b": plain})
    with pytest.raises(ValueError, match="must not have a key of another state that is registered, got 'a'"):
        optimizer.register_trainable_weights({"a": plain})
    rows = embax.brainstate.grad(lambda: embedding([1]).sum(), embedding.weight)()
    with pytest.raises(TypeError, match="must be a dict with the keys of the registered states, got list"):
        optimizer.update([rows])
    with pytest.raises(ValueError, match=r"got none for \['b'\] and unknown ones \['c'\]"):
        optimizer.update({"a": rows, "c": rows})
    with pytest.raises(ValueError, match=r"must have a RowGrad for tables only, got one for \['b'\]"):
        optimizer.update({"a": rows, "b": rows})
    with pytest.raises(ValueError, match="must fit the table"):
        optimizer.update({"a": jnp.ones((5, 2)), "b": plain.value})
