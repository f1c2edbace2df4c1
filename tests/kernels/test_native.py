"""The handlers of the native library against NumPy, with ids of every kind, and what they refuse."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

native = pytest.importorskip("native", reason="the native kernels are not installed")

ROWS = 300
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Every combination of a dtype, a dtype of ids and a shape of rows stands here at least once with each of the others.
CASES = [
    (dtype, np.int64 if (i + j) % 2 else np.int32, shape)
    for i, dtype in enumerate(native.DTYPES)
    for j, shape in enumerate([(), (1,), (7,), (2, 25), (64,)])
] + [(np.float32, np.int32, (0,))]


def of_case(case):
    dtype, id_dtype, shape = case
    return f"{np.dtype(dtype).name}-{np.dtype(id_dtype).name}-{'x'.join(map(str, shape)) or 'numbers'}"


@pytest.fixture(params=CASES, ids=of_case)
def data(request):
    """A table, ids with many duplicates and of every kind, values for them, and the ids that have a row."""
    dtype, id_dtype, shape = request.param
    rng = np.random.default_rng(len(shape))
    number = 4800
    ids = np.where(rng.random(number) < 0.4, rng.integers(0, 5, number), rng.integers(-5, ROWS + 5, number))
    ids = ids.astype(id_dtype)
    ids[:5] = np.iinfo(id_dtype).min, np.iinfo(id_dtype).max, -1, ROWS, ROWS - 1
    table, values = (rng.normal(size=(n, *shape)).astype(dtype) for n in (ROWS, number))
    with jax.enable_x64(True):
        yield table, ids, values, (ids >= 0) & (ids < ROWS)


def sums(ids, terms, shape):
    """The sum of the terms of each row in more than float64, and that of their sizes."""
    out = np.zeros((2, ROWS, *shape), np.longdouble)
    np.add.at(out[0], ids, terms)
    np.add.at(out[1], ids, np.abs(terms))
    return out


def assert_rounded_once(got, want, sizes, dtype):
    """Compare with a wider sum, given the sum of the sizes of what was added up."""
    accumulator = native.accumulator(dtype)
    bound = 4 * native.rounding(accumulator) * sizes
    if dtype != accumulator:
        bound = 1.01 * bound + native.rounding(dtype) / 2 * np.abs(want) + 2.0**-25  # float16 has subnormal numbers
    assert (np.abs(got.astype(np.longdouble) - want) <= bound).all()


def test_rows_are_read_and_written(data):
    table, ids, values, has_row = data
    taken, nan, written, added = jax.jit(
        lambda t, i, v: (native.take(t, i), native.take(t, i, 1), native.put(t, i, v), native.put(t, i, v, 1))
    )(table, ids, values)
    want = np.zeros_like(values)
    want[has_row] = table[ids[has_row]]
    assert np.asarray(taken).tobytes() == want.tobytes()
    want[~has_row] = np.nan
    np.testing.assert_array_equal(np.asarray(nan).astype(np.float64), want.astype(np.float64))
    want = table.copy()
    for position in np.flatnonzero(has_row):
        want[ids[position]] = values[position]
    assert np.asarray(written).tobytes() == want.tobytes()
    if table.dtype == native.accumulator(table.dtype):  # one after the other
        want = table.copy()
        np.add.at(want, ids[has_row], values[has_row])
        assert np.asarray(added).tobytes() == want.tobytes()
    else:
        total, sizes = sums(ids[has_row], values[has_row].astype(np.longdouble), table.shape[1:])
        start = table.astype(np.longdouble)
        assert_rounded_once(np.asarray(added), start + total, np.abs(start) + sizes, table.dtype)


def test_gradients_are_summed(data):
    table, ids, values, has_row = data
    number = ids.shape[0]
    rng = np.random.default_rng(1)
    factors = rng.normal(size=number).astype(native.accumulator(table.dtype))
    bag_of = rng.integers(-2, 52, number).astype(np.int32)

    @jax.jit
    def run(ids, values, factors, bag_of):
        by_length = native.combine(ids, values[: number // 6], ROWS, length=6, factors=factors)
        return native.combine(ids, values, ROWS), by_length, native.combine(ids, values[:50], ROWS, 0, bag_of)

    of_gradient = np.arange(number), np.arange(number) // 6, bag_of
    for result, of, scale in zip(run(ids, values, factors, bag_of), of_gradient, (1, factors, 1), strict=True):
        distinct, got, count = map(np.asarray, result)
        counts = has_row & (of >= 0) & (of < (50 if of is bag_of else number))
        terms = values.astype(np.longdouble)[np.where(counts, of, 0)]
        terms = terms * np.reshape(scale, (-1,) + (1,) * (terms.ndim - 1))
        total, sizes = sums(ids[counts], terms[counts], table.shape[1:])
        np.testing.assert_array_equal(np.sort(distinct[:count]), np.unique(ids[counts]))
        assert (distinct[count:] == ROWS).all()
        assert not got[count:].astype(np.float32).any()
        # A product is rounded before it is added.
        sizes = sizes * (1 if np.ndim(scale) == 0 else 1.5)
        assert_rounded_once(got[:count], total[distinct[:count]], sizes[distinct[:count]], table.dtype)


def test_many_equal_gradients_keep_their_sum():
    # One after the other, 4,096 times 0.1 is off by 1e-5 in float32.
    ids, values = np.zeros(4096, np.int32), np.full((4096, 3), 0.1, np.float32)
    _, got, _ = jax.jit(lambda i, v: native.combine(i, v, 1))(ids, values)
    exact = 4096 * np.float64(np.float32(0.1))
    assert np.abs(np.asarray(got)[0] - exact).max() <= 4 * np.finfo(np.float32).eps * exact


def test_infinite_gradients_stay_infinite():
    with jax.enable_x64(True):
        for dtype in native.DTYPES:
            values = np.ones((40, 2), dtype)
            values[3, 0] = np.inf
            _, got, _ = native.combine(np.zeros(40, np.int32), values, 1)
            np.testing.assert_array_equal(np.asarray(got)[0].astype(np.float32), [np.inf, 40])


@functools.partial(jax.jit, static_argnums=3)
def pooled(table, ids, factors, bags):
    length = ids.shape[0] // bags
    offsets = jnp.arange(0, ids.shape[0] + 1, length, dtype=jnp.int32)
    fixed = [native.pool(table, ids, bags, factors=f, nan=nan) for f, nan in ((native.NO_FACTORS, 0), (factors, 1))]
    ragged = [native.pool(table, ids, bags, offsets, f, nan) for f, nan in ((native.NO_FACTORS, 0), (factors, 1))]
    return fixed, ragged


def test_rows_of_bags_are_summed(data):
    table, ids, _, _ = data
    ids = np.concatenate([ids[:1000], ids[1000:1200]])
    ids[np.random.default_rng(2).random(ids.shape) < 0.2] = np.iinfo(ids.dtype).min
    factors = np.random.default_rng(3).normal(size=ids.shape).astype(native.accumulator(table.dtype))
    rows = table.astype(factors.dtype)
    for bags in (200, 4):  # of 6 ids, one after the other, and of 300
        fixed, ragged = pooled(table, ids, factors, bags)
        for got, same, scaled in zip(fixed, ragged, (False, True), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(same).tobytes()
            want, sizes = np.zeros((2, bags, *table.shape[1:]), factors.dtype if bags == 200 else np.float64)
            for position, row in enumerate(ids):
                if row == np.iinfo(ids.dtype).min:
                    continue
                missing = np.full(table.shape[1:], np.nan if scaled else 0, factors.dtype)
                term = rows[row] if 0 <= row < ROWS else missing
                term = term * factors[position] if scaled else term
                want[position * bags // ids.size] += term
                sizes[position * bags // ids.size] += np.abs(term)
            if bags == 200:
                np.testing.assert_array_equal(np.asarray(got), want)
            elif not scaled:  # else all of them have an id without a row
                assert (np.abs(np.asarray(got) - want) <= 64 * native.rounding(factors.dtype) * sizes).all()


def test_rows_are_written_to_several_arrays():
    rng = np.random.default_rng(4)
    table, ids = rng.normal(size=(50, 24)).astype(np.float32), rng.integers(-1, 51, 9000).astype(np.int32)
    whole = np.asarray(native.take(table, ids))
    sizes = [1, 4000, 0, 4999]
    for got, want in zip(native.take_parts(table, ids, sizes), np.split(whole, np.cumsum(sizes)[:-1]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("is_ragged", [False, True])
def test_sums_of_bags_are_written_to_several_arrays(is_ragged):
    """Each bag to the array that has it; bags between the arrays, such as unused places, are left out."""
    rng = np.random.default_rng(4)
    table, ids = rng.normal(size=(50, 24)).astype(np.float32), rng.integers(0, 50, 9000).astype(np.int32)
    offsets = np.linspace(0, 9000, 3001).astype(np.int32) if is_ragged else native.NOTHING
    whole = np.asarray(native.pool(table, ids, 3000, offsets))
    parts = [(0, 1), (1, 1500), (1502, 0), (1502, 1400), (2903, 97)]
    for (first, size), got in zip(parts, native.pool_parts(table, ids, 3000, parts, offsets), strict=True):
        assert got.shape == (size, 24)
        np.testing.assert_array_equal(got, whole[first : first + size])


def test_ids_count_from_the_end_where_they_are_asked_to():
    table = np.arange(1, 5, dtype=np.float32)[:, None]
    for dtype in (np.int32, np.int64):
        ends = np.iinfo(dtype)
        ids = np.array([0, 3, -1, -4, -5, 4, ends.min, ends.min + 1, ends.max], dtype)
        want = [1, 4, 4, 1, 0, 0, 0, 0, 0]
        with jax.enable_x64(dtype == np.int64):
            np.testing.assert_array_equal(native.take(table, ids, wrap=1)[:, 0], want)
            np.testing.assert_array_equal(native.pool(table, ids, 9, wrap=1)[:, 0], want)
            # The smallest id is no mark here: it has no row, like others.
            np.testing.assert_array_equal(np.isnan(native.pool(table, ids, 9, nan=1, wrap=1)[:, 0]), np.equal(want, 0))


def test_offsets_are_not_trusted():
    table = np.ones((4, 2), np.float32)
    ids = np.zeros(6, np.int32)
    offsets = np.array([5, 2, 2**31 - 1, -(2**31), 6], np.int32)
    got = np.asarray(jax.jit(lambda t, i, o: native.pool(t, i, 4, o))(table, ids, offsets))
    np.testing.assert_array_equal(got[:, 0], [0, 4, 0, 6])


def test_nothing_gives_nothing():
    table, ids, values = np.ones((0, 3), np.float32), np.array([0, -1, 5], np.int32), np.ones((3, 3), np.float32)
    np.testing.assert_array_equal(native.take(table, ids), np.zeros((3, 3)))
    assert native.put(table, ids, values).shape == (0, 3)
    assert int(native.combine(ids, values, 0)[2]) == 0
    none = np.zeros(0, np.int32)
    assert native.take(np.ones((4, 3), np.float32), none).shape == (0, 3)
    np.testing.assert_array_equal(native.pool(np.ones((4, 3), np.float32), none, 2), np.zeros((2, 3)))
    np.testing.assert_array_equal(native.put(np.ones((4, 3), np.float32), none, values[:0]), np.ones((4, 3)))


TABLE, IDS, VALUES = jnp.zeros((4, 3)), jnp.zeros(6, jnp.int32), jnp.zeros((6, 3))
INTEGERS = TABLE.astype(jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.take(TABLE, IDS.astype(jnp.int16)), "`ids` must be of dtype int32 or int64"),
        (lambda: native.take(TABLE.astype(jnp.complex64), IDS, 1), "`table` must be of dtype float32"),
        (lambda: native.take(INTEGERS, IDS, 1), "which have NaN"),
        (lambda: native.take_parts(TABLE, IDS, [3, 2]), "`ids` must be one for each row of the results"),
        (lambda: native.put(TABLE, IDS, VALUES[:5]), r"`values` must be of shape \(6,3\)"),
        (lambda: native.put(TABLE, IDS, VALUES[:, :2]), r"`values` must be of shape \(6,3\)"),
        (lambda: native.put(TABLE, IDS, VALUES.astype(jnp.bfloat16)), "`values` must be of dtype F32"),
        (
            lambda: native.put(INTEGERS, IDS, INTEGERS[IDS], 1),
            "`table` must be of dtype float32",
        ),
        (lambda: native.combine(IDS, VALUES, 4, length=2), "`values` must be one row for each `length` ids"),
        (lambda: native.combine(IDS, VALUES, 4, length=-1), "`values` must be one row for each `length` ids"),
        (lambda: native.combine(IDS, VALUES[:1], 4, length=4), "`values` must be one row for each `length` ids"),
        (lambda: native.combine(IDS, VALUES, 4, length=0), r"`bag_of` must be of shape \(6,\)"),
        (lambda: native.combine(IDS, VALUES, 4, bag_of=IDS), r"`bag_of` must be of shape \(0,\)"),
        (lambda: native.combine(IDS, VALUES, 2**31), "`ids` must be of a dtype that holds the number of rows"),
        (lambda: native.combine(IDS, VALUES, -1), "`ids` must be of a dtype that holds the number of rows"),
        (lambda: native.combine(IDS, VALUES, 4, factors=jnp.ones(5)), r"`factors` must be of shape \(6,\)"),
        (lambda: native.pool(TABLE, IDS, 4), "`ids` must be as many ids for each of 4 bags"),
        (lambda: native.pool(TABLE, IDS, 2, jnp.zeros(4, jnp.int32)), r"`offsets` must be of shape \(3,\)"),
        (lambda: native.pool(TABLE, IDS, 2, factors=IDS), "`factors` must be of dtype float32 or float64"),
        (
            lambda: native.pool_parts(TABLE, IDS, 6, [(0, 3), (4, 3)]),
            "`firsts` must be of arrays that end at 6 or before",
        ),
        (lambda: native.pool_parts(TABLE, IDS, 6, [(-1, 3)]), "`firsts` must be of arrays that end at 6 or before"),
        (lambda: native.pool_parts(TABLE, IDS[:0], -1, [(0, 1)]), "`ids` must be of 0 to 2,147,483,647 bags"),
        (lambda: native.step("Sgd", [TABLE], IDS, VALUES, [0.1]), r"`scalars` must be of shape \(2,\)"),
        (lambda: native.step("Sgd", [TABLE], IDS, VALUES, [0.1, 0], decay=3), "with a decay of 0, 1 or 2"),
        (
            lambda: native.step("Adagrad", [TABLE, TABLE[:3]], IDS, VALUES, [0.1, 0, 0]),
            r"`sum` must be of shape \(4,3\)",
        ),
        (
            lambda: native.step("RowwiseAdagrad", [TABLE, TABLE], IDS, VALUES, [0.1, 0, 0]),
            r"`sum` must be of shape \(4,\)",
        ),
    ],
)
def test_calls_refuse_arguments_that_do_not_fit(call, message):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.block_until_ready(call())


@pytest.mark.parametrize("dtype", native.DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_threads_change_no_bit(dtype):
    assert len({native.digest(np.dtype(dtype).name, threads) for threads in (1, 2, 3, 8)}) == 1


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_instruction_sets_change_no_bit(isa):
    here = native.LIBRARY.embax_kernels_isa().decode()
    if isa == here:
        pytest.skip("this process has it")
    processor = Path("/proc/cpuinfo")
    if isa == "v4" and processor.exists() and "avx512vl" not in processor.read_text():
        pytest.skip("this machine has no v4")
    command = [sys.executable, str(Path(native.__file__))]
    environment = {"EMBAX_KERNELS_ISA": isa, "EMBAX_KERNELS_HUGE_PAGES": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    there, pages, *digests = done.stdout.split()
    if there != isa:
        pytest.skip(f"this machine has no {isa}")
    assert float(pages) == 0 or "[madvise]" not in PAGES.read_text()
    assert digests == [native.digest(np.dtype(dtype).name, 2) for dtype in native.DTYPES]


def test_a_large_table_gets_large_pages():
    if not PAGES.exists() or "[madvise]" not in PAGES.read_text():
        pytest.skip("large pages are not given on request here")
    assert native.large_pages_after_reads() > 0.5


def test_library_reports_version_and_calls():
    assert native.LIBRARY.embax_kernels_version().decode() == native.embax_kernels.__version__
    before = native.LIBRARY.embax_kernels_calls()
    native.take(TABLE, IDS).block_until_ready()
    assert native.LIBRARY.embax_kernels_calls() == before + 1
