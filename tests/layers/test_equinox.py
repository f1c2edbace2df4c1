"""The layer for Equinox: what `equinox.nn.Embedding` takes and gives, and row-sparse gradients of modules."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import RowGrad, Table
from embax.equinox import Embedding, EmbeddingBag
from embax.optim import lift, rowwise_adagrad

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
def test_it_takes_every_argument_of_equinox(name):
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
    loss = lambda embedding: embedding(IDS).sum()  # noqa: E731
    np.testing.assert_array_equal(eqx.filter_grad(loss)(layer()).weight, COUNTS)
    gradient = eqx.filter_grad(loss)(layer(padding_idx=0, scale_grad_by_freq=True)).weight
    np.testing.assert_array_equal(gradient, [[0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [1, 1]])
    assert not eqx.filter_grad(loss)(layer(freeze=True)).weight.any()


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
    np.testing.assert_array_equal(bag(jnp.array([1, 2, 5]), offsets=[0, 2]), [WEIGHT[1] + WEIGHT[2], WEIGHT[5]])
    np.testing.assert_array_equal(bag([[1, 2]], per_sample_weights=[[2.0, 0.5]]), [2 * WEIGHT[1] + WEIGHT[2] / 2])
    assert bag([[1]], dtype=jnp.bfloat16).dtype == jnp.bfloat16
    last = EmbeddingBag(6, 2, key=KEY, include_last_offset=True)
    assert (last.mode, last([1, 2, 5, 3], offsets=[0, 2, 3]).shape) == ("mean", (2, 2))
    gradient = embax.grad(lambda bag: eqx.filter_jit(lambda: bag(jnp.array([[1, 2]])))().sum(), on_dense="error")(bag)
    np.testing.assert_array_equal(gradient.table.to_dense()[1:3], np.ones((2, 2)))
    assert isinstance(embax.grad(lambda bag: bag(IDS[None]).sum())(bag).table, RowGrad)


# Row-sparse gradients of modules


class Model(eqx.Module):
    """A module with leaves that are no parameters."""

    embedding: Embedding
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout
    steps: jax.Array
    host: np.ndarray
    lengths: Embedding
    activation: object
    flag: bool
    name: str
    nothing: None

    def __init__(self, **rules):
        self.embedding = layer(**rules)
        self.mlp = eqx.nn.MLP(2, 1, 3, 1, key=KEY)
        self.dropout = eqx.nn.Dropout(0.5)
        self.steps = jnp.arange(3)
        self.host = np.arange(3)
        self.lengths = Embedding(weight=np.ones((6, 2), np.int32))
        self.activation, self.flag, self.name, self.nothing = jax.nn.relu, True, "model", None

    def __call__(self, ids):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            rows = self.activation(self.embedding(ids)) * self.lengths(ids)
            return (jax.vmap(self.mlp)(self.dropout(rows, key=KEY)) ** 2).sum()


def densely(module):
    """A module with the dense gradient in the place of a table's, and nothing in that of one that has none."""

    def weight(node):
        if isinstance(node, RowGrad):
            return Table(node.to_dense()) if len(node.ids) else None
        return node

    return jax.tree.map(weight, module, is_leaf=lambda node: isinstance(node, RowGrad))


def assert_same(ours, theirs):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)  # float32


