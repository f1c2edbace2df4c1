"""The layer's interface: constructor, from_pretrained, attributes, initialisers, units, and brainstate's habits."""

import inspect
import itertools

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import usual_and_rest

import embax

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)


@pytest.mark.parametrize("method", ["__init__", "from_pretrained", "update"])
def test_signature_begins_like_that_of_brainstates_layer(method):
    def parameters(layer):
        return [
            (p.name, p.kind)
            for p in inspect.signature(getattr(layer, method)).parameters.values()
            if p.kind != p.VAR_KEYWORD
        ]

    theirs, ours = parameters(brainstate.nn.Embedding), parameters(embax.Embedding)
    assert ours[: len(theirs)] == theirs
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind in ours[len(theirs) :])


@pytest.mark.parametrize("method", ["__init__", "from_pretrained"])
def test_defaults_equal_those_of_brainstates_layer(method):
    theirs = inspect.signature(getattr(brainstate.nn.Embedding, method)).parameters
    ours = inspect.signature(getattr(embax.Embedding, method)).parameters
    for name, parameter in theirs.items():
        if name != "embedding_init":
            assert ours[name].default == parameter.default, name


def test_is_a_module_of_its_own():
    assert issubclass(embax.Embedding, brainstate.nn.Module)
    assert not issubclass(embax.Embedding, brainstate.nn.Embedding)
    assert embax.Embedding is embax.brainstate.Embedding


def test_all_arguments_may_be_positional():
    embedding = embax.Embedding(6, 2, WEIGHT, 1, 3.0, 1.0, True, True, "words", brainstate.LongTermState)
    assert (embedding.padding_idx, embedding.max_norm, embedding.norm_type) == (1, 3.0, 1.0)
    assert (embedding.scale_grad_by_freq, embedding.freeze, embedding.name) == (True, True, "words")
    assert type(embedding.weight) is brainstate.LongTermState
    np.testing.assert_array_equal(embedding.weight.value[1], [0, 0])


def test_attributes():
    embedding = embax.Embedding(6, (2, 3))
    assert (embedding.num_embeddings, embedding.embedding_size, embedding.out_size) == (6, (2, 3), (2, 3))
    assert embedding.in_size is None
    assert list(embedding.states()) == [("weight",)]
    assert embedding([[0, 1]]).shape == (1, 2, 2, 3)


def test_whole_floats_and_numpy_sizes_are_sizes():
    embedding = embax.Embedding(6.0, np.array([2, 3]))
    assert embedding.weight.value.shape == (6, 2, 3)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}])
@pytest.mark.parametrize("size", [(50, 8), (7, (2, 3))])
def test_same_seed_gives_the_weights_of_brainstates_layer(size, options):
    weights = []
    for layer in (embax.Embedding, brainstate.nn.Embedding):
        brainstate.random.seed(7)
        weights += [layer(*size, **options).weight.value, layer(*size, **options).weight.value]
    np.testing.assert_array_equal(weights[0], weights[2])
    np.testing.assert_array_equal(weights[1], weights[3])


PRECISIONS = {16: jnp.float16, "bf16": jnp.bfloat16, 32: jnp.float32}
INITIALISERS = {
    "default": {},
    "of JAX": {"embedding_init": jax.nn.initializers.normal()},
    "number": {"embedding_init": 0.5},
    "list": {"embedding_init": [[0.5, 1.5]]},
}


