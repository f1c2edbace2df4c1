"""What kernels compute, against NumPy in float64, for every dtype that they know."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels_used import calls

import embax
from embax._kernels.combine import combine
from embax._kernels.library import library
from embax._kernels.pool import pool
from embax._kernels.primitive import FLOATS, INTEGERS
from embax._kernels.put import put
from embax._kernels.take import take

pytestmark = pytest.mark.skipif(library() is None, reason="kernels are not installed, or switched off")

ROWS = 20
RANDOM = np.random.default_rng(0)
# Duplicates, ids on both sides of the rows, and the largest numbers of their dtype.
IDS = np.concatenate([RANDOM.integers(-3, ROWS + 3, 30), [4] * 8, [2**31 - 1, -(2**31)]])
INSIDE = (IDS >= 0) & (IDS < ROWS)
FACTORS = RANDOM.normal(size=IDS.size).astype(np.float32)
OFFSETS = np.array([0, 0, 7, 8, 30, 38], np.int32)  # the last two ids are in no bag


@pytest.fixture(params=FLOATS, ids=str)
def dtype(request):
    with jax.enable_x64(request.param == np.float64):
        yield request.param


def rows_of(dtype, *dim, number=ROWS):
    if dtype in INTEGERS:
        return RANDOM.integers(0, 100, (number, *dim)).astype(dtype)
    return RANDOM.normal(size=(number, *dim)).astype(dtype)


def close(found, expected, terms=1.0):
    """Whether numbers are as near as a sum in float32 or wider, rounded once to their dtype, has to be."""
    eps = jnp.finfo(found.dtype).eps
    wide = jnp.finfo(np.float64 if found.dtype == np.float64 else np.float32).eps
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    np.testing.assert_array_less(abs(found - expected), 0.51 * eps * abs(expected) + 4 * wide * terms + 1e-300)


def summed(ids, values):
    """The sum, and that of the absolute values, of each row in float64."""
    values, known = np.asarray(values, np.float64), (ids >= 0) & (ids < ROWS)
    sums, sizes = np.zeros((2, ROWS, *values.shape[1:]))
    np.add.at(sums, ids[known], values[known])
    np.add.at(sizes, ids[known], abs(values[known]))
    return sums, sizes


@pytest.mark.parametrize("dim", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_take(dim, index):
    with jax.enable_x64(True):
        tables = {name: rows_of(name, *dim) for name in FLOATS + INTEGERS}
        ids = jnp.asarray(IDS, index)

        @jax.jit
        def read(tables, ids):
            zeros = {name: take(table, ids, 0) for name, table in tables.items()}
            return zeros, {name: take(table, ids, np.nan) for name, table in tables.items() if name in FLOATS}

        (zeros, nans), kernels = calls(read, tables, ids)
        assert kernels == len(tables) + len(FLOATS)
    for fill, found in ((0, zeros), (np.nan, nans)):
        for name, rows in found.items():
            expected = np.full((IDS.size, *dim), fill).astype(name)
            expected[INSIDE] = tables[name][IDS[INSIDE]]
            assert rows.dtype == name
            np.testing.assert_array_equal(np.asarray(rows, np.float64), expected.astype(np.float64), strict=True)


def test_set():
    with jax.enable_x64(True):
        tables = {name: rows_of(name, 5) for name in FLOATS + INTEGERS}
        values = {name: rows_of(name, 5)[IDS % ROWS] for name in tables}  # equal for duplicates
        write = jax.jit(lambda *trees: jax.tree.map(lambda t, v: put(t, jnp.asarray(IDS), v, "set"), *trees))
        found, kernels = calls(write, tables, values)
        assert kernels == len(tables)
    for name, table in tables.items():
        expected = table.copy()
        expected[IDS[INSIDE]] = values[name][INSIDE]
        np.testing.assert_array_equal(np.asarray(found[name]), expected, strict=True)


def test_add(dtype):
    table, values = rows_of(dtype, 5), rows_of(dtype, 5, number=IDS.size)
    found, kernels = calls(jax.jit(lambda *args: put(*args, "add")), table, IDS.astype(np.int32), values)
    assert kernels == 1
    sums, sizes = summed(IDS, values)
    close(found, table.astype(np.float64) + sums, sizes + abs(table.astype(np.float64)))


def test_add_of_4096_half_precision_rows_is_exact(dtype):
    ones = jnp.ones((4096, 2), dtype)
    add = jax.jit(lambda table: put(table, jnp.zeros(4096, jnp.int32), ones, "add"))
    assert add(jnp.zeros((1, 2), dtype))[0, 0] == 4096


@pytest.mark.parametrize("pair", [False, True], ids=["array", "pair"])
def test_combine(dtype, pair):
    values, column = rows_of(dtype, 2, 3, number=IDS.size), rows_of(dtype, number=IDS.size)
    ids = np.where(INSIDE, IDS, ROWS).astype(np.int32)

    @jax.jit
    def run(slots, values):
        return combine(slots, jnp.asarray(ids), values, ROWS)

    slots = jnp.arange(ROWS, dtype=jnp.int32)
    (kept, (distinct, sums, number)), kernels = calls(run, slots, (values, column) if pair else values)
    assert kernels == 1
    np.testing.assert_array_equal(kept, slots)
    touched = np.unique(IDS[INSIDE])
    assert number == touched.size
    np.testing.assert_array_equal(np.sort(distinct[:number]), touched)
    np.testing.assert_array_equal(distinct[number:], ROWS)
    for found, of in zip(sums if pair else [sums], [values, column], strict=False):
        expected, sizes = summed(IDS, of)
        close(found[:number], expected[distinct[:number]], sizes[distinct[:number]])
        np.testing.assert_array_equal(found[number:], 0)


def test_sums_of_many_duplicates_are_exact_to_four_eps():
    """To 4 eps of the sum of absolute values, where a sum one by one has an error of up to 4,096 eps."""
    values = RANDOM.normal(1, 0.1, (4096, 8)).astype(np.float32)
    run = jax.jit(lambda values: combine(jnp.zeros(1, jnp.int32), jnp.zeros(4096, jnp.int32), values, 1)[1])
    _, sums, number = run(values)
    assert number == 1
    close(sums[0], values.astype(np.float64).sum(0), abs(values.astype(np.float64)).sum(0))


@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_pool(dtype, ragged):
    table, counted = rows_of(dtype, 5), np.arange(IDS.size) % 7 != 3
    wide = np.float64 if dtype == np.float64 else np.float32
    factors, ids = FACTORS.astype(wide), IDS.astype(np.int32)
    offsets = OFFSETS if ragged else np.arange(0, 41, 8)
    shape = () if ragged else (5, 8)
    plain = jnp.zeros((5, 5), wide)

    @jax.jit
    def run(table):
        given = [jnp.reshape(jnp.asarray(x), shape or (-1,)) for x in (ids, counted, factors)]
        where = jnp.asarray(offsets, jnp.int32) if ragged else None
        return [
            pool([plain], table, *given[:2], weights, where, nan=nan)[0]
            for weights in (None, given[2])
            for nan in (False, True)
        ]

    found, kernels = calls(run, table)
    assert kernels == 4
    cases = itertools.product((np.ones(IDS.size), factors), (0, np.nan))
    for out, (weights, fill) in zip(found, cases, strict=True):
        terms = np.full((IDS.size, 5), float(fill))
        terms[INSIDE] = table[IDS[INSIDE]]
        terms = np.where(counted[:, None], terms * np.asarray(weights, np.float64)[:, None], 0)
        bags = [terms[a:b] for a, b in itertools.pairwise(offsets)]
        expected = np.stack([bag.sum(0) for bag in bags])
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        known = ~np.isnan(expected)
        sizes = np.stack([abs(bag).sum(0) for bag in bags])
        close(np.asarray(out)[known], expected[known], sizes[known])


def test_an_id_that_is_the_smallest_number_counts_in_a_bag():
    """A kernel takes this number for an id that does not count."""
    table = embax.Table(jnp.ones((3, 2)), out_of_range="nan")
    bags = jax.jit(lambda ids: embax.embedding_bag(table, ids, mode="sum"))(jnp.array([[0, -(2**31)], [1, 2]]))
    np.testing.assert_array_equal(bags, [[np.nan, np.nan], [2, 2]])


def test_a_long_bag_has_no_error_that_grows_with_its_length():
    table = RANDOM.normal(1, 0.1, (1, 4)).astype(np.float32)
    ids = jnp.zeros((2, 100_000), jnp.int32)
    found = jax.jit(lambda: embax.embedding_bag(embax.Table(jnp.asarray(table)), ids, mode="sum"))()
    expected = table.astype(np.float64)[0] * 100_000
    np.testing.assert_allclose(found, [expected, expected], rtol=2e-6)
