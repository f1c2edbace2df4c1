"""Layers of sharded tables: how models are sharded, copied, tied and grown. What they compute: test_storage_layers."""

import brainstate
import brainunit
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from frameworks import ALL, LAYERS
from meshes import mesh_of

import embax
import embax.equinox
import embax.nnx
from embax import Table

WEIGHT = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True, "out_of_range": "zero"}
TX = embax.optim.lift(optax.adamw(0.1))

pytestmark = pytest.mark.usefixtures("standard_promotion")


def shard(tree, layout):
    return embax.shard(tree, mesh_of({"x": 2}), "x", layout)


def rows_of(layer):
    """The rows of a layer, in the order of their ids."""
    return embax.to_state_dict(layer)["weight"]


@pytest.mark.parametrize("name", ALL)
def test_models_are_sharded_and_taken_off_the_mesh(name):
    table = Table(WEIGHT, **RULES)
    embedding = ALL[name].make(WEIGHT, **RULES)
    model = {
        "functional": lambda: [embedding, embedding, jnp.ones(2)],
        "brainstate": lambda: brainstate.nn.Sequential(embedding, brainstate.nn.Linear(4, 1, w_init=WEIGHT[:4, :1])),
        "nnx": lambda: nnx.Sequential(embedding, nnx.Linear(4, 1, rngs=nnx.Rngs(0))),
        "equinox": lambda: eqx.nn.Sequential([embedding, eqx.nn.Linear(4, 1, key=jax.random.key(0))]),
    }[name]()
    sharded = shard({"model": model}, "rows-cyclic")["model"]
    layer = sharded[0] if name == "functional" else sharded.layers[0]
    assert ALL[name].table(layer).placement.layout == "rows-cyclic"
    assert ALL[name].table(embedding).placement is None  # the model that was given stays as it is
    back = embax.unshard(sharded)
    back = ALL[name].table(back[0] if name == "functional" else back.layers[0])
    assert repr(back) == repr(table)
    np.testing.assert_array_equal(back.weight, WEIGHT)
    moved = shard(sharded, "columns")
    moved = ALL[name].table(moved[0] if name == "functional" else moved.layers[0])
    assert moved.placement.layout == "columns"
    np.testing.assert_array_equal(rows_of(moved), WEIGHT)


def test_a_copy_may_be_donated():
    model = nnx.Sequential(embax.nnx.Embedding(11, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(0)))
    sharded = shard(model, "columns")
    for copy in sharded, shard(sharded, "columns"), embax.unshard(sharded), embax.unshard(model):
        nnx.jit(lambda model: jax.tree.map(lambda x: x + 1, nnx.state(model)), donate_argnums=0)(copy)
    assert model(jnp.arange(3)).shape == (3, 1)
    layer = brainstate.nn.Sequential(embax.Embedding(11, 4), brainstate.nn.Linear(4, 1))
    for copy in shard(layer, "columns"), embax.unshard(layer):
        jax.jit(lambda values: jax.tree.map(lambda x: x + 1, values), donate_argnums=0)(copy.states().to_dict_values())
    assert not any(x.is_deleted() for x in jax.tree.leaves(layer.states().to_dict_values()))


def test_layers_that_share_a_weight_share_a_sharded_one():
    class Tied(nnx.Module):
        def __init__(self):
            self.a, self.b = (embax.nnx.Embedding(11, 4, rngs=nnx.Rngs(0)) for _ in range(2))
            self.b.embedding = self.a.embedding
            self.table = nnx.Param(Table(WEIGHT))

    model = shard(Tied(), "rows")
    assert model.a.embedding is model.b.embedding
    assert model.b.table.placement.layout == model.table.get_value().placement.layout == "rows"
    assert embax.unshard(model).table.get_value().placement is None
    layers = [embax.Embedding(11, 4) for _ in range(2)]
    layers[1].weight = layers[0].weight
    model = shard(brainstate.nn.Sequential(*layers), "rows")
    assert model.layers[0].weight is model.layers[1].weight
    assert model.layers[1].table.placement.layout == "rows"


