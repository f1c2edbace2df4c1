"""Training a Collection: the same steps as of separate tables, in memory that follows the ids."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_compiled import compiled

import embax
from embax import Collection, Feature, RowGrad, Table
from embax.optim import clip_by_global_norm, lift, rowwise_adagrad


def weight(rows):
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 3)), "float32")


TABLES = {
    "a": Table(weight(5), padding_idx=0),
    "b": Table(weight(6)),
    "c": Table(weight(7), padding_idx=(1, 6)),
    "norm": Table(weight(5), max_norm=0.5, padding_idx=1),
    "often": Table(weight(5), scale_grad_by_freq=True),
    "often_2": Table(weight(8), scale_grad_by_freq=True, padding_idx=-1),
    "frozen": Table(weight(4), freeze=True),
}
# Each table is read by two features, of which some share a gather.
FEATURES = [Feature(f"{k}_rows", k) for k in TABLES] + [Feature(f"{k}_mean", k, "mean") for k in TABLES]
PADDING = {"a": [0], "c": [1, 6], "norm": [1], "often_2": [7], "frozen": [0, 1, 2, 3]}


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


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


def test_row_gradients_equal_dense_ones_of_separate_tables():
    value, gradient = jax.jit(embax.value_and_grad(loss))(Collection(TABLES, FEATURES), batch())
    assert isinstance(gradient, Collection)
    assert all(isinstance(stack, RowGrad) for stack in gradient.stacks)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(TABLES, batch())
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)  # float32
    for name in TABLES:
        ours = gradient[name].to_dense()
        np.testing.assert_allclose(ours, expected[name].weight, rtol=1e-5, atol=1e-6)  # float32
        np.testing.assert_array_equal(ours[jnp.array(PADDING.get(name, []), int)], 0)


def test_frequency_is_counted_within_a_feature():
    tables = {k: Table(jnp.ones((3, 1)), scale_grad_by_freq=True) for k in "ab"}
    collection = Collection(tables, [Feature("one", "a"), Feature("two", "a"), Feature("other", "b")])
    ids = {"one": [0, 0, 1], "two": [0, 2, 2], "other": [0, 0, 0]}
    gradient = embax.grad(lambda c: sum(x.sum() for x in c(ids).values()))(collection)
    np.testing.assert_allclose(gradient["a"].to_dense()[:, 0], [2, 1, 1])
    np.testing.assert_allclose(gradient["b"].to_dense()[:, 0], [1, 0, 0])


@pytest.mark.parametrize(
    "tx",
    [lift(optax.adamw(0.1)), optax.chain(clip_by_global_norm(0.5), rowwise_adagrad(0.1))],
    ids=["adamw", "clipped_rowwise_adagrad"],
)
def test_steps_equal_those_of_separate_tables(tx):
    def run(tables):
        state = tx.init(tables)

        @jax.jit
        def step(tables, state, batch):
            updates, state = tx.update(embax.grad(loss)(tables, batch), state, tables)
            return embax.apply_updates(tables, updates), state

        for seed in range(5):
            tables, state = step(tables, state, batch(seed))
        return tables

    ours, theirs = run(Collection(TABLES, FEATURES)), run(TABLES)
    for name, table in TABLES.items():
        np.testing.assert_allclose(ours[name].weight, theirs[name].weight, rtol=1e-4, atol=1e-5)  # float32
        still = PADDING.get(name, [])
        before, after = np.asarray(table.weight), np.asarray(ours[name].weight)
        assert after[still].tobytes() == before[still].tobytes()
        assert (name == "frozen") == (after == before).all()


@pytest.mark.parametrize("tx", [lift(optax.adamw(0.1)), rowwise_adagrad(0.1)], ids=["adamw", "rowwise_adagrad"])
def test_memory_of_a_donated_step_follows_the_ids(tx):
    def step(collection, state, batch):
        gradient = embax.grad(loss)(collection, batch)
        updates, state = tx.update(gradient, state, collection)
        return embax.apply_updates(collection, updates), state

    def memory(rows):
        tables = {k: Table(jax.ShapeDtypeStruct((rows, 16), jnp.float32), padding_idx=0) for k in "abcd"}
        modes = {"rows": None, "mean": "mean"}
        features = [Feature(f"{k}_{name}", k, mode) for name, mode in modes.items() for k in tables]
        collection = jax.eval_shape(lambda tables: Collection(tables, features), tables)
        shapes = {f.name: (8,) if f.mode is None else (8, 3) for f in features}
        ids = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        program = compiled(step, collection, jax.eval_shape(tx.init, collection), ids, donate=(0, 1))
        assert program.memory_analysis().alias_size_in_bytes > 4 * rows * 16 * 4
        return program.memory_analysis().temp_size_in_bytes

    assert memory(1_000) == memory(100_000) < 200_000
