"""combine: the sums of duplicates by slots and by sort, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embax._base import distinct as _dedupe

ROWS = 7
LENGTH = 6
VALUES = np.random.default_rng(0).normal(size=(LENGTH, 3)).astype(np.float32)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # float32

CASES = {
    "distinct": [3, 0, 6, 2, 5, 1],
    "duplicates": [4, 1, 4, 0, 1, 4],
    "same": [2] * LENGTH,
    "some_without_a_row": [4, ROWS, 4, ROWS, 0, 1],
    "none_with_a_row": [ROWS] * LENGTH,
    "first_and_last": [6, 0, 6, 0, ROWS, 6],
}

# Slots hold whatever earlier calls have left in them.
STALE = [0, 5, 3, 3, 2, 1, 100]
WAYS = {"sort": None, "slots": np.zeros(ROWS, np.int32), "stale_slots": np.array(STALE, np.int32)}

by_every_way = pytest.mark.parametrize("slots", WAYS.values(), ids=WAYS)
by_slots_and_sort = pytest.mark.parametrize("by_slots", [True, False], ids=["slots", "sort"])


@functools.partial(jax.jit, static_argnums=3)
def combine(slots, ids, values, rows=ROWS):
    return _dedupe.combine(slots, ids, values, rows)


def assert_combined(distinct, ids, values, rows=ROWS, **tolerance):
    """The places used are the first ones, each has a row of its own and the sum of it; the others are empty."""
    distinct = jax.tree.map(np.asarray, distinct)  # whose slices need no compiling
    ids, values = np.asarray(ids), np.asarray(values)
    used = int(distinct.number)
    assert distinct.number.dtype == jnp.int32
    assert distinct.ids.shape == np.shape(ids)
    assert (distinct.values.shape, distinct.values.dtype) == (np.shape(values), values.dtype)
    assert sorted(np.asarray(distinct.ids[:used])) == sorted({index for index in np.asarray(ids) if index < rows})
    np.testing.assert_array_equal(distinct.ids[used:], rows)
    np.testing.assert_array_equal(distinct.values[used:], np.zeros_like(values[used:]))
    for index, sum_ in zip(np.asarray(distinct.ids[:used]), np.asarray(distinct.values[:used]), strict=True):
        expected = np.asarray(values, np.float64)[np.asarray(ids) == index].sum(0)
        np.testing.assert_allclose(sum_.astype(np.float64), expected, **(tolerance or TOLERANCE))


@by_every_way
@pytest.mark.parametrize("ids", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dim", [(), (3,), (2, 3)], ids=str)
def test_combine_sums_each_row(slots, ids, dim):
    values = np.random.default_rng(1).normal(size=(LENGTH, *dim)).astype(np.float32)
    after, distinct = combine(slots, np.asarray(ids, np.int32), values)
    assert_combined(distinct, ids, values)
    assert (after is None) == (slots is None)


@by_every_way
@given(ids=st.lists(st.integers(0, ROWS), min_size=LENGTH, max_size=LENGTH))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_combine_sums_any_ids(slots, ids):
    assert_combined(combine(slots, jnp.asarray(ids), VALUES)[1], ids, VALUES)


@by_every_way
def test_values_of_the_sentinel_are_dropped(slots):
    ids = np.array(CASES["some_without_a_row"])
    for garbage in (np.nan, np.inf):
        values = np.where(ids[:, None] == ROWS, np.float32(garbage), VALUES)
        assert_combined(combine(slots, jnp.asarray(ids), values)[1], ids, VALUES)


@by_every_way
def test_sort_gives_rising_ids_and_no_way_needs_any(slots):
    assert_combined(combine(slots, jnp.zeros(0, jnp.int32), np.zeros((0, 3), np.float32))[1], [], VALUES[:0])
    ids = combine(slots, jnp.asarray(CASES["distinct"]), VALUES)[1].ids
    if slots is None:
        np.testing.assert_array_equal(ids, sorted(CASES["distinct"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@by_every_way
def test_low_precision_is_summed_in_float32(dtype, slots):
    ids, values = np.array(CASES["duplicates"], np.int32), VALUES.astype(jnp.dtype(dtype))
    one_rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert_combined(combine(slots, ids, values)[1], ids, values, rtol=one_rounding)
    many = combine(slots, np.ones(4096, np.int32), np.ones((4096, 1), values.dtype))[1]
    number, ids, values = (np.asarray(leaf) for leaf in (many.number, many.ids, many.values))
    np.testing.assert_array_equal(values[0], np.array([4096], values.dtype))
    assert (number, ids[0], ids[1]) == (1, 1, ROWS)


def test_slots_are_used_again_without_clearing():
    slots = jnp.zeros(ROWS, jnp.int32)
    for ids in [*CASES.values(), *CASES.values()]:
        slots, distinct = combine(slots, jnp.asarray(ids), VALUES)
        assert_combined(distinct, ids, VALUES)
    assert (slots.shape, slots.dtype) == ((ROWS,), jnp.int32)


@by_every_way
def test_two_runs_give_the_same_bytes(slots):
    rng = np.random.default_rng(2)
    ids, values = jnp.asarray(rng.integers(0, ROWS + 1, 5000)), rng.normal(size=(5000, 3)).astype(np.float32)
    first, second = (combine(slots, ids, values)[1] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@by_slots_and_sort
def test_lanes_are_apart(by_slots):
    ids = jnp.asarray([CASES["duplicates"], CASES["some_without_a_row"]])
    values = np.stack([VALUES, 2 * VALUES])
    slots = jnp.zeros((2, ROWS), jnp.int32) if by_slots else None
    of_lanes = jax.vmap(lambda *lane: _dedupe.combine(*lane, ROWS), in_axes=(0 if by_slots else None, 0, 0))
    _, lanes = jax.tree.map(np.asarray, jax.jit(of_lanes)(slots, ids, values))
    ids = np.asarray(ids)
    for k in range(2):
        assert_combined(jax.tree.map(lambda leaf, k=k: leaf[k], lanes), ids[k], values[k])


@pytest.mark.parametrize(
    ("by_slots", "dtype"),
    [
        (True, "float32"),
        (False, "bfloat16"),
        pytest.param(True, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param(False, "float32", marks=pytest.mark.exhaustive),
    ],
)
def test_temporary_memory_follows_the_ids(by_slots, dtype):
    rows = 10**6  # a byte for each is far more than the program may use
    slots = jax.ShapeDtypeStruct((rows,), jnp.int32) if by_slots else None
    ids, values = jax.ShapeDtypeStruct((128,), jnp.int32), jax.ShapeDtypeStruct((128, 16), jnp.dtype(dtype))
    program = jax.jit(_dedupe.combine, static_argnums=3, donate_argnums=0).lower(slots, ids, values, rows).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == (rows * 4 if by_slots else 0)
    assert memory.temp_size_in_bytes <= 8 * 128 * 16 * 4


def test_scratch_is_for_the_cpu(monkeypatch):
    assert _dedupe.scratch(5).shape == (5,)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _dedupe.scratch(5) is None
