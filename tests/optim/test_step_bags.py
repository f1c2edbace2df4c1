"""A step of bags: the kernels read one gradient for each bag, and compute what they do for one for each id."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hlo import arrays
from kernels_used import in_program

import embax
from embax import Ragged, RowGrad, Table, embedding_bag, optim
from embax._base.by_bag import ByBag
from embax._kernels.library import has

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(40, 6)).astype(np.float32)
IDS = RANDOM.integers(-3, 44, (10, 16)).astype(np.int32)
FACTORS = RANDOM.normal(size=IDS.shape).astype(np.float32)
RAGGED = Ragged(jnp.ravel(IDS), jnp.array([0, 40, 40, 100, 155], jnp.int32))
OPTIMIZERS = {
    "sgd": optim.sgd(0.05, weight_decay=0.1),
    "adagrad": optim.adagrad(0.05),
    "rowwise_adagrad": optim.rowwise_adagrad(0.05, weight_decay=0.1),
    "adam": optim.adam(0.05),
    "rowwise_adam": optim.rowwise_adam(0.05),
    "of optax": optim.lift(optax.adam(0.05)),
}
KERNELS = pytest.mark.skipif(not has("step_adam"), reason="kernels are not installed, or switched off")


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def params_of():
    def table(dtype="float32", **rules):
        return Table(jnp.asarray(WEIGHT, dtype), out_of_range="zero", **rules)

    return {
        "fixed": table(padding_idx=(3, 7)),
        "weighted": table(padding_idx=3),
        "ragged": table(max_norm=2.0),
        "ragged, weighted": table(),
        "together": table(padding_idx=3),
        "narrow": table("bfloat16"),
        "by frequency": table(scale_grad_by_freq=True),
    }


def loss(params, ids, factors, bags):
    flat = jnp.ravel(factors)
    together = params["together"]
    pooled = [
        embedding_bag(params["fixed"], ids),
        embedding_bag(params["weighted"], ids, factors, mode="sqrtn"),
        embedding_bag(params["ragged"], bags, mode="sum"),
        embedding_bag(params["ragged, weighted"], bags, flat, mode="sum"),
        embedding_bag(together, ids[:, :5], factors[:, :5]),
        embedding_bag(together, bags),
        embax.lookup(together, ids[0]),
        embedding_bag(params["narrow"], ids),
        embedding_bag(params["by frequency"], ids),
    ]
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in pooled) / 7


@pytest.fixture(scope="module")
def steps_of_bags():
    """Of each optimizer, by one program: the step by the gradient of bags, and the one by the gradient of their ids."""
    params = params_of()

    @jax.jit
    def steps(params):
        gradients = embax.grad(loss)(params, IDS, FACTORS, RAGGED)
        by_bag = {name for name, gradient in gradients.items() if isinstance(gradient.held, ByBag)}
        assert by_bag == set(params) - {"by frequency"}
        by_id = jax.tree.map(lambda leaf: leaf, gradients)
        assert not any(isinstance(gradient.held, ByBag) for gradient in by_id.values())
        return {
            name: [optim.step(tx, given, tx.init(params), params) for given in (gradients, by_id)]
            for name, tx in OPTIMIZERS.items()
        }

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return steps(params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_of_bags_equals_step_of_their_ids_bit_for_bit(name, steps_of_bags):
    found, expected = steps_of_bags[name]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.array_equal(found[0]["together"].weight, WEIGHT)


def of_bags(tx, table, state, ids):
    value, gradient = embax.value_and_grad(lambda table: (embedding_bag(table, ids) ** 2).sum())(table)
    return *optim.step(tx, gradient, state, table), value


@KERNELS
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_donated_step_of_bags_holds_nothing_for_each_id_but_numbers(name):
    tx, rows, dim = OPTIMIZERS[name], 50_000, 8
    table = Table(jnp.zeros((rows, dim)), padding_idx=0)
    ids = jax.ShapeDtypeStruct((1024, 16), np.int32)
    step = jax.jit(functools.partial(of_bags, tx), donate_argnums=(0, 1))
    compiled = step.lower(table, tx.init(table), ids).compile()
    assert re.findall(r'custom_call_target="embax_(\w+)"', compiled.as_text()) == ["pool", f"step_{name}"]
    sizes = {int(np.prod(shape)) for _, shape in arrays(compiled.as_text())} - {rows * dim, rows}
    assert max(sizes) == 1024 * 16
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 1024 * 16 * 4


@KERNELS
def test_a_kernel_sums_bags_for_other_optimizers():
    tx, table = OPTIMIZERS["of optax"], Table(jnp.zeros((50_000, 8)))
    ids = jax.ShapeDtypeStruct((64, 16), np.int32)
    assert in_program(functools.partial(of_bags, tx), table, tx.init(table), ids)[:2] == ["pool", "combine"]
    gradients = embax.grad(lambda table: embedding_bag(table, IDS % 40).sum())(table)
    clip = optim.clip_by_global_norm(0.1)
    clipped, _ = clip.update(gradients, clip.init(table))
    assert isinstance(clipped.held, ByBag)
    np.testing.assert_allclose(embax.global_norm(clipped), 0.1, rtol=1e-5)


@KERNELS
def test_a_step_of_an_nnx_layer_holds_one_gradient_for_each_bag():
    model = embax.nnx.EmbeddingBag(1_000, 8, rngs=nnx.Rngs(0))
    optimizer = embax.nnx.Optimizer(model, optim.adagrad(0.1))

    @nnx.jit
    def step(model, optimizer, ids):
        gradient = embax.nnx.grad(lambda model: (model(ids) ** 2).sum())(model)
        assert isinstance(gradient["embedding"].get_raw_value().held, ByBag)
        optimizer.update(model, gradient)

    text = step.lower(model, optimizer, jnp.zeros((32, 16), jnp.int32)).compile().as_text()
    assert (512, 8) not in {shape for _, shape in arrays(text)}


def test_a_collection_holds_one_gradient_for_each_bag():
    tables = {name: Table(jnp.asarray(WEIGHT), padding_idx=0) for name in ("user", "film")}
    features = [
        embax.Feature("users", "user", mode="mean"),
        embax.Feature("seen", "film", mode="sum"),
        embax.Feature("liked", "film", mode="mean"),
    ]
    collection, tx = embax.Collection(tables, features), OPTIMIZERS["adagrad"]
    batch = {"users": IDS[:, :5] % 40, "seen": IDS % 40, "liked": RAGGED}
    batch["liked"] = Ragged(RAGGED.values % 40, RAGGED.offsets)

    @jax.jit
    def both(collection, state):
        def loss(collection):
            return sum(jnp.sin(x).sum() for x in collection(batch).values())

        gradient = embax.grad(loss)(collection)
        held = gradient.stacks[0].held
        assert held.values.shape == (10 + 10 + 4, 6)
        assert isinstance(gradient["film"].held, ByBag)
        by_id = jax.tree.map(lambda leaf: leaf, gradient)
        of_film = gradient["film"], by_id["film"]
        return [x.to_dense() for x in of_film], [optim.step(tx, x, state, collection) for x in (gradient, by_id)]

    of_film, (found, expected) = both(collection, tx.init(collection))
    np.testing.assert_array_equal(*of_film)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_gradient_of_bags_may_be_passed_through_a_finite_check():
    """Whose other branch returns zeros with the leaves of the gradient."""
    tx = optax.apply_if_finite(optim.adagrad(0.05), 3)
    table = Table(jnp.asarray(WEIGHT))

    @jax.jit
    def step(table, state):
        gradient = embax.grad(lambda table: embedding_bag(table, IDS % 40).sum())(table)
        assert isinstance(gradient, RowGrad)
        return optim.step(tx, gradient, state, table)

    new, _ = step(table, tx.init(table))
    assert not np.array_equal(new.weight, WEIGHT)
