"""CompositionalTable: two small tables that give each of very many ids its own vector, and train as tables do."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bag_cases import dense, ids_of
from cases import assert_same_gradient
from jax.experimental import checkify

import embax
from embax import CompositionalTable, RowGrad, Table
from embax.optim import rowwise_adagrad

COMBINE = ["mul", "add", "concat"]
with_combine = pytest.mark.parametrize("combine", COMBINE)
exhaustive = pytest.mark.exhaustive
KEY = jax.random.key(0)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # float32
# Ids are not a multiple of the remainders, so that the last quotient has fewer.
IDS, REMAINDERS, DIM = 23, 5, 8


@functools.cache
def made(combine):
    return CompositionalTable.create(KEY, IDS, DIM, remainders=REMAINDERS, combine=combine)


def create(combine="mul", padding_idx=None, out_of_range="error"):
    """A table with these rules; all of one `combine` have the same rows."""
    table = made(combine)
    parts = (dataclasses.replace(part, out_of_range=out_of_range) for part in (table.quotient, table.remainder))
    return CompositionalTable(*parts, IDS, combine, padding_idx)


def vectors(table, ids):
    """What ids read, in float64."""
    quotient, remainder = (np.asarray(part.weight, np.float64) for part in (table.quotient, table.remainder))
    ids = np.asarray(ids) % table.ids
    one, other = quotient[ids // len(remainder)], remainder[ids % len(remainder)]
    out = {
        "mul": lambda: one * other,
        "add": lambda: one + other,
        "concat": lambda: np.concatenate([one, other], axis=-1),
    }[table.combine]()
    out[ids == table.padding_idx] = 0
    return out


@with_combine
def test_create_makes_two_tables(combine):
    new = functools.partial(CompositionalTable.create, KEY, IDS, DIM, remainders=REMAINDERS, combine=combine)
    table = made(combine)
    width = DIM // 2 if combine == "concat" else DIM
    assert table.quotient.weight.shape == (5, width)
    assert table.remainder.weight.shape == (5, width)
    assert (table.ids, table.combine, table.padding_idx) == (IDS, combine, None)
    rules = new(padding_idx=-1, out_of_range="clip")
    assert (rules.padding_idx, rules.quotient.out_of_range, rules.remainder.out_of_range) == (IDS - 1, "clip", "clip")
    assert rules.quotient.padding_idx is rules.remainder.padding_idx is None
    assert jax.eval_shape(lambda: new(dtype="bfloat16")([1])).dtype == jnp.bfloat16
    constant = new(init=lambda _, shape, dtype: np.full(shape, 2, dtype))
    assert (
        np.array(constant.quotient.weight).tolist() == np.array(constant.remainder.weight).tolist() == [[2] * width] * 5
    )
    other = CompositionalTable.create(jax.random.key(1), IDS, DIM, remainders=REMAINDERS, combine=combine)
    for one, another in [(table.quotient, other.quotient), (table.quotient, table.remainder)]:
        assert not np.any(np.asarray(one.weight) == np.asarray(another.weight))


@pytest.mark.parametrize("ids", [1, 2, 3, 4, 5, 99, 100, 101, 10**6 + 1, 2**31 - 1])
def test_by_default_the_fewest_rows_are_stored(ids):
    table = jax.eval_shape(lambda: CompositionalTable.create(KEY, ids, 2))
    assert table.quotient.rows * table.remainder.rows >= ids
    assert table.quotient.rows + table.remainder.rows == math.isqrt(4 * ids - 1) + 1  # twice the root, rounded up
    assert jax.eval_shape(lambda table: table([ids - 1]), table).shape == (1, 2)
    for remainders in 1, 7, ids:
        table = jax.eval_shape(lambda n=remainders: CompositionalTable.create(KEY, ids, 2, remainders=n))
        assert (table.quotient.rows, table.remainder.rows) == (-(-ids // remainders), remainders)


def test_lookup_combines_rows_of_both_tables():
    plain = {combine: create(combine) for combine in COMBINE}
    padded = {combine: create(combine, padding_idx=7) for combine in COMBINE}
    ids = np.arange(-IDS, IDS).reshape(2, IDS)
    forms = {"int8 of JAX": jnp.asarray(ids, jnp.int8), "lists": ids.tolist(), "int16": ids.astype(np.int16)}

    @jax.jit
    def run(plain, padded, ids):
        traced = {combine: table(ids) for combine, table in plain.items()}
        mapped = {combine: jax.vmap(table)(ids) for combine, table in padded.items()}
        table = plain["mul"]
        return traced, mapped, {form: table(given) for form, given in forms.items()}, table(3), table([])

    traced, mapped, of_forms, one, nothing = run(plain, padded, ids)
    for combine in COMBINE:
        np.testing.assert_allclose(traced[combine], vectors(plain[combine], ids), **TOLERANCE, err_msg=combine)
        np.testing.assert_allclose(mapped[combine], vectors(padded[combine], ids), **TOLERANCE, err_msg=combine)
    for form, out in of_forms.items():
        np.testing.assert_allclose(out, vectors(plain["mul"], ids), **TOLERANCE, err_msg=form)
    np.testing.assert_allclose(one, vectors(plain["mul"], 3), **TOLERANCE)
    assert nothing.shape == (0, DIM)


def test_reads_outside_of_jit():
    np.testing.assert_allclose(create(padding_idx=7)([3, 7]), vectors(create(padding_idx=7), [3, 7]), **TOLERANCE)


@pytest.mark.parametrize("combine", ["mul", *(pytest.param(combine, marks=exhaustive) for combine in COMBINE[1:])])
def test_every_id_has_its_own_vector(combine):
    @jax.jit
    def run(table, ids):
        of_sum = jax.grad(lambda table, id_: table(id_).sum())
        return table(ids), jax.vmap(of_sum, (None, 0))(table, ids)

    out, changed = jax.device_get(run(create(combine), np.arange(IDS)))
    assert len(np.unique(np.asarray(out), axis=0)) == IDS
    pairs = [(id_ // REMAINDERS, id_ % REMAINDERS) for id_ in range(IDS)]
    assert len(set(pairs)) == IDS
    for id_, (quotient, remainder) in enumerate(pairs):
        assert np.flatnonzero(np.any(changed.quotient.weight[id_], axis=1)).tolist() == [quotient], id_
        assert np.flatnonzero(np.any(changed.remainder.weight[id_], axis=1)).tolist() == [remainder], id_


@with_combine
def test_vectors_have_a_norm_near_1(combine):
    table = CompositionalTable.create(KEY, 10_000, 64, combine=combine)
    square = np.square(vectors(table, np.arange(10_000))).sum(axis=1)
    assert abs(square.mean() - 1) < 0.1
    assert 0.1 < square.min() <= square.max() < 5


def test_a_billion_ids_are_stored_in_the_square_root():
    table = CompositionalTable.create(KEY, 1_000_000_000, 16, padding_idx=-1)
    assert table.quotient.rows == table.remainder.rows == 31_623
    assert table.padding_idx == 999_999_999
    ids = np.array([0, 1, 31_622, 31_623, 999_999_998, 999_999_999, -1])
    out = np.asarray(jax.jit(lambda table: table(ids))(table))
    assert len(np.unique(out, axis=0)) == 6
    np.testing.assert_array_equal(out[5:], np.zeros((2, 16)))
    with pytest.raises(IndexError, match=r"must be in .* got 1000000000 at position \(0,\)"):
        table([1_000_000_000])


def test_more_ids_than_int32_has_need_64_bits():
    number, m = 2**33 + 5, 2**17
    table = CompositionalTable.create(KEY, number, 4, remainders=m)
    with pytest.raises(ValueError, match=r"must be read with 64-bit ids, got 8589934597 rows"):
        table([0])
    with jax.enable_x64(True):
        ids = np.array([0, number - 1, -1, m + 3])
        quotient, remainder = (np.asarray(part.weight) for part in (table.quotient, table.remainder))
        expected = quotient[ids % number // m] * remainder[ids % number % m]
        np.testing.assert_allclose(jax.jit(lambda table: table(ids))(table), expected, **TOLERANCE)


# Policies, and how parts are combined under them.
POLICIES = {"error": ["mul"], "nan": ["add"], "zero": ["concat"], "clip": ["mul"]}
POLICIES_TOO = {policy: [combine for combine in COMBINE if combine not in main] for policy, main in POLICIES.items()}


def with_policies(*names):
    pairs = [(policy, POLICIES[policy]) for policy in names]
    others = [pytest.param(policy, POLICIES_TOO[policy], marks=exhaustive) for policy in names]
    return pytest.mark.parametrize(("out_of_range", "combines"), [*pairs, *others])


@with_policies("error", "nan", "zero", "clip")
def test_ids_outside(out_of_range, combines):
    tables = {combine: create(combine, out_of_range=out_of_range, padding_idx=7) for combine in combines}
    ids = np.array([IDS, 3, -IDS - 1, IDS + 1])  # the last of which has both parts, were it not outside
    if out_of_range == "error":
        with pytest.raises(IndexError, match=r"CompositionalTable\(ids\)` must be in \[-23, 23\), .* got 23"):
            tables[combines[0]](ids)

    @jax.jit
    def run(tables, ids):
        def read(table):
            out = table(ids)
            return jnp.nansum(out), out

        return {combine: jax.value_and_grad(read, has_aux=True)(table) for combine, table in tables.items()}

    for combine, ((_, out), gradient) in run(tables, ids).items():
        out = np.asarray(out)
        if out_of_range == "clip":
            expected = vectors(tables[combine], [IDS - 1, 3, 0, IDS - 1])
            np.testing.assert_allclose(out, expected, **TOLERANCE, err_msg=combine)
            continue
        wrong = 0 if out_of_range == "zero" else np.nan
        np.testing.assert_array_equal(out[[0, 2, 3]], np.full((3, DIM), wrong), err_msg=combine)
        np.testing.assert_allclose(out[1], vectors(tables[combine], 3), **TOLERANCE, err_msg=combine)
        assert np.flatnonzero(np.any(gradient.remainder.weight, axis=1)).tolist() == [3], combine
        assert np.flatnonzero(np.any(gradient.quotient.weight, axis=1)).tolist() == [0], combine


@with_policies("error", "clip", "zero")
def test_padding_reads_zero_and_names_no_row(out_of_range, combines):
    ids, cotangent = np.array([IDS - 1, 3, -1]), np.array([[np.nan], [1], [np.inf]], np.float32)

    def broken(combine):
        table = create(combine)
        # Neither its own rows nor the last ones, to which numbers are clipped, are read.
        weights = [np.array(part.weight) for part in (table.quotient, table.remainder)]
        for weight in weights:
            weight[[4, -1]] = np.nan
        parts = [Table(weight, out_of_range=out_of_range) for weight in weights]
        return CompositionalTable(*parts, IDS, combine, IDS - 1)

    @jax.jit
    def run(tables):
        def loss(table):
            return (table(ids) * cotangent).sum()

        return {combine: (x(ids), embax.grad(loss)(x), jax.grad(loss)(x)) for combine, x in tables.items()}

    for combine, (out, gradient, expected) in run({combine: broken(combine) for combine in combines}).items():
        np.testing.assert_array_equal(np.asarray(out)[[0, 2]], np.zeros((2, DIM)), err_msg=combine)
        named = ids_of((gradient.quotient, gradient.remainder))
        assert [ids.tolist() for ids in named] == [[5, 0, 5], [5, 3, 5]], combine
        assert np.isfinite(expected.quotient.weight).all(), combine
        assert np.isfinite(expected.remainder.weight).all(), combine
        assert_same_gradient(in_full(gradient), expected, **TOLERANCE, err_msg=combine)


def in_full(gradient):
    parts = map(Table, dense((gradient.quotient, gradient.remainder)))
    return CompositionalTable(*parts, gradient.ids, gradient.combine, gradient.padding_idx)


def test_gradient_by_rows_equals_jax():
    tables = {combine: create(combine, padding_idx=2) for combine in COMBINE}
    ids = np.array([[0, 22, 7], [7, -1, 2]])

    def loss(table):
        return jnp.sin(table(ids)).sum()

    def by_rows(table):
        return embax.value_and_grad(loss, on_dense="error")(table)

    run = jax.jit(lambda tables: {combine: (by_rows(x), jax.grad(loss)(x)) for combine, x in tables.items()})
    for combine, ((value, gradient), expected) in run(tables).items():
        np.testing.assert_allclose(value, np.sin(vectors(tables[combine], ids)).sum(), **TOLERANCE, err_msg=combine)
        assert isinstance(gradient, CompositionalTable)
        for part in gradient.quotient, gradient.remainder:
            assert isinstance(part, RowGrad)
            assert part.values.shape[0] == 6
        assert_same_gradient(in_full(gradient), expected, **TOLERANCE, err_msg=combine)


@pytest.mark.parametrize("combines", [["mul"], pytest.param(["add", "concat"], marks=exhaustive)], ids=str)
def test_training_changes_only_the_rows_that_are_read(combines):
    tx, ids, target = rowwise_adagrad(0.5), np.array([6, 7, 0, 6]), np.ones((4, DIM), np.float32)
    before = {combine: create(combine, padding_idx=0) for combine in combines}

    def loss(tables):
        losses = {combine: jnp.square(table(ids) - target).mean() for combine, table in tables.items()}
        return sum(losses.values()), losses

    @jax.jit
    def step(tables, state):
        (_, losses), gradient = embax.value_and_grad(loss, has_aux=True, on_dense="error")(tables)
        updates, state = tx.update(gradient, state, tables)
        return embax.apply_updates(tables, updates), state, losses

    tables, state, losses = before, jax.jit(tx.init)(before), []
    for _ in range(20):
        tables, state, now = step(tables, state)
        losses.append(now)
    for combine, table in tables.items():
        assert losses[-1][combine] < 0.5 * losses[0][combine], combine
        parts = ("quotient", [1]), ("remainder", [1, 2])
        for part, read in parts:
            one, other = (np.asarray(getattr(x, part).weight) for x in (table, before[combine]))
            assert np.flatnonzero(np.any(one != other, axis=1)).tolist() == read, (combine, part)


@pytest.mark.parametrize("combine", ["mul", *(pytest.param(combine, marks=exhaustive) for combine in COMBINE[1:])])
def test_checkify_finds_bad_ids_and_nothing_else(combine):
    def rows(table, ids):
        return jax.tree.leaves(embax.grad(lambda table: table(ids).sum())(table))

    calls = CompositionalTable.__call__, jax.grad(lambda table, ids: table(ids).sum()), rows

    def run(table, batches):
        return [call(table, ids) for call, ids in zip(calls, batches, strict=True)]

    program = jax.jit(checkify.checkify(run, errors=checkify.index_checks))
    table, good = create(combine, padding_idx=7), np.array([7, 1, -1, 7])
    assert program(table, [good] * 3)[0].get() is None
    for call in range(3):
        for bad in IDS, -IDS - 1:
            batches = [np.where(np.arange(4) == 3, bad, good) if i == call else good for i in range(3)]
            message = program(table, batches)[0].get()
            assert "index 5 is out of bounds for axis 0 with size 5" in message, (call, bad)


BAD = {
    "combine": ({"combine": "max"}, ValueError, r"combine=...\)` must be one of 'mul', 'add', 'concat', got 'max'"),
    "no_ids": ({"ids": 0}, ValueError, r"create\(ids=...\)` must be 1 or more, got 0"),
    "negative_ids": ({"ids": -1}, ValueError, r"ids=...\)` must not be negative, got -1"),
    "part_of_an_id": ({"ids": 1.5}, TypeError, r"ids=...\)` must be a whole number, got 1.5"),
    "dim": ({"dim": -1}, ValueError, r"dim=...\)` must not be negative, got -1"),
    "no_remainders": ({"remainders": 0}, ValueError, r"remainders=...\)` must be 1 or more, got 0"),
    "odd": ({"dim": 3, "combine": "concat"}, ValueError, r"dim=...\)` must be even for 'concat', got 3\. Each part"),
    "padding": ({"padding_idx": 9}, ValueError, r"padding_idx=...\)` must be a row of the table, in \[-9, 9\), got 9"),
    "policy": ({"out_of_range": "wrap"}, ValueError, "must be one of 'error', 'clip', 'nan', 'zero', got 'wrap'"),
    "integers": (
        {"dtype": "int32"},
        TypeError,
        r"init=...\)` must be given for tables of integers, got None for int",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        CompositionalTable.create(KEY, **{"ids": 9, "dim": 4, **arguments})


def test_bad_ids_are_refused():
    with pytest.raises(TypeError, match=r"CompositionalTable\(ids\)` must be of an integer dtype, got float64"):
        create()([1.5])


def test_zero_width():
    for combine in COMBINE:
        table = CompositionalTable.create(KEY, 9, 0, combine=combine)
        assert jax.eval_shape(lambda table: table([1, 2]), table).shape == (2, 0)
