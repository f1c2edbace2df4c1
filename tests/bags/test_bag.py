"""embedding_bag against the reference: every mode, layout, weight and rule; empty bags, dtypes, what must not leak."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ROWS, WEIGHT
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

import embax
from embax import Ragged, Table, embedding_bag

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32
# Quickly made machine code need not be fast.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)

MODES = ["sum", "mean", "sqrtn", "max"]
with_modes = pytest.mark.parametrize("mode", MODES)
# Without weights, and with them.
with_weights = pytest.mark.parametrize(
    ("mode", "weighted"), [*itertools.product(MODES[:3], [False, True]), ("max", False)]
)

# Of one length, so that they fit in a matrix: duplicates, bags of one row, padding rows first, last and in the middle.
FULL = [[2, 0, 2, 6], [1, 2, 5, 2], [6, 6, 6, 6], [0, 0, 0, 0], [-1, 4, 0, -5], [3, 3, 1, 0]]
# The same with empty bags: at the start, two in a row, and one whose offset is the very end.
LISTS = [[], *FULL[:2], [], [], [5], FULL[2] + FULL[4] * 5, FULL[3], []]

# Numbers of both signs, with which no sum of the bags below is near zero.
FACTORS = np.random.default_rng(2).uniform(0.5, 2, size=64).astype(np.float32) * np.where(np.arange(64) % 5, 1, -0.25)

PADDING = {
    "none": {},
    "first": {"padding_idx": 0},
    "last": {"padding_idx": -1},
    "several": {"padding_idx": (0, 2, -1)},
    "with_norm": {"padding_idx": 2, "max_norm": 1.5},
}


def factors_of(lists):
    starts = [0, *itertools.accumulate(map(len, lists))]
    return [FACTORS[start:end] for start, end in itertools.pairwise(starts)]


def of_layout(layout):
    """Lists, and what to call with for them: bags, weights, the shape of the output."""
    if layout == "ragged":
        bags = Ragged.from_lists(LISTS).pad_to(60)
        return LISTS, bags, np.concatenate([*factors_of(LISTS), FACTORS])[:60], (len(LISTS),)
    shape = (6,) if layout == "2d" else (3, 2)
    return FULL, np.reshape(FULL, (*shape, 4)), np.reshape(factors_of(FULL), (*shape, 4)), shape


@pytest.mark.parametrize(
    ("layout", "rules"),
    [*itertools.product(["2d", "ragged"], PADDING.values()), ("3d", PADDING["first"])],
    ids=[*map("-".join, itertools.product(["2d", "ragged"], PADDING)), "3d-first"],
)
@with_weights
def test_bags_and_gradients_are_those_of_the_reference(mode, weighted, layout, rules):
    lists, bags, weights, shape = of_layout(layout)
    cotangents = np.random.default_rng(1).normal(size=(*shape, 3)).astype(np.float32)

    @quick_jit
    def both(table, bags, weights, cotangents):
        run = functools.partial(embedding_bag, bags=bags, mode=mode)
        pooled, pull = jax.vjp(lambda table, weights: run(table, weights=weights), table, weights)
        return pooled, *pull(cotangents)

    out, of_table, of_weights = both(Table(WEIGHT, **rules), bags, weights if weighted else None, cotangents)
    args = WEIGHT, lists, cotangents.reshape(-1, 3)
    factors = factors_of(lists) if weighted else None
    expected = reference.embedding_bag(WEIGHT, lists, factors, mode, **rules).reshape(*shape, 3)
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    expected, expected_of_weights = reference.embedding_bag_gradient(*args, factors, mode, **rules)
    np.testing.assert_allclose(of_table.weight, expected, **TOLERANCE)
    if weighted:
        flat = np.concatenate(expected_of_weights)
        np.testing.assert_allclose(of_weights.reshape(-1)[: flat.size], flat, **TOLERANCE)
        assert not of_weights.reshape(-1)[flat.size :].any()


RULES = {
    "norm": {"max_norm": 1.5},
    "norm_1": {"max_norm": 1.5, "norm_type": 1.0},
    "frequency": {"scale_grad_by_freq": True},
    "frequency_padding": {"scale_grad_by_freq": True, "padding_idx": (1, 2)},
    "frequency_clip": {"scale_grad_by_freq": True, "out_of_range": "clip"},
    "freeze": {"freeze": True},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@with_modes
def test_rules_of_the_table(mode, rules):
    # What is behind the last bag counts for no row, wherever a policy would take it.
    bags = Ragged.from_lists([*LISTS, [ROWS - 1] * 3 + [99] * 3 + [-99] * 4])
    bags = Ragged(bags.values, bags.offsets[:-1])
    cotangents = np.random.default_rng(1).normal(size=(len(LISTS), 3)).astype(np.float32)

    def loss(table):
        return (embedding_bag(table, bags, mode=mode) * cotangents).sum()

    table = Table(WEIGHT, **rules)
    out = embedding_bag(table, bags, mode=mode)
    np.testing.assert_allclose(out, reference.embedding_bag(WEIGHT, LISTS, None, mode, **rules), **TOLERANCE)
    expected, _ = reference.embedding_bag_gradient(WEIGHT, LISTS, cotangents, None, mode, **rules)
    gradient, rows = quick_jit(lambda table: (jax.grad(loss)(table), embax.grad(loss)(table)))(table)
    np.testing.assert_allclose(gradient.weight, expected, **TOLERANCE)
    np.testing.assert_allclose(rows.to_dense(), expected, **TOLERANCE)
    named = {id_ % ROWS for ids in LISTS for id_ in ids}
    assert set(np.asarray(rows.ids).tolist()) <= named | {ROWS}


@pytest.mark.parametrize("out_of_range", ["error", "nan", "zero", "clip"])
@with_modes
def test_traced_ids_without_a_row(mode, out_of_range):
    lists = [[1, 7], [2, 3], [-8, -8, 2], [99]]
    rules = {"out_of_range": out_of_range, "padding_idx": 1}
    bags = Ragged.from_lists(lists).pad_to(20)

    def run(table, bags):
        out = embedding_bag(table, bags, mode=mode)
        return jnp.nansum(out), out

    (_, out), gradient = quick_jit(jax.value_and_grad(run, has_aux=True))(Table(WEIGHT, **rules), bags)
    expected = reference.embedding_bag(WEIGHT, lists, None, mode, **rules)
    np.testing.assert_allclose(out, expected, **TOLERANCE)
    reads_nan = out_of_range in ("error", "nan")
    assert np.isnan(out).all(axis=1).tolist() == [reads_nan, False, reads_nan, reads_nan]
    cotangent = np.where(np.isnan(expected), 0, 1)
    expected, _ = reference.embedding_bag_gradient(WEIGHT, lists, cotangent, None, mode, **rules)
    np.testing.assert_allclose(gradient.weight, expected, **TOLERANCE)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_concrete_ids_without_a_row_are_an_error_where_they_are_in_a_bag(mode):
    table = Table(WEIGHT)
    with pytest.raises(IndexError, match=r"embedding_bag\(bags=...\)` must be in .* got 7 at position \(2,\)"):
        embedding_bag(table, Ragged.from_lists([[1, 2], [7]]), mode=mode)
    with pytest.raises(IndexError, match=r"got -8 at position \(0, 1\)"):
        embedding_bag(table, [[1, -8]], mode=mode)
    expected = reference.embedding_bag(WEIGHT, [[1, 2]], None, mode)
    values, offsets = np.array([1, 2, 7, -8]), np.array([0, 2])

    def pool(values, offsets):
        return embedding_bag(table, Ragged(values, offsets), mode=mode)

    for ids in values, jnp.array(values):
        # Inside of jit, ids or offsets or both may be concrete.
        for out in [
            pool(ids, offsets),
            quick_jit(lambda ids=ids: pool(ids, offsets))(),
            quick_jit(lambda offsets, ids=ids: pool(ids, offsets))(offsets),
            quick_jit(lambda ids: pool(ids, offsets))(ids),
        ]:
            np.testing.assert_allclose(out, expected, **TOLERANCE)


@with_modes
def test_checkify_names_an_id_without_a_row(mode):
    run = checkify.checkify(jax.jit(lambda ids: embedding_bag(Table(WEIGHT), ids, mode=mode)), checkify.index_checks)
    assert run(jnp.array([[1, 6, -7]]))[0].get() is None
    assert "index 77 is out of bounds" in run(jnp.array([[1, 77, 3]]))[0].get()


# Bags of some ids, of which the argument is one: padding first and last; room behind the last bag, where anything may
# stand; longer than the pieces that they are cut into.
CHECKED = {
    "matrix": lambda id_: jnp.array([[2, 1, 0], [2, 2, -1], [id_, 4, 2]]),
    "room": lambda id_: Ragged(jnp.array([1, 2, 2, id_, 3, 99, -99, 2]), jnp.array([0, 2, 2, 5])),
    "long": lambda id_: Ragged(jnp.array([4] * 20 + [id_] + [2] * 20 + [7] * 90), jnp.array([0, 0, 41])),
}
CHECKED_RULES = {"none": {}, "all": {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True}}


def checked_calls(mode, bags):
    """What is differentiated in each way, of a table and bags."""
    ids = bags.values if isinstance(bags, Ragged) else bags
    weights = jnp.ones(ids.shape) if mode == "sqrtn" else None

    def loss(table, bags, weights):
        return jnp.sin(embedding_bag(table, bags, weights, mode)).sum()

    yield lambda table, bags: embedding_bag(table, bags, weights, mode)
    yield lambda table, bags: jax.grad(loss)(table, bags, weights).weight
    yield lambda table, bags: embax.grad(loss)(table, bags, weights).values
    yield lambda table, bags: jax.jvp(lambda table: loss(table, bags, weights), (table,), (table,))
    if weights is not None:
        yield lambda table, bags: jax.grad(loss, 2)(table, bags, weights)


@pytest.mark.parametrize("rules", CHECKED_RULES.values(), ids=CHECKED_RULES)
@pytest.mark.parametrize("layout", CHECKED)
@with_modes
def test_checkify_finds_bad_ids_and_nothing_else(mode, layout, rules):
    table = Table(np.abs(WEIGHT) + 0.1, **rules)
    for call in checked_calls(mode, CHECKED[layout](5)):
        run = quick_jit(checkify.checkify(call, errors=checkify.all_checks))
        assert run(table, CHECKED[layout](5))[0].get() is None
        for bad in 7, -8:
            assert f"index {bad} is out of bounds" in run(table, CHECKED[layout](bad))[0].get()


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=["no_bags", "no_ids"])
@with_modes
def test_checkify_finds_nothing_where_nothing_is(mode, offsets):
    bags = Ragged(jnp.array([9, 2]), jnp.array(offsets))
    for call in checked_calls(mode, bags):
        run = quick_jit(checkify.checkify(call, errors=checkify.index_checks))
        assert run(Table(WEIGHT, padding_idx=2), bags)[0].get() is None


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64"])
def test_small_and_large_integers(mode, dtype):
    weight = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    lists = [[1, 2, 100], [4, 4, 0]]
    expected = reference.embedding_bag(weight, lists, None, mode, padding_idx=0)
    for bags in np.array(lists, dtype), Ragged(np.ravel(lists).astype(dtype), np.array([0, 3, 6], dtype)):
        out = embedding_bag(Table(weight, padding_idx=0), bags, mode=mode)
        np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_rows_of_several_axes_and_of_none(mode):
    weight = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)
    expected = reference.embedding_bag(weight, FULL, None, mode, padding_idx=2)
    for bags in FULL, Ragged.from_lists(FULL):
        np.testing.assert_allclose(embedding_bag(Table(weight, padding_idx=2), bags, mode=mode), expected, **TOLERANCE)
        scalars = embedding_bag(Table(weight[:, 0, 0], padding_idx=2), bags, mode=mode)
        np.testing.assert_allclose(scalars, expected[:, 0, 0], **TOLERANCE)
        assert embedding_bag(Table(weight[:, :, :0]), bags, mode=mode).shape == (6, 2, 0)


EMPTY = {
    "no_bags": (np.zeros((0, 3), int), (0, 3)),
    "no_ids": (np.zeros((2, 0), int), (2, 3)),
    "neither": (np.zeros((3, 0, 0), int), (3, 0, 3)),
    "one_bag_of_no_id": ([], (3,)),
    "ragged_no_bags": (Ragged([], [0]), (0, 3)),
    "ragged_no_ids": (Ragged([], [0, 0, 0]), (2, 3)),
    "ragged_unused": (Ragged([9, 9], [0, 0, 0]), (2, 3)),
    "ragged_no_bags_unused": (Ragged([9, 9], [0]), (0, 3)),
}


@pytest.mark.parametrize(("bags", "shape"), EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("rows", [ROWS, 0])
@with_modes
def test_nothing_is_zero(mode, rows, bags, shape):
    table = Table(WEIGHT[:rows], scale_grad_by_freq=True)
    ids = bags.values if isinstance(bags, Ragged) else np.asarray(bags)
    weights = np.ones(ids.shape, np.float32) if mode in ("mean", "sqrtn") else None
    out, gradient = jax.value_and_grad(lambda table: embedding_bag(table, bags, weights, mode).sum())(table)
    assert embedding_bag(table, bags, weights, mode).shape == shape
    assert out == 0
    assert gradient.weight.shape == (rows, 3)
    assert not gradient.weight.any()


@with_modes
def test_clip_in_a_table_without_rows(mode):
    table = Table(jnp.zeros((0, 3)), out_of_range="clip")
    pool = functools.partial(embedding_bag, table, mode=mode)
    for bags in Ragged([9, 9], [0, 0, 0]), Ragged([], [0, 0, 0]), np.zeros((2, 0), int):
        for out in pool(bags), quick_jit(pool)(bags), quick_jit(lambda bags=bags: pool(bags))():
            np.testing.assert_array_equal(out, np.zeros((2, 3)))
    one = Ragged([9, 9], [0, 1, 1])
    for call in lambda: pool(one), quick_jit(lambda: pool(one)), lambda: pool([[9]]), lambda: quick_jit(pool)([[9]]):
        with pytest.raises(ValueError, match=r"must be empty for a table without rows, got 1 ids and out_of_range='cl"):
            call()
    # How many ids there are is unknown while the offsets are traced, so that they read no row, as under "error".
    np.testing.assert_array_equal(quick_jit(pool)(one), [[np.nan] * 3, [0] * 3])
    gradient = quick_jit(embax.grad(lambda table, bags: embedding_bag(table, bags, mode=mode).sum()))(table, one)
    assert gradient.ids.tolist() == [0, 0]


@with_modes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_sums_in_float32(mode, dtype):
    table, ids = Table(jnp.ones((3, 2), dtype)), np.ones((1, 4096), int)
    for bags in ids, Ragged(ids[0], [0, 4096]):
        pool = functools.partial(embedding_bag, bags=bags, mode=mode)
        out, pull = quick_jit(functools.partial(jax.vjp, pool))(table)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, np.full((1, 2), {"sum": 4096, "sqrtn": 64}.get(mode, 1), jnp.dtype(dtype)))
        gradient = pull(jnp.ones((1, 2), dtype))[0].weight
        assert gradient.dtype == dtype
        # Of the largest, one of the equals has all the gradient.
        expected = {"sum": 4096, "sqrtn": 64}.get(mode, 1)
        np.testing.assert_array_equal(gradient[1], np.full(2, expected, jnp.dtype(dtype)))
        assert not gradient[::2].any()


@with_weights
@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("layout", ["2d", "ragged"])
def test_padding_and_unused_places_never_leak(mode, weighted, layout, junk):
    weight = WEIGHT.copy()
    weight[0] = junk
    lists = [[0, 2, 5, 0], [0, 0, 0, 0], [3, 0, 0, 0]]
    kept = [[id_ for id_ in ids if id_] for ids in lists]
    bags = np.array(lists) if layout == "2d" else Ragged.from_lists(lists).pad_to(16)
    ids = bags if layout == "2d" else bags.values
    weights = np.where((ids == 0) | (np.arange(ids.size).reshape(ids.shape) >= 12), junk, 1.5).astype(np.float32)
    cotangents = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)

    def run(table, weights):
        return embedding_bag(table, bags, weights, mode)

    out, pull = quick_jit(lambda *args: jax.vjp(run, *args))(
        Table(weight, padding_idx=0), weights if weighted else None
    )
    factors = [np.full(len(ids), 1.5) for ids in kept] if weighted else None
    np.testing.assert_allclose(out, reference.embedding_bag(WEIGHT, kept, factors, mode), **TOLERANCE)
    gradient, of_weights = pull(cotangents)
    expected, expected_of_weights = reference.embedding_bag_gradient(WEIGHT, kept, cotangents, factors, mode)
    np.testing.assert_allclose(gradient.weight, expected, **TOLERANCE)
    if weighted:
        np.testing.assert_allclose(of_weights[ids != 0], np.concatenate(expected_of_weights), **TOLERANCE)
        assert not of_weights[ids == 0].any()
    # Nor does a cotangent of a bag of nothing else.
    cotangents[1] = junk
    gradient, of_weights = pull(cotangents)
    assert np.isfinite(gradient.weight).all()
    assert not weighted or np.isfinite(of_weights).all()


_INF, _NAN = np.inf, np.nan
LARGEST = {  # rows, the ids of a bag, what it is pooled to, and which row gets the gradient of each column
    "ties": ([[1, 2], [1, 2], [0, 2]], [2, 1, 0, 0], [1, 2], [1, 2]),
    "nan": ([[1, 2], [_NAN, 3], [5, 4]], [0, 1, 2, 1], [_NAN, 4], [1, 2]),
    "infinity": ([[9, 9], [_INF, 1], [2, _INF]], [0, 2, 1, 2], [_INF, _INF], [1, 2]),
    "minus_infinity": ([[9, 9], [-_INF, -1], [-_INF, -2]], [0, 1, 2, 0], [-_INF, -1], [1, 1]),
}


@pytest.mark.parametrize(("rows", "ids", "expected", "row_of_column"), LARGEST.values(), ids=LARGEST)
def test_largest_of_equals_nans_and_infinities(rows, ids, expected, row_of_column):
    table = Table(np.array(rows, np.float32), padding_idx=0 if rows[0][0] == 9 else None)
    for bags in [ids], Ragged.from_lists([ids]), Ragged.from_lists([[], ids, []]).pad_to(9):
        pool = functools.partial(embedding_bag, bags=bags, mode="max")
        out, pull = quick_jit(functools.partial(jax.vjp, pool))(table)
        np.testing.assert_array_equal(out[len(out) // 2], expected)
        gradient = np.zeros((3, 2))
        gradient[row_of_column, [0, 1]] = 1
        np.testing.assert_array_equal(pull(jnp.ones(out.shape))[0].weight, gradient)


def test_a_row_that_is_not_a_number_is_the_largest_wherever_it_stands():
    weight = np.random.default_rng(0).normal(size=(22, 8)).astype(np.float32)
    weight[21, :7] = np.nan
    ids = np.random.default_rng(1).integers(0, 21, (16, 40))
    ids[np.arange(16), np.arange(16) * 2] = 21
    for bags in ids, Ragged.from_lists(ids.tolist()):
        out, pull = jax.vjp(jax.jit(functools.partial(embedding_bag, bags=bags, mode="max")), Table(weight))
        assert np.isnan(out[:, :7]).all()
        np.testing.assert_array_equal(out[:, 7], weight[ids, 7].max(1))
        np.testing.assert_array_equal(pull(jnp.ones(out.shape))[0].weight[21, :7], np.full(7, 16))


@pytest.mark.parametrize(
    ("length", "mode", "weighted"),
    [
        *itertools.product([15, 16, 17, 63, 64, 65, 127, 1023, 1024, 1025, 4095, 4096, 4097], ["sum"], [True]),
        *itertools.product([16, 17, 1025], ["max"], [False]),
        *itertools.product([65, 4097], ["mean", "sqrtn"], [True]),
    ],
)
def test_lengths_around_the_sizes_that_bags_are_cut_into(length, mode, weighted):
    random = np.random.default_rng(length)
    ids = random.integers(0, ROWS, size=(2, length))
    lists = [ids[0], [], ids[1][:5], ids[1]]
    weights = [random.uniform(0.5, 2, size=len(ids)).astype(np.float32) for ids in lists] if weighted else None
    flat = np.concatenate(weights) if weighted else None
    expected = reference.embedding_bag(np.abs(WEIGHT), lists, weights, mode, padding_idx=3)
    table = Table(np.abs(WEIGHT), padding_idx=3)
    pool = quick_jit(functools.partial(embedding_bag, mode=mode))
    np.testing.assert_allclose(pool(table, Ragged.from_lists(lists), flat), expected, **TOLERANCE)
    weights = np.stack([weights[0], weights[3]]) if weighted else None
    np.testing.assert_allclose(pool(table, ids, weights), expected[[0, 3]], **TOLERANCE)


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("mode", MODES[:3])
def test_a_million_ids_in_one_bag(mode, positive):
    random = np.random.default_rng(0)
    weight = (random.uniform(size=(1000, 2)) if positive else random.normal(size=(1000, 2)) + 0.1).astype(np.float32)
    ids = random.integers(0, 1000, size=(1, 1_000_000))
    total = np.bincount(ids[0], minlength=1000) @ weight.astype(np.float64)
    expected = total / {"sum": 1, "mean": 1e6, "sqrtn": 1e3}[mode]
    for bags in Ragged(ids[0], [0, 1_000_000]), ids:
        out = jax.jit(embedding_bag, static_argnames="mode")(Table(weight), bags, mode=mode)
        np.testing.assert_allclose(out[0], expected, rtol=1e-5)


def test_a_mean_divides_by_a_negative_sum_of_weights_too():
    lists, weights = [[1, 2], [3]], [np.array([1.0, -3.0], np.float32), np.array([-0.5], np.float32)]
    expected = reference.embedding_bag(WEIGHT, lists, weights, "mean")
    out = embedding_bag(Table(WEIGHT), Ragged.from_lists(lists), np.concatenate(weights), "mean")
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("mode", "weights", "expected"),
    [
        ("mean", [1.0, -1.0], [np.inf, np.nan, -np.inf]),
        ("mean", [0.0, 0.0], [np.nan] * 3),
        ("sqrtn", [0.0, 0.0], [np.nan] * 3),
        ("sqrtn", [1.0, -1.0], [2**0.5, 0, -(2**0.5)]),
    ],
)
def test_weights_that_sum_to_zero_are_divided_by(mode, weights, expected):
    table, weights = Table(np.array([[3, 1, 0], [1, 1, 2]], np.float32)), np.array(weights, np.float32)
    for bags, of_ids in ([[0, 1]], weights[None]), (Ragged.from_lists([[0, 1]]), weights):
        np.testing.assert_allclose(embedding_bag(table, bags, of_ids, mode)[0], expected, **TOLERANCE)


BAD = {
    "mode": ({"mode": "min"}, ValueError, r"mode=...\)` must be one of 'sum', 'mean', 'sqrtn', 'max', got 'min'"),
    "float_ids": ({"bags": [[1.0]]}, TypeError, r"bags=...\)` must be of an integer dtype, got float64"),
    "scalar": ({"bags": 3}, ValueError, r"must have an axis of ids, got a scalar\. Pass \(\*bags, length\)"),
    "integers": ({"table": Table(np.ones((3, 2), int))}, TypeError, r"table=...\)` must be of a float dtype"),
    "weights_for_max": ({"weights": [[1.0]], "mode": "max"}, TypeError, r"weights=...\)` must be None in mode 'max'"),
    "integer_weights": ({"weights": [[1]]}, TypeError, r"weights=...\)` must be of a float dtype, got int32"),
    "few_weights": ({"weights": [1.0]}, ValueError, r"must be one for each id, \(1, 1\), got shape \(1,\)"),
    "weights_of_ragged": (
        {"bags": Ragged([1, 2, 3], [0, 2]), "weights": [1.0, 1.0]}, ValueError, r"each id, \(3,\), got shape \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        embedding_bag(**{"table": Table(WEIGHT), "bags": [[1]], **arguments})


_IDS = st.lists(st.integers(-ROWS, ROWS - 1), min_size=24, max_size=24)
_FACTORS = st.lists(st.floats(0.25, 4, width=32), min_size=24, max_size=24)
_OFFSETS = st.lists(st.integers(0, 24), min_size=5, max_size=5).map(lambda ends: [0, *sorted(ends)])


@functools.partial(quick_jit, static_argnames="mode")
def _pool(bags, weights, mode):
    return embedding_bag(Table(WEIGHT, padding_idx=3, max_norm=2.0), bags, weights, mode)


@settings(max_examples=60, deadline=None)
@given(_IDS, _FACTORS, _OFFSETS, st.sampled_from(MODES))
def test_any_lists(ids, factors, offsets, mode):
    factors = np.array(factors, np.float32)
    cut = list(itertools.pairwise(offsets))
    lists, weights = [ids[i:j] for i, j in cut], [factors[i:j] for i, j in cut]
    if mode == "max":
        factors = weights = None
    out = _pool(Ragged(ids, offsets), factors, mode)
    expected = reference.embedding_bag(WEIGHT, lists, weights, mode, padding_idx=3, max_norm=2.0)
    np.testing.assert_allclose(out, expected, **TOLERANCE)
