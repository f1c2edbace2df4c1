"""The numbers of embedding_bag: precision, bags of any length, NaN and infinity, weights that add up to zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ROWS, WEIGHT

from embax import Ragged, Table, embedding_bag

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32


LOW = {
    "bfloat16": [("matrix", "sqrtn"), ("ragged", "sum")],
    "float16": [("ragged", "mean"), ("matrix", "max")],
}
LOW_TOO = {
    "bfloat16": [("matrix", "sum"), ("matrix", "max"), ("ragged", "mean"), ("ragged", "max")],
    "float16": [("matrix", "sum"), ("matrix", "sqrtn"), ("ragged", "sum"), ("ragged", "max")],
}


@pytest.mark.parametrize(
    ("dtype", "cases"), [*LOW.items(), *(pytest.param(*too, marks=pytest.mark.exhaustive) for too in LOW_TOO.items())]
)
def test_low_precision_sums_in_float32(dtype, cases):
    layouts = {"matrix": np.ones((1, 4096), int), "ragged": Ragged(np.ones(4096, int), [0, 4096])}

    @jax.jit
    def run(table):
        def pulled(name, mode):
            out, pull = jax.vjp(lambda table: embedding_bag(table, layouts[name], mode=mode), table)
            return out, pull(jnp.ones((1, 2), dtype))[0].weight

        return {case: pulled(*case) for case in cases}

    for case, (out, gradient) in jax.device_get(run(Table(np.ones((3, 2), dtype)))).items():
        # Of the largest, one of the equals has all the gradient.
        expected = {"sum": 4096, "sqrtn": 64}.get(case[1], 1)
        assert out.dtype == dtype, case
        np.testing.assert_array_equal(out, np.full((1, 2), expected, jnp.dtype(dtype)), err_msg=str(case))
        assert gradient.dtype == dtype, case
        np.testing.assert_array_equal(gradient[1], np.full(2, expected, jnp.dtype(dtype)), err_msg=str(case))
        assert not np.any(gradient[::2]), case


# Modes, and whether there are weights.
LEAKS = {
    "2d": [("sum", True), ("mean", False), ("max", False)],
    "ragged": [("mean", True), ("sqrtn", True), ("max", False)],
}
LEAKS_TOO = {"2d": [("mean", True), ("sqrtn", True)], "ragged": [("sum", True), ("mean", False)]}


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [*LEAKS.items(), *(pytest.param(*too, marks=pytest.mark.exhaustive) for too in LEAKS_TOO.items())],
)
def test_padding_and_unused_places_never_leak(layout, kinds):
    lists = [[0, 2, 5, 0], [0, 0, 0, 0], [3, 0, 0, 0]]
    kept = [[id_ for id_ in ids if id_] for ids in lists]
    bags = np.array(lists) if layout == "2d" else Ragged.from_lists(lists).pad_to(16)
    ids = bags if layout == "2d" else np.asarray(bags.values)
    is_counted = (ids != 0) & (np.arange(ids.size).reshape(ids.shape) < 12)

    @jax.jit
    def run(table, weights, cotangents):
        def pulled(mode, weighted):
            args = table, weights if weighted else None
            out, pull = jax.vjp(lambda table, weights: embedding_bag(table, bags, weights, mode), *args)
            return out, jax.vmap(pull)(cotangents)

        return {kind: pulled(*kind) for kind in kinds}

    for junk in np.nan, np.inf:
        weight = WEIGHT.copy()
        weight[0] = junk
        weights = np.where(is_counted, 1.5, junk).astype(np.float32)
        cotangents = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
        with_junk = cotangents.copy()  # for a bag of nothing but padding
        with_junk[1] = junk
        results = run(Table(weight, padding_idx=0), weights, np.stack([cotangents, with_junk]))
        for (mode, weighted), (out, (gradients, of_weights)) in jax.device_get(results).items():
            case = f"{mode}, {'weighted' if weighted else 'plain'}, {junk}"
            factors = [np.full(len(ids), 1.5) for ids in kept] if weighted else None
            expected = reference.embedding_bag(WEIGHT, kept, factors, mode)
            np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=case)
            expected, of_factors = reference.embedding_bag_gradient(WEIGHT, kept, cotangents, factors, mode)
            np.testing.assert_allclose(gradients.weight[0], expected, **TOLERANCE, err_msg=case)
            assert np.isfinite(gradients.weight).all(), case
            if weighted:
                assert np.isfinite(of_weights).all(), case
                of_ids = of_weights[0][ids != 0]
                np.testing.assert_allclose(of_ids, np.concatenate(of_factors), **TOLERANCE, err_msg=case)
                assert not np.any(of_weights[0][ids == 0]), case


_INF, _NAN = np.inf, np.nan
LARGEST = {  # rows, the ids of a bag, what it is pooled to, and which row gets the gradient of each column
    "ties": ([[1, 2], [1, 2], [0, 2]], [2, 1, 0, 0], [1, 2], [1, 2]),
    "nan": ([[1, 2], [_NAN, 3], [5, 4]], [0, 1, 2, 1], [_NAN, 4], [1, 2]),
    "infinity": ([[9, 9], [_INF, 1], [2, _INF]], [0, 2, 1, 2], [_INF, _INF], [1, 2]),
    "minus_infinity": ([[9, 9], [-_INF, -1], [-_INF, -2]], [0, 1, 2, 0], [-_INF, -1], [1, 1]),
}


@jax.jit
def _largest(table, layouts):
    def pulled(bags):
        out, pull = jax.vjp(lambda table: embedding_bag(table, bags, mode="max"), table)
        return out, pull(jnp.ones(out.shape))[0].weight

    return {name: pulled(bags) for name, bags in layouts.items()}


@pytest.mark.parametrize(("rows", "ids", "expected", "row_of_column"), LARGEST.values(), ids=LARGEST)
def test_largest_of_equals_nans_and_infinities(rows, ids, expected, row_of_column):
    table = Table(np.array(rows, np.float32), padding_idx=0 if rows[0][0] == 9 else None)
    among_others = Ragged.from_lists([[], ids, []]).pad_to(9)
    layouts = {"matrix": np.array([ids]), "ragged": Ragged.from_lists([ids]), "among others": among_others}
    for name, (out, gradient) in jax.device_get(_largest(table, layouts)).items():
        np.testing.assert_array_equal(out[len(out) // 2], expected, err_msg=name)
        of_rows = np.zeros((3, 2))
        of_rows[row_of_column, [0, 1]] = 1
        np.testing.assert_array_equal(gradient, of_rows, err_msg=name)


def test_max_of_a_bag_with_nan_at_any_place_is_nan():
    weight = np.random.default_rng(0).normal(size=(22, 8)).astype(np.float32)
    weight[21, :7] = np.nan
    ids = np.random.default_rng(1).integers(0, 21, (16, 40))
    ids[np.arange(16), np.arange(16) * 2] = 21
    layouts = {"matrix": ids, "ragged": Ragged.from_lists(ids.tolist())}
    for name, (out, gradient) in jax.device_get(_largest(Table(weight), layouts)).items():
        assert np.isnan(out[:, :7]).all(), name
        np.testing.assert_array_equal(out[:, 7], weight[ids, 7].max(1), err_msg=name)
        np.testing.assert_array_equal(gradient[21, :7], np.full(7, 16), err_msg=name)


# The lengths of pieces, of bags that are summed in one fusion, and of blocks, and the lengths next to them.
LENGTHS = {
    **{15: ["sum"], 16: ["sum", "max"], 17: ["sum", "max"], 63: ["sum"], 64: ["sum"], 65: ["sum", "mean", "sqrtn"]},
    **{127: ["sum"], 1023: ["sum"], 1024: ["sum"], 1025: ["sum", "max"], 4095: ["sum"], 4096: ["sum"]},
    4097: ["sum", "mean", "sqrtn"],
}
MAIN_LENGTHS = [(16, ["sum"]), (17, ["max"]), (65, ["mean"]), (4097, ["sqrtn"])]


@pytest.mark.parametrize(
    ("length", "modes"),
    [*MAIN_LENGTHS, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in LENGTHS.items())],
)
def test_lengths_around_the_sizes_that_bags_are_cut_into(length, modes):
    random = np.random.default_rng(length)
    ids = random.integers(0, ROWS, size=(2, length))
    lists = [ids[0], [], ids[1][:5], ids[1]]
    weights = [random.uniform(0.5, 2, size=len(ids)).astype(np.float32) for ids in lists]

    @jax.jit
    def run(table, *args):
        def pool(bags, weights, mode):
            return embedding_bag(table, bags, None if mode == "max" else weights, mode)

        return {mode: [pool(bags, weights, mode) for bags, weights in args] for mode in modes}

    table = Table(np.abs(WEIGHT), padding_idx=3)
    matrix = ids, np.stack([weights[0], weights[3]])
    results = run(table, (Ragged.from_lists(lists), np.concatenate(weights)), matrix)
    for mode, (ragged, of_matrix) in results.items():
        of_lists = None if mode == "max" else weights
        expected = reference.embedding_bag(np.abs(WEIGHT), lists, of_lists, mode, padding_idx=3)
        np.testing.assert_allclose(ragged, expected, **TOLERANCE, err_msg=mode)
        np.testing.assert_allclose(of_matrix, expected[[0, 3]], **TOLERANCE, err_msg=mode)


@pytest.mark.parametrize("modes", [["mean"], pytest.param(["sum", "sqrtn"], marks=pytest.mark.exhaustive)], ids=str)
def test_a_million_ids_in_one_bag(modes):
    @jax.jit
    def run(table, *layouts):
        return {mode: [embedding_bag(table, bags, mode=mode)[0] for bags in layouts] for mode in modes}

    for positive in False, True:
        random = np.random.default_rng(0)
        numbers = random.uniform(size=(1000, 2)) if positive else random.normal(size=(1000, 2)) + 0.1
        weight = numbers.astype(np.float32)
        ids = random.integers(0, 1000, size=(1, 1_000_000))
        total = np.bincount(ids[0], minlength=1000) @ weight.astype(np.float64)
        for mode, outs in run(Table(weight), Ragged(ids[0], [0, 1_000_000]), ids).items():
            expected = total / {"sum": 1, "mean": 1e6, "sqrtn": 1e3}[mode]
            for layout, out in zip(("ragged", "matrix"), outs, strict=True):
                np.testing.assert_allclose(out, expected, rtol=1e-5, err_msg=f"{mode}, {layout}, positive={positive}")


@pytest.mark.parametrize(
    ("weights", "mean", "sqrtn"),
    [
        ([1.0, -1.0], [np.inf, np.nan, -np.inf], [2**0.5, 0, -(2**0.5)]),
        ([0.0, 0.0], [np.nan] * 3, [np.nan] * 3),
        ([1.0, -3.0], [0, 1, 3], [0, -2 / 10**0.5, -6 / 10**0.5]),
    ],
    ids=["zero in sum", "zeros", "negative in sum"],
)
def test_sums_of_weights_are_divided_by(weights, mean, sqrtn):
    table, weights = Table(np.array([[3, 1, 0], [1, 1, 2]], np.float32)), np.array(weights, np.float32)
    outs = jax.device_get(_of_two_weights(table, weights))
    for expected, of_mode in zip((mean, sqrtn), outs, strict=True):
        for out in of_mode:
            np.testing.assert_allclose(out[0], expected, **TOLERANCE)


@jax.jit
def _of_two_weights(table, weights):
    args = (np.array([[0, 1]]), weights[None]), (Ragged.from_lists([[0, 1]]), weights)
    return [[embedding_bag(table, *bags_and_weights, mode) for bags_and_weights in args] for mode in ("mean", "sqrtn")]
