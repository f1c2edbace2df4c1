"""Layers of every framework hold a table in any storage: they compute, store and train as those of a dense one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import LAYERS
from meshes import usual_and_rest
from storages import MORE, STORAGES

import embax
from embax import Table

WEIGHT = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True, "out_of_range": "zero"}
IDS = np.array([[1, 2, 10], [3, 3, -1], [4, 5, 12]])
X = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
STORED = STORAGES | MORE
OPTIMIZERS = {
    "adagrad": embax.optim.lift(optax.adagrad(0.1)),
    "adamw": embax.optim.lift(optax.adamw(0.1)),
    "rowwise_adagrad": embax.optim.rowwise_adagrad(0.1),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def made():
    """A table of its own, since training may write it in place."""
    return Table(WEIGHT, **RULES)


def layers_of(table, framework):
    return {
        "rows": framework.Embedding.from_table(table),
        "bags": framework.EmbeddingBag.from_table(table, mode="sqrtn"),
        "largest": framework.EmbeddingBag.from_table(table, mode="max"),
    }


def rows_of(layer):
    """The rows of a layer, in the order of their ids."""
    return embax.to_state_dict(layer)["weight"]


# The layers of each framework in each storage; exhaustive runs try more layouts.
COMPUTING = [("brainstate", "rows"), ("nnx", "reversed"), ("equinox", "columns")]
TRAINING = [
    ("equinox", "rows", "adamw", True),
    ("nnx", "columns", "rowwise_adagrad", True),
    ("brainstate", "reversed", "adagrad", False),
]
OF_MORE = [name for name in STORED if name != "dense"]


def computed(framework, table):
    """What compiled and plain calls of layers give, and the rows that are stored afterwards."""
    functions = {
        "rows": lambda layer: (layer(IDS), layer.attend(X)),
        "bags": lambda layer: layer(IDS, per_sample_weights=np.ones(IDS.shape, np.float32) / 3),
        "largest": lambda layer: layer(IDS),
    }
    layers = layers_of(table, framework)
    for layer in layers.values():
        assert layer.table.storage == table.storage
        assert repr(layer.table) == repr(table)
        np.testing.assert_array_equal(rows_of(layer), WEIGHT)
    results = framework.call_each(functions, layers)
    return results, layers["rows"](IDS), {name: rows_of(layer) for name, layer in layers.items()}


@pytest.mark.parametrize(("framework", "name"), usual_and_rest(COMPUTING, itertools.product(LAYERS, OF_MORE)))
def test_layers_compute_and_store_like_dense_ones(framework, name, off):
    expected, ours = off(computed, framework), computed(LAYERS[framework], STORED[name](made()))
    assert LAYERS[framework].stores == (expected[2]["bags"] != WEIGHT).any()
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def trained(framework, table, optimizer, by_rows):
    """The rows of a layer after some steps. A dense gradient where rows are asked for would warn."""
    loss = lambda layer, ids: ((framework.read(layer, ids) - 0.5) ** 2).sum()  # noqa: E731
    layer = framework.Embedding.from_table(table)
    return framework.train(layer, OPTIMIZERS[optimizer], loss, jnp.asarray(IDS[:2]), by_rows)


@pytest.mark.parametrize(
    ("framework", "name", "optimizer", "by_rows"),
    usual_and_rest(TRAINING, itertools.product(LAYERS, OF_MORE, OPTIMIZERS, [True, False])),
)
def test_layers_train_like_dense_ones(framework, name, optimizer, by_rows, off):
    expected = off(trained, framework, optimizer, by_rows)
    ours = trained(LAYERS[framework], STORED[name](made()), optimizer, by_rows)
    assert (expected != WEIGHT).any()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[2], WEIGHT[2])


@pytest.fixture(scope="module")
def off():
    """What layers of the dense table give, computed once."""
    return functools.cache(lambda function, framework, *options: function(LAYERS[framework], made(), *options))
