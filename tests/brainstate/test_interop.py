"""Conversion to Flax NNX and Equinox: what the target can do is converted, a rule that it lacks is an error."""

import brainstate
import brainunit
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import embax

CONVERT = {"nnx": brainstate.interop.to_nnx, "equinox": brainstate.interop.to_equinox}


def test_to_nnx_reads_the_same_rows():
    embedding = embax.Embedding(6, 2)
    module = CONVERT["nnx"](embedding)
    assert type(module) is nnx.Embed
    ids = jnp.array([[0, 5], [2, 2]])
    np.testing.assert_array_equal(module(ids), embedding(ids))


def test_to_nnx_keeps_dtypes():
    weight = jnp.ones((6, 2), jnp.bfloat16)
    module = CONVERT["nnx"](embax.Embedding(6, 2, embedding_init=weight, dtype=jnp.float32))
    assert module.embedding[...].dtype == jnp.bfloat16
    assert module(jnp.array([1])).dtype == jnp.float32


def test_to_equinox_reads_the_same_rows():
    embedding = embax.Embedding(6, 2)
    module = CONVERT["equinox"](embedding)
    assert type(module) is equinox.nn.Embedding
    ids = jnp.array([0, 5, 2])
    np.testing.assert_array_equal(jax.vmap(module)(ids), embedding(ids))


def test_layer_inside_a_sequential():
    linear = brainstate.nn.Linear(2, 3, w_init=np.ones((2, 3), np.float32))
    model = brainstate.nn.Sequential(embax.Embedding(6, 2), linear)
    for framework, convert in CONVERT.items():
        rows = convert(model)(jnp.array(1))
        np.testing.assert_allclose(rows, model(jnp.array(1)), rtol=1e-6, err_msg=framework)  # float32


@pytest.mark.parametrize("framework", CONVERT)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"padding_idx": 0}, "padding_idx=0"),
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"freeze": True}, "freeze=True"),
        ({"param_type": brainstate.FakeState}, "param_type='FakeState'"),
        ({"out_of_range": "zero"}, "out_of_range='zero'"),
        ({"embedding_init": np.ones((6, 2)) * brainunit.mV}, "unit="),
        ({"embedding_size": (2, 1)}, r"embedding_size=\(2, 1\)"),
    ],
)
def test_rule_that_the_target_lacks_is_an_error(framework, options, named):
    embedding = embax.Embedding(**{"num_embeddings": 6, "embedding_size": 2, **options})
    with pytest.raises(brainstate.interop.ConversionError, match=named):
        CONVERT[framework](embedding)


@pytest.mark.parametrize(("framework", "policy"), [("nnx", "clip"), ("equinox", "nan")])
def test_policy_of_the_other_target_is_an_error(framework, policy):
    with pytest.raises(brainstate.interop.ConversionError, match=f"out_of_range='{policy}'"):
        CONVERT[framework](embax.Embedding(6, 2, out_of_range=policy))


def test_output_dtype_is_an_error_for_equinox():
    with pytest.raises(brainstate.interop.ConversionError, match="dtype="):
        CONVERT["equinox"](embax.Embedding(6, 2, dtype=jnp.float16))


def test_conversions_of_the_frameworks_own_layers_stay_theirs():
    assert type(brainstate.interop.from_nnx(nnx.Embed(6, 2, rngs=nnx.Rngs(0)))) is brainstate.nn.Embedding
    assert type(CONVERT["nnx"](brainstate.nn.Embedding(6, 2))) is nnx.Embed
