"""The clipped norm: exact to the dtype from the smallest to the largest rows, and its gradient straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import reference

from embax import Table, lookup, renormalize

# What a row of this dtype may be off by: float32 is three roundings; the narrow ones are computed in float32.
RTOL = {"float32": 4e-7, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def read(row, **rules):
    """The row as it is read, and as it is stored after `renormalize`."""
    table = Table(row[None], **rules)
    return lookup(table, [0])[0], renormalize(table, [0]).weight[0]


@jax.jit
def read_each(tables):
    """Of named tables their rows as they are read, and as they are stored after `renormalize`, in one program."""
    ids = {name: np.arange(table.rows) for name, table in tables.items()}
    return {name: (lookup(table, ids[name]), renormalize(table, ids[name]).weight) for name, table in tables.items()}


def assert_clipped(cases):
    """Rows `(dtype, rows, max_norm)` by every norm, against the reference in float64."""
    cases = {f"{case}, {norm_type}": (*case, norm_type) for case in cases for norm_type in (0.5, 1, 2, 3, np.inf)}
    tables = {
        name: Table(np.array(rows, jnp.dtype(dtype)), max_norm=max_norm, norm_type=norm_type)
        for name, (dtype, rows, max_norm, norm_type) in cases.items()
    }
    for name, results in read_each(tables).items():
        dtype, _, max_norm, norm_type = cases[name]
        expected = [reference.clip(row, max_norm, norm_type) for row in np.asarray(tables[name].weight, np.float64)]
        for clipped in results:
            assert clipped.dtype == dtype
            np.testing.assert_allclose(np.asarray(clipped, np.float64), expected, rtol=RTOL[dtype], err_msg=name)


def test_max_norm_of_large_rows():
    assert_clipped(
        [
            ("bfloat16", [(300, 400), (3e38, -3e38)], 1.0),
            ("float16", [(300, 400), (65504, -65504)], 1.0),
            ("float32", [(3e8, 4e8), (1e30, -2e30), (3e38, 1e38), (3.4e38, 3.4e38), (2.0, 1e-30)], 1.0),
        ]
    )


def test_max_norm_of_tiny_rows():
    assert_clipped(
        [
            ("float32", [(3e-30, 4e-30)], 1e-30),
            ("float32", [(3e-37, 4e-37)], 1e-36),
            ("float32", [(2e-37, 0)], 1e-37),
        ]
    )


def test_max_norm_of_300_400_is_the_nearest_of_the_dtype():
    tables = {name: Table(np.array([[300, 400]], jnp.dtype(name)), max_norm=1.0) for name in ("bfloat16", "float16")}
    for name, results in read_each(tables).items():
        for clipped in results:
            np.testing.assert_array_equal(clipped, np.array([[0.6, 0.8]], tables[name].dtype))


def test_max_norm_in_float64():
    with jax.enable_x64(True):
        row = jnp.array([3e307, -4e307])
        for clipped in read(row, max_norm=1.0):
            np.testing.assert_allclose(clipped, [0.6, -0.8], rtol=1e-15)  # float64


def test_max_norm_leaves_shorter_rows_bit_for_bit():
    rows = [[0.0, -0.0], [0.25, 0.5], [1.0, 0.0], [6e-8, 0.1]]
    tables = {
        f"{dtype}, {max_norm}": Table(np.array(rows, jnp.dtype(dtype)), max_norm=max_norm)
        for dtype in ("float32", "float16", "bfloat16")
        for max_norm in (1.0, np.inf)
    }
    for name, results in read_each(tables).items():
        for clipped in results:
            assert np.asarray(clipped).tobytes() == np.asarray(tables[name].weight).tobytes(), name


def test_max_norm_leaves_rows_without_a_norm():
    for row in [np.nan, 1.0], [np.inf, 1.0]:
        for clipped in read(jnp.array(row), max_norm=1.0):
            np.testing.assert_array_equal(clipped, row)


def test_max_norm_of_zeros_is_quiet_under_debug_nans():
    with jax.debug_nans(True):
        for clipped in read(jnp.zeros(2), max_norm=1.0):
            np.testing.assert_array_equal(clipped, [0, 0])


def test_max_norm_leaves_the_padding_row():
    table = Table(jnp.full((2, 2), 9.0), max_norm=1.0, padding_idx=-1)
    np.testing.assert_allclose(lookup(table, [0, 1, -1]), [[0.5**0.5] * 2, [9, 9], [9, 9]], rtol=2e-7)  # float32


def test_max_norm_passes_the_gradient_straight_through():
    tables = {
        f"{dtype}, {row}": Table(np.array([row], jnp.dtype(dtype)), max_norm=1.0)
        for dtype in ("float32", "float16", "bfloat16")
        for row in ([300, 400], [0, 0], [0.1, 0.1])
    }

    def derivatives(table):
        gradient = jax.grad(lambda table: (lookup(table, [0, 0])[1] * jnp.array([2, 3], table.dtype)).sum())(table)
        return gradient.weight, jax.jvp(lambda table: lookup(table, [0]), (table,), (gradient,))[1]

    results = jax.jit(lambda tables: {name: derivatives(table) for name, table in tables.items()})(tables)
    for name, both in results.items():
        for derivative in both:
            np.testing.assert_array_equal(derivative, np.array([[2, 3]], tables[name].dtype), err_msg=name)
