"""State dicts: weights under the names of torch and Hugging Face."""

import jax.numpy as jnp
import numpy as np
import pytest
import real
import safetensors.numpy

import embax
import embax.equinox
import embax.nnx
from embax import Table, from_state_dict, to_state_dict

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)


class Tensor:
    """What `from_state_dict` may ask of a torch tensor, which does as torch's does."""

    def __init__(self, array, requires_grad=False):
        self.array, self.requires_grad = array, requires_grad

    @property
    def ndim(self):
        return self.array.ndim

    def detach(self):
        return Tensor(self.array)

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if self.array.dtype == jnp.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return np.asarray(self.array, dtype)

    def __dlpack__(self, **options):
        return jnp.asarray(self.array).__dlpack__(**options)

    def __dlpack_device__(self):
        return jnp.asarray(self.array).__dlpack_device__()


# to_state_dict


def test_a_single_table_is_the_weight():
    state = to_state_dict(Table(WEIGHT))
    assert list(state) == ["weight"]
    assert type(state["weight"]) is np.ndarray
    np.testing.assert_array_equal(state["weight"], WEIGHT)
    assert list(to_state_dict(Table(WEIGHT), "encoder.tokens.")) == ["encoder.tokens.weight"]


def test_layers_of_any_framework_and_tables_by_the_names_of_their_modules():
    table = Table(WEIGHT)
    layers = {
        "model.a": embax.Embedding.from_table(table),
        "model.b": embax.nnx.Embedding.from_table(table),
        "model.c": embax.equinox.EmbeddingBag.from_table(table),
        "model.d": table,
    }
    state = to_state_dict(layers, "x.")
    assert list(state) == [f"x.model.{letter}.weight" for letter in "abcd"]
    for weight in state.values():
        np.testing.assert_array_equal(weight, WEIGHT)
    for module, layer in layers.items():
        assert list(to_state_dict(layer)) == ["weight"]
        assert list(to_state_dict({module: layer})) == [f"{module}.weight"]
    assert to_state_dict({}) == {}


def test_arrays_are_of_their_own_and_may_be_written():
    table = Table(jnp.asarray(WEIGHT))
    weight = to_state_dict(table)["weight"]
    weight[:] = 0
    np.testing.assert_array_equal(table.weight, WEIGHT)
    assert weight.flags.c_contiguous


@pytest.mark.parametrize("node", [3, WEIGHT, None, "text"], ids=["int", "array", "none", "text"])
def test_anything_else_is_refused(node):
    match = rf"embax.to_state_dict\(tables=...\)` must have tables or layers, got {type(node).__name__} for 'head'"
    with pytest.raises(TypeError, match=match):
        to_state_dict({"tokens": Table(WEIGHT), "head": node})
    with pytest.raises(TypeError, match=rf"must have tables or layers, got {type(node).__name__} for ''"):
        to_state_dict(node)


# from_state_dict


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8])
def test_round_trip_keeps_values_and_dtype(dtype):
    table = Table(jnp.asarray(WEIGHT, dtype))
    again = from_state_dict(to_state_dict({"a.b": table}), "a.b", padding_idx=-1)
    assert (again.dtype, again.padding_idx) == (dtype, 5)
    np.testing.assert_array_equal(again.weight, table.weight)


HUGGING_FACE = [
    "bert.embeddings.word_embeddings.weight",
    "embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight",
    "model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "shared.weight",
    "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight",
    "word_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "backbone.embeddings.weight",
    "tok_embeddings.weight",
    "weight",
]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_input_embeddings_of_known_models_are_found(name):
    others = (
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "lm_head.weight",
        "transformer.wpe.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "my_wte.weight",
        "not_shared.weight",
    )
    state = {other: np.zeros((3, 3), np.float32) for other in others}
    np.testing.assert_array_equal(from_state_dict({**state, name: WEIGHT}).weight, WEIGHT)