@pytest.mark.parametrize(
    ("precision", "init"),
    usual_and_rest(
        [(16, "default"), ("bf16", "of JAX"), (32, "number"), (16, "list")], itertools.product(PRECISIONS, INITIALISERS)
    ),
)
def test_precision_is_the_environments(precision, init):
    with brainstate.environ.context(precision=precision):
        assert embax.Embedding(6, 2, **INITIALISERS[init]).weight.value.dtype == PRECISIONS[precision]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_embeddings": -1}, ValueError, r"num_embeddings=...\)` must not be negative, got -1"),
        ({"num_embeddings": 2.5}, TypeError, "must be a whole number, got 2.5"),
        ({"embedding_size": ()}, ValueError, "must have an axis or more, got none"),
        ({"embedding_size": -2}, ValueError, r"embedding_size=...\)` must not be negative, got -2"),
        ({"padding_idx": -1}, ValueError, r"padding_idx=...\)` must be in \[0, 6\), got -1"),
        ({"padding_idx": 6}, ValueError, r"must be in \[0, 6\), got 6"),
        ({"padding_idx": 0.5}, TypeError, "must be a whole number, got 0.5"),
        ({"max_norm": 0.0}, ValueError, "must be positive, got 0.0"),
        ({"max_norm": -1.0}, ValueError, "must be positive, got -1.0"),
        ({"max_norm": "one"}, TypeError, "must be a positive number, got 'one'"),
        ({"norm_type": 0}, ValueError, "must be positive, got 0.0"),
        ({"out_of_range": "wrap"}, ValueError, "must be one of 'error', 'clip', 'nan', 'zero', got 'wrap'"),
        ({"embedding_init": WEIGHT[:5]}, ValueError, r"broadcasts to \(6, 2\), got \(5, 2\)"),
        ({"embedding_init": lambda shape: jnp.zeros((2, 2))}, ValueError, r"broadcasts to \(6, 2\), got \(2, 2\)"),
        ({"embedding_init": None}, ValueError, "got None"),
        ({"embedding_init": "normal"}, TypeError, "must give numbers"),
        ({"embedding_init": brainstate.nn.init.LecunUniform}, TypeError, "must give numbers"),
        ({"embedding_init": np.ones((6, 2), bool)}, TypeError, "must give numbers, got bool"),
        ({"embedding_init": np.ones((6, 2), int), "max_norm": 1.0}, TypeError, "table of integers"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        embax.Embedding(**{"num_embeddings": 6, "embedding_size": 2, **arguments})


@pytest.mark.parametrize("indices", [1.0, [0.5], np.array([True]), True, jnp.ones(2)])
def test_indices_that_are_not_integers_are_refused(indices):
    with pytest.raises(TypeError, match=r"embax.Embedding.update\(indices=...\)` must be of an integer dtype"):
        embax.Embedding(6, 2)(indices)


def test_jax_initialiser_gets_a_key_the_shape_and_the_dtype():
    seen = []

    def init(key, shape, dtype):
        seen.append((shape, dtype))
        return jax.random.normal(key, shape, dtype)

    first, second = (embax.Embedding(6, 2, embedding_init=init).weight.value for _ in range(2))
    assert seen == [((6, 2), brainstate.environ.dftype())] * 2
    assert (np.asarray(first) != np.asarray(second)).all()


def test_brainstate_initialiser_gets_the_shape():
    value = embax.Embedding(6, 2, embedding_init=brainstate.nn.init.Constant(2.0)).weight.value
    np.testing.assert_array_equal(value, np.full((6, 2), 2.0))


@pytest.mark.parametrize("size", [(0, 2), (0, 0), (3, 0), (1, 1)])
def test_sizes_of_zero_and_one(size):
    embedding = embax.Embedding(*size)
    assert embedding.weight.value.shape == size
    assert embedding([]).shape == (0, size[1])
    if size[0]:
        assert embedding([0, -1]).shape == (2, size[1])


def test_embedding_init_takes_the_value_of_a_state():
    state = brainstate.ParamState(jnp.asarray(WEIGHT))
    embedding = embax.Embedding(6, 2, embedding_init=state)
    assert embedding.weight is not state
    np.testing.assert_array_equal(embedding.weight.value, WEIGHT)


class Words(embax.Embedding):
    pass


def test_from_pretrained_of_a_subclass():
    embedding = Words.from_pretrained(WEIGHT, padding_idx=2)
    assert type(embedding) is Words
    assert embedding.freeze
    np.testing.assert_array_equal(embedding.weight.value, WEIGHT)  # the padding row, too, is kept
    gradient = brainstate.transform.jit(brainstate.transform.grad(lambda: embedding([0, 1]).sum(), embedding.weight))
    assert not np.any(gradient())


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.float16, np.float32])
def test_from_pretrained_keeps_the_dtype(dtype):
    embedding = embax.Embedding.from_pretrained(WEIGHT.astype(dtype))
    assert embedding.weight.value.dtype == dtype
    assert embedding(1).dtype == dtype


def test_from_pretrained_of_lists_and_more_axes():
    assert embax.Embedding.from_pretrained([[1, 2], [3, 4]]).weight.value.dtype == jnp.int32
    embedding = embax.Embedding.from_pretrained(np.zeros((5, 2, 3)), out_of_range="clip", dtype=jnp.float16)
    assert embedding(9).shape == (2, 3)
    assert embedding(9).dtype == jnp.float16


def test_from_pretrained_refuses_a_vector():
    with pytest.raises(ValueError, match=r"2 axes or more, \(rows, \*dim\), got shape \(6,\)"):
        embax.Embedding.from_pretrained(np.zeros(6))


def test_from_pretrained_does_not_share_a_buffer_of_the_caller():
    mine = WEIGHT.copy()
    embedding = embax.Embedding.from_pretrained(mine)
    mine[:] = 0
    np.testing.assert_array_equal(embedding.weight.value, WEIGHT)


def test_dtype_casts_the_output_only():
    embedding = embax.Embedding(6, 2, dtype=jnp.bfloat16)
    assert embedding([0]).dtype == jnp.bfloat16
    assert embedding.weight.value.dtype == jnp.float32
    gradient = brainstate.transform.jit(brainstate.transform.grad(lambda: embedding([0]).sum(), embedding.weight))
    assert gradient().dtype == jnp.float32


