import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embax.vectors import _nearest as _queries


def brute(unit, queries, k, exclude=None):
    """Nearest rows by all products in float64."""
    rows = np.full((len(queries), k), -1)
    products = np.full((len(queries), k), np.nan, np.float32)
    for place, query in enumerate(np.asarray(queries, np.float64)):
        values = (unit.astype(np.float64) * query).sum(axis=1)
        left = np.flatnonzero(~np.isnan(values))
        if exclude is not None:
            left = left[~np.isin(left, exclude[place])]
        order = left[np.lexsort((left, -values[left]))][:k]
        rows[place, : len(order)], products[place, : len(order)] = order, values[order]
    return rows, products


def check(unit, queries, k, exclude=None):
    rows, products = _queries.nearest(unit, queries, k, exclude)
    wanted_rows, wanted_products = brute(unit, queries, k, exclude)
    assert rows.dtype == np.int64
    assert products.dtype == np.float32
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(products, wanted_products)


def random_unit(rows, dim, seed=0):
    return _queries.unit_rows(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_unit_rows_have_length_one_to_the_last_bits_of_float32(dtype):
    rows = np.random.default_rng(0).standard_normal((3000, 7)).astype(dtype)
    unit = _queries.unit_rows(rows)
    exact = rows.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([3.0, 4.0], [0.6, 0.8]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([-0.0, 2.0], [-0.0, 1.0]),
        ([3e38, 3e38], [0.5**0.5] * 2),
        ([1e-45, 0.0], [1.0, 0.0]),
        ([3e-320, 4e-320], [0.6, 0.8]),
        ([3e307, -4e307], [0.6, -0.8]),
        ([np.nan, 1.0], [np.nan] * 2),
        ([np.inf, 1.0], [np.nan] * 2),
        ([-np.inf, 0.0], [np.nan] * 2),
    ],
)
def test_unit_rows_of_any_scale(row, wanted):
    # Numbers below 1e-308 have few digits of their own.
    np.testing.assert_allclose(_queries.unit_rows(np.asarray([row, [1.0, 0.0]])), [wanted, [1, 0]], rtol=2e-4, atol=0)


def test_unit_rows_leaves_its_argument_unchanged_and_accepts_no_rows():
    rows = np.ones((2, 2), np.float32)
    _queries.unit_rows(rows)
    np.testing.assert_array_equal(rows, 1)
    assert _queries.unit_rows(np.ones((0, 3))).shape == (0, 3)
    assert _queries.unit_rows(np.ones((3, 0))).shape == (3, 0)


def test_unit_rows_are_aligned_for_jax():
    assert _queries.unit_rows(np.ones((5, 3))).ctypes.data % 64 == 0


@pytest.mark.parametrize(("rows", "dim"), [(1, 3), (127, 3), (128, 1), (129, 5), (5000, 8), (1025, 300)])
@pytest.mark.parametrize("number", [1, 8, 9, 33])
def test_nearest_equals_float64(rows, dim, number):
    unit = random_unit(rows, dim)
    queries = np.random.default_rng(1).standard_normal((number, dim)).astype(np.float32)
    for k in 1, 10, rows + 2:
        if k * number < 5_000:
            check(unit, queries, k)


@pytest.mark.parametrize("number", [1, 10])
def test_nearest_of_rows_with_negative_products(number):
    unit = _queries.unit_rows(np.random.default_rng(0).uniform(-2, -1, (4097, 4)))
    check(unit, np.random.default_rng(1).uniform(1, 2, (number, 4)), 1)


def test_nearest_of_more_queries_than_a_block():
    check(random_unit(1000, 6), random_unit(1030, 6, seed=1), 5)


SMALL = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, np.nan, 3e-8])


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float32, (300, 3), elements=SMALL),
    hnp.arrays(np.float32, (12, 3), elements=SMALL),
    hnp.arrays(np.int64, (12, 2), elements=st.integers(-1, 299)),
    st.integers(1, 12),
)
def test_nearest_with_ties_nan_and_excluded_rows(rows, queries, exclude, number):
    check(_queries.unit_rows(rows), queries[:number], 7, exclude[:number])


