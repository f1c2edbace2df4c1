"""The layer for Equinox: what `equinox.nn.Embedding` takes and gives, under the tools of Equinox."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import embax
from embax import RowGrad, Table
from embax.equinox import Embedding, EmbeddingBag

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
KEY = jax.random.key(0)
IDS = jnp.array([0, 2, 2, -1])
COUNTS = np.array([1, 0, 2, 0, 0, 1])[:, None] * np.ones((1, 2))


def layer(**rules):
    return Embedding(weight=WEIGHT, **rules)


# One edit: eqx.nn.Embedding -> embax.equinox.Embedding


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_same_key_gives_the_weight_of_equinox(dtype):
    ours, theirs = (cls(6, 2, dtype=dtype, key=KEY) for cls in (Embedding, eqx.nn.Embedding))
    np.testing.assert_array_equal(ours.weight, theirs.weight)
    assert ours.weight.dtype == theirs.weight.dtype
    assert (ours.num_embeddings, ours.embedding_size) == (theirs.num_embeddings, theirs.embedding_size)
    np.testing.assert_array_equal(jax.vmap(ours)(IDS), jax.vmap(theirs)(IDS))
    np.testing.assert_array_equal(ours(jnp.array(3), key=KEY), theirs(jnp.array(3), key=KEY))


@pytest.mark.parametrize("name", ["__init__", "__call__"])
def test_embedding_takes_every_argument_of_equinox(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Embedding, eqx.nn.Embedding))
    assert set(theirs) <= set(ours)
    positional = [name for name, parameter in theirs.items() if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


def test_in_64_bit_mode_too():
    with jax.enable_x64(True):
        ours, theirs = (cls(6, 2, key=KEY) for cls in (Embedding, eqx.nn.Embedding))
        assert ours.weight.dtype == theirs.weight.dtype == jnp.float64
        np.testing.assert_array_equal(ours.weight, theirs.weight)


def test_a_weight_may_be_given():
    for embedding in Embedding(weight=jnp.asarray(WEIGHT)), Embedding(6, 2, WEIGHT), Embedding(6, weight=WEIGHT):
        assert (embedding.num_embeddings, embedding.embedding_size) == (6, 2)
        np.testing.assert_array_equal(embedding([[0, 5]]), WEIGHT[[[0, 5]]])
    assert Embedding(weight=WEIGHT, padding_idx=0)(0).any()
    assert not Embedding(6, 2, key=KEY, padding_idx=0)(0).any()
    several = Embedding(6, (2, 3), key=KEY, init=jax.nn.initializers.ones)
    assert (several.embedding_size, several([1, 2]).shape) == ((2, 3), (2, 2, 3))
    assert layer()([1], dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Embedding(), ValueError, r"embax.equinox.Embedding` must be given num_embeddings, .*None, None and N"),
        (lambda: Embedding(5, 2), ValueError, r"must be given num_embeddings, embedding_size and key .* 5, 2 and None"),
        (lambda: Embedding(5, key=KEY), ValueError, r"must be given num_embeddings, embedding_size and key"),
        (lambda: Embedding(5, 2, WEIGHT), ValueError, r"weight=...\)` must be of the shape \(5, 2\), got \(6, 2\)"),
        (lambda: Embedding(-5, 2, key=KEY), ValueError, r"embax.equinox.Embedding\(num_embeddings=...\)` must not be"),
        (lambda: Embedding(5, -2, key=KEY), ValueError, r"embax.equinox.Embedding\(embedding_size=...\)` must not be"),
        (lambda: Embedding(5, 2.5, key=KEY), TypeError, r"embedding_size=...\)` must be a whole number, got 2.5"),
        (lambda: Embedding(5, 2, key=KEY, padding=1), TypeError, r"unexpected keyword argument 'padding'"),
        (lambda: Embedding(5, 2, key=KEY, padding_idx=5), ValueError, r"padding_idx=...\)` must be a row of the table"),
        (lambda: layer(max_norm=-1), ValueError, r"max_norm=...\)` must be positive"),
        (lambda: Embedding(weight=3.0), ValueError, r"weight=...\)` must have an axis of rows, got a scalar"),
        (lambda: layer()([6]), IndexError, r"must be in \[-6, 6\), the table having 6 rows, got 6 at position \(0,\)"),
        (lambda: layer()([0.5]), TypeError, r"must be of an integer dtype, got float64"),
        (lambda: layer(max_norm=1.0).renormalized([7]), IndexError, r"must be in \[-6, 6\)"),
        (lambda: layer(max_norm=1.0).renormalized([True]), TypeError, r"must be of an integer dtype, got bool"),
        (lambda: EmbeddingBag(5, 2), ValueError, r"embax.equinox.EmbeddingBag` must be given num_embeddings"),
        (
            lambda: EmbeddingBag(weight=WEIGHT, mode="min"),
            ValueError,
            r"equinox.EmbeddingBag\(mode=...\)` .* got 'min'",
        ),
        (
            lambda: EmbeddingBag(weight=WEIGHT, include_last_offset=0),
            TypeError,
            r"embax.equinox.EmbeddingBag\(include_last_offset=...\)` must be a bool, got 0",
        ),
        (
            lambda: EmbeddingBag(weight=WEIGHT)(embax.Ragged.from_lists([[1]]), [0]),
            TypeError,
            r"embax.equinox.EmbeddingBag\(offsets=...\)` must be None for a Ragged, got \[0\]",
        ),
        (lambda: EmbeddingBag(weight=[[1]])([[0]]), TypeError, r"equinox.EmbeddingBag` must have a table of a float d"),
        (
            lambda: EmbeddingBag(weight=WEIGHT)([[6]]),
            IndexError,
            r"embax.equinox.EmbeddingBag\(input=...\)` must be in",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


# Equinox's tools


@pytest.mark.parametrize("where", [lambda m: m.weight, lambda m: m.table.weight])
def test_tree_at_changes_the_weight_and_keeps_the_rules(where):
    embedding = layer(padding_idx=1)
    changed = eqx.tree_at(where, embedding, jnp.ones((6, 2)))
    np.testing.assert_array_equal(changed.weight, np.ones((6, 2)))
    np.testing.assert_array_equal(embedding.weight, WEIGHT)
    assert changed.table.padding_idx == 1
    doubled = eqx.tree_at(where, embedding, replace_fn=lambda weight: weight * 2)
    np.testing.assert_array_equal(doubled.weight, WEIGHT * 2)


def test_tree_at_changes_the_rules():
    frozen = eqx.tree_at(lambda m: m.table, layer(), Table(WEIGHT, freeze=True, padding_idx=2))
    assert (frozen.table.freeze, frozen.table.padding_idx) == (True, 2)


def test_partition_combine_filter_and_equality():
    embedding = layer(padding_idx=1, max_norm=2.0)
    arrays, static = eqx.partition(embedding, eqx.is_array)
    assert static.weight is None
    for again in eqx.combine(arrays, static), eqx.filter(embedding, eqx.is_inexact_array):
        assert bool(eqx.tree_equal(again, embedding))
    assert not eqx.tree_equal(layer(), embedding)
    assert eqx.filter(Embedding(weight=[[1]]), eqx.is_inexact_array).weight is None
    assert eqx.tree_pformat(embedding) == "Embedding(table=Table(weight=f32[6,2], padding_idx=1, max_norm=2.0))"


def test_filter_jit_compiles_once_for_the_same_rules():
    traced = []

    @eqx.filter_jit
    def call(embedding, ids):
        traced.append(None)
        return embedding(ids)

    np.testing.assert_array_equal(call(layer(), IDS), WEIGHT[IDS])
    call(eqx.tree_at(lambda m: m.weight, layer(), jnp.ones((6, 2))), IDS + 1 - 1)
    assert len(traced) == 1
    assert np.linalg.norm(call(layer(max_norm=1.0), IDS), axis=1).max() <= 1 + 1e-6
    assert len(traced) == 2


def test_filter_grad_follows_the_rules():
    gradient = eqx.filter_grad(lambda embedding: embedding(IDS).sum())
    layers = layer(), layer(padding_idx=0, scale_grad_by_freq=True), layer(freeze=True)
    plain, by_rules, frozen = eqx.filter_jit(lambda layers: [gradient(layer).weight for layer in layers])(layers)
    np.testing.assert_array_equal(plain, COUNTS)
    np.testing.assert_array_equal(by_rules, [[0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [1, 1]])
    assert not frozen.any()


def test_filter_vmap_over_ids_and_over_modules():
    np.testing.assert_array_equal(eqx.filter_vmap(layer())(IDS), WEIGHT[IDS])
    np.testing.assert_array_equal(jax.vmap(jax.vmap(layer()))(IDS.reshape(2, 2)), WEIGHT[IDS.reshape(2, 2)])
    make = lambda key: Embedding(6, 2, key=key, padding_idx=0)  # noqa: E731
    ensemble = eqx.filter_vmap(make)(jax.random.split(KEY, 3))
    rows = eqx.filter_vmap(lambda embedding, i: embedding(i))(ensemble, jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(rows, ensemble.weight[jnp.arange(3), jnp.arange(3)])
    assert not rows[0].any()


def test_filter_eval_shape():
    abstract = eqx.filter_eval_shape(Embedding, 10**12, 2, key=KEY, out_of_range="nan")
    assert (abstract.num_embeddings, abstract.weight.dtype) == (10**12, jnp.float32)
    assert eqx.filter_eval_shape(layer(), IDS).shape == (4, 2)


def test_serialised_leaves(tmp_path):
    path = tmp_path / "layer.eqx"
    eqx.tree_serialise_leaves(path, layer(padding_idx=1))
    loaded = eqx.tree_deserialise_leaves(path, Embedding(6, 2, key=KEY, padding_idx=1))
    assert eqx.tree_equal(loaded, layer(padding_idx=1))
    # Of Equinox's layer, into a skeleton.
    theirs = eqx.nn.Embedding(6, 2, key=KEY)
    eqx.tree_serialise_leaves(path, theirs)
    loaded = eqx.tree_deserialise_leaves(path, eqx.filter_eval_shape(Embedding, 6, 2, key=KEY, max_norm=1.0))
    np.testing.assert_array_equal(loaded.weight, theirs.weight)
    assert loaded.table.max_norm == 1


def test_renormalized():
    embedding = layer(max_norm=1.0, padding_idx=2)
    changed = eqx.filter_jit(lambda m, ids: m.renormalized(ids))(embedding, IDS)
    expected = WEIGHT.copy()
    expected[[0, 5]] /= np.linalg.norm(WEIGHT[[0, 5]], axis=1, keepdims=True)
    np.testing.assert_allclose(changed.weight, expected, rtol=2e-7)  # float32
    np.testing.assert_array_equal(embedding.weight, WEIGHT)
    assert repr(changed.table) == repr(embedding.table)
    np.testing.assert_allclose(embedding.renormalized([0, 5]).weight, expected, rtol=2e-7)
    assert layer().renormalized([0]).table.max_norm is None


def test_bags():
    bag = EmbeddingBag(weight=WEIGHT, mode="sum", padding_idx=0)
    np.testing.assert_array_equal(bag([[1, 2], [0, 0]], key=KEY), [WEIGHT[1] + WEIGHT[2], [0, 0]])
    last = EmbeddingBag(weight=WEIGHT, include_last_offset=True)
    assert last.mode == "mean"

    @eqx.filter_jit
    def others(bag, last):
        within = lambda bag: eqx.filter_jit(lambda: bag(jnp.array([[1, 2]])))().sum()  # noqa: E731
        return {
            "offsets": bag(jnp.array([1, 2, 5]), offsets=[0, 2]),
            "weights": bag([[1, 2]], per_sample_weights=[[2.0, 0.5]]),
            "dtype": bag([[1, 2]], dtype=jnp.bfloat16),
            "last": last([1, 2, 5, 3], offsets=[0, 2, 3]),
            "gradient": embax.grad(within, on_dense="error")(bag).table.to_dense(),
        }

    out = others(bag, last)
    np.testing.assert_array_equal(out["offsets"], [WEIGHT[1] + WEIGHT[2], WEIGHT[5]])
    np.testing.assert_array_equal(out["weights"], [2 * WEIGHT[1] + WEIGHT[2] / 2])
    assert out["dtype"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(out["last"], [(WEIGHT[1] + WEIGHT[2]) / 2, WEIGHT[5]])
    np.testing.assert_array_equal(out["gradient"][1:3], np.ones((2, 2)))
    assert isinstance(eqx.filter_eval_shape(embax.grad(lambda bag: bag(IDS[None]).sum()), bag).table, RowGrad)


def test_embedding_is_an_equinox_module():
    assert isinstance(layer(), eqx.Module)
    assert Embedding.__module__ == EmbeddingBag.__module__ == "embax.equinox"
    assert isinstance(layer().table, Table)