@pytest.mark.parametrize("compile_", [lambda fun: fun, eqx.filter_jit], ids=["eager", "jit"])
@pytest.mark.parametrize("rules", [{}, {"padding_idx": 2, "max_norm": 1.0, "scale_grad_by_freq": True}], ids=str)
def test_modules_as_they_are(rules, compile_):
    model = Model(**rules)
    value, gradient = compile_(embax.value_and_grad(Model.__call__))(model, IDS)
    expected, theirs = eqx.filter_value_and_grad(Model.__call__)(model, IDS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32
    assert isinstance(gradient, Model)
    assert isinstance(gradient.embedding.table, RowGrad)
    assert len(gradient.lengths.table.ids) == 0
    rest = gradient.steps, gradient.host, gradient.activation, gradient.flag, gradient.name, gradient.dropout.p
    assert rest == (None,) * 6
    assert_same(densely(gradient), theirs)


def test_modules_beside_arrays():
    params = {"model": Model(), "scale": jnp.array([1.0, 2.0]), "table": Table(WEIGHT)}
    loss = lambda params: params["model"](IDS) * (params["scale"] * embax.lookup(params["table"], 1)).sum()  # noqa: E731
    gradient = embax.grad(loss)(params)
    assert_same(densely(gradient), eqx.filter_grad(loss)(params))
    assert isinstance(gradient["table"], RowGrad)
    # The rule of JAX holds outside of modules.
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        embax.grad(lambda params: params["model"](IDS))({"model": Model(), "ids": IDS})


def test_argnums_and_has_aux():
    loss = lambda scale, model: (model(IDS) * scale, (model, "text"))  # noqa: E731
    (value, (model, text)), gradient = embax.value_and_grad(loss, argnums=(1, 0), has_aux=True)(2.0, Model())
    assert (text, model.name, model.activation) == ("text", "model", jax.nn.relu)
    np.testing.assert_array_equal(model.embedding.weight, WEIGHT)
    np.testing.assert_allclose(gradient[1] * 2, value, rtol=1e-6)  # float32
    assert isinstance(gradient[0].embedding.table, RowGrad)
    (_, (model, _)), _ = eqx.filter_jit(embax.value_and_grad(loss, 1, has_aux=True))(2.0, Model())
    assert model.name == "model"


def test_a_partitioned_module():
    params, static = eqx.partition(Model(), eqx.is_inexact_array)
    gradient = embax.grad(lambda params: eqx.combine(params, static)(IDS))(params)
    assert_same(densely(gradient), densely(embax.grad(Model.__call__)(Model(), IDS)))
    assert gradient.lengths.table.weight is None


def test_a_table_of_integers_and_a_frozen_one_have_no_rows():
    for embedding in Embedding(weight=np.ones((6, 2), np.int32)), layer(freeze=True):
        gradient = embax.grad(lambda m: m(IDS).sum().astype(jnp.float32))(embedding)
        assert len(gradient.table.ids) == 0
    assert eqx.filter_grad(lambda m: m(IDS).sum().astype(jnp.float32))(Embedding(weight=[[1]] * 6)).weight is None


def test_dense_uses_name_the_table():
    with pytest.warns(embax.DenseGradientWarning, match=r"argument 0\['m'\].embedding.table, .* sums over all rows"):
        gradient = embax.grad(lambda d: d["m"].embedding.weight.sum())({"m": Model()})
    np.testing.assert_array_equal(gradient["m"].embedding.weight, np.ones((6, 2)))


TRANSFORMED = {
    "vmap": lambda m: jax.vmap(m)(IDS),
    "filter_vmap": lambda m: eqx.filter_vmap(m)(IDS),
    "filter_vmap_of_module": lambda m: eqx.filter_vmap(lambda m, i: m(i), in_axes=(None, 0))(m, IDS),
    "filter_jit": lambda m: eqx.filter_jit(m)(IDS),
    "filter_checkpoint": lambda m: eqx.filter_checkpoint(m)(IDS),
    "scan": lambda m: jax.lax.scan(lambda c, i: (c, m(i)), 0, IDS)[1],
}


def test_transformations_of_a_module_are_followed():
    def of(transformed):
        return lambda m: (jnp.sin(transformed(m)) ** 2).sum()

    @jax.jit
    def gradients(m):
        ours = {name: embax.grad(of(way), on_dense="error")(m).table for name, way in TRANSFORMED.items()}
        return ours, jax.grad(of(lambda m: m(IDS)))(m)

    ours, expected = gradients(layer())
    for name, gradient in ours.items():
        assert len(gradient.ids) == IDS.size, name
        np.testing.assert_allclose(gradient.to_dense(), expected.weight, rtol=1e-6, err_msg=name)  # float32


def shared(where):
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            pair = layer(), Embedding(weight=WEIGHT + 1)
            self.shared = eqx.nn.Shared(pair, where=lambda pair: where(pair[1]), get=lambda pair: where(pair[0]))

        def __call__(self, ids):
            first, second = self.shared()
            return (first(ids) * second(ids)).sum()

    return Tied()


@pytest.mark.parametrize("where", [lambda m: m.table, lambda m: m.weight], ids=["table", "weight"])
def test_shared_layers_have_one_gradient(where):
    model = shared(where)
    gradient = embax.grad(type(model).__call__)(model, IDS)
    first, second = gradient.shared.pytree
    assert len(first.table.ids) == 8
    np.testing.assert_allclose(first.table.to_dense(), COUNTS * 2 * WEIGHT, rtol=1e-6)  # float32
    assert not [x for x in jax.tree.leaves(second) if x is not None and x.size]


def test_a_head_that_shares_the_weight():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            pair = layer(), eqx.nn.Linear(2, 6, use_bias=False, key=KEY)
            self.shared = eqx.nn.Shared(pair, where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)

        def __call__(self, ids):
            embedding, head = self.shared()
            return (jax.vmap(head)(embedding(ids)) ** 2).sum()

    value, gradient = embax.value_and_grad(Tied.__call__, on_dense="allow")(Tied(), IDS)
    expected, theirs = eqx.filter_value_and_grad(Tied.__call__)(Tied(), IDS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32
    assert_same(gradient, theirs)
    # attend is the same, without a word.
    ours = embax.grad(lambda m: (m.attend(m(IDS)) ** 2).sum(), on_dense="error")(layer())
    np.testing.assert_allclose(ours.weight, theirs.shared.pytree[0].weight, rtol=1e-5)


# Training


@pytest.fixture
def _standard_promotion():  # which optax relies on
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(model, tx, value_and_grad, apply_updates, steps=6):
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, ids):
        value, gradient = value_and_grad(Model.__call__)(model, ids)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return apply_updates(model, updates), state, value

    values = []
    for i in range(steps):
        model, state, value = step(model, state, (IDS + i) % 6)
        values.append(value)
    return model, values


@pytest.mark.usefixtures("_standard_promotion")
def test_training_equals_dense_training():
    ours, values = train(Model(padding_idx=1), lift(optax.adagrad(0.1)), embax.value_and_grad, embax.apply_updates)
    # Equinox alone, with the layer as it is, whose gradient is dense.
    theirs, expected = train(Model(padding_idx=1), optax.adagrad(0.1), eqx.filter_value_and_grad, eqx.apply_updates)
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32
    assert_same(eqx.filter(ours, eqx.is_array), eqx.filter(theirs, eqx.is_array))
    np.testing.assert_array_equal(ours.embedding.weight[1], WEIGHT[1])
    assert (ours.name, ours.activation, ours.steps.dtype) == ("model", jax.nn.relu, jnp.int32)


@pytest.mark.usefixtures("_standard_promotion")
@pytest.mark.parametrize("value_and_grad", [embax.value_and_grad, eqx.filter_value_and_grad])
def test_padding_rows_never_change(value_and_grad):
    tx = lift(optax.adamw(0.1, weight_decay=0.5))
    model, _ = train(Model(padding_idx=1), tx, value_and_grad, embax.apply_updates)
    changed = (np.asarray(model.embedding.weight) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    frozen, _ = train(Model(freeze=True), tx, value_and_grad, embax.apply_updates, steps=1)
    np.testing.assert_array_equal(frozen.embedding.weight, WEIGHT)


@pytest.mark.usefixtures("_standard_promotion")
def test_the_filter_of_arrays_serves_a_module_without_integers():
    model = layer()
    tx = rowwise_adagrad(0.1)
    state = tx.init(eqx.filter(model, eqx.is_array))
    gradient = embax.grad(lambda m: m(IDS).sum())(model)
    updates, _ = tx.update(gradient, state, eqx.filter(model, eqx.is_array))
    new = embax.apply_updates(model, updates)
    np.testing.assert_allclose(new.weight, WEIGHT - 0.1 * (COUNTS > 0), rtol=1e-6)  # float32


@pytest.mark.usefixtures("_standard_promotion")
def test_equinox_refuses_to_apply_rows():
    gradient = embax.grad(lambda m: m(IDS).sum())(layer())
    with pytest.raises(ValueError, match="RowGrad"):
        eqx.apply_updates(layer(), gradient)


def memory_of_a_step(rows, tx, **rules):
    class Scaled(eqx.Module):
        embedding: Embedding
        scale: jax.Array
        activation: object

        def __call__(self, ids):
            return (self.activation(self.embedding(ids)) * self.scale).sum()

    model = Scaled(Embedding(weight=np.ones((rows, 16), np.float32), **rules), jnp.ones((1, 16)), jax.nn.relu)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(ids, model, state):
        value, gradient = embax.value_and_grad(Scaled.__call__)(model, ids)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        model = embax.apply_updates(model, updates)
        return eqx.tree_at(lambda m: m.embedding, model, model.embedding.renormalized(ids)), state, value

    held = sum(x.nbytes for x in jax.tree.leaves((eqx.filter(model, eqx.is_array), state)))
    return step.lower(jnp.arange(128), model, state).compile().compiled.memory_analysis(), held


@pytest.mark.usefixtures("_standard_promotion")
@pytest.mark.parametrize("rules", [{}, {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}], ids=str)
def test_memory_of_a_donated_step_follows_the_ids(rules):
    tx = lift(optax.adamw(0.1))
    (few, _), (many, held) = memory_of_a_step(10**4, tx, **rules), memory_of_a_step(10**5, tx, **rules)
    assert few.temp_size_in_bytes == many.temp_size_in_bytes <= 128 * 16 * 4 * 16
    assert many.alias_size_in_bytes >= held
    assert many.output_size_in_bytes - many.alias_size_in_bytes < 1_000


def test_a_module_is_one_where_equinox_comes_in():
    assert isinstance(layer(), eqx.Module)
    assert Embedding.__module__ == EmbeddingBag.__module__ == "embax.equinox"
    assert isinstance(layer().table, Table)
