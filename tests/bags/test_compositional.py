"""CompositionalTable: two small tables that give each of very many ids its own vector, and train as tables do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_gradient
from jax.experimental import checkify

import embax
from embax import CompositionalTable, RowGrad, Table
from embax.optim import rowwise_adagrad

COMBINE = ["mul", "add", "concat"]
with_combine = pytest.mark.parametrize("combine", COMBINE)
KEY = jax.random.key(0)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # float32
# Ids are not a multiple of the remainders, so that the last quotient has fewer.
IDS, REMAINDERS, DIM = 23, 5, 8


def create(combine="mul", **options):
    return CompositionalTable.create(KEY, IDS, DIM, remainders=REMAINDERS, combine=combine, **options)


def vector(table, id_):
    """What an id reads, in float64."""
    quotient, remainder = (np.asarray(part.weight, np.float64) for part in (table.quotient, table.remainder))
    id_ = id_ % table.ids
    if id_ == table.padding_idx:
        return np.zeros(DIM)
    one, other = quotient[id_ // remainder.shape[0]], remainder[id_ % remainder.shape[0]]
    return {"mul": lambda: one * other, "add": lambda: one + other, "concat": lambda: np.concatenate([one, other])}[
        table.combine
    ]()


def vectors(table, ids):
    return np.reshape([vector(table, id_) for id_ in np.ravel(ids)], (*np.shape(ids), DIM))


@with_combine
def test_sizes(combine):
    table = create(combine)
    width = DIM // 2 if combine == "concat" else DIM
    assert table.quotient.weight.shape == (5, width)
    assert table.remainder.weight.shape == (5, width)
    assert (table.ids, table.combine, table.padding_idx) == (IDS, combine, None)
    assert create(combine, dtype="bfloat16")([1]).dtype == jnp.bfloat16
    constant = create(combine, init=jax.nn.initializers.constant(2.0))([3])
    assert constant.tolist() == [[{"mul": 4, "add": 4, "concat": 2}[combine]] * DIM]
    assert create(combine)([1]).tolist() != CompositionalTable.create(jax.random.key(1), IDS, DIM)([1]).tolist()


@pytest.mark.parametrize("ids", [1, 2, 3, 4, 5, 99, 100, 101, 10**6 + 1, 2**31 - 1])
def test_by_default_the_fewest_rows_are_stored(ids):
    table = jax.eval_shape(lambda: CompositionalTable.create(KEY, ids, 2))
    assert table.quotient.rows * table.remainder.rows >= ids
    assert table.quotient.rows + table.remainder.rows <= 2 * np.sqrt(ids) + 2
    assert jax.eval_shape(lambda table: table([ids - 1]), table).shape == (1, 2)
    for remainders in 1, 7, ids:
        table = jax.eval_shape(lambda n=remainders: CompositionalTable.create(KEY, ids, 2, remainders=n))
        assert (table.quotient.rows, table.remainder.rows) == (-(-ids // remainders), remainders)


@with_combine
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_reads_what_it_is_put_together_from(combine, padding_idx):
    table = create(combine, padding_idx=padding_idx)
    ids = np.arange(-IDS, IDS).reshape(2, IDS)
    expected = vectors(table, ids)
    for form in ids, jnp.asarray(ids, jnp.int8), ids.tolist(), ids.astype(np.int16):
        np.testing.assert_allclose(table(form), expected, **TOLERANCE)
    np.testing.assert_allclose(jax.jit(CompositionalTable.__call__)(table, ids), expected, **TOLERANCE)
    assert table(3).shape == (DIM,)
    assert table([]).shape == (0, DIM)
    np.testing.assert_allclose(jax.vmap(table)(jnp.asarray(ids)), expected, **TOLERANCE)


@with_combine
def test_every_id_has_its_own_vector(combine):
    table = create(combine)
    assert len(np.unique(np.asarray(table(np.arange(IDS))), axis=0)) == IDS
    pairs = [(id_ // REMAINDERS, id_ % REMAINDERS) for id_ in range(IDS)]
    assert len(set(pairs)) == IDS
    of_sum = jax.jit(jax.grad(lambda table, id_: table(id_).sum()))
    for id_, (quotient, remainder) in enumerate(pairs):
        changed = of_sum(table, id_)
        assert np.flatnonzero(np.any(changed.quotient.weight, axis=1)).tolist() == [quotient]
        assert np.flatnonzero(np.any(changed.remainder.weight, axis=1)).tolist() == [remainder]


@with_combine
def test_vectors_have_a_norm_near_1(combine):
    table = CompositionalTable.create(KEY, 10_000, 64, combine=combine)
    square = np.square(table(np.arange(10_000))).sum(axis=1)
    assert abs(square.mean() - 1) < 0.1
    assert 0.1 < square.min() <= square.max() < 5


def test_a_billion_ids_are_stored_in_the_square_root():
    table = CompositionalTable.create(KEY, 1_000_000_000, 16, padding_idx=-1)
    assert table.quotient.rows == table.remainder.rows == 31_623
    assert table.padding_idx == 999_999_999
    out = table(np.array([0, 1, 31_622, 31_623, 999_999_998, 999_999_999, -1]))
    assert len(np.unique(np.asarray(out), axis=0)) == 6
    np.testing.assert_array_equal(out[5:], np.zeros((2, 16)))
    with pytest.raises(IndexError, match=r"must be in .* got 1000000000 at position \(0,\)"):
        table([1_000_000_000])


def test_more_ids_than_int32_has_need_64_bits():
    table = CompositionalTable.create(KEY, 10**12, 4, remainders=2 * 10**6)
    with pytest.raises(ValueError, match=r"must be read with 64-bit ids, got 1000000000000 rows"):
        table([0])
    with jax.enable_x64(True):
        ids = np.array([0, 10**12 - 1, -1, 2 * 10**6 + 3])
        expected = table.quotient.weight[ids % 10**12 // (2 * 10**6)] * table.remainder.weight[ids % (2 * 10**6)]
        np.testing.assert_allclose(table(ids), expected, **TOLERANCE)


@with_combine
@pytest.mark.parametrize("out_of_range", ["error", "nan", "zero", "clip"])
def test_ids_outside(combine, out_of_range):
    table = create(combine, out_of_range=out_of_range, padding_idx=7)
    ids = np.array([IDS, 3, -IDS - 1, IDS + 1])  # the last of which has both parts, were it not outside
    if out_of_range == "error":
        with pytest.raises(IndexError, match=r"CompositionalTable\(ids\)` must be in \[-23, 23\), .* got 23"):
            table(ids)
    out = jax.jit(CompositionalTable.__call__)(table, ids)
    gradient = jax.jit(jax.grad(lambda table: jnp.nansum(table(jnp.asarray(ids)))))(table)
    if out_of_range == "clip":
        np.testing.assert_allclose(out, vectors(table, [IDS - 1, 3, 0, IDS - 1]), **TOLERANCE)
        return
    np.testing.assert_array_equal(
        np.asarray(out)[[0, 2, 3]], np.full((3, DIM), 0 if out_of_range == "zero" else np.nan)
    )
    np.testing.assert_allclose(out[1], vector(table, 3), **TOLERANCE)
    assert np.flatnonzero(np.any(gradient.remainder.weight, axis=1)).tolist() == [3]
    assert np.flatnonzero(np.any(gradient.quotient.weight, axis=1)).tolist() == [0]


@with_combine
@pytest.mark.parametrize("out_of_range", ["error", "clip", "zero"])
def test_padding_reads_zero_and_names_no_row(combine, out_of_range):
    table = create(combine, padding_idx=-1, out_of_range=out_of_range)
    # Neither its own rows nor the last ones, to which numbers are clipped, are read.
    weights = [part.weight.at[np.array([4, -1])].set(np.nan) for part in (table.quotient, table.remainder)]
    parts = [Table(weight, out_of_range=out_of_range) for weight in weights]
    broken = CompositionalTable(*parts, IDS, combine, table.padding_idx)
    ids, cotangent = np.array([IDS - 1, 3, -1]), np.array([[np.nan], [1], [np.inf]], np.float32)

    def loss(table):
        return (table(ids) * cotangent).sum()

    np.testing.assert_array_equal(broken(ids)[np.array([0, 2])], np.zeros((2, DIM)))
    gradient, expected = jax.jit(lambda table: (embax.grad(loss)(table), jax.grad(loss)(table)))(broken)
    assert_same_gradient(gradient, expected, **TOLERANCE)
    assert np.isfinite(expected.quotient.weight).all()
    assert np.isfinite(expected.remainder.weight).all()
    assert gradient.quotient.ids.tolist() == [5, 0, 5]
    assert gradient.remainder.ids.tolist() == [5, 3, 5]


@with_combine
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])
def test_gradient_by_rows_is_that_of_jax(combine, wrap):
    table, ids = create(combine, padding_idx=2), np.array([[0, 22, 7], [7, -1, 2]])

    def loss(table):
        return jnp.sin(table(ids)).sum()

    value, gradient = wrap(embax.value_and_grad(loss, on_dense="error"))(table)
    np.testing.assert_allclose(value, np.sin(vectors(table, ids)).sum(), **TOLERANCE)
    assert isinstance(gradient, CompositionalTable)
    for part in gradient.quotient, gradient.remainder:
        assert isinstance(part, RowGrad)
        assert part.ids.shape == (6,)
    assert_same_gradient(gradient, jax.grad(loss)(table), **TOLERANCE)


@with_combine
def test_trains_only_what_is_read(combine):
    tx = rowwise_adagrad(0.5)
    table = create(combine, padding_idx=0)
    ids, target = np.array([6, 7, 0, 6]), jnp.ones((4, DIM))

    def loss(table):
        return jnp.square(table(ids) - target).mean()

    @jax.jit
    def step(table, state):
        value, gradient = embax.value_and_grad(loss, on_dense="error")(table)
        updates, state = tx.update(gradient, state, table)
        return embax.apply_updates(table, updates), state, value

    trained, state, losses = table, tx.init(table), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    changed = jax.tree.map(lambda x, y: np.flatnonzero(np.any(x != y, axis=1)).tolist(), trained, table)
    assert changed.quotient.weight == [1]
    assert changed.remainder.weight == [1, 2]
    np.testing.assert_array_equal(trained([0]), np.zeros((1, DIM)))


@with_combine
def test_checkify_finds_bad_ids_and_nothing_else(combine):
    table = create(combine, padding_idx=7)

    def rows(table, ids):
        return jax.tree.leaves(embax.grad(lambda table: table(ids).sum())(table))

    for call in CompositionalTable.__call__, jax.grad(lambda table, ids: table(ids).sum()), rows:
        run = jax.jit(checkify.checkify(call, errors=checkify.index_checks))
        assert run(table, jnp.array([7, 1, -1, 7]))[0].get() is None
        for bad in IDS, -IDS - 1:
            assert "index 5 is out of bounds for axis 0 with size 5" in run(table, jnp.array([7, 1, bad]))[0].get()


BAD = {
    "combine": ({"combine": "max"}, ValueError, r"combine=...\)` must be one of 'mul', 'add', 'concat', got 'max'"),
    "no_ids": ({"ids": 0}, ValueError, r"create\(ids=...\)` must be 1 or more, got 0"),
    "negative_ids": ({"ids": -1}, ValueError, r"ids=...\)` must not be negative, got -1"),
    "part_of_an_id": ({"ids": 1.5}, TypeError, r"ids=...\)` must be a whole number, got 1.5"),
    "dim": ({"dim": -1}, ValueError, r"dim=...\)` must not be negative, got -1"),
    "no_remainders": ({"remainders": 0}, ValueError, r"remainders=...\)` must be 1 or more, got 0"),
    "odd": ({"dim": 3, "combine": "concat"}, ValueError, r"dim=...\)` must be even for 'concat', got 3\. Half of it"),
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
        assert CompositionalTable.create(KEY, 9, 0, combine=combine)([1, 2]).shape == (2, 0)
