"""bfloat16 and float16 tables: sums of duplicate gradients and their counts are kept in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embax import Table, lookup

both = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def table_of_ones(dtype, **rules):
    return Table(jnp.ones((3, 2), dtype), **rules)


def total(table, ids):
    return lookup(table, ids).astype(jnp.float32).sum()


@both
def test_4096_gradients_of_one_sum_to_4096(dtype):
    ids, all_rules = jnp.ones(4096, jnp.int32), [{}, {"max_norm": 0.5}, {"padding_idx": 0}]
    tables = {str(rules): table_of_ones(dtype, **rules) for rules in all_rules}
    gradients = jax.jit(lambda tables: {name: jax.grad(total)(table, ids) for name, table in tables.items()})(tables)
    for name, gradient in [*gradients.items(), ("direct", jax.grad(total)(table_of_ones(dtype), ids))]:
        assert gradient.dtype == dtype
        expected = np.array([[0, 0], [4096, 4096], [0, 0]], gradient.dtype)
        np.testing.assert_array_equal(gradient.weight, expected, err_msg=name)


@both
def test_4096_gradients_of_one_sum_to_4096_however_the_gradient_is_taken(dtype):
    ids = jnp.ones((4, 1024), jnp.int32)
    expected = np.array([[0, 0], [4096, 4096], [0, 0]], jnp.dtype(dtype))

    @jax.jit
    def gradients(table, ones):
        def read(table):
            return lookup(table, ids)

        push = jax.linearize(read, table)[1]
        return {
            "vjp": jax.vjp(read, table)[1](ones)[0].weight,
            "transposed": jax.linear_transpose(push, table)(ones)[0].weight,
            "remat": jax.grad(jax.checkpoint(total))(table, ids).weight,
        }

    for name, gradient in gradients(table_of_ones(dtype), jnp.ones((4, 1024, 2), dtype)).items():
        np.testing.assert_array_equal(gradient, expected, err_msg=name)


@both
def test_jvp_is_of_the_tables_dtype(dtype):
    table = table_of_ones(dtype, scale_grad_by_freq=True)
    _, tangent = jax.jvp(lambda table: lookup(table, [1, 1, 0]), (table,), (table,))
    assert tangent.dtype == dtype
    np.testing.assert_array_equal(tangent, np.array([[0.5] * 2, [0.5] * 2, [1] * 2], jnp.dtype(dtype)))


DIRECT = pytest.param(lambda f: f, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wrap", [DIRECT, jax.jit], ids=["direct", "jit"])
def test_70000_duplicates_scaled_by_frequency_are_one(dtype, wrap):
    table = table_of_ones(dtype, scale_grad_by_freq=True)
    gradient = wrap(jax.grad(total))(table, jnp.full(70_000, -1)).weight
    np.testing.assert_array_equal(gradient, np.array([[0, 0], [0, 0], [1, 1]], gradient.dtype))


@both
def test_small_gradients_are_not_lost_beside_large_ones(dtype):
    # 256 + 512 / 256 = 258; one by one, each of the small ones would be rounded away in either dtype.
    cotangents = jnp.concatenate([jnp.full((1, 2), 256), jnp.full((512, 2), 2.0**-8)]).astype(dtype)
    _, pull = jax.vjp(lambda table: lookup(table, jnp.zeros(513, jnp.int32)), table_of_ones(dtype))
    np.testing.assert_array_equal(pull(cotangents)[0].weight[0], jnp.full(2, 258, dtype))


@both
def test_bad_ids_in_low_precision(dtype):
    policies = {"clip": 1, "nan": np.nan, "zero": 0}
    tables = {policy: table_of_ones(dtype, out_of_range=policy, max_norm=9.0) for policy in policies}

    @jax.jit
    def read_each(tables, ids):
        return {policy: (lookup(table, ids), jax.grad(total)(table, ids)) for policy, table in tables.items()}

    for policy, (rows, gradient) in read_each(tables, jnp.array([0, 3])).items():
        row, of_rows = np.asarray(rows, np.float64)[1], np.asarray(gradient.weight)[:, 0]
        np.testing.assert_array_equal(row, np.full(2, policies[policy]), err_msg=policy)
        np.testing.assert_array_equal(of_rows, [1, 0, 1 if policy == "clip" else 0], err_msg=policy)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_tables(dtype):
    table = Table(jnp.array([[3, 4], [1, 0]], dtype), max_norm=1.0)
    np.testing.assert_array_equal(lookup(table, [0, 1]), jnp.array([[0.6, 0.8], [1, 0]], dtype))
    gradient = jax.grad(total)(table, jnp.array([0, 0, 0, 1])).weight
    np.testing.assert_array_equal(gradient, jnp.array([[3, 3], [1, 1]], dtype))
