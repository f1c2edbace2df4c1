"""hash_ids: MurmurHash3 of integers, the same everywhere; strings and bytes; how evenly and independently ids fall."""

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import hash_ids

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
MOST = 2**31 - 1
M32 = 2**32 - 1


def murmur3_32(key, seed):
    """MurmurHash3_x86_32 as published, of bytes."""

    def rotated(x, by):
        return (x << by | x >> 32 - by) & M32

    def mixed(k):
        return rotated(k * 0xCC9E2D51 & M32, 15) * 0x1B873593 & M32

    h, whole = seed, len(key) // 4 * 4
    for i in range(0, whole, 4):
        h = rotated(h ^ mixed(int.from_bytes(key[i : i + 4], "little")), 13) * 5 + 0xE6546B64 & M32
    if key[whole:]:
        h ^= mixed(int.from_bytes(key[whole:], "little"))
    h ^= len(key)
    h = (h ^ h >> 16) * 0x85EBCA6B & M32
    h = (h ^ h >> 13) * 0xC2B2AE35 & M32
    return h ^ h >> 16


def expected(values, rows, seed=0):
    keys = [(int(value) % 2**64).to_bytes(8, "little") for value in np.ravel(values)]
    return np.reshape([murmur3_32(key, seed) * rows >> 32 for key in keys], np.shape(values))


def samples(dtype):
    """The limits of a dtype, numbers next to them, and some between."""
    info = np.iinfo(dtype)
    inside = np.random.default_rng(0).integers(info.min, info.max, size=20, dtype=dtype, endpoint=True)
    return np.concatenate([np.array([info.min, info.min + 1, 0, 1, 17, info.max - 1, info.max], dtype), inside])


def test_the_reference_is_murmur3():
    # Verification values of the published implementation, https://en.wikipedia.org/wiki/MurmurHash and SMHasher.
    assert murmur3_32(b"", 0) == 0
    assert murmur3_32(b"", 1) == 0x514E28B7
    assert murmur3_32(b"test", 0x9747B28C) == 0x704B81DC
    assert murmur3_32(b"Hello, world!", 0x9747B28C) == 0x24884CBA
    hashes = b"".join(murmur3_32(bytes(range(i)), 256 - i).to_bytes(4, "little") for i in range(256))
    assert murmur3_32(hashes, 0) == 0xB0F57EE3


SIZES = [(1, 0), (2, 1), (1000, 7), (65_536, 0), (70_001, 2**31), (MOST, 2**32 - 1)]  # rows, seed


@pytest.mark.parametrize("dtype", INTEGERS)
def test_is_murmur3_of_the_64_bit_value(dtype):
    values = samples(dtype)
    rows_of = [expected(values, *size) for size in SIZES]

    def run(values):
        return [hash_ids(values, *size) for size in SIZES]

    for (rows, seed), out, expected_rows in zip(SIZES, run(values), rows_of, strict=True):
        assert isinstance(out, np.ndarray)
        np.testing.assert_array_equal(out, expected_rows, err_msg=f"{rows} rows, seed {seed}")
    with jax.enable_x64(True):
        wide = jax.jit(run)(values)
        if dtype in ("int64", "uint16"):
            eager = hash_ids(jnp.asarray(values), *SIZES[2])
            assert isinstance(eager, jax.Array)
            assert eager.dtype == jnp.int32
            np.testing.assert_array_equal(eager, rows_of[2])
    of_jax = [wide, jax.jit(run)(values)] if np.dtype(dtype).itemsize < 8 else [wide]
    for outs in of_jax:
        for (rows, seed), out, expected_rows in zip(SIZES, outs, rows_of, strict=True):
            assert out.dtype == jnp.int32
            np.testing.assert_array_equal(out, expected_rows, err_msg=f"{rows} rows, seed {seed}")
            assert out.min() >= 0
            assert out.max() < rows


