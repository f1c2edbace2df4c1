"""Row-sparse gradients of Equinox modules, and their training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_close

import embax
from embax import RowGrad, Table
from embax.equinox import Embedding
from embax.optim import lift, rowwise_adagrad

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
KEY = jax.random.key(0)
IDS = jnp.array([0, 2, 2, -1])
COUNTS = np.array([1, 0, 2, 0, 0, 1])[:, None] * np.ones((1, 2))


def layer(**rules):
    return Embedding(weight=WEIGHT, **rules)


class Model(eqx.Module):
    """A module with leaves that are no parameters."""

    embedding: Embedding
    linear: eqx.nn.Linear
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
        self.linear = eqx.nn.Linear(2, 1, key=KEY)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)
        self.steps = jnp.arange(3)
        self.host = np.arange(3)
        self.lengths = Embedding(weight=np.ones((6, 2), np.int32))
        self.activation, self.flag, self.name, self.nothing = jax.nn.relu, True, "model", None

    def __call__(self, ids):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            rows = self.activation(self.embedding(ids)) * self.lengths(ids)
            return (jax.vmap(self.linear)(self.dropout(rows)) ** 2).sum()


def densely(module):
    """A module with the dense gradient in the place of a table's, and nothing in that of one that has none."""

    def weight(node):
        if isinstance(node, RowGrad):
            return Table(node.to_dense()) if len(node.ids) else None
        return node

    return jax.tree.map(weight, module, is_leaf=lambda node: isinstance(node, RowGrad))


@pytest.mark.parametrize(
    ("rules", "compile_"),
    [
        # Outside of jit, each operation is a program of its own; the tests of arguments take fewer.
        pytest.param({}, lambda fun: fun, marks=pytest.mark.exhaustive),
        ({"padding_idx": 2, "max_norm": 1.0, "scale_grad_by_freq": True}, eqx.filter_jit),
    ],
    ids=["eager", "jit"],
)
def test_value_and_grad_takes_whole_modules(rules, compile_):
    model = Model(**rules)
    value, gradient = compile_(embax.value_and_grad(Model.__call__))(model, IDS)
    expected, theirs = eqx.filter_jit(eqx.filter_value_and_grad(Model.__call__))(model, IDS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32
    assert isinstance(gradient, Model)
    assert isinstance(gradient.embedding.table, RowGrad)
    assert len(gradient.lengths.table.ids) == 0
    rest = gradient.steps, gradient.host, gradient.activation, gradient.flag, gradient.name, gradient.dropout.p
    assert rest == (None,) * 6
    assert_close(densely(gradient), theirs)


def test_modules_beside_arrays():
    params = {"model": Model(), "scale": jnp.array([1.0, 2.0]), "table": Table(WEIGHT)}
    loss = lambda params: params["model"](IDS) * (params["scale"] * embax.lookup(params["table"], 1)).sum()  # noqa: E731
    gradient, theirs = eqx.filter_jit(lambda params: (embax.grad(loss)(params), eqx.filter_grad(loss)(params)))(params)
    assert_close(densely(gradient), theirs)
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
    assert_close(densely(gradient), densely(eqx.filter_jit(embax.grad(Model.__call__))(Model(), IDS)))
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
    gradient = eqx.filter_jit(embax.grad(type(model).__call__))(model, IDS)
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

    @eqx.filter_jit
    def gradients(tied, embedding):
        # attend is the same, without a word.
        attend = embax.grad(lambda m: (m.attend(m(IDS)) ** 2).sum(), on_dense="error")(embedding)
        ours = embax.value_and_grad(Tied.__call__, on_dense="allow")(tied, IDS)
        return ours, eqx.filter_value_and_grad(Tied.__call__)(tied, IDS), attend

    (value, gradient), (expected, theirs), attend = gradients(Tied(), layer())
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # float32
    assert_close(gradient, theirs)
    np.testing.assert_allclose(attend.weight, theirs.shared.pytree[0].weight, rtol=1e-5)


# Training


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


@pytest.mark.usefixtures("standard_promotion")
def test_training_equals_dense_training():
    ours, values = train(Model(padding_idx=1), lift(optax.adagrad(0.1)), embax.value_and_grad, embax.apply_updates)
    # Equinox alone, with the layer as it is, whose gradient is dense.
    theirs, expected = train(Model(padding_idx=1), optax.adagrad(0.1), eqx.filter_value_and_grad, eqx.apply_updates)
    np.testing.assert_allclose(values, expected, rtol=1e-5)  # float32
    assert_close(eqx.filter(ours, eqx.is_array), eqx.filter(theirs, eqx.is_array))
    np.testing.assert_array_equal(ours.embedding.weight[1], WEIGHT[1])
    assert (ours.name, ours.activation, ours.steps.dtype) == ("model", jax.nn.relu, jnp.int32)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("value_and_grad", [embax.value_and_grad, eqx.filter_value_and_grad])
def test_padding_rows_never_change(value_and_grad):
    tx = lift(optax.adamw(0.1, weight_decay=0.5))
    model, _ = train(Model(padding_idx=1), tx, value_and_grad, embax.apply_updates)
    changed = (np.asarray(model.embedding.weight) != WEIGHT).any(axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, True])
    frozen, _ = train(Model(freeze=True), tx, value_and_grad, embax.apply_updates, steps=1)
    np.testing.assert_array_equal(frozen.embedding.weight, WEIGHT)


@pytest.mark.usefixtures("standard_promotion")
def test_the_filter_of_arrays_serves_a_module_without_integers():
    tx = rowwise_adagrad(0.1)

    @eqx.filter_jit
    def trained(model):
        state = tx.init(eqx.filter(model, eqx.is_array))
        gradient = embax.grad(lambda m: m(IDS).sum())(model)
        updates, _ = tx.update(gradient, state, eqx.filter(model, eqx.is_array))
        return embax.apply_updates(model, updates)

    np.testing.assert_allclose(trained(layer()).weight, WEIGHT - 0.1 * (COUNTS > 0), rtol=1e-6)  # float32


@pytest.mark.usefixtures("standard_promotion")
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


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "rules",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}],
    ids=str,
)
def test_memory_of_a_donated_step_follows_the_ids(rules):
    tx = lift(optax.adamw(0.1))
    (few, _), (many, held) = memory_of_a_step(10**4, tx, **rules), memory_of_a_step(10**5, tx, **rules)
    assert few.temp_size_in_bytes == many.temp_size_in_bytes <= 128 * 16 * 4 * 16
    assert many.alias_size_in_bytes >= held
    assert many.output_size_in_bytes - many.alias_size_in_bytes < 1_000