def test_fake_state_is_not_listed_among_states():
    embedding = embax.Embedding(6, 2, param_type=brainstate.FakeState)
    assert not embedding.states()
    assert brainstate.transform.jit(embedding)(jnp.array([1])).shape == (1, 2)


def test_tying_and_replacing_the_weight():
    first, second = embax.Embedding(6, 2), embax.Embedding(6, 2)
    second.weight = first.weight
    first.weight.value = jnp.asarray(WEIGHT)
    np.testing.assert_array_equal(second([1]), WEIGHT[[1]])
    loss = lambda: first([1]).sum() + second([1]).sum()  # noqa: E731
    gradient = brainstate.transform.jit(brainstate.transform.grad(loss, first.weight))()
    np.testing.assert_array_equal(np.asarray(gradient)[1], [2, 2])


def test_desc_and_pipeline():
    description = embax.Embedding.desc(embedding_size=2)
    assert description(num_embeddings=6).weight.value.shape == (6, 2)
    embedding = embax.Embedding(6, 2)
    np.testing.assert_array_equal(jnp.array([0, 1]) >> embedding, embedding([0, 1]))


def test_sequential_with_a_linear_head_trains():
    weight = np.random.default_rng(0).normal(scale=0.5, size=(6, 4)).astype(np.float32)
    linear = brainstate.nn.Linear(4, 1, w_init=weight[:4, :1])
    model = brainstate.nn.Sequential(embax.Embedding(6, 4, weight, padding_idx=0), linear)
    ids, targets = jnp.array([1, 2, 3]), jnp.array([[0.0], [1.0], [2.0]])
    parameters = model.states(brainstate.ParamState)

    def loss():
        return jnp.mean((model(ids) - targets) ** 2)

    @embax.brainstate.jit
    def step():
        gradients, value = brainstate.transform.grad(loss, parameters, return_value=True)()
        for key, gradient in gradients.items():
            parameters[key].value = jax.tree.map(lambda p, g: p - 0.1 * g, parameters[key].value, gradient)
        return value

    with jax.numpy_rank_promotion("allow"):  # brainstate's Linear needs it
        first = step()
        for _ in range(100):
            last = step()
    assert last < first / 100
    np.testing.assert_array_equal(model.layers[0].weight.value[0], np.zeros(4))


MAX_NORMS = {"number": 0.005, "millivolt": 5.0 * brainunit.mV, "volt": 0.005 * brainunit.volt}


@pytest.mark.parametrize("kind", ["millivolt", "volt"])
def test_max_norm_with_a_unit_is_converted_to_the_tables(kind):
    embedding = embax.Embedding.from_pretrained(WEIGHT * brainunit.mV, max_norm=MAX_NORMS[kind])
    np.testing.assert_allclose(np.linalg.norm(embedding(5).mantissa), 5, rtol=3e-7)  # float32


def test_max_norm_without_unit_is_in_the_unit_of_the_table():
    embedding = embax.Embedding.from_pretrained(WEIGHT * brainunit.volt, max_norm=0.005)
    np.testing.assert_allclose(np.linalg.norm(embedding(5).mantissa), 0.005, rtol=3e-7)  # float32


def test_max_norm_of_another_dimension_is_refused():
    with pytest.raises(brainunit.UnitMismatchError):
        embax.Embedding(6, 2, max_norm=1.0 * brainunit.second)


def test_embedding_init_takes_a_quantity_or_an_initialiser_of_one():
    made = embax.Embedding(6, 2, brainstate.nn.init.LecunUniform(unit=brainunit.mV), padding_idx=0)
    assert made([0, 1]).unit == brainunit.mV
    np.testing.assert_array_equal(made(0).mantissa, [0, 0])
    given = embax.Embedding(6, 2, WEIGHT * brainunit.mV)
    np.testing.assert_array_equal(given(5).mantissa, WEIGHT[5])
    assert brainstate.transform.jit(given)(jnp.array([1])).unit == brainunit.mV


def test_quantity_under_vmap_and_with_write_back():
    embedding = embax.Embedding.from_pretrained(WEIGHT * brainunit.mV, max_norm=1.0, freeze=False)
    rows = brainstate.transform.vmap(embedding)(jnp.array([[0, 1], [2, 3]]))
    assert rows.unit == brainunit.mV
    np.testing.assert_allclose(np.linalg.norm(embedding.weight.value.mantissa[:4], axis=1), 1, rtol=3e-7)  # float32


def test_one_program_serves_all_calls_of_a_shape():
    traces = []
    embedding = embax.Embedding(6, 2, max_norm=1.0, padding_idx=0, scale_grad_by_freq=True)

    @embax.brainstate.jit
    def step(ids):
        traces.append(1)
        embedding.weight.value -= brainstate.transform.grad(lambda: embedding(ids).sum(), embedding.weight)()

    step(jnp.array([1, 2]))
    traced = len(traces)
    for ids in ([0, 1], [5, 5], [-1, 3]):
        step(jnp.array(ids))
    assert len(traces) == traced
