"""The optimizers of the frameworks run fused steps, too."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from kernels_used import calls

import embax
from embax._kernels.library import has

pytestmark = pytest.mark.skipif(not has("step_adam"), reason="kernels are not installed, or switched off")

WEIGHT = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
IDS = jnp.array([3, 5, 3, 0, 7], jnp.int32)
OPTIMIZERS = {"fused": lambda: embax.optim.adam(0.1), "two calls": lambda: embax.optim.lift(optax.adam(0.1))}


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def by_nnx(tx):
    model = embax.nnx.Embedding.from_table(embax.Table(jnp.asarray(WEIGHT), padding_idx=0))
    optimizer = embax.nnx.Optimizer(model, tx)

    @nnx.jit
    def step(model, optimizer, ids):
        gradient = embax.nnx.grad(lambda model: (model(ids) ** 2).sum())(model)
        optimizer.update(model, gradient)

    step(model, optimizer, IDS)
    _, kernels = calls(step, model, optimizer, IDS)
    return model.table.weight, kernels


def by_brainstate(tx):
    embedding = embax.Embedding.from_table(embax.Table(jnp.asarray(WEIGHT), padding_idx=0))
    weights = {"table": embedding.weight}
    optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)

    @brainstate.transform.jit
    def step(ids):
        optimizer.update(embax.brainstate.grad(lambda: (embedding(ids) ** 2).sum(), weights)())

    step(IDS)
    _, kernels = calls(lambda ids: (step(ids), embedding.weight.value)[1], IDS)
    return embedding.table.weight, kernels


@pytest.mark.parametrize("run", [by_nnx, by_brainstate])
def test_step_is_fused_and_equals_two_calls(run):
    (found, few), (expected, many) = (run(make()) for make in OPTIMIZERS.values())
    assert few == 2  # the lookup and the step
    assert many > 5
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_array_equal(found[0], WEIGHT[0])
    assert (found[3] != WEIGHT[3]).all()
