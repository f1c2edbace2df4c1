"""Stacks: each table, gradient and state under its own name, however it is stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bag_cases import assert_same_bits, dense, put_together

import embax
from embax import Collection, Feature, Table
from embax.optim import lift, rowwise_adagrad


def weight(rows, dim=3):
    return np.random.default_rng(rows).normal(size=(rows, dim)).astype(np.float32)


TABLES = {
    "film": Table(weight(5), padding_idx=0),
    "wide": Table(weight(6, 4), max_norm=1.0),
    "user": Table(weight(7)),
    "none": Table(weight(0)),
    "genre": Table(weight(4), padding_idx=(1, 3)),
    "frozen": Table(weight(2), freeze=True),
}
FEATURES = [Feature(name, name, "sum") for name in TABLES if name != "none"]
BATCH = {feature.name: np.array([[0, 1], [1, 0], [-1, 1]]) for feature in FEATURES}
STATES = {"adamw": lift(optax.adamw(0.1)), "rowwise_adagrad": rowwise_adagrad(0.1)}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@jax.jit
def gradient_of(tables):
    def loss(tables):
        if isinstance(tables, Collection):
            out = tables(BATCH)
        else:
            out = {name: embax.embedding_bag(tables[name], ids, mode="sum") for name, ids in BATCH.items()}
        return sum(jnp.square(x - 0.3).sum() for x in out.values())

    return embax.grad(loss)(tables)


@functools.partial(jax.jit, static_argnames="name")
def updated(tables, state, gradient, name):
    updates, state = STATES[name].update(gradient, state, tables)
    return embax.apply_updates(tables, updates), state


@functools.cache
def trained(name, stacked):
    """The parameters and the state of an optimizer after some steps."""
    tables = put_together(TABLES, FEATURES) if stacked else TABLES
    state = jax.jit(STATES[name].init)(tables)
    for _ in range(2):
        tables, state = updated(tables, state, gradient_of(tables), name)
    return tables, state


def named(tree):
    """The leaves by path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_collection_returns_tables_by_name_in_order():
    collection = put_together(TABLES, FEATURES)
    assert list(collection.tables) == list(TABLES)
    assert len(collection.stacks) == 3
    for name, table in TABLES.items():
        for own in (collection.tables[name], collection[name]):
            assert jax.tree.structure(own) == jax.tree.structure(table)
            np.testing.assert_array_equal(own.weight, table.weight)


def test_gradients_go_by_name():
    gradient = gradient_of(put_together(TABLES, FEATURES))
    assert isinstance(gradient, Collection)
    ours = jax.jit(lambda gradient: gradient.tables)(gradient)
    whole, expected = dense((ours, gradient_of(TABLES)))
    for name in TABLES:
        np.testing.assert_allclose(whole[name], expected[name], rtol=1e-6, err_msg=name)  # float32
        assert ours[name].rows == TABLES[name].rows
    np.testing.assert_array_equal(*jax.jit(lambda one, other: (one["user"].ids, other["user"].ids))(gradient, ours))


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "adamw" else pytest.mark.exhaustive) for x in STATES]
)
def test_unstacked_parameters_and_state_have_the_names_and_values_of_separate_tables(name):
    collection, state = trained(name, stacked=True)
    tables, expected = trained(name, stacked=False)
    ours, theirs = named(jax.jit(embax.unstack)((collection, state.inner))), named((tables, expected.inner))
    # What is not trained has no state of its own, and a stack is trained or not as its tables are.
    assert ours.keys() == theirs.keys()
    assert "[0]['film'].weight" in ours
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)  # float32


@pytest.mark.parametrize("name", STATES)
def test_restack_undoes_unstack(name):
    tree = dict(zip(("params", "state"), trained(name, stacked=True), strict=True))
    apart = jax.jit(embax.unstack)(tree)
    assert not any(
        isinstance(x, Collection) for x in jax.tree.leaves(apart, is_leaf=lambda x: isinstance(x, Collection))
    )
    again = jax.jit(lambda apart: embax.restack(apart, like=jax.eval_shape(lambda tree: tree, tree)))(apart)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert_same_bits(named(again), named(tree))
    updated(again["params"], again["state"], gradient_of(again["params"]), name)


def test_restack_does_not_mind_the_order_of_names():
    collection = Collection(TABLES, FEATURES)
    apart = dict(reversed(embax.unstack(collection).items()))
    assert_same_bits(named(embax.restack(apart, collection)), named(collection))
    assert_same_bits(named(embax.restack(jax.tree.map(lambda x: x, apart), collection)), named(collection))


def test_restack_refuses_another_structure():
    params = {"rows": Collection(TABLES, FEATURES)}
    with pytest.raises(ValueError, match="rows"):
        embax.restack({"other": embax.unstack(params)["rows"]}, like=params)


def test_trees_without_collections_stay_unchanged():
    tree = {"table": TABLES["film"], "bias": jnp.ones(2), "none": None}
    assert jax.tree.structure(embax.unstack(tree)) == jax.tree.structure(tree)
    assert embax.restack(embax.unstack(tree), like=tree)["table"].weight is TABLES["film"].weight


def test_unstack_and_restack_work_under_jit():
    collection = Collection(TABLES, FEATURES)

    @jax.jit
    def doubled(collection):
        apart = jax.tree.map(lambda x: 2 * x, embax.unstack(collection))
        return embax.restack(apart, like=collection)

    for name, table in doubled(collection).tables.items():
        np.testing.assert_array_equal(table.weight, 2 * TABLES[name].weight)
