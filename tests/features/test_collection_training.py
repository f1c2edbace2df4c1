"""Training a Collection: the same steps as of separate tables, in memory that follows the ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bag_cases import dense, put_together

import embax
from embax import Collection, Feature, RowGrad, Table
from embax.optim import clip_by_global_norm, lift, rowwise_adagrad


def weight(rows):
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 3)), "float32")


TABLES = {
    "a": Table(weight(5), padding_idx=0),
    "b": Table(weight(7), padding_idx=(1, 6)),
    "norm": Table(weight(5), max_norm=0.5, padding_idx=1),
    "often": Table(weight(8), scale_grad_by_freq=True, padding_idx=-1),
    "frozen": Table(weight(4), freeze=True),
}
# Some tables are read by two features, of which some share a gather.
FEATURES = [Feature(f"{k}_rows", k) for k in ("a", "norm", "frozen")]
FEATURES += [Feature(f"{k}_mean", k, "mean") for k in ("a", "b", "norm", "often")]
PADDING = {"a": [0], "b": [1, 6], "norm": [1], "often": [7], "frozen": [0, 1, 2, 3]}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {f.name: rng.integers(0, TABLES[f.table].rows, (4,) if f.mode is None else (4, 3)) for f in FEATURES}


def loss(tables, batch):
    if isinstance(tables, Collection):
        out = tables(batch)
    else:
        out = {
            f.name: embax.lookup(tables[f.table], batch[f.name])
            if f.mode is None
            else embax.embedding_bag(tables[f.table], batch[f.name], mode=f.mode)
            for f in FEATURES
        }
    return sum(jnp.square(x - 0.3).sum() for x in out.values())


GRADIENT = jax.jit(embax.value_and_grad(loss))


def test_row_gradients_equal_separate_tables():
    value, gradient = GRADIENT(put_together(TABLES, FEATURES), batch())
    assert isinstance(gradient, Collection)
    assert all(isinstance(stack, RowGrad) for stack in gradient.stacks)
    expected_value, expected = GRADIENT(TABLES, batch())
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)  # float32
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # float32
    expected = dense(expected)
    for name, rows in dense(jax.jit(lambda gradient: gradient.tables)(gradient)).items():
        close(rows, expected[name], err_msg=name)
        np.testing.assert_array_equal(rows[PADDING.get(name, [])], 0, err_msg=name)


def test_frequency_is_counted_within_a_feature():
    tables = {k: Table(np.ones((3, 1), np.float32), scale_grad_by_freq=True) for k in "ab"}
    features = [Feature("one", "a"), Feature("two", "a"), Feature("other", "b")]
    ids = {"one": [0, 0, 1], "two": [0, 2, 2], "other": [0, 0, 0]}

    @jax.jit
    def run(tables):
        return embax.grad(lambda c: sum(x.sum() for x in c(ids).values()))(Collection(tables, features)).tables

    gradient = dense(run(tables))
    np.testing.assert_allclose(gradient["a"][:, 0], [2, 1, 1])
    np.testing.assert_allclose(gradient["b"][:, 0], [1, 0, 0])


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(lift(optax.adamw(0.1)), id="adamw", marks=pytest.mark.exhaustive),
        pytest.param(optax.chain(clip_by_global_norm(0.5), rowwise_adagrad(0.1)), id="clipped_rowwise_adagrad"),
    ],
)
def test_steps_equal_separate_tables(tx):
    @jax.jit
    def updated(tables, state, gradient):
        updates, state = tx.update(gradient, state, tables)
        return embax.apply_updates(tables, updates), state

    def run(tables):
        state = jax.jit(tx.init)(tables)
        for seed in range(4):
            tables, state = updated(tables, state, GRADIENT(tables, batch(seed))[1])
        return tables

    ours, theirs = jax.jit(lambda c: c.tables)(run(put_together(TABLES, FEATURES))), run(TABLES)
    for name, table in TABLES.items():
        before, after = np.asarray(table.weight), np.asarray(ours[name].weight)
        np.testing.assert_allclose(after, theirs[name].weight, rtol=1e-4, atol=1e-5, err_msg=name)  # float32
        still = PADDING.get(name, [])
        assert after[still].tobytes() == before[still].tobytes(), name
        assert (name == "frozen") == (after == before).all(), name


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(lift(optax.adamw(0.1)), id="adamw", marks=pytest.mark.exhaustive),
        pytest.param(rowwise_adagrad(0.1), id="rowwise_adagrad"),
    ],
)
def test_memory_of_a_donated_step_follows_the_ids(tx):
    def step(collection, state, batch):
        gradient = embax.grad(loss)(collection, batch)
        updates, state = tx.update(gradient, state, collection)
        return embax.apply_updates(collection, updates), state

    rows, names = 10**8, "ab"  # so that a bit for each row were too much
    tables = {k: Table(jax.ShapeDtypeStruct((rows, 16), jnp.float32), padding_idx=0) for k in names}
    features = [Feature("rows", "a"), Feature("mean", "b", "mean")]
    collection = jax.eval_shape(lambda tables: Collection(tables, features), tables)
    ids = {f.name: jax.ShapeDtypeStruct((8,) if f.mode is None else (8, 3), jnp.int32) for f in features}
    program = jax.jit(step, donate_argnums=(0, 1)).lower(collection, jax.eval_shape(tx.init, collection), ids).compile()
    assert program.memory_analysis().alias_size_in_bytes > len(names) * rows * 16 * 4
    assert program.memory_analysis().temp_size_in_bytes < 200_000