def test_a_number_has_one_row_whatever_its_dtype():
    cases = [*itertools.product([(-3, -1, 0, 100)], INTEGERS[:4]), *itertools.product([(0, 1, 100)], INTEGERS)]
    arrays = [np.array(values, dtype) for values, dtype in cases]
    with jax.enable_x64(True):
        of_jax = jax.jit(lambda arrays: [hash_ids(array, 1000) for array in arrays])(arrays)
    for (values, dtype), array, out in zip(cases, arrays, of_jax, strict=True):
        np.testing.assert_array_equal(hash_ids(array, 1000), expected(values, 1000), err_msg=dtype)
        np.testing.assert_array_equal(out, expected(values, 1000), err_msg=dtype)
    assert hash_ids(np.array(2**64 - 1), 1000) == hash_ids(-1, 1000)


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(1, MOST), st.integers(0, M32))
def test_any_number_any_rows_any_seed(value, rows, seed):
    assert hash_ids(value, rows, seed) == expected(value, rows, seed)


def test_hash_ids_uses_all_64_bits_of_host_numbers():
    values = np.array([2**40, 2**40 + 2**33, -(2**50)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(hash_ids(values, MOST), expected(values, MOST))
        np.testing.assert_array_equal(hash_ids(values.tolist(), MOST), expected(values, MOST))


def test_vmap_and_jit_hash_each_number():
    values = jnp.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda v: hash_ids(v, 50)))(values), expected(values, 50))


