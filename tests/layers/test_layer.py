"""What the layers of all frameworks share: how they are made of weights, and how they move between frameworks."""

import re
import subprocess
import sys

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real
from flax import nnx

import embax
import embax.equinox
import embax.nnx
from embax import Table, Vectors, Vocabulary
from embax.vectors import MissingTokensWarning, UnknownTokenError

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
LAYERS = {
    "brainstate": embax.Embedding,
    "nnx": embax.nnx.Embedding,
    "equinox": embax.equinox.Embedding,
    "brainstate bag": embax.EmbeddingBag,
    "nnx bag": embax.nnx.EmbeddingBag,
    "equinox bag": embax.equinox.EmbeddingBag,
}
RULES = {
    "padding_idx": 1,
    "max_norm": 1.5,
    "norm_type": 3.0,
    "scale_grad_by_freq": True,
    "freeze": True,
    "out_of_range": "clip",
}
OF_ROWS = pytest.mark.parametrize("name", [name for name in LAYERS if "bag" not in name])
OF_ALL = pytest.mark.parametrize("name", LAYERS)


@OF_ALL
def test_from_pretrained_freezes_by_default(name):
    layer = LAYERS[name]
    assert type(layer.from_pretrained(WEIGHT)) is layer
    assert layer.from_pretrained(WEIGHT).table.freeze
    assert not layer.from_pretrained(WEIGHT, freeze=False).table.freeze
    np.testing.assert_array_equal(layer.from_pretrained(WEIGHT.tolist()).table.weight, WEIGHT)


@OF_ALL
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_from_pretrained_keeps_dtype_and_padding_row(name, dtype):
    weight = jnp.asarray(WEIGHT, dtype)
    table = LAYERS[name].from_pretrained(weight, padding_idx=0).table
    assert (table.dtype, table.padding_idx) == (dtype, 0)
    np.testing.assert_array_equal(table.weight, weight)


@OF_ALL
def test_from_pretrained_takes_rows_of_several_axes_and_the_options_of_the_constructor(name):
    weight = WEIGHT.reshape(3, 2, 2)
    table = LAYERS[name].from_pretrained(weight, max_norm=3.0, out_of_range="zero").table
    assert (table.dim, table.max_norm, table.out_of_range) == ((2, 2), 3.0, "zero")
    with pytest.raises(TypeError, match="unexpected keyword argument 'maxnorm'"):
        LAYERS[name].from_pretrained(weight, maxnorm=3.0)
    with pytest.raises(ValueError, match=r"padding_idx=...\)` must be a row|padding_idx=...\)` must be in"):
        LAYERS[name].from_pretrained(weight, padding_idx=3)


@OF_ALL
@pytest.mark.parametrize("weight", [3.0, [1.0, 2.0]])
def test_from_pretrained_wants_a_matrix(name, weight):
    call = {"brainstate": "embax.Embedding", "brainstate bag": "embax.EmbeddingBag"}.get(name)
    call = call or f"{LAYERS[name].__module__}.{LAYERS[name].__name__}"
    match = rf"`{re.escape(call)}.from_pretrained\((weight|embeddings)=...\)` must have 2 axes or more, \(rows, \*dim\)"
    with pytest.raises(ValueError, match=match):
        LAYERS[name].from_pretrained(weight)


@OF_ALL
def test_the_given_array_is_not_changed(name):
    weight = jnp.asarray(WEIGHT)
    layer = LAYERS[name].from_pretrained(weight, freeze=False, max_norm=0.5)
    layer([[0, 1]])
    np.testing.assert_array_equal(weight, WEIGHT)


@OF_ALL
@pytest.mark.parametrize("other", ["brainstate", "nnx", "equinox"])
def test_a_layer_moves_to_another_framework_and_back_with_all_rules(name, other):
    table = Table(WEIGHT, **RULES)
    there = LAYERS[other].from_table(table)
    back = LAYERS[name].from_table(there.table)
    assert type(back) is LAYERS[name]
    for layer in there, back:
        assert repr(layer.table) == repr(table)
        np.testing.assert_array_equal(layer.table.weight, WEIGHT)


@OF_ALL
def test_from_table_takes_the_options_of_the_constructor(name):
    table = LAYERS[name].from_table(Table(WEIGHT, **RULES), freeze=False, max_norm=None, padding_idx=2).table
    changed = {**RULES, "freeze": False, "max_norm": None, "padding_idx": 2}
    assert repr(table) == repr(Table(WEIGHT, **changed))
    np.testing.assert_array_equal(table.weight, WEIGHT)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        LAYERS[name].from_table(Table(WEIGHT), colour=3)


def test_options_of_their_own():
    table = Table(WEIGHT, max_norm=1.0)
    layer = embax.nnx.Embedding.from_table(table, write_back=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    assert layer([0]).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.embedding.get_value(), WEIGHT)
    half = embax.nnx.Embedding.from_table(table, param_dtype=jnp.bfloat16)
    assert half.embedding.get_value().dtype == half.param_dtype == jnp.bfloat16
    tagged = embax.nnx.Embedding.from_pretrained(WEIGHT, embedding_metadata={"tag": "t"})
    assert tagged.embedding.tag == "t"
    layer = embax.Embedding.from_table(table, param_type=brainstate.FakeState)
    assert not layer.states()
    assert embax.EmbeddingBag.from_table(table, mode="max").mode == "max"
    assert embax.nnx.EmbeddingBag.from_table(table, mode="max").mode == "max"
    assert embax.equinox.EmbeddingBag.from_table(table, include_last_offset=True).include_last_offset


