"""Ids: every integer dtype and container, what is no id, and what an id without a row gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from embax import Table, lookup, renormalize
from embax._core import ids as _ids

TABLE = Table(jnp.arange(1000.0)[:, None])
DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
ALL_DTYPES = ["int2", "int4", "uint2", "uint4", *DTYPES]


def read(ids, table=TABLE):
    """The numbers of the rows that are read, the row being its own number."""
    return np.asarray(lookup(table, ids))[..., 0]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_numpy_ids_of_every_dtype(dtype):
    ids = np.array([0, 1], jnp.dtype(dtype))
    np.testing.assert_array_equal(read(ids), [0, 1])
    if not dtype.startswith("u"):
        np.testing.assert_array_equal(read(-ids), [0, 999])


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=() if dtype in ("int2", "uint8", "int32", "uint64") else pytest.mark.exhaustive)
        for dtype in ALL_DTYPES
    ],
)
def test_jax_ids_of_every_dtype(dtype):
    with jax.enable_x64("64" in dtype):
        ids = jnp.array([0, 1], dtype)
        assert ids.dtype == dtype
        np.testing.assert_array_equal(read(ids), [0, 1])


@pytest.mark.parametrize("bits", [32, 64])
def test_traced_ids_of_every_dtype(bits):
    dtypes = [dtype for dtype in ALL_DTYPES if ("64" in dtype) == (bits == 64)]

    @jax.jit
    def read_each(ids):
        assert [x.dtype for x in ids] == dtypes
        return [lookup(TABLE, x)[:, 0] for x in ids]

    with jax.enable_x64(bits == 64):
        for rows in read_each([np.array([0, 1], jnp.dtype(dtype)) for dtype in dtypes]):
            np.testing.assert_array_equal(rows, [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_ids_of_every_dtype_wrap_as_in_numpy_or_are_out_of_range(dtype):
    info = np.iinfo(dtype)
    ids = np.array([info.max, info.min], dtype)
    expected = [float(i % 1000) if -1000 <= i < 1000 else np.nan for i in (info.max, info.min)]
    np.testing.assert_array_equal(read(ids, Table(TABLE.weight, out_of_range="nan")), expected)
    tables = {policy: Table(TABLE.weight, out_of_range=policy) for policy in ("nan", "zero", "clip")}
    with jax.enable_x64(True):
        read_each = jax.jit(lambda tables, ids: {policy: lookup(table, ids) for policy, table in tables.items()})
        rows = {policy: np.asarray(rows)[:, 0] for policy, rows in read_each(tables, ids).items()}
    np.testing.assert_array_equal(rows["nan"], expected)
    np.testing.assert_array_equal(rows["zero"], np.nan_to_num(expected))
    np.testing.assert_array_equal(rows["clip"], np.arange(1000)[np.clip(ids.astype(object), -1000, 999).astype(int)])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (3, 3.0),
        (-1, 999.0),
        (np.int8(-1), 999.0),
        (np.array(3, np.uint8), 3.0),
        (jnp.array(3), 3.0),
        ([1, 2], [1.0, 2.0]),
        ((1, -1), [1.0, 999.0]),
        ([[1], [2]], [[1.0], [2.0]]),
        ([np.int16(1), 2], [1.0, 2.0]),
        ([jnp.array(1), jnp.array(2)], [1.0, 2.0]),
        (range(3), [0.0, 1.0, 2.0]),
        ([], []),
        ((), []),
        ([[], []], [[], []]),
        (np.zeros((2, 0), np.uint8), [[], []]),
        (np.array([[1, 2], [3, 4]])[:, ::-1].T, [[2.0, 4.0], [1.0, 3.0]]),
    ],
    ids=repr,
)
def test_ids_in_every_container(ids, expected):
    np.testing.assert_array_equal(read(ids), np.asarray(expected))
    assert read(ids).shape == np.shape(expected)


def test_ids_are_not_changed():
    ids = np.array([-1, 2, 2**40])
    lookup(Table(jnp.ones((3, 1)), out_of_range="clip"), ids)
    np.testing.assert_array_equal(ids, [-1, 2, 2**40])


NO_IDS = [True, 1.0, 1j, "1", b"1", None, [True], [1.5], [None], {1, 2}, np.zeros(0), np.array(["a"]), 2**64]


@pytest.mark.parametrize("function", [lookup, renormalize])
@pytest.mark.parametrize("ids", NO_IDS, ids=repr)
def test_ids_that_are_not_integers_are_a_type_error(ids, function):
    name = np.asarray(ids).dtype.name.replace("str32", "<U1").replace("bytes8", r"\|S1")
    with pytest.raises(
        TypeError, match=rf"`embax\.{function.__name__}\(ids=\.\.\.\)` must be of an integer dtype, got {name}"
    ):
        function(TABLE, ids)


@pytest.mark.parametrize("ids", [jnp.array(True), jnp.array([1.0]), jax.random.key(0)], ids=["bool", "float", "key"])
def test_ids_that_are_not_integers_are_a_type_error_under_jit(ids):
    for call in lookup, jax.jit(lookup):
        with pytest.raises(TypeError, match=r"must be of an integer dtype, got (bool|float32|key<fry>)\. Cast them"):
            call(TABLE, ids)


BAD = [
    (1000, 1000, ()),
    ([0, -1001], -1001, (1,)),
    ([[0, 1], [2, 1000]], 1000, (1, 1)),
    ([5000, -5000], 5000, (0,)),
    (np.array([0, 2**32 - 1], np.uint32), 2**32 - 1, (1,)),
    (np.array([2**64 - 1], np.uint64), 2**64 - 1, (0,)),
    (np.array([2**32 + 1, 0]), 2**32 + 1, (0,)),
    (np.array([[-(2**63)]]), -(2**63), (0, 0)),
    (jnp.array([0, 0, 1000]), 1000, (2,)),
    (jnp.array(2**32 - 1, jnp.uint32), 2**32 - 1, ()),
]


@pytest.mark.parametrize("function", [lookup, renormalize])
@pytest.mark.parametrize(("ids", "bad", "position"), BAD, ids=[str(bad) for _, bad, _ in BAD])
def test_a_concrete_bad_id_is_an_index_error(ids, bad, position, function):
    with pytest.raises(IndexError) as info:
        function(TABLE, ids)
    assert str(info.value) == (
        f"`embax.{function.__name__}(ids=...)` must be in [-1000, 1000), the table having 1000 rows, got {bad} "
        f"at position {position}. Correct the ids, or choose what they read: out_of_range='clip', 'nan' or 'zero'."
    )


def test_a_concrete_bad_id_is_an_index_error_inside_a_transformation_too():
    with pytest.raises(IndexError, match=r"got 7 at position \(0,\)"):
        jax.jit(lambda table: lookup(table, [7]))(Table(jnp.ones((3, 1))))
    with pytest.raises(IndexError, match=r"got 7 at position \(1,\)"):
        jax.grad(lambda table: lookup(table, np.array([0, 7])).sum())(Table(jnp.ones((3, 1))))


@pytest.mark.parametrize(("rows", "bad"), [(0, 0), (0, -1), (1, 1), (1, -2)])
def test_a_bad_id_of_a_small_table_is_an_index_error(rows, bad):
    with pytest.raises(IndexError, match=rf"in \[{-rows}, {rows}\), the table having {rows} rows, got {bad} at"):
        lookup(Table(jnp.ones((rows, 2))), [bad])


def test_concrete_ids_in_range_of_every_policy_read_alike():
    for policy in "error", "clip", "nan", "zero":
        np.testing.assert_array_equal(
            read([0, -1000, 999, -1], Table(TABLE.weight, out_of_range=policy)), [0, 0, 999, 999]
        )


@functools.cache
def with_checks(function):
    return jax.jit(checkify.checkify(function, errors=checkify.index_checks))


def checked(function, *args):
    """The message of checkify's index checks, None where there is no error."""
    return with_checks(function)(*args)[0].get()