SHAPES = [(), (0,), (2, 0, 3), (1,), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_hash_ids_keeps_the_shape(shape):
    values = np.arange(math.prod(shape)).reshape(shape)
    for array in values, values.astype(str), values.astype(str).astype(object), values.astype(bytes):
        out = hash_ids(array, 1000)
        assert out.shape == shape
        assert out.dtype == np.int32


def test_hash_ids_keeps_the_shape_under_jit():
    arrays = [np.zeros(shape, np.int32) for shape in SHAPES]
    for shape, out in zip(SHAPES, jax.jit(lambda arrays: [hash_ids(x, 1000) for x in arrays])(arrays), strict=True):
        assert out.shape == shape
        assert out.dtype == np.int32


@pytest.mark.parametrize("values", [[], [[], []], ()], ids=str)
def test_empty_lists_are_empty_batches(values):
    assert hash_ids(values, 10).shape == np.shape(values)
    assert hash_ids(values, 10).dtype == np.int32


STRINGS = ["", "a", "user:17", "naïve", "日本語", "🦆" * 40, "x" * 1000, "a\0", "\0"]


@pytest.mark.parametrize("rows", [1, 1000, MOST])
def test_strings_are_hashed_by_their_utf8(rows):
    encoded = [value.encode() for value in STRINGS]
    for seed in 0, 5, 2**32 - 1:
        expected = [xxhash.xxh3_64_intdigest(value, seed) * rows >> 64 for value in encoded]
        assert max(expected) < rows
        for values in STRINGS, tuple(STRINGS), encoded, np.array(STRINGS, object), np.array(encoded, object):
            out = hash_ids(values, rows, seed)
            assert isinstance(out, np.ndarray)
            assert out.tolist() == expected
        nested = hash_ids([STRINGS[:3], STRINGS[3:6]], rows, seed)
        assert nested.tolist() == [expected[:3], expected[3:6]]
        assert [hash_ids(value, rows, seed).item() for value in STRINGS] == expected
    assert hash_ids("caf\udcc3", rows) == hash_ids(b"caf\xc3", rows)  # a token cut inside a character
    kept = [value for value in STRINGS if "\0" not in value]  # NumPy's own strings end before the zeros
    np.testing.assert_array_equal(hash_ids(np.array(kept), rows), hash_ids(kept, rows))


def test_strings_that_end_in_zero_bytes_differ():
    values = [b"key", b"key\0", b"key\0\0"]
    assert len(set(hash_ids(values, MOST).tolist())) == 3


BAD = {
    "float": (lambda: hash_ids([1.5], 10), TypeError, "must be integers or strings, got float64. Cast them"),
    "bool": (lambda: hash_ids(np.array([True]), 10), TypeError, "must be integers or strings, got bool"),
    "empty_floats": (lambda: hash_ids(np.zeros(0), 10), TypeError, "must be integers or strings, got float64"),
    "jax_float": (lambda: hash_ids(jnp.ones(2), 10), TypeError, "must be integers or strings, got float32"),
    "none": (lambda: hash_ids([None], 10), TypeError, "must be integers or strings, got None at position 0"),
    "mixed": (lambda: hash_ids(["a", 1], 10), TypeError, "must be integers or strings, got 1 at position 1"),
    "mixed_object": (lambda: hash_ids(np.array([["a"], [2.5]], object), 10), TypeError, "got 2.5 at position 1"),
    "huge": (lambda: hash_ids([2**70], 10), TypeError, "got 1180591620717411303424 at position 0"),
    "no_rows": (lambda: hash_ids([1], 0), ValueError, r"rows=...\)` must be from 1 to 2147483647, got 0"),
    "negative_rows": (lambda: hash_ids([1], -1), ValueError, r"rows=...\)` must not be negative, got -1"),
    "many_rows": (lambda: hash_ids([1], 2**31), ValueError, "must be from 1 to 2147483647, got 2147483648"),
    "float_rows": (lambda: hash_ids([1], 1.5), TypeError, r"rows=...\)` must be a whole number, got 1.5"),
    "negative_seed": (lambda: hash_ids([1], 10, -1), ValueError, r"seed=...\)` must not be negative, got -1"),
    "large_seed": (lambda: hash_ids([1], 10, 2**32), ValueError, r"seed=...\)` must be below 2\*\*32, got 4294967296"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- How they fall. Numbers that users have: in sequence, with a stride, in the high bits; and strings.

NUMBER = 100_000
VALUES = {
    "sequence": np.arange(NUMBER),
    "negative": -np.arange(NUMBER),
    "stride": np.arange(NUMBER) * 4096,
    "high_bits": np.arange(NUMBER) << 40,
    "strings": [f"user:{i}" for i in range(NUMBER)],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("rows", [2, 64, 1000])
def test_values_fall_evenly(values, rows):
    counts = np.bincount(hash_ids(values, rows), minlength=rows)
    chi_square = ((counts - NUMBER / rows) ** 2).sum() / (NUMBER / rows)
    # Of the distribution with rows - 1 degrees of freedom: five standard deviations, and some for its tail.
    assert chi_square < rows - 1 + 5 * math.sqrt(2 * (rows - 1)) + 15
    assert counts.min() > 0


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("rows", [10**5, 10**6])
def test_hash_ids_collides_as_often_as_chance(values, rows):
    places = hash_ids(values, rows)
    shares = np.bincount(places, minlength=rows)[places] > 1
    probability = 1 - math.exp(-NUMBER / rows)
    assert abs(shares.mean() - probability) < 0.01  # a standard deviation is below 0.002


@pytest.mark.parametrize("values", [VALUES["sequence"], VALUES["strings"]], ids=["integers", "strings"])
def test_another_seed_is_independent(values):
    rows = 64
    first, second = (hash_ids(values, rows, seed) for seed in (0, 1))
    assert abs(np.mean(first == second) - 1 / rows) < 0.003
    # All pairs are as frequent, so that the one tells nothing of the other.
    counts = np.bincount(first * rows + second, minlength=rows**2)
    chi_square = ((counts - NUMBER / rows**2) ** 2).sum() / (NUMBER / rows**2)
    assert abs(chi_square - rows**2) < 5 * math.sqrt(2) * rows
    # Of those that share a row of 1e5 under one seed, one in 1e5 shares it under both.
    pairs = np.stack([hash_ids(values, 10**5, seed) for seed in (0, 1)])
    assert NUMBER - np.unique(pairs, axis=1).shape[1] < 10
