"""bfloat16 and float16 tables: sums of duplicate gradients and their counts are kept in float32."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embax import Table, lookup

both = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def table_of_ones(dtype, **rules):
    return Table(np.ones((3, 2), jnp.dtype(dtype)), **rules)


def total(table, ids):
    return lookup(table, ids).astype(jnp.float32).sum()


@both
def test_4096_gradients_of_one_sum_to_4096(dtype):
    ids, all_rules = np.ones(4096, np.int32), [{}, {"max_norm": 0.5}, {"padding_idx": 0}]
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
    tangent = jax.jit(lambda table: jax.jvp(lambda table: lookup(table, [1, 1, 0]), (table,), (table,))[1])(table)
    assert tangent.dtype == dtype
    np.testing.assert_array_equal(tangent, np.array([[0.5] * 2, [0.5] * 2, [1] * 2], jnp.dtype(dtype)))


DIRECT = pytest.param(lambda f: f, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("wrap", [DIRECT, jax.jit], ids=["direct", "jit"])
def test_frequency_scaling_of_70000_duplicates_sums_to_one(wrap):
    tables = {dtype: table_of_ones(dtype, scale_grad_by_freq=True) for dtype in ("bfloat16", "float16", "float32")}
    each = wrap(lambda tables, ids: {dtype: jax.grad(total)(table, ids) for dtype, table in tables.items()})
    for dtype, gradient in each(tables, jnp.full(70_000, -1)).items():
        expected = np.array([[0, 0], [0, 0], [1, 1]], jnp.dtype(dtype))
        np.testing.assert_array_equal(gradient.weight, expected, err_msg=dtype)


@both
def test_small_gradients_are_not_lost_beside_large_ones(dtype):
    # 256 + 512 / 256 = 258; one by one, each of the small ones would be rounded away in either dtype.
    cotangents = np.full((513, 2), 2.0**-8, jnp.dtype(dtype))
    cotangents[0] = 256

    @jax.jit
    def pulled(table):
        return jax.vjp(lambda table: lookup(table, np.zeros(513, np.int32)), table)[1](cotangents)[0].weight

    np.testing.assert_array_equal(pulled(table_of_ones(dtype))[0], np.full(2, 258, jnp.dtype(dtype)))


def test_bad_ids_in_low_precision():
    policies = {"clip": 1, "nan": np.nan, "zero": 0}
    cases = [*itertools.product(["bfloat16", "float16"], policies)]
    tables = [table_of_ones(dtype, out_of_range=policy, max_norm=9.0) for dtype, policy in cases]

    @jax.jit
    def read_each(tables, ids):
        return [(lookup(table, ids), jax.grad(total)(table, ids)) for table in tables]

    for (dtype, policy), (rows, gradient) in zip(cases, read_each(tables, np.array([0, 3])), strict=True):
        row, of_rows = np.asarray(rows, np.float64)[1], np.asarray(gradient.weight)[:, 0]
        np.testing.assert_array_equal(row, np.full(2, policies[policy]), err_msg=f"{dtype}, {policy}")
        np.testing.assert_array_equal(of_rows, [1, 0, 1 if policy == "clip" else 0], err_msg=f"{dtype}, {policy}")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_tables(dtype):
    dtype = jnp.dtype(dtype)
    table = Table(np.array([[3, 4], [1, 0]], dtype), max_norm=1.0)
    rows, gradient = jax.jit(lambda table: (lookup(table, [0, 1]), jax.grad(total)(table, np.array([0, 0, 0, 1]))))(
        table
    )
    np.testing.assert_array_equal(rows, np.array([[0.6, 0.8], [1, 0]], dtype))
    np.testing.assert_array_equal(gradient.weight, np.array([[3, 3], [1, 1]], dtype))