def test_nearest_orders_rows_whose_float32_products_are_equal():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(100)
    unit = _queries.unit_rows(base + 3e-7 * rng.standard_normal((3000, 100)))
    queries = _queries.unit_rows(base + rng.standard_normal((20, 100)))
    float32 = np.argsort(-(unit @ queries[0]), kind="stable")[:10]
    assert not np.array_equal(float32, brute(unit, queries[:1], 10)[0][0])
    check(unit, queries, 10)
    check(unit, queries[:1], 10)


def test_nearest_of_equal_rows_takes_the_first():
    unit = _queries.unit_rows(np.ones((5000, 6), np.float32))
    for number in 1, 20:
        rows, products = _queries.nearest(unit, np.ones((number, 6)), 4, np.full((number, 1), 1))
        np.testing.assert_array_equal(rows, [[0, 2, 3, 4]] * number)
        assert len(set(products.ravel())) == 1


def test_nearest_of_one_query_does_not_depend_on_others():
    unit, queries = random_unit(20_000, 40), random_unit(100, 40, seed=1)
    rows, products = _queries.nearest(unit, queries, 10)
    for place in 0, 50, 99:
        row, product = _queries.nearest(unit, queries[place : place + 1], 10)
        np.testing.assert_array_equal(rows[place], row[0])
        np.testing.assert_array_equal(products[place], product[0])


@pytest.mark.parametrize("scale", [1e-310, 1e-30, 1e-5, 1.0, 1e25, 1e37])
def test_nearest_does_not_depend_on_the_length_of_a_query(scale):
    unit, queries = random_unit(2000, 5), random_unit(3, 5, seed=1)
    rows, products = _queries.nearest(unit, queries * np.float64(scale), 5)
    wanted_rows, wanted = _queries.nearest(unit, queries, 5)
    np.testing.assert_array_equal(rows, wanted_rows)
    if scale > 1e-40:
        np.testing.assert_allclose(products, wanted * scale, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nearest_of_a_query_that_is_not_finite_is_empty(value):
    unit = random_unit(500, 4)
    queries = np.ones((2, 4))
    queries[0, 2] = value
    rows, products = _queries.nearest(unit, queries, 3)
    np.testing.assert_array_equal(rows[0], -1)
    assert np.isnan(products[0]).all()
    np.testing.assert_array_equal(rows[1], brute(unit, queries[1:], 3)[0][0])


@pytest.mark.parametrize(("rows", "number", "k"), [(0, 2, 3), (0, 0, 3), (5, 0, 3), (5, 2, 0), (0, 2, 0)])
def test_nearest_of_nothing(rows, number, k):
    found, products = _queries.nearest(np.ones((rows, 2), np.float32), np.ones((number, 2)), k)
    assert found.shape == products.shape == (number, k)
    assert (found == -1).all()


def test_nearest_without_columns_ties_everywhere():
    rows, products = _queries.nearest(np.ones((3, 0), np.float32), np.ones((1, 0)), 2)
    np.testing.assert_array_equal(rows, [[0, 1]])
    np.testing.assert_array_equal(products, 0)


def test_nearest_takes_rows_that_may_not_be_written_and_are_not_contiguous():
    unit = random_unit(300, 8)
    unit.flags.writeable = False
    check(unit[:, ::2], np.ones((12, 4)), 3)
    check(unit[::2], np.ones((1, 8)), 3)


def test_nearest_never_makes_an_array_of_queries_and_rows():
    script = """
import numpy as np, resource
from embax.vectors import _nearest as _queries
unit = _queries.unit_rows(np.random.default_rng(0).standard_normal((40_000, 4)).astype(np.float32))
_queries.nearest(unit, unit[:512], 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_queries.nearest(unit, unit[:1024], 5)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 1024 * 40_000 * 4 / 10
