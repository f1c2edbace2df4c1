"""A table of more than 2**31 numbers, whose first, middle and last rows are read and trained: `pytest -m slow`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax

DIM = 64


def fresh(rows, dtype):
    """Rows that tell which they are: the row's number modulo 127, in every column; made in place."""
    number = jnp.arange(rows, dtype=jnp.int32) % 127
    return jnp.broadcast_to(number[:, None].astype(dtype), (rows, DIM))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rows"), [("float32", 34_000_000), ("bfloat16", 40_000_000)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", ["sgd", "rowwise_adagrad"])
def test_rows_of_a_table_beyond_int32_offsets_are_read_and_trained(dtype, rows, name):
    assert rows * DIM > 2**31
    tx = {"sgd": lambda: embax.optim.lift(optax.sgd(1.0)), "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(1.0)}
    tx = tx[name]()
    table = embax.Table(jax.jit(fresh, static_argnums=(0, 1))(rows, dtype))
    state = jax.jit(tx.init)(table)
    ids = np.array([0, 1, rows // 2, rows - 1, -1, 2**31 // DIM, 2**31 // DIM - 1, 2**31 // DIM + 1], np.int32)
    # The cotangent of each id is 4; the last row is read twice.
    expected_step = {"sgd": 4.0, "rowwise_adagrad": 1.0}[name]
    before = (ids % rows % 127).astype(np.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table, state, ids):
        def loss(table):
            read = embax.lookup(table, ids)
            return 4 * read.astype(jnp.float32).sum(), read

        (_, read), gradient = embax.value_and_grad(loss, has_aux=True)(table)
        updates, state = tx.update(gradient, state, table)
        return embax.apply_updates(table, updates), state, read

    table, state, read = step(table, state, jnp.asarray(ids))
    np.testing.assert_array_equal(np.asarray(read, np.float32), np.repeat(before[:, None], DIM, 1))
    steps = np.full(len(ids), expected_step)
    if name == "sgd":
        steps[[3, 4]] *= 2
    after = np.asarray(embax.lookup(table, ids), np.float32)
    np.testing.assert_allclose(after, np.repeat((before - steps)[:, None], DIM, 1), rtol=1e-6)  # exact in bfloat16
    neighbours = np.array([2, rows // 2 - 1, rows // 2 + 1, rows - 2, 2**31 // DIM + 2, 2**31 // DIM - 2], np.int32)
    untouched = np.asarray(embax.lookup(table, neighbours), np.float32)
    np.testing.assert_array_equal(untouched, np.repeat((neighbours % 127).astype(np.float32)[:, None], DIM, 1))