def gradient(table, ids):
    return jax.grad(lambda table: lookup(table, ids).sum())(table).weight


@pytest.mark.parametrize("function", [lookup, gradient, renormalize])
@pytest.mark.parametrize(("ids", "bad"), [([0, 4], 4), ([-5, 1], -5), ([2**31 - 1, 0], 2**31 - 1)])
def test_checkify_names_a_traced_bad_id(ids, bad, function):
    table = Table(jnp.ones((4, 2)), max_norm=1.0)
    assert f"index {bad} is out of bounds for axis 0 with size 4" in checked(function, table, jnp.array(ids))
    assert checked(function, table, jnp.array([3, -4])) is None
    assert checked(function, table, jnp.array([0, 0])) is None


def test_checkify_with_all_checks_finds_nothing_in_good_ids():
    table = Table(jnp.array([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]), max_norm=1.0, padding_idx=2, scale_grad_by_freq=True)

    def all_three(table, ids):
        return [function(table, ids) for function in (lookup, gradient, renormalize)]

    call = jax.jit(checkify.checkify(all_three, errors=checkify.all_checks))
    assert call(table, np.array([0, 1, 1, -1]))[0].get() is None


def test_checkify_finds_nothing_in_clipped_ids():
    for function in lookup, gradient:
        assert checked(function, Table(jnp.ones((4, 2)), out_of_range="clip"), jnp.array([9, -9])) is None


def test_64_bit_ids_into_more_rows_than_int32_counts():
    rows = 2**31 + 5
    with jax.enable_x64(True):
        ids = np.array([-1, 0, rows, -rows - 1, 2**31])
        nan, clip = jax.jit(lambda ids: [_ids.resolve(ids, rows, policy) for policy in ("nan", "clip")])(ids)
        np.testing.assert_array_equal(nan, [rows - 1, 0, rows, -rows - 1, 2**31])
        np.testing.assert_array_equal(clip, [rows - 1, 0, rows - 1, 0, 2**31])


def test_more_rows_than_int32_counts_need_x64():
    table = Table(jax.ShapeDtypeStruct((2**31, 1), jnp.float32))
    with pytest.raises(ValueError, match="more than 2147483647 rows must be read with 64-bit ids, got 2147483648 rows"):
        jax.eval_shape(lookup, table, jax.ShapeDtypeStruct((2,), jnp.int32))
    with jax.enable_x64(True):
        assert jax.eval_shape(lookup, table, jax.ShapeDtypeStruct((2,), jnp.int64)).shape == (2, 1)


@pytest.mark.parametrize("ids", [[], [3], [3, 1, 3, 3, -9, 1]], ids=repr)
def test_occurrences_names_the_first_and_the_number(ids):
    first, count = jax.jit(_ids.occurrences)(jnp.array(ids, jnp.int32))
    np.testing.assert_array_equal(first, [ids.index(i) for i in ids])
    np.testing.assert_array_equal(count, [ids.count(i) for i in ids])
    assert first.dtype == count.dtype == jnp.int32
