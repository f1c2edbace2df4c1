"""Ragged: what each constructor makes of its arguments, what it refuses, and how it goes through transformations."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import Ragged

BAGS = [[4, 7, 7], [], [2]]

# Each makes BAGS of what `array` makes of nested lists.
CONSTRUCTORS = {
    "init": lambda array: Ragged(array([4, 7, 7, 2]), array([0, 3, 3, 4])),
    "init_unused": lambda array: Ragged(array([4, 7, 7, 2, 9, 9]), array([0, 3, 3, 4])),
    "lists": lambda array: Ragged.from_lists([array([4, 7, 7]), array([]), array([2])]),
    "lengths": lambda array: Ragged.from_lengths(array([4, 7, 7, 2]), array([3, 0, 1])),
    "lengths_unused": lambda array: Ragged.from_lengths(array([4, 7, 7, 2, 9]), array([3, 0, 1])),
    "offsets": lambda array: Ragged.from_offsets(array([4, 7, 7, 2]), array([0, 3, 3])),
    "offsets_last": lambda array: Ragged.from_offsets(array([4, 7, 7, 2, 9]), array([0, 3, 3, 4]), True),
    "segments": lambda array: Ragged.from_segments(array([4, 7, 7, 2]), array([0, 0, 0, 2]), 3),
    "segments_unused": lambda array: Ragged.from_segments(array([4, 7, 7, 2, 9]), array([0, 0, 0, 2, 3]), 3),
    "padded": lambda array: Ragged.from_padded(array([[4, 7, 7, 0], [0, 0, 0, 0], [2, 0, 0, 0]]), padding_idx=0),
    "padded_in_front": lambda array: Ragged.from_padded(array([[4, 7, 7, 0], [0, 0, 0, 0], [0, 0, 2, 0]]), 0),
    "padded_between": lambda array: Ragged.from_padded(array([[4, 9, 7, 7], [9, 9, 9, 9], [9, 9, 9, 2]]), 9),
    "masked": lambda array: Ragged.from_padded(
        array([[4, 0, 7, 7], [1, 2, 3, 4], [9, 9, 9, 2]]), mask=array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    ),
}
with_constructors = pytest.mark.parametrize("construct", CONSTRUCTORS.values(), ids=CONSTRUCTORS)

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def lists(bags):
    """The ids of each bag."""
    values, offsets = np.asarray(bags.values), np.asarray(bags.offsets)
    return [values[start:end].tolist() for start, end in itertools.pairwise(offsets)]


def assert_are_bags(bags, expected=BAGS):
    assert lists(bags) == expected
    assert isinstance(bags.offsets, jax.Array)
    assert bags.offsets.dtype == jnp.int32
    assert_are_parts(bags, *_parts(Ragged(np.zeros(bags.capacity, np.int32), bags.offsets)), expected)
    assert (bags.bags, bags.used) == (len(expected), sum(map(len, expected)))
    assert repr(bags) == f"Ragged({len(expected)} bags, capacity={bags.capacity})"


@jax.jit
def _parts(bags):
    return bags.lengths, bags.segments


def assert_are_parts(bags, lengths, segments, expected=BAGS):
    assert lengths.tolist() == [len(ids) for ids in expected]
    numbers = [b for b, ids in enumerate(expected) for _ in ids]
    assert segments.tolist() == numbers + [len(expected)] * (bags.capacity - len(numbers))


@with_constructors
def test_constructor_of_lists(construct):
    assert_are_bags(construct(lambda values: values))


@with_constructors
@pytest.mark.parametrize("dtype", INTEGERS)
def test_constructor_of_numpy_arrays_keeps_their_dtype(construct, dtype):
    bags = construct(lambda values: np.array(values, dtype))
    assert_are_bags(bags)
    assert bags.values.dtype == dtype


_OF_JAX = ["int8", "int32", "uint16"]


@pytest.mark.parametrize(
    ("construct", "dtype"),
    [
        pytest.param(construct, dtype, id=f"{name}-{dtype}", marks=[] if (i - j) % 3 == 0 else pytest.mark.exhaustive)
        for i, (name, construct) in enumerate(CONSTRUCTORS.items())
        for j, dtype in enumerate(_OF_JAX)
    ],
)
def test_constructor_of_jax_arrays_keeps_their_dtype(construct, dtype):
    bags = construct(lambda values: jnp.array(values, dtype))
    assert_are_bags(bags)
    assert bags.values.dtype == dtype


@pytest.mark.parametrize("dtype", ["int8", pytest.param("uint32", marks=pytest.mark.exhaustive)])
def test_constructors_of_traced_arrays(dtype):
    constructors = {name: construct for name, construct in CONSTRUCTORS.items() if name != "lists"}

    @jax.jit
    def run(zero):
        def traced(values):
            return np.array(values, dtype) + zero

        made = {name: construct(traced) for name, construct in constructors.items()}
        return made, {name: (bags.lengths, bags.segments) for name, bags in made.items()}

    made, parts = run(np.zeros((), dtype))
    for name, bags in made.items():
        assert lists(bags) == BAGS, name
        assert bags.offsets.dtype == jnp.int32, name
        assert bags.values.dtype == dtype, name
        assert_are_parts(bags, *parts[name])


@with_constructors
def test_constructor_of_concrete_arrays_inside_of_jit_stays_concrete(construct):
    @jax.jit
    def inside(zero):
        assert construct(lambda values: np.array(values, int)).used == 4
        return zero

    inside(0)


def test_constructor_of_traced_ids_and_concrete_offsets_checks_the_offsets():
    with pytest.raises(ValueError, match="must not lie beyond the 2 ids, got 3 at position 1"):
        jax.jit(lambda ids: Ragged(ids, [0, 3]))(jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(("wrap", "dtype"), [(lambda f: f, "int8"), (jax.jit, "int8"), (jax.jit, "uint8")])
def test_more_ids_and_bags_than_a_small_dtype_can_count(wrap, dtype):
    args = {
        "ids": np.zeros(300),
        "lengths": np.full(3, 100),
        "offsets": np.array([0, 100]),
        "segments": np.repeat([0, 2], 150),
        "matrix": np.zeros((2, 300)),
    }

    def run(ids, lengths, offsets, segments, matrix):
        return {
            "lengths": Ragged.from_lengths(ids, lengths).offsets,
            "offsets": Ragged.from_offsets(ids, offsets).offsets,
            "segments": Ragged.from_segments(ids, segments, 280).offsets,
            "padded": Ragged.from_padded(matrix, 1).offsets,
        }

    offsets = wrap(run)(**{name: jnp.asarray(x.astype(dtype)) for name, x in args.items()})
    assert offsets["lengths"].tolist() == [0, 100, 200, 300]
    assert offsets["offsets"].tolist() == [0, 100, 300]
    assert offsets["segments"].tolist() == [0, 150, 150] + [300] * 278
    assert offsets["padded"].tolist() == [0, 300, 600]


@pytest.mark.parametrize("ids", [2**40 + 3, 2**63 + 5], ids=["int64", "uint64"])
def test_ragged_keeps_64_bit_numbers_of_the_host(ids):
    key = np.array([ids, ids + 1])
    for bags in [
        Ragged(key, [0, 2]),
        Ragged.from_lists([key, []]),
        Ragged.from_padded(np.array([[0, ids, ids + 1]], key.dtype), 0),
        Ragged.from_padded(key[None], mask=[[True, True]]),
        Ragged(key, [0, 2]).pad_to(5),
    ]:
        assert lists(bags)[0] == [ids, ids + 1]


EMPTY = {
    "no_bags": (lambda: Ragged([], [0]), []),
    "empty_bags": (lambda: Ragged([], [0, 0, 0]), [[], []]),
    "no_lists": (lambda: Ragged.from_lists([]), []),
    "empty_lists": (lambda: Ragged.from_lists([[], np.zeros(0)]), [[], []]),
    "no_lengths": (lambda: Ragged.from_lengths([], []), []),
    "no_offsets": (lambda: Ragged.from_offsets([], []), []),
    "offsets_at_the_end": (lambda: Ragged.from_offsets([], [0, 0]), [[], []]),
    "only_the_last_offset": (lambda: Ragged.from_offsets([4], [0], include_last_offset=True), []),
    "no_segments": (lambda: Ragged.from_segments([], [], 2), [[], []]),
    "segments_in_no_bag": (lambda: Ragged.from_segments([4, 5], [0, 0], 0), []),
    "no_rows": (lambda: Ragged.from_padded(np.zeros((0, 3), int), 0), []),
    "no_columns": (lambda: Ragged.from_padded(np.zeros((2, 0), int), 0), [[], []]),
    "only_padding": (lambda: Ragged.from_padded(jnp.zeros((2, 3), int), 0), [[], []]),
}


@pytest.mark.parametrize(("construct", "expected"), EMPTY.values(), ids=EMPTY)
def test_nothing(construct, expected):
    bags = construct()
    assert_are_bags(bags, expected)
    assert_are_bags(bags.pad_to(bags.capacity + 2), expected)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_pad_to_adds_or_removes_padding(array):
    bags = Ragged(array([4, 7, 7, 2, 9, 9]), [0, 3, 3, 4])
    for capacity in (4, 5, 6, 9, np.int64(9)):
        padded = bags.pad_to(capacity)
        assert padded.capacity == capacity
        assert padded.values.dtype == bags.values.dtype
        assert_are_bags(padded)
    assert jax.jit(lambda: bags.pad_to(5).values)().shape == (5,)
    assert_are_bags(jax.jit(lambda bags: bags.pad_to(8))(bags))
    with pytest.raises(ValueError, match=r"must be at least 4, the number of ids, got 3\. Nothing is cut off"):
        bags.pad_to(3)
    # Of traced offsets, the last one is unknown.
    with pytest.raises(ValueError, match="must be at least 6, the number of ids, got 5"):
        jax.jit(lambda bags: bags.pad_to(5))(bags)


BAD = {
    "float_values": (lambda: Ragged([1.5], [0, 1]), TypeError, r"Ragged\(values=...\)` must be of an integer dtype"),
    "bool_values": (lambda: Ragged([True], [0, 1]), TypeError, "must be of an integer dtype, got bool"),
    "no_axis": (lambda: Ragged(3, [0, 1]), ValueError, r"Ragged\(values=...\)` must have 1 axes, got shape \(\)"),
    "float_offsets": (lambda: Ragged([1], [0, 1.0]), TypeError, r"Ragged\(offsets=...\)` must be of an integer dtype"),
    "axes_of_offsets": (lambda: Ragged([1], [[0, 1]]), ValueError, r"offsets=...\)` must have 1 axes, got shape"),
    "no_end": (lambda: Ragged([1], []), ValueError, r"must have an end, got none\. Pass \[0\]"),
    "start": (lambda: Ragged([1, 2], [1, 2]), ValueError, r"must start at 0, got 1 at position 0\. Correct it"),
    "negative_start": (lambda: Ragged([1, 2], [-1, 2]), ValueError, "must start at 0, got -1 at position 0"),
    "falls": (
        lambda: Ragged([1, 2, 3], [0, 2, 3, 1, 0]), ValueError,
        "must not fall below the one before, 3, got 1 at position 3",
    ),
    "beyond": (lambda: Ragged([1, 2], [0, 1, 5, 7]), ValueError, "must not lie beyond the 2 ids, got 5 at position 2"),
    "beyond_int32": (lambda: Ragged([1], np.array([0, 2**32])), ValueError, "beyond the 1 ids, got 4294967296 at"),
    "list_of_floats": (lambda: Ragged.from_lists([[1], [1.5]]), TypeError, r"from_lists\(lists=...\)` must be of an"),
    "list_of_lists": (lambda: Ragged.from_lists([[[1]]]), ValueError, r"must have 1 axes, got shape \(1, 1\)"),
    "float_lengths": (lambda: Ragged.from_lengths([1], [1.0]), TypeError, r"from_lengths\(lengths=...\)` must be of"),
    "negative_length": (
        lambda: Ragged.from_lengths([1, 2], [2, -1, 1]), ValueError, "must not be negative, got -1 at position 1",
    ),
    "long_lengths": (lambda: Ragged.from_lengths([1, 2], [1, 2]), ValueError, "beyond the 2 ids, got 3 at position 2"),
    "huge_lengths": (lambda: Ragged.from_lengths([], np.array([2**32])), ValueError, "got 4294967296 at position 1"),
    "float_offset": (lambda: Ragged.from_offsets([1], [0.0]), TypeError, r"from_offsets\(offsets=...\)` must be of"),
    "matrix_of_ids": (lambda: Ragged.from_offsets([[1]], [0]), ValueError, r"from_offsets\(ids=...\)` must have 1"),
    "first_offset": (lambda: Ragged.from_offsets([1, 2], [1]), ValueError, "must start at 0, got 1 at position 0"),
    "late_offset": (lambda: Ragged.from_offsets([1], [0, 2]), ValueError, "must not fall below the one before, 2, got"),
    "huge_offset": (lambda: Ragged.from_offsets([1], np.array([0, 2**32])), ValueError, "4294967296, got 1 at"),
    "no_last_offset": (lambda: Ragged.from_offsets([], [], True), ValueError, "must have an end, got none"),
    "flag": (lambda: Ragged.from_offsets([1], [0], 1), TypeError, r"include_last_offset=...\)` must be a bool, got 1"),
    "falling_segments": (
        lambda: Ragged.from_segments([1, 2, 3], [0, 2, 1], 3), ValueError,
        r"segments=...\)` must not fall, nor be negative, got 1 after 2 at position 2\. Sort the ids",
    ),
    "negative_segment": (lambda: Ragged.from_segments([1], [-1], 3), ValueError, "got -1 after 0 at position 0"),
    "few_segments": (lambda: Ragged.from_segments([1, 2], [0], 3), ValueError, "one for each of 2 values, got 1"),
    "negative_bags": (lambda: Ragged.from_segments([1], [0], -1), ValueError, r"bags=...\)` must not be negative"),
    "part_of_a_bag": (lambda: Ragged.from_segments([1], [0], 1.5), TypeError, "must be a whole number, got 1.5"),
    "no_padding": (lambda: Ragged.from_padded([[1]]), TypeError, "must have padding_idx or mask, got None and None"),
    "both": (lambda: Ragged.from_padded([[1]], 0, [[True]]), TypeError, "must have padding_idx or mask, got 0 and"),
    "float_matrix": (lambda: Ragged.from_padded([[1.5]], 0), TypeError, r"from_padded\(ids=...\)` must be of an"),
    "vector": (lambda: Ragged.from_padded([1, 2], 0), ValueError, r"must have 2 axes, got shape \(2,\)"),
    "float_padding": (lambda: Ragged.from_padded([[1]], 0.5), TypeError, "must be a whole number, got 0.5"),
    "mask": (
        lambda: Ragged.from_padded([[1, 2]], mask=[[True]]), ValueError,
        r"mask=...\)` must be of the shape of the ids, \(1, 2\), got \(1, 1\)\. Pass one truth value",
    ),
    "capacity": (lambda: Ragged([1], [0, 1]).pad_to(1.5), TypeError, r"pad_to\(capacity=...\)` must be a whole number"),
    "negative_capacity": (lambda: Ragged([], [0]).pad_to(-1), ValueError, "must not be negative, got -1"),
}  # fmt: skip


@pytest.mark.parametrize(("construct", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(construct, error, match):
    with pytest.raises(error, match=match):
        construct()


def test_is_a_pytree():
    bags = Ragged(jnp.array([4, 7, 7, 2, 9]), [0, 3, 3, 4])
    leaves = jax.tree_util.tree_leaves_with_path(bags)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".values", ".offsets"]
    assert_are_bags(jax.tree.map(lambda x: x, bags))
    assert_are_bags(jax.jit(lambda bags: bags)(bags))
    assert repr(jax.tree.map(lambda _: None, bags)) == "Ragged(values=None, offsets=None)"
    assert repr(jax.eval_shape(lambda: bags)) == "Ragged(3 bags, capacity=5)"
    assert repr(jax.tree.map(lambda _: 0, bags)) == "Ragged(values=0, offsets=0)"
    stacked = jax.tree.map(lambda *x: jnp.stack(x), bags, bags)
    assert repr(stacked).startswith("Ragged(values=Array([[4, 7")


def test_goes_through_vmap_and_scan():
    batches = [[[4, 7, 7], [], [2]], [[], [1], [3, 3]], [[], [], []]]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(Ragged.from_lists(lists_).pad_to(5) for lists_ in batches))
    expected = [[len(ids) for ids in lists_] for lists_ in batches]
    lengths, segments = jax.jit(jax.vmap(lambda bags: (bags.lengths, bags.segments)))(stacked)
    assert lengths.tolist() == expected
    assert segments.tolist() == [[0, 0, 0, 2, 3], [1, 2, 2, 3, 3], [3] * 5]
    last, (lengths, again) = jax.jit(
        lambda first, stacked: jax.lax.scan(lambda _, bags: (bags, (bags.lengths, bags)), first, stacked)
    )(Ragged([0] * 5, [0] * 4), stacked)
    assert_are_bags(last, batches[-1])
    assert lengths.tolist() == expected
    np.testing.assert_array_equal(again.values, stacked.values)


def test_ragged_of_int64_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bags = Ragged(np.arange(4), np.array([0, 2, 4]))
        jax.jit(lambda bags: bags.segments)(bags)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 100), min_size=12, max_size=12),
    st.lists(st.integers(0, 12), min_size=4, max_size=4).map(sorted),
)
def test_constructors_agree(values, ends):
    offsets = np.array([0, *ends])
    bags = Ragged(values, offsets)
    expected = [values[start:end] for start, end in itertools.pairwise(offsets)]
    lengths = np.diff(offsets)
    mask = np.arange(12) < lengths[:, None]
    matrix = np.where(mask, np.asarray(values)[np.minimum(offsets[:-1, None] + np.arange(12), 11)], -1)
    for same in [
        bags,
        Ragged.from_lists(expected),
        Ragged.from_lengths(values, lengths),
        Ragged.from_lengths(values, bags.lengths),
        Ragged.from_offsets(values, offsets, include_last_offset=True),
        Ragged.from_offsets(values[: ends[-1]], offsets[:-1]),
        Ragged.from_segments(values, bags.segments, 4),
        Ragged.from_padded(matrix, padding_idx=-1),
        Ragged.from_padded(jnp.asarray(matrix), mask=mask),
    ]:
        assert lists(same) == expected
    assert lists(Ragged.from_padded(matrix[:, ::-1], -1)) == [ids[::-1] for ids in expected]
