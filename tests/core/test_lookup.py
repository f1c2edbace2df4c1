"""Lookup and its gradient against the reference: every rule with every shape of ids, dtypes, and sums of lookups."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import IDS, MAIN_RULES, RULES, WEIGHT, cotangent
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import Table, lookup

POLICIES = ["error", "clip", "nan", "zero"]
RTOL = 2e-6  # float32


@jax.jit
def read_and_pull_back(table, ids, cotangents):
    out, pull = jax.vjp(lambda table: lookup(table, ids), table)
    return out, pull(cotangents)[0].weight


@jax.jit
def read_and_pull_back_each(cases):
    return {name: read_and_pull_back(*case) for name, case in cases.items()}


def assert_as_reference(cases):
    """Named cases `(weight, ids, rules)` in one program, for it takes longer to compile than to run."""
    cotangents = {name: cotangent(ids, weight) for name, (weight, ids, _) in cases.items()}
    results = read_and_pull_back_each(
        {name: (Table(weight, **rules), ids, cotangents[name]) for name, (weight, ids, rules) in cases.items()}
    )
    for name, (weight, ids, rules) in cases.items():
        out, gradient = results[name]
        assert out.shape == cotangents[name].shape, name
        assert out.dtype == gradient.dtype == jnp.float32, name
        np.testing.assert_allclose(out, reference.lookup(weight, ids, **rules), rtol=RTOL, err_msg=name)  # float32
        expected = reference.gradient(weight, ids, cotangents[name], **rules)
        np.testing.assert_allclose(gradient, expected, rtol=RTOL, atol=1e-6, err_msg=name)  # float32


SOME_RULES = {"none": {}, "all": RULES["all"]}


def of_grid(names, usual, grid):
    """The usual cases of a grid in the program of every run, and the whole grid in that of an exhaustive run."""
    cases = [usual, pytest.param(grid, marks=pytest.mark.exhaustive)]
    return pytest.mark.parametrize(names, cases, ids=["usual", "whole"])


def test_lookup_and_gradient_of_each_rule():
    assert_as_reference({name: (WEIGHT, IDS["matrix"], rules) for name, rules in RULES.items()})


@of_grid(
    "pairs",
    [*((name, "none") for name in IDS), *((name, "all") for name in ("scalar", "empty_matrix"))],
    [*itertools.product(IDS, SOME_RULES)],
)
def test_lookup_and_gradient_of_each_shape(pairs):
    assert_as_reference({f"{name}, {rules}": (WEIGHT, IDS[name], SOME_RULES[rules]) for name, rules in pairs})


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(rules, marks=() if name in ("none", "all") else pytest.mark.exhaustive)
        for name, rules in MAIN_RULES.items()
    ],
    ids=MAIN_RULES,
)
def test_lookup_called_directly(rules):
    ids, table = IDS["negative"], Table(WEIGHT, **rules)
    cotangents = cotangent(ids)
    out = lookup(table, ids)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, reference.lookup(WEIGHT, ids, **rules), rtol=RTOL)  # float32
    gradient = jax.grad(lambda table: (lookup(table, ids) * cotangents).sum())(table)
    assert isinstance(gradient, Table)
    expected = reference.gradient(WEIGHT, ids, cotangents, **rules)
    np.testing.assert_allclose(gradient.weight, expected, rtol=RTOL, atol=1e-6)  # float32


@of_grid(
    "pairs",
    [((), "all"), ((0,), "none"), ((1,), "none"), ((2, 0), "all"), ((2, 3), "all")],
    [*itertools.product([(), (0,), (1,), (2, 0), (2, 3)], SOME_RULES)],
)
def test_lookup_of_rows_of_any_shape(pairs):
    rng, ids = np.random.default_rng(2), np.array([[0, 2, -1], [4, 4, 2]])
    assert_as_reference(
        {
            f"{dim}, {rules}": (rng.normal(scale=2, size=(5, *dim)).astype(np.float32), ids, SOME_RULES[rules])
            for dim, rules in pairs
        }
    )


def test_lookup_clips_over_all_trailing_axes():
    weight = np.full((1, 2, 2), 2.0, np.float32)  # a norm of 4
    np.testing.assert_allclose(lookup(Table(weight, max_norm=1.0), [0]), np.full((1, 2, 2), 0.5), rtol=2e-7)  # float32


@of_grid(
    "pairs",
    [*((policy, "none") for policy in POLICIES), ("clip", "all"), ("nan", "all")],
    [*itertools.product(POLICIES, SOME_RULES)],
)
def test_lookup_forward_and_gradient_agree_on_the_row_of_a_bad_id(pairs):
    ids = np.array([[0, 7, -8, 6], [7, 2**31 - 1, -(2**31), -7]])
    assert_as_reference(
        {f"{policy}, {rules}": (WEIGHT, ids, {**SOME_RULES[rules], "out_of_range": policy}) for policy, rules in pairs}
    )


def test_lookup_in_a_table_of_one_row_or_none():
    one, none = np.array([[1.0, 2.0]], np.float32), np.zeros((0, 2), np.float32)
    cases = {}
    for policy in POLICIES:
        # A count of ids takes long to compile.
        rules = {"out_of_range": policy, "scale_grad_by_freq": policy in ("error", "clip")}
        cases[f"one, {policy}"] = one, np.array([0, -1, 1, -2, 5]), rules
        if policy != "clip":
            cases[f"none, {policy}"] = none, np.array([0, -1]), {**rules, "max_norm": 1.0}
    cases["none, no ids"] = none, np.zeros((3, 0), int), {"max_norm": 1.0, "scale_grad_by_freq": True}
    assert_as_reference(cases)


def test_lookup_in_a_table_of_no_rows_clips_to_nothing():
    table = Table(jnp.zeros((0, 2)), out_of_range="clip")
    assert lookup(table, []).shape == (0, 2)
    for call in lookup, jax.jit(lookup):
        with pytest.raises(
            ValueError, match=r"must be empty for a table without rows, got 1 ids and out_of_range='clip'"
        ):
            call(table, jnp.array([0]))


def test_lookup_in_an_integer_table():
    cases = [*(("int32", policy) for policy in POLICIES), ("uint8", "nan"), ("bool", "error")]
    weights = {dtype: np.array([[1, 0], [1, 1], [0, 1]], dtype) for dtype, _ in cases}
    tables = [Table(weights[dtype], out_of_range=policy, padding_idx=0, freeze=True) for dtype, policy in cases]
    read_each = jax.jit(lambda tables, ids: [lookup(table, ids) for table in tables])
    for (dtype, policy), out in zip(cases, read_each(tables, np.array([1, -1, 3, -4])), strict=True):
        weight = weights[dtype]
        bad = weight[[2, 0]] if policy == "clip" else np.zeros((2, 2), dtype)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, [*weight[1:], *bad], err_msg=f"{dtype}, {policy}")


def test_lookup_in_a_complex_table():
    weight = jnp.array([[3 + 4j, 0], [0.5j, 0]])
    table = Table(weight, max_norm=1.0, scale_grad_by_freq=True, padding_idx=1)
    np.testing.assert_allclose(lookup(table, [0, 1]), [[0.6 + 0.8j, 0], [0.5j, 0]], rtol=2e-7)  # complex64
    tangent = Table(jnp.array([[1 + 1j, 2j], [1, 1]]))
    _, pushed = jax.jvp(
        lambda table: lookup(table, [0, 0, 1]), (table,), (dataclasses.replace(table, weight=tangent.weight),)
    )
    np.testing.assert_array_equal(pushed, [[0.5 + 0.5j, 1j], [0.5 + 0.5j, 1j], [0, 0]])
    assert np.isnan(jax.jit(lookup)(table, jnp.array(2))).all()


def test_lookup_casts_the_rows_to_dtype():
    dtypes = [
        ("float32", "bfloat16"),
        ("float16", "float32"),
        ("bfloat16", "float16"),
        ("int8", "float32"),
        ("float32", "int32"),
    ]
    tables = [Table(np.arange(6).reshape(3, 2).astype(jnp.dtype(stored))) for stored, _ in dtypes]

    @jax.jit
    def read_each(tables):
        return [
            (lookup(table, [2, 0], dtype=read), lookup(table, [2, 0]))
            for table, (_, read) in zip(tables, dtypes, strict=True)
        ]

    for (stored, read), (cast, as_stored) in zip(dtypes, read_each(tables), strict=True):
        assert (cast.dtype, as_stored.dtype) == (read, stored)
        np.testing.assert_array_equal(cast, np.array([[4, 5], [0, 1]]).astype(jnp.dtype(read)))


def test_lookup_clips_before_it_casts():
    table = Table(jnp.array([[3e30, 4e30]]), max_norm=1.0)  # inf in float16
    np.testing.assert_array_equal(lookup(table, [0], jnp.float16), np.array([[0.6, 0.8]], np.float16))


def test_lookup_gradient_is_of_the_tables_dtype_whatever_is_read():
    table = Table(np.ones((3, 2), jnp.bfloat16))
    gradient = jax.jit(jax.grad(lambda table: lookup(table, [0, 0, 1], jnp.float32).sum()))(table).weight
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, np.array([[2, 2], [1, 1], [0, 0]], jnp.bfloat16))


@pytest.mark.parametrize("rules", [{}, RULES["all"]], ids=["none", "all"])
def test_lookups_of_one_table_add_up_their_gradients(rules):
    first, second = np.array([0, 2, 2]), np.array([[2, -1], [0, 4]])
    cotangents = cotangent(first), cotangent(second)

    def loss(table):
        return (lookup(table, first) * cotangents[0]).sum() + (lookup(table, second) * cotangents[1]).sum()

    pairs = zip((first, second), cotangents, strict=True)
    expected = sum(reference.gradient(WEIGHT, ids, cotangents, **rules) for ids, cotangents in pairs)
    gradient = jax.jit(jax.grad(loss))(Table(WEIGHT, **rules)).weight
    np.testing.assert_allclose(gradient, expected, rtol=RTOL, atol=1e-6)  # float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("rules", [{}, RULES["frequency"], RULES["norm_2"]], ids=["none", "frequency", "norm"])
def test_padding_gradient_is_zero_under_a_bad_cotangent(rules, bad):
    cotangents = np.ones((4, 3), np.float32)
    cotangents[[1, 3]] = bad
    _, gradient = read_and_pull_back(Table(WEIGHT, padding_idx=-1, **rules), np.array([0, 6, 0, -1]), cotangents)
    gradient = np.asarray(gradient)  # whose slices need no compiling
    np.testing.assert_array_equal(gradient[6], [0, 0, 0])
    np.testing.assert_array_equal(gradient[0], [1, 1, 1] if "scale_grad_by_freq" in rules else [2, 2, 2])


def test_gradient_of_a_bad_id_is_dropped_with_its_bad_cotangent():
    cotangents = np.array([[1, 1, 1], [np.nan, np.inf, np.nan]], np.float32)
    _, gradient = read_and_pull_back(Table(WEIGHT, out_of_range="nan"), np.array([0, 7]), cotangents)
    np.testing.assert_array_equal(gradient, np.eye(7, 1) * np.ones(3))


def test_freeze_has_no_gradient_under_a_bad_cotangent():
    _, gradient = read_and_pull_back(Table(WEIGHT, freeze=True), np.array([0]), np.full((1, 3), np.nan, np.float32))
    np.testing.assert_array_equal(gradient, np.zeros_like(WEIGHT))


def test_frequency_counts_after_wrapping_and_leaves_bad_ids_out():
    ids = np.array([-1, 6, 6, 7, -8, 0])  # row 6 three times, row 0 once
    for policy in "nan", "zero":
        table = Table(WEIGHT, scale_grad_by_freq=True, out_of_range=policy)
        _, gradient = read_and_pull_back(table, ids, np.full((6, 3), 3.0, np.float32))
        np.testing.assert_array_equal(np.asarray(gradient)[:, 0], [3, 0, 0, 0, 0, 0, 3])


# Integers up to 1000, so that float32 sums are exact in any order.
exact_cotangents = st.lists(st.integers(-1000, 1000), min_size=15, max_size=15)
any_ids = st.lists(st.integers(-9, 9) | st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5)
any_floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(ids=any_ids, weight=st.lists(any_floats, min_size=21, max_size=21), cotangents=exact_cotangents)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lookup_of_drawn_values(ids, weight, cotangents):
    rules = {"padding_idx": 3, "max_norm": 2.0}
    weight = np.array(weight, np.float32).reshape(7, 3)
    cotangents = np.array(cotangents, np.float32).reshape(5, 3)
    # A count of ids takes long to compile.
    of_policy = {
        policy: {**rules, "out_of_range": policy, "scale_grad_by_freq": policy in ("clip", "nan")}
        for policy in POLICIES
    }
    cases = {
        policy: (Table(weight, **rules), np.array(ids, np.int32), cotangents) for policy, rules in of_policy.items()
    }
    for policy, (out, gradient) in read_and_pull_back_each(cases).items():
        rules = of_policy[policy]
        # float32; what is below its smallest normal number may become zero
        expected = reference.lookup(weight, ids, **rules)
        np.testing.assert_allclose(out, expected, rtol=RTOL, atol=2e-38, err_msg=policy)
        expected = reference.gradient(weight, ids, cotangents, **rules)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, err_msg=policy)  # float32