def test_names_of_weights_and_of_modules():
    state = {"a.weight": WEIGHT, "b": WEIGHT + 1, "b.weight": WEIGHT + 2}
    np.testing.assert_array_equal(from_state_dict(state, "a").weight, WEIGHT)
    np.testing.assert_array_equal(from_state_dict(state, "a.weight").weight, WEIGHT)
    np.testing.assert_array_equal(from_state_dict(state, "b").weight, WEIGHT + 1)
    np.testing.assert_array_equal(from_state_dict(state, "b.weight").weight, WEIGHT + 2)


def test_errors_of_names():
    many = {f"layer.{i}.kernel": WEIGHT for i in range(12)}
    match = r"name=...\)` must name a weight of the state dict, got None, and it has 'layer.0.kernel', .*, \.\.\.\."
    with pytest.raises(KeyError, match=match) as caught:
        from_state_dict({**many, "bias": WEIGHT[0]})
    assert "layer.9.kernel" in str(caught.value)
    assert "layer.10.kernel" not in str(caught.value)
    assert "bias" not in str(caught.value)
    with pytest.raises(KeyError, match=r"must name a weight of the state dict, got 'x', and it has 'a.weight'. Pass"):
        from_state_dict({"a.weight": Tensor(WEIGHT)}, "x")
    with pytest.raises(KeyError, match=r"got None, and it has no matrices. Pass its name"):
        from_state_dict({})
    match = r"must be given if there are several token embeddings, got None and 'shared.weight', 'x.embed_tokens.we"
    with pytest.raises(KeyError, match=match):
        from_state_dict({"shared.weight": WEIGHT, "x.embed_tokens.weight": WEIGHT})


def test_rules_and_their_errors():
    table = from_state_dict({"weight": WEIGHT}, max_norm=1.0, freeze=True)
    assert (table.max_norm, table.freeze) == (1.0, True)
    with pytest.raises(ValueError, match=r"padding_idx=...\)` must be a row of the table"):
        from_state_dict({"weight": WEIGHT}, padding_idx=6)
    with pytest.raises(TypeError, match="unexpected keyword argument 'padding'"):
        from_state_dict({"weight": WEIGHT}, padding=0)
    with pytest.raises(ValueError, match=r"weight=...\)` must have an axis of rows, got a scalar"):
        from_state_dict({"weight": np.float32(3)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_of_torch(requires_grad, dtype):
    array = jnp.asarray(WEIGHT, dtype)
    table = from_state_dict({"weight": Tensor(np.asarray(array), requires_grad)})
    assert table.dtype == dtype
    np.testing.assert_array_equal(table.weight, array)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_table_does_not_share_the_memory_of_the_state_dict(dtype):
    """Otherwise a step of torch would change the table, and a donated step of JAX the tensor of torch."""
    held = jnp.asarray(np.ones((64, 64)), dtype)
    table = from_state_dict({"weight": Tensor(held)})
    assert table.weight.unsafe_buffer_pointer() != held.unsafe_buffer_pointer()


def test_real_model():
    """all-MiniLM-L6-v2, of the sentence-transformers."""
    state = safetensors.numpy.load_file(real.MINILM / "model" / "model.safetensors")
    table = from_state_dict(state, padding_idx=0)
    assert repr(table) == "Table(float32[30522,384], padding_idx=0)"
    weight = state["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(table.weight, weight)
    layer = embax.nnx.Embedding.from_state_dict(state, freeze=True)
    np.testing.assert_array_equal(layer([101, 2003, 102]), weight[[101, 2003, 102]])
    places = from_state_dict(state, "embeddings.position_embeddings")
    np.testing.assert_array_equal(places.weight, state["embeddings.position_embeddings.weight"])


def test_a_file_and_back(tmp_path):
    layer = embax.equinox.Embedding(weight=jnp.asarray(WEIGHT, jnp.bfloat16))
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(to_state_dict({"model.embed_tokens": layer}), path)
    again = embax.equinox.Embedding.from_state_dict(safetensors.numpy.load_file(path))
    assert again.weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.weight, layer.weight)