def test_a_fake_state_is_not_shared_with_the_copy():
    layer = embax.Embedding.from_pretrained(WEIGHT, param_type=brainstate.FakeState)
    assert shard(layer, "rows").table.placement.layout == "rows"
    assert layer.table.placement is None


def test_shard_and_unshard_refuse_optimizers_and_wrong_trees():
    layer = embax.Embedding(11, 4)
    optimizer = embax.brainstate.Optimizer(TX)
    with pytest.raises(TypeError, match=r"embax.shard\(tree=...\)` must not have an optimizer, .*carry_over\(states\)"):
        shard(optimizer.register_trainable_weights({"w": layer.weight}), "rows")
    optimizer = embax.nnx.Optimizer(embax.nnx.Embedding(11, 4, rngs=nnx.Rngs(0)), TX)
    with pytest.raises(TypeError, match=r"embax.unshard\(tree=...\)` must not have an optimizer.*carry_over\(model\)"):
        embax.unshard([optimizer])
    layer.weight = brainstate.ParamState(WEIGHT * brainunit.mV)
    with pytest.raises(ValueError, match=r"embax.shard\(tree=...\)` must have tables without a unit, got one in mV at"):
        shard(layer, "rows")
    assert embax.unshard(layer).weight.value.unit == brainunit.mV
    with pytest.raises(brainstate.interop.ConversionError, match=r"embax.Embedding with placement=Placement\('rows'"):
        brainstate.interop.to_nnx(embax.Embedding.from_table(shard(Table(WEIGHT), "rows")))


def test_copies_of_a_layer_keep_the_layout():
    table = shard(Table(WEIGHT, padding_idx=1), "rows-cyclic")
    layer = embax.nnx.EmbeddingBag.from_table(table)
    graphdef, state = nnx.split(layer)
    for copy in nnx.merge(graphdef, state), nnx.clone(layer):
        assert copy.table.storage == table.storage
        np.testing.assert_array_equal(rows_of(copy), WEIGHT)
    assert hash(graphdef) == hash(nnx.graphdef(nnx.clone(layer)))
    module = embax.equinox.Embedding.from_table(table)
    doubled = eqx.tree_at(lambda module: module.table.weight, module, replace_fn=lambda weight: 2 * weight)
    np.testing.assert_array_equal(rows_of(doubled), 2 * WEIGHT)
    np.testing.assert_array_equal(module.weight, WEIGHT)
    with pytest.raises(TypeError, match=r"StoredRows\[...\]` must have no index, as its rows are not in .* got 3"):
        module.weight[3]
    assert layer.embedding[...].shape == (11, 4)
    params, rest = eqx.partition(doubled, eqx.is_inexact_array)
    assert eqx.combine(params, rest).table.storage == table.storage
    layer = embax.Embedding.from_table(table)
    clone = brainstate.graph.clone(layer)
    other = embax.Embedding(11, 4, embedding_init=layer.weight, padding_idx=1)
    for copy in clone, other:
        assert copy.table.storage == table.storage
    np.testing.assert_array_equal(rows_of(clone), WEIGHT)
    np.testing.assert_array_equal(rows_of(other)[1], np.zeros(4))
    np.testing.assert_array_equal(layer.weight.value, WEIGHT)
    assert layer.weight.value.size == 44


@pytest.mark.parametrize("name", LAYERS)
def test_layer_grows_and_keeps_its_layout(name):
    layer = LAYERS[name].Embedding.from_table(shard(Table(WEIGHT), "rows-cyclic"))
    if name == "equinox":
        layer = layer.resized(14, jax.random.key(0))
    else:
        layer.resize(14, jax.random.key(0))
    assert (layer.num_embeddings, layer.table.placement.layout, layer.table.rows) == (14, "rows-cyclic", 14)
    np.testing.assert_array_equal(rows_of(layer)[:11], WEIGHT)
    np.testing.assert_array_equal(layer([10, 3]), WEIGHT[[10, 3]])
