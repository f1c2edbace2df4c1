"""The fused steps of the native library against optax and against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

native = pytest.importorskip("native", reason="the native kernels are not installed")

ROWS, RATE, DECAY = 120, 0.05, 0.02
SCALERS = {
    "Sgd": optax.identity(),
    "Adagrad": optax.scale_by_rss(0.1, 1e-7),
    "Adam": optax.scale_by_adam(),
    "nesterov": optax.scale_by_adam(nesterov=True),
}


def normal(rng, shape, dtype):
    return rng.normal(size=shape).astype(dtype)


def optax_chain(name, decay):
    weights = optax.add_decayed_weights(DECAY)
    parts = [weights] * (decay == 1) + [SCALERS[name]] + [weights] * (decay == 2)
    return optax.chain(*parts, optax.scale_by_learning_rate(RATE))


# In float16, optax loses the small numbers of Adam's moments, and the library does not.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in SCALERS for dtype in native.DTYPES if name in ("Sgd", "Adagrad") or dtype != np.float16],
)
def test_step_equals_optax(name, dtype):
    """Given the same sums, a row differs by at most 4 units of the larger of it and its update."""
    rng = np.random.default_rng(0)
    nesterov, handler = name == "nesterov", "Adam" if name == "nesterov" else name
    ids = rng.permutation(ROWS)[:50].astype(np.int32)
    table, gradient = normal(rng, (ROWS, 19), dtype), normal(rng, (50, 19), dtype)

    def run(decay):
        tx = optax_chain(name, decay)
        rows = jnp.asarray(table)[ids]
        start = native.state_of(handler, table, 0.1 if name == "Adagrad" else 0)
        # optax corrects the bias by what it has of 1 - b**t in the dtype of the step, which is off by 1e-5 in float32.
        corrections = [
            1 / (1 - jnp.asarray(b, native.accumulator(dtype)) ** t) for b, t in ((0.9, 1), (0.999, 1), (0.9, 2))
        ]
        scalars = native.scalars_of(handler, RATE, DECAY, 1e-7 if name == "Adagrad" else 1e-8)
        if handler == "Adam":
            scalars[-2:] = corrections[:2]
        if nesterov:
            scalars[-2:] = [0.9 * corrections[2], corrections[1], 0.1 * corrections[0]]
        more = {"nesterov": int(nesterov)} if handler == "Adam" else {}
        arrays = native.step(handler, [table, *start], ids, gradient, scalars, decay=decay, **more)
        update, state = tx.update(jnp.asarray(gradient), tx.init(rows), rows)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        return arrays, rows, update, optax.apply_updates(rows, update), moments

    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("standard"):
        results = jax.jit(lambda: [run(decay) for decay in (0, 1, 2)])()
        for decay, (arrays, before, update, rows, moments) in enumerate(results):
            sizes = np.maximum(np.abs(before), np.abs(update)).astype(np.float64)
            difference = np.abs(np.asarray(arrays[0])[ids].astype(np.float64) - np.asarray(rows).astype(np.float64))
            assert (difference <= 4 * native.rounding(dtype) * sizes).all()
            rest = np.setdiff1d(np.arange(ROWS), ids)
            assert np.asarray(arrays[0])[rest].tobytes() == table[rest].tobytes()
            assert len(moments) == len(arrays) - 1
            for got, want in zip(arrays[1:], moments, strict=True):
                want = np.asarray(want).astype(np.float64)
                # With weight decay before the moments, gradients cancel.
                bound = 4 * native.rounding(dtype) * (np.abs(want) + (decay == 1))
                assert (np.abs(np.asarray(got)[ids].astype(np.float64) - want) <= bound).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def steps_of(name, length, decay, arrays, ids, gradients, bag_of, factors):
    more = {"nesterov": 0} if name == "Adam" else {}
    scalars = native.scalars_of(name)
    return native.step(name, arrays, ids, gradients, scalars, length, bag_of, factors, decay, **more)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", native.STEPS)
def test_gradients_of_duplicates_and_bags_are_summed_first(name, dtype):
    rng = np.random.default_rng(0)
    number = 3000
    ids = rng.integers(-4, ROWS + 4, number)
    ids[:3] = np.iinfo(np.int64).min, np.iinfo(np.int64).max, ROWS
    factors = normal(rng, number, native.accumulator(dtype))
    bag_of = rng.integers(-2, 302, number).astype(np.int32)
    none = native.NOTHING, native.NO_FACTORS
    # The gradients of ids, whose they are, and their factors; with a decay of each kind, and rows of one or two axes.
    cases = [
        (1, 0, (70,), np.arange(number), none),
        (5, 1, (2, 9), np.arange(number) // 5, (native.NOTHING, factors)),
        (0, 2, (), bag_of, (bag_of, factors)),
    ]
    with jax.enable_x64(True):
        for length, decay, shape, of, more in cases:
            gradients = normal(rng, (number // max(length, 1) if length else 300, *shape), dtype)
            table = normal(rng, (ROWS, *shape), dtype)
            arrays = [table, *native.state_of(name, table)]
            counts = (of >= 0) & (of < gradients.shape[0])
            terms = gradients.astype(np.float64)[np.where(counts, of, 0)]
            if more[1].size:
                terms = terms * factors.reshape((-1,) + (1,) * len(shape))
            kept = np.where(counts, ids, -1)
            want = native.reference_step(name, arrays, kept, terms, native.scalars_of(name), decay)
            for got, expected, old in zip(
                steps_of(name, length, decay, arrays, ids, gradients, *more), want, arrays, strict=True
            ):
                assert got.dtype == old.dtype
                error = np.abs(np.asarray(got).astype(np.float64) - expected)
                # Sums of some 25 gradients, their squares, and the reference itself are rounded.
                bound = 40 * native.rounding(got.dtype) * np.maximum(np.abs(expected), 1)
                assert (error <= bound).all()


@pytest.mark.parametrize("name", native.STEPS)
def test_ids_count_from_the_end_where_they_are_asked_to(name):
    rng = np.random.default_rng(0)
    rows = np.array([ROWS - 1, 0, 7, -1, ROWS, 7, ROWS - 1, -1, -1, -1, ROWS // 2])  # -1 and ROWS are none
    table, gradients = normal(rng, (ROWS, 5), np.float32), normal(rng, (len(rows), 5), np.float32)
    arrays, scalars = [table, *native.state_of(name, table)], native.scalars_of(name)
    more = {"nesterov": 0} if name == "Adam" else {}
    for dtype in (np.int32, np.int64):
        ends = np.iinfo(dtype)
        ids = rows.astype(dtype)
        ids[[0, 1, 5]] -= ROWS  # the last row, the first one, and one that occurs twice
        ids[[3, 7, 8, 9]] = -ROWS - 1, ends.min, ends.min + 1, ends.max
        with jax.enable_x64(dtype == np.int64):
            want = native.step(name, arrays, rows.astype(dtype), gradients, scalars, **more)
            for got, expected in zip(
                native.step(name, arrays, ids, gradients, scalars, wrap=1, **more), want, strict=True
            ):
                np.testing.assert_array_equal(got, expected)
            missing = native.step(name, arrays, np.full(len(rows), -1, dtype), gradients, scalars, **more)
            np.testing.assert_array_equal(missing[0], table)


def test_a_mean_may_have_another_dtype():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, 300).astype(np.int32)
    table, gradients = normal(rng, (ROWS, 21), np.float32), normal(rng, (300, 21), np.float32)
    for name in ("Adam", "RowwiseAdam"):
        arrays = [table, *native.state_of(name, table, 0.25)]
        none = native.NOTHING, native.NO_FACTORS
        same = steps_of(name, 1, 0, arrays, ids, gradients, *none)
        for dtype in native.DTYPES[2:]:
            arrays[1] = arrays[1].astype(dtype)
            got = steps_of(name, 1, 0, arrays, ids, gradients, *none)
            assert got[1].dtype == dtype
            np.testing.assert_array_equal(got[0], same[0])
            np.testing.assert_array_equal(got[2], same[2])
            np.testing.assert_array_equal(np.asarray(got[1]), np.asarray(same[1]).astype(dtype))


def test_no_gradient_no_division():
    """Where all gradients were zero so far, Adagrad leaves a row alone; a NaN is not hidden."""
    table, ids = np.ones((3, 2), np.float32), np.array([0, 1], np.int32)
    gradients = np.array([[0, 0], [0, np.nan]], np.float32)
    for name in ("Adagrad", "RowwiseAdagrad"):
        arrays = [table, *native.state_of(name, table, 0)]
        got = np.asarray(native.step(name, arrays, ids, gradients, [1.0, 0.0, 0.0])[0])
        np.testing.assert_array_equal(got[0], [1, 1])
        np.testing.assert_array_equal(got[2], [1, 1])
        assert np.isnan(got[1]).any()


def rows_of_tables(rng, number, rows):
    """The ids of ten tables one after the other."""
    return np.arange(number) * 10 // number * (rows // 10) + rng.integers(0, rows // 10, number)


IDS = {
    "of tables": rows_of_tables,
    "of tables, some without a row": lambda rng, number, rows: rows_of_tables(rng, number, rows) - 3,
    "in order": lambda rng, number, rows: np.sort(rng.integers(0, rows, number)),
    "mostly of few rows": lambda rng, number, rows: np.sort(np.minimum(rng.geometric(0.3, number), rows - 1)),
    "one": lambda rng, number, rows: np.full(number, rows - 1),
    "none": lambda rng, number, rows: np.full(number, rows),
}


@pytest.mark.parametrize("ids_of", IDS.values(), ids=IDS)
def test_step_of_many_ids_in_ranges_is_exact_for_any_threads(ids_of):
    """Numbers of few bits, whose sums are exact. Ranges of rows are for one thread each, if they have as many ids."""
    rng = np.random.default_rng(5)
    rows, number = 3000, 40_000
    ids = ids_of(rng, number, rows).astype(np.int32)
    table, gradient = (rng.integers(-8, 9, (n, 3)).astype(np.float32) / 4 for n in (rows, number))
    expected, has_row = table.copy(), (ids >= 0) & (ids < rows)
    np.subtract.at(expected, ids[has_row], gradient[has_row])
    for threads in (1, 2, 8):
        native.LIBRARY.embax_kernels_set_threads(threads)
        try:
            (found,) = native.step("Sgd", [table.copy()], ids, gradient, [1.0, 0.0])
            np.testing.assert_array_equal(found, expected)
        finally:
            native.LIBRARY.embax_kernels_set_threads(0)