def test_several_padding_rows_are_kept_or_refused():
    table = Table(WEIGHT, padding_idx=(1, 3))
    for layer in embax.nnx.Embedding, embax.equinox.Embedding:
        assert layer.from_table(table).table.padding_idx == (1, 3)
    with pytest.raises((TypeError, ValueError), match="padding_idx"):
        embax.Embedding.from_table(table)


def test_a_table_alone_is_not_enough():
    class Other(embax._layers.layer.TableLayer):
        pass

    with pytest.raises(NotImplementedError):
        Other.from_table(Table(WEIGHT))


VECTORS = Vectors(["a", "b"], np.asarray([[1, 2], [3, 4]], np.float32))
OWN = Vocabulary(["[PAD]", "b", "x"], special={"padding": "[PAD]"})


@OF_ROWS
def test_from_vectors_is_frozen_and_of_all_words(name):
    layer = LAYERS[name].from_vectors(VECTORS)
    assert layer.table.freeze
    np.testing.assert_array_equal(layer([1, 0]), VECTORS.weight[[1, 0]])


@OF_ROWS
def test_from_vectors_fills_a_vocabulary_and_reports_missing_tokens(name):
    layer = LAYERS[name]
    call = re.escape(f"{layer.__module__}.Embedding.from_vectors")
    with pytest.warns(MissingTokensWarning, match=rf'{call}`: 1 of 3 tokens have no vector, such as "x"\.'):
        embedding = layer.from_vectors(VECTORS, OWN, freeze=False, max_norm=100.0)
    assert (embedding.table.padding_idx, embedding.table.freeze, embedding.table.max_norm) == (0, False, 100.0)
    np.testing.assert_array_equal(embedding([0, 1, 2]), [[0, 0], [3, 4], [2, 3]])
    embedding, report = layer.from_vectors(VECTORS, OWN, "zero", return_report=True, padding_idx=None)
    assert (report.missing, report.found, embedding.table.padding_idx) == (("x",), 2, None)
    assert not embedding([2]).any()
    some = [layer.from_vectors(VECTORS, ["y"], "random", seed=s, return_report=True)[0]([0]) for s in (1, 1, 2)]
    np.testing.assert_array_equal(some[0], some[1])
    assert (some[0] != some[2]).any()


@OF_ROWS
def test_from_vectors_errors(name):
    layer = LAYERS[name]
    with pytest.raises(UnknownTokenError, match='"x" is not'):
        layer.from_vectors(VECTORS, OWN, "error")
    with pytest.raises(ValueError, match=r"missing=...\)` must be one of"):
        layer.from_vectors(VECTORS, OWN, "guess")
    with pytest.raises(TypeError, match="unexpected keyword argument 'frozen'"):
        layer.from_vectors(VECTORS, frozen=True)


@OF_ROWS
def test_from_vectors_of_real_words(name):
    words = ["the", "king", "sword"]
    layer, report = LAYERS[name].from_vectors(real.glove(), words, return_report=True)
    assert (report.missing, report.found) == ((), 3)
    np.testing.assert_array_equal(layer([0, 1, 2]), real.glove()[words])


@OF_ALL
def test_state_dicts_of_a_layer(name):
    layer = LAYERS[name].from_pretrained(WEIGHT, padding_idx=2)
    state = layer.to_state_dict("encoder.tokens.")
    assert list(state) == ["encoder.tokens.weight"]
    again = LAYERS[name].from_state_dict(state, "encoder.tokens", padding_idx=2)
    assert type(again) is LAYERS[name]
    assert repr(again.table) == "Table(float32[6,2], padding_idx=2)"  # trained
    np.testing.assert_array_equal(again.table.weight, WEIGHT)
    assert LAYERS[name].from_state_dict(layer.to_state_dict(), freeze=True).table.freeze
    with pytest.raises(KeyError, match=r"must name a weight of the state dict, got 'x', and it has 'encoder.tokens.we"):
        LAYERS[name].from_state_dict(state, "x")


@OF_ROWS
def test_a_head_that_is_tied(name):
    layer = LAYERS[name].from_pretrained(WEIGHT, padding_idx=0, freeze=False)
    np.testing.assert_array_equal(layer.attend([[1.0, 1.0]]), WEIGHT.sum(axis=1)[None])
    logits = layer.attend(jnp.ones(2), mask_padding=True)
    assert jnp.isneginf(logits[0])
    assert jnp.isfinite(logits[1:]).all()
    with pytest.raises(ValueError, match=r"embax.attend\(x=...\)` must be of the shape \(\*batch, \*\(2,\)\)"):
        layer.attend(jnp.ones(3))


@pytest.mark.parametrize(("module", "extra"), [("flax", "nnx"), ("equinox", "equinox")])
def test_import_without_a_framework_names_the_extra(module, extra):
    code = f"import sys; sys.modules[{module!r}] = None; import embax; import embax.{extra}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    named = {"flax": "Flax", "equinox": "Equinox"}[module]
    last = run.stderr.strip().splitlines()[-1]
    assert last == f'ImportError: embax.{extra} needs {named}, which is not installed: pip install "embax[{extra}]"'


def test_the_same_rows_from_every_framework():
    table = Table(jnp.asarray(WEIGHT), **RULES)
    rows = [LAYERS[name].from_table(table)([0, 1, 9, -1]) for name in ("brainstate", "nnx", "equinox")]
    for other in rows:
        np.testing.assert_array_equal(other, embax.lookup(table, [0, 1, 9, -1]))
    assert isinstance(rows[0], jax.Array)
