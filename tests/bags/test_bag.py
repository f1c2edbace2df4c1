"""embedding_bag against the reference: every mode, layout, weight and rule; shapes, integers and arguments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bag_cases import MODES, cut, dense, ids_of
from cases import ROWS, WEIGHT
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import usual_and_rest

import embax
from embax import Ragged, Table, embedding_bag

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32
exhaustive = pytest.mark.exhaustive

# Modes, and whether there are weights; in quarters.
KINDS = [
    [("sum", False), ("sqrtn", True)],
    [("mean", True), ("max", False)],
    [("mean", False), ("sum", True)],
    [("sqrtn", False)],
]

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


def of_layout(layout):
    """Lists, and what to call with for them: bags, weights, the shape of the output."""
    if layout == "ragged":
        bags = Ragged.from_lists(LISTS).pad_to(60)
        return LISTS, bags, np.concatenate([*cut(FACTORS, LISTS), FACTORS])[:60], (len(LISTS),)
    shape = (6,) if layout == "2d" else (3, 2)
    return FULL, np.reshape(FULL, (*shape, 4)), np.reshape(FACTORS[:24], (*shape, 4)), shape


def kinds_of_cases():
    """A quarter of the kinds with each layout and padding that is not a part of another; the others are exhaustive."""
    for (i, layout), (j, name) in itertools.product(enumerate(["2d", "ragged"]), enumerate(PADDING)):
        main, padding = (2 * i + j // 2) % 4, PADDING[name]
        marks = [exhaustive] if name in ("first", "last") else []
        yield pytest.param(layout, padding, KINDS[main], id=f"{layout}-{name}", marks=marks)
        others = [kind for quarter in KINDS if quarter is not KINDS[main] for kind in quarter]
        yield pytest.param(layout, padding, others, id=f"{layout}-{name}-others", marks=exhaustive)
    yield pytest.param("3d", PADDING["first"], KINDS[1], id="3d-first")
    yield pytest.param("3d", PADDING["first"], KINDS[0] + KINDS[2], id="3d-first-others", marks=exhaustive)


@pytest.mark.parametrize(("layout", "rules", "kinds"), [*kinds_of_cases()])
def test_bags_and_gradients_equal_the_reference(layout, rules, kinds):
    lists, bags, weights, shape = of_layout(layout)
    cotangents = np.random.default_rng(1).normal(size=(*shape, 3)).astype(np.float32)

    @jax.jit
    def run(table, bags, weights, cotangents):
        def pulled(mode, weighted):
            pool = functools.partial(embedding_bag, bags=bags, mode=mode)
            args = table, weights if weighted else None
            pooled, pull = jax.vjp(lambda table, weights: pool(table, weights=weights), *args)
            return pooled, *pull(cotangents)

        return {kind: pulled(*kind) for kind in kinds}

    for (mode, weighted), (out, of_table, of_weights) in run(Table(WEIGHT, **rules), bags, weights, cotangents).items():
        case = f"{mode}, {'weighted' if weighted else 'plain'}"
        factors = cut(FACTORS, lists) if weighted else None
        expected = reference.embedding_bag(WEIGHT, lists, factors, mode, **rules).reshape(*shape, 3)
        np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=case)
        expected, expected_of_weights = reference.embedding_bag_gradient(
            WEIGHT, lists, cotangents.reshape(-1, 3), factors, mode, **rules
        )
        np.testing.assert_allclose(of_table.weight, expected, **TOLERANCE, err_msg=case)
        if weighted:
            flat = np.concatenate(expected_of_weights)
            np.testing.assert_allclose(of_weights.reshape(-1)[: flat.size], flat, **TOLERANCE, err_msg=case)
            assert not np.any(of_weights.reshape(-1)[flat.size :]), case


@pytest.mark.parametrize(
    ("rules", "modes"),
    [
        pytest.param({"max_norm": 1.5, "norm_type": 1.0}, ("sum", "max"), id="norm_1"),
        pytest.param({"scale_grad_by_freq": True}, ("max", "sqrtn"), id="frequency", marks=exhaustive),
        pytest.param({"scale_grad_by_freq": True, "padding_idx": (1, 2)}, ("mean", "max"), id="frequency_padding"),
        pytest.param({"scale_grad_by_freq": True, "out_of_range": "clip"}, ("sum", "max"), id="frequency_clip"),
        pytest.param({"freeze": True}, ("max", "sqrtn"), id="freeze"),
    ],
)
def test_rules_of_the_table(rules, modes):
    # What is behind the last bag counts for no row, wherever a policy would take it.
    bags = Ragged.from_lists([*LISTS, [ROWS - 1] * 3 + [99] * 3 + [-99] * 4])
    bags = Ragged(bags.values, bags.offsets[:-1])
    cotangents = np.random.default_rng(1).normal(size=(len(LISTS), 3)).astype(np.float32)

    def loss(table, mode):
        out = embedding_bag(table, bags, mode=mode)
        return (out * cotangents).sum(), out

    @jax.jit
    def run(table):
        # The first mode by rows, the second one as a whole.
        return [grad(loss, has_aux=True)(table, mode) for grad, mode in zip((embax.grad, jax.grad), modes, strict=True)]

    (rows, _), (whole, _) = results = run(Table(WEIGHT, **rules))
    for mode, gradient, (_, out) in zip(modes, (dense(rows), whole.weight), results, strict=True):
        expected = reference.embedding_bag(WEIGHT, LISTS, None, mode, **rules)
        np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=mode)
        expected, _ = reference.embedding_bag_gradient(WEIGHT, LISTS, cotangents, None, mode, **rules)
        np.testing.assert_allclose(gradient, expected, **TOLERANCE, err_msg=mode)
    named = {id_ % ROWS for ids in LISTS for id_ in ids}
    assert {*ids_of(rows).tolist()} <= named | {ROWS}


INTEGERS = [("int8", "2d", "sum"), ("int64", "ragged", "max"), ("uint8", "ragged", "sum"), ("uint64", "2d", "max")]
INTEGERS_TOO = [(dtype, "ragged" if layout == "2d" else "2d", mode) for dtype, layout, mode in INTEGERS]


@pytest.mark.parametrize("cases", [INTEGERS, pytest.param(INTEGERS_TOO, marks=exhaustive)], ids=["", "too"])
def test_small_and_large_integers(cases):
    weight = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    lists, table = [[1, 2, 100], [4, 4, 0]], Table(weight, padding_idx=0)

    def pooled_of(dtype, layout, mode):
        ids = np.array(lists, dtype)
        return embedding_bag(
            table, ids if layout == "2d" else Ragged(ids.ravel(), np.array([0, 3, 6], dtype)), mode=mode
        )

    # The arrays stay those of NumPy, as jit makes no arguments of them.
    out = jax.jit(lambda: {case: pooled_of(*case) for case in cases})()
    for case, pooled in out.items():
        expected = reference.embedding_bag(weight, lists, None, case[2], padding_idx=0)
        np.testing.assert_allclose(pooled, expected, **TOLERANCE, err_msg=str(case))


@pytest.mark.parametrize(
    ("layout", "mode"),
    usual_and_rest([("ragged", "sum"), ("2d", "max")], itertools.product(["2d", "ragged"], ["sum", "max"])),
)
def test_bags_of_rows_with_zero_one_or_two_axes(layout, mode):
    weight = np.random.default_rng(0).normal(size=(ROWS, 2, 3)).astype(np.float32)
    expected = reference.embedding_bag(weight, FULL, None, mode, padding_idx=2)

    @jax.jit
    def run(bags):
        tables = Table(weight, padding_idx=2), Table(weight[:, 0, 0], padding_idx=2), Table(weight[:, :, :0])
        return [embedding_bag(table, bags, mode=mode) for table in tables]

    whole, scalars, nothing = run(np.array(FULL) if layout == "2d" else Ragged.from_lists(FULL))
    np.testing.assert_allclose(whole, expected, **TOLERANCE)
    np.testing.assert_allclose(scalars, expected[:, 0, 0], **TOLERANCE)
    assert nothing.shape == (6, 2, 0)


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


@pytest.mark.parametrize("rows", [ROWS, 0])
def test_nothing_is_zero(rows):
    # The largest of each, or one of the other modes: the one of a table with rows, the other of one without.
    cases = [(name, MODES[i % 3] if i % 2 == bool(rows) else "max") for i, name in enumerate(EMPTY)]

    @jax.jit
    def run(table):
        def value_and_gradient(name, mode):
            bags, _ = EMPTY[name]
            ids = bags.values if isinstance(bags, Ragged) else np.asarray(bags)
            weights = np.ones(ids.shape, np.float32) if mode in ("mean", "sqrtn") else None
            out, pull = jax.vjp(lambda table: embedding_bag(table, bags, weights, mode), table)
            return out, pull(jnp.ones_like(out))[0]

        return {case: value_and_gradient(*case) for case in cases}

    for case, (out, gradient) in run(Table(WEIGHT[:rows], scale_grad_by_freq=True)).items():
        assert out.shape == EMPTY[case[0]][1], case
        assert not np.any(out), case
        assert gradient.weight.shape == (rows, 3), case
        assert not np.any(gradient.weight), case


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


def test_embedding_bag_averages_by_default():
    calls = [([[0, 1], [2, 2]],), (Ragged.from_lists([[0, 1], [], [2]]),), ([[0, 1]], [[3.0, 1.0]])]
    pooled = jax.jit(lambda table: [embedding_bag(table, *call) for call in calls])(
        Table(np.array([[1.0], [3.0], [8.0]], np.float32))
    )
    assert [out.tolist() for out in pooled] == [[[2], [8]], [[2], [0], [8]], [[1.5]]]


_IDS = st.lists(st.integers(-ROWS, ROWS - 1), min_size=24, max_size=24)
_FACTORS = st.lists(st.floats(0.25, 4, width=32), min_size=24, max_size=24)
_OFFSETS = st.lists(st.integers(0, 24), min_size=5, max_size=5).map(lambda ends: [0, *sorted(ends)])


@jax.jit
def _pool(bags, weights):
    table = Table(WEIGHT, padding_idx=3, max_norm=2.0)
    return {mode: embedding_bag(table, bags, None if mode == "max" else weights, mode) for mode in ("sqrtn", "max")}


@settings(max_examples=20, deadline=None)
@given(_IDS, _FACTORS, _OFFSETS)
def test_any_lists(ids, factors, offsets):
    factors = np.array(factors, np.float32)
    pairs = list(itertools.pairwise(offsets))
    lists, weights = [ids[i:j] for i, j in pairs], [factors[i:j] for i, j in pairs]
    for mode, out in _pool(Ragged(ids, offsets), factors).items():
        of_lists = None if mode == "max" else weights
        expected = reference.embedding_bag(WEIGHT, lists, of_lists, mode, padding_idx=3, max_norm=2.0)
        np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=mode)
