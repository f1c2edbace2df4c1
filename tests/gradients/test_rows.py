"""RowGrad: what it holds, its arithmetic and what refuses to be it; global_norm and apply_updates against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from embax import RowGrad, Table, apply_updates, global_norm, optim

ROWS = 7
IDS = [4, 1, 4, ROWS, 0, 4]  # duplicates, and a place without a row
VALUES = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # float32
HALF = {"bfloat16": {"rtol": 2**-8}, "float16": {"rtol": 2**-11}}  # one rounding of a sum of up to 6

drawn_ids = st.lists(st.integers(0, ROWS), min_size=6, max_size=6)


def example(dtype="float32"):
    return RowGrad(IDS, jnp.asarray(VALUES, dtype), ROWS)


def dense(ids, values, rows=ROWS):
    """The gradient that ids and values stand for, in float64."""
    out = np.zeros((rows, *np.shape(values)[1:]))
    for index, value in zip(np.asarray(ids), np.asarray(values, np.float64), strict=True):
        if index < rows:
            out[index] += value
    return out


# ---- The constructor and what is read from it.


@pytest.mark.parametrize("rows", [1000, 256])
@pytest.mark.parametrize(
    "ids",
    [[127, 3], (127, 3), *(np.array([127, 3], dtype) for dtype in ("int8", "uint8", "int16", "int64", "uint64"))],
    ids=lambda ids: str(getattr(ids, "dtype", type(ids).__name__)),
)
@pytest.mark.parametrize("convert", [lambda ids: ids, jnp.asarray], ids=["host", "jax"])
def test_ids_of_any_integer_dtype_are_kept(ids, rows, convert):
    gradient = RowGrad(convert(ids), np.ones((2, 3), np.float32), rows)
    assert gradient.ids.dtype == jnp.int32
    np.testing.assert_array_equal(gradient.ids, [127, 3])


def test_ids_at_the_end_of_their_dtype_are_kept():
    last = RowGrad(np.array([255, 0], np.uint8), jnp.ones((2, 1)), 256)
    np.testing.assert_array_equal(last.ids, [255, 0])
    none = RowGrad(np.array([2**31 - 1, 2**31 - 2]), jnp.ones((2, 1)), 2**31 - 1)
    np.testing.assert_array_equal(none.ids, [2**31 - 1, 2**31 - 2])


@pytest.mark.parametrize("rows", [ROWS, 0])
def test_no_ids(rows):
    gradient = RowGrad([], jnp.zeros((0, 2, 3)), rows)
    assert (gradient.ids.shape, gradient.ids.dtype, gradient.dim) == ((0,), jnp.int32, (2, 3))
    assert gradient.to_dense().shape == (rows, 2, 3)
    assert (gradient.deduplicated().ids.shape, global_norm(gradient)) == ((0,), 0)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "uint32"])
def test_traced_id_out_of_range_counts_as_no_row(dtype):
    ids = np.array([3, -1, 100, ROWS]).astype(dtype)

    @jax.jit
    def read(ids):
        gradient = RowGrad(ids, jnp.ones((4, 1)), ROWS)
        return gradient.ids, gradient.to_dense()

    kept, dense = read(ids)
    np.testing.assert_array_equal(kept, [3, ROWS, ROWS, ROWS])
    assert np.asarray(dense).sum() == 1


def test_properties():
    gradient = example("bfloat16")
    assert (gradient.rows, gradient.dim, gradient.dtype) == (ROWS, (3,), jnp.bfloat16)
    np.testing.assert_array_equal(gradient.ids, IDS)
    np.testing.assert_array_equal(gradient.values, jnp.asarray(VALUES, jnp.bfloat16))


@pytest.mark.parametrize(
    ("ids", "values", "rows", "error", "match"),
    [
        ([1.0], np.ones((1, 2)), 3, TypeError, r"ids=.*integer dtype, got float64"),
        ([True], np.ones((1, 2)), 3, TypeError, r"ids=.*integer dtype, got bool"),
        ([1], np.ones((1, 2), int), 3, TypeError, r"values=.*float dtype, got int32"),
        ([[1]], np.ones((1, 2)), 3, ValueError, r"got \(1, 1\) and \(1, 2\)"),
        ([1, 2], np.ones((1, 2)), 3, ValueError, r"got \(2,\) and \(1, 2\)"),
        ([1], 1.0, 3, ValueError, r"got \(1,\) and \(\)"),
        ([1, 4], np.ones((2, 2)), 3, ValueError, r"in \[0, 3\], 3 for none, got 4 at position 1"),
        ([-1], np.ones((1, 2)), 3, ValueError, r"got -1 at position 0"),
        (jnp.array([100], jnp.int8), np.ones((1, 2)), 3, ValueError, r"got 100 at position 0"),
        ([0], np.ones((1, 2)), -3, ValueError, r"rows=.*must not be negative"),
        ([0], np.ones((1, 2)), 2.5, TypeError, r"rows=.*whole number"),
        (np.array([2**31 + 5]), np.ones((1, 2)), 2**32, ValueError, "jax_enable_x64"),
    ],
)
def test_the_constructor_refuses(ids, values, rows, error, match):
    values = values if isinstance(values, float) else values.astype(np.int32 if values.dtype == int else np.float32)
    with pytest.raises(error, match=match):
        RowGrad(ids, values, rows)


def test_repr():
    assert repr(example()) == "RowGrad(6 ids of 7 rows, float32[6,3])"
    assert repr(jax.tree.map(lambda _: None, example())) == "RowGrad(of 7 rows, None)"
    assert repr(jax.tree.map(lambda _: True, example())) == "RowGrad(of 7 rows, True)"
    seen = []
    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), example())
    jax.vmap(lambda lane: seen.append(repr(lane)))(lanes)
    jax.jit(lambda gradient: seen.append(repr(gradient)))(example())
    assert seen == [repr(example())] * 2


def test_ids_of_64_bits_of_a_table_beyond_memory():
    rows, ids = 2**40, [2**31, 2**32 - 1, 2**32, 2**31 - 1, 2**40 - 1, 0, 2**40]

    @jax.jit
    def read(traced):
        gradient = RowGrad(np.array(ids), jnp.ones((7, 2), jnp.float32), rows)
        narrow = RowGrad(np.array([5, 3], np.int32), jnp.ones((2, 2), jnp.float32), rows)
        of_traced = RowGrad(traced, jnp.ones((7, 2), jnp.float32), rows)
        summed = 2 * (gradient + gradient)
        return [x.ids for x in (gradient, of_traced, narrow, summed, gradient.deduplicated())]

    with jax.enable_x64():
        assert RowGrad(np.array(ids), np.ones((7, 2), np.float32), rows).ids.dtype == jnp.int64
        all_ids = [np.asarray(x) for x in read(np.array(ids))]
    for actual, expected in zip(all_ids, [ids, ids, [5, 3], ids + ids, sorted(ids)], strict=True):
        assert actual.dtype == np.int64
        np.testing.assert_array_equal(actual, expected)


# ---- Sums.


@jax.jit
def sums(gradient):
    once = gradient.deduplicated()
    return gradient.to_dense(), once, once.ids, once.to_dense(), global_norm(gradient)


@given(ids=drawn_ids)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_to_dense_deduplicated_and_norm_are_of_the_sum(ids):
    values = np.where(np.array(ids)[:, None] == ROWS, np.nan, VALUES)  # nobody reads what stands beside no row
    gradient, expected = RowGrad(ids, values, ROWS), dense(ids, VALUES)
    to_dense, once, once_ids, once_dense, norm = sums(gradient)
    np.testing.assert_allclose(to_dense, expected, **TOLERANCE)
    distinct = sorted({index for index in ids if index < ROWS})
    np.testing.assert_array_equal(once_ids, distinct + [ROWS] * (6 - len(distinct)))
    np.testing.assert_allclose(once_dense, expected, **TOLERANCE)
    assert not np.asarray(once.values)[len(distinct) :].any()
    np.testing.assert_allclose(norm, np.linalg.norm(expected), **TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_sums_in_float32(dtype):
    def of(gradient):
        to_dense, _, _, once_dense, norm = sums(gradient)
        return (to_dense, once_dense), norm

    few = of(example(dtype))[0]
    many, norm = of(RowGrad(np.ones(4096, int), np.ones((4096, 1), dtype), 3))
    expected = dense(IDS, jnp.asarray(VALUES, dtype))
    for gradient, of_many in zip(few, many, strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, **HALF[dtype])
        np.testing.assert_array_equal(of_many, np.array([[0], [4096], [0]], many[0].dtype))
    assert (norm, norm.dtype) == (4096, jnp.float32)


def test_global_norm_equals_the_dense_gradient():
    tree = {"table": example(), "bias": jnp.arange(3.0), "dense": Table(jnp.asarray(VALUES)), "none": None}
    expected = np.linalg.norm([*dense(IDS, VALUES).ravel(), *np.arange(3.0), *VALUES.ravel()])
    np.testing.assert_allclose(jax.jit(global_norm)(tree), expected, **TOLERANCE)
    assert global_norm({}) == 0


# ---- Arithmetic that knows it.


def test_add_puts_lengths_together():
    both = example() + RowGrad([2], 10 * jnp.ones((1, 3)), ROWS)
    np.testing.assert_array_equal(both.ids, [*IDS, 2])
    np.testing.assert_allclose(both.to_dense(), dense(IDS, VALUES) + dense([2], 10 * np.ones((1, 3))), **TOLERANCE)


@pytest.mark.parametrize(
    "other",
    [
        RowGrad([1], jnp.ones((1, 3)), ROWS + 1),
        RowGrad([1], jnp.ones((1, 2)), ROWS),
        RowGrad([1], jnp.ones((1, 3), jnp.bfloat16), ROWS),
    ],
    ids=["rows", "dim", "dtype"],
)
def test_add_refuses_another_table(other):
    with pytest.raises(ValueError, match="must be of tables of the same rows, dim and dtype"):
        example() + other


FACTORS = [2, -0.5, np.float32(3), np.float64(3), np.int64(3), np.array(3.0), jnp.float32(3), jnp.asarray(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])
def test_scaling_scales_the_values(dtype, wrap):
    gradient = example(dtype)
    both = wrap(lambda factors, gradient: [(factor * gradient, gradient * factor) for factor in factors])
    for factor, pair in zip(FACTORS, both(FACTORS, gradient), strict=True):
        for scaled in pair:
            assert (scaled.rows, scaled.dtype) == (ROWS, dtype)
            np.testing.assert_array_equal(scaled.ids, IDS)
            np.testing.assert_array_equal(scaled.values, gradient.values * jnp.asarray(factor, dtype))


@pytest.mark.parametrize("factor", [np.ones(6, np.float32), jnp.ones(6), jnp.ones((6, 3)), jnp.ones(1)], ids=repr)
def test_scaling_by_an_array_is_refused(factor):
    with pytest.raises(ValueError, match="must have a scalar factor, got shape"):
        factor * example()
    with pytest.raises(ValueError, match="must have a scalar factor, got shape"):
        example() * factor


# ---- Arithmetic that does not know it.

G = example()
TABLE = Table(jnp.ones((ROWS, 3)))
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), G)


def psum_of_shards():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sum_ = functools.partial(jax.lax.psum, axis_name="x")
    return jax.jit(jax.shard_map(sum_, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec()))(STACKED)


IGNORANT = {
    "operator_array": lambda: G + jnp.ones((6, 3)),
    "array_operator": lambda: jnp.ones((6, 3)) + G,
    "numpy_operator": lambda: np.ones((6, 3), np.float32) + G,
    "operator_number": lambda: G + 1,
    "product": lambda: G * G,
    "complex": lambda: 1j * G,
    "array": lambda: jnp.asarray(G),
    "add": lambda: jax.tree.map(jnp.add, G, G),
    "scale": lambda: jax.tree.map(lambda leaf: 2 * leaf, G),
    "mean": lambda: jax.tree.map(jnp.mean, G),
    "mean_of_lanes": lambda: jax.tree.map(lambda leaf: leaf.mean(0), STACKED),
    "cast": lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), G),
    "psum": lambda: jax.vmap(lambda g: jax.lax.psum(g, "i"), axis_name="i")(STACKED),
    "pmean": lambda: jax.vmap(lambda g: jax.lax.pmean(g, "i"), axis_name="i")(STACKED),
    "psum_of_shards": psum_of_shards,
    "optax_norm": lambda: optax.tree.norm(G),
    "optax_add": lambda: optax.tree.add(G, G),
    "optax_scale": lambda: optax.tree.scale(2.0, G),
    "optax_apply_updates": lambda: optax.apply_updates(TABLE, G),
    **{
        f"{name}_of_{like}": functools.partial(lambda tx, params: tx.update(G, tx.init(params), params), tx, params)
        for name, tx in {
            "clip_by_global_norm": optax.clip_by_global_norm(1.0),
            "clip": optax.clip(1.0),
            "sgd": optax.sgd(0.1),
            "adam": optax.adam(0.1),
            "ema": optax.ema(0.9),
            "trace": optax.trace(0.9),
            "multi_steps": optax.MultiSteps(optim.lift(optax.sgd(0.1)), 2),
        }.items()
        for like, params in {"table": TABLE, "rowgrad": G}.items()
        if (name, like) != ("multi_steps", "rowgrad")
    },
}


@pytest.mark.parametrize("name", IGNORANT)
def test_arithmetic_on_the_leaves_raises(name):
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        IGNORANT[name]()


# ---- A pytree.


def assert_same(actual, expected):
    assert (actual.rows, actual.dtype) == (expected.rows, expected.dtype)
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.values, expected.values)


def test_row_grad_passes_through_jit_cond_scan_and_vmap():
    other = RowGrad([0, 0, 5, 5, ROWS, 1], jnp.ones((6, 3)), ROWS)
    assert_same(jax.jit(lambda g: g)(G), G)
    choose = jax.jit(lambda c: jax.lax.cond(c, lambda: G, lambda: other))
    for chosen, expected in ((True, G), (False, other)):
        assert_same(choose(chosen), expected)
    last, all_ = jax.lax.scan(lambda carry, g: (g, 2 * carry), other, STACKED)
    assert_same(last, G)
    assert_same(jax.tree.map(lambda leaf: leaf[0], all_), 2 * other)
    dense_lanes, once = jax.jit(jax.vmap(lambda g: (g.to_dense(), g.deduplicated())))(STACKED)
    np.testing.assert_allclose(dense_lanes, [dense(IDS, VALUES)] * 2, **TOLERANCE)
    assert_same(jax.tree.map(lambda leaf: leaf[1], once), jax.jit(RowGrad.deduplicated)(G))


def test_row_grad_can_be_donated():
    gradient = example()
    size = 6 * (2 * 4 + 3 * 4)  # two words an id, three float32 a value
    double = jax.jit(lambda g: 2 * g, donate_argnums=0)
    assert double.lower(gradient).compile().memory_analysis().alias_size_in_bytes == size
    assert_same(double(gradient), 2 * G)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("zeros", [lambda g: jax.tree.map(jnp.zeros_like, g), optax.tree.zeros_like])
def test_zeros_mean_no_rows(zeros):
    nothing = zeros(G)
    np.testing.assert_array_equal(nothing.ids, [ROWS] * 6)
    assert not np.asarray(nothing.to_dense()).any()
    minus = Table(np.full((ROWS, 3), -0.0, np.float32))
    assert bits(apply_updates(minus, nothing).weight) == bits(minus.weight)


# ---- apply_updates.


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])
def test_apply_updates_adds_up_duplicates(wrap):
    table = wrap(apply_updates)(TABLE, RowGrad(IDS, np.where(np.array(IDS)[:, None] == ROWS, np.nan, VALUES), ROWS))
    np.testing.assert_allclose(table.weight, 1 + dense(IDS, VALUES), **TOLERANCE)
    assert bits(np.asarray(table.weight)[[2, 3, 5, 6]]) == bits(np.ones((4, 3), np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_apply_updates_sums_low_precision_in_float32(dtype):
    table = Table(np.zeros((3, 2), jnp.dtype(dtype)))
    new = jax.jit(apply_updates)(table, RowGrad(np.ones(4096, int), np.ones((4096, 2), jnp.dtype(dtype)), 3))
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.weight, np.array([[0, 0], [4096, 4096], [0, 0]], table.dtype))


@pytest.mark.parametrize("update", [RowGrad([1, 2, 1], jnp.ones((3, 3)), ROWS), Table(jnp.ones((ROWS, 3)))], ids=repr)
@pytest.mark.parametrize("rules", [{"padding_idx": 1}, {"freeze": True}], ids=str)
def test_padding_and_frozen_rows_stay_bit_for_bit(update, rules):
    weight = np.full((ROWS, 3), -0.0, np.float32)
    weight[1, 0] = np.nan
    new = jax.jit(apply_updates)(Table(weight, **rules), update)
    after, kept = np.asarray(new.weight), np.arange(ROWS) if "freeze" in rules else np.array([1])
    assert bits(after[kept]) == bits(weight[kept])
    assert ("freeze" in rules) or (after[2] == 1).all()
    assert repr(new) == repr(Table(weight, **rules))


def test_integer_tables_stay_unchanged():
    table = Table(jnp.arange(ROWS))
    assert apply_updates(table, RowGrad([1], jnp.ones(1), ROWS)) is table


def test_apply_updates_equals_optax_at_ordinary_leaves():
    params = {"a": jnp.arange(3.0), "b": (jnp.ones(2, jnp.bfloat16), None), "c": [jnp.float16(2)], "d": 1.5}
    updates = {"a": jnp.full(3, 0.1), "b": (jnp.ones(2, jnp.bfloat16), None), "c": [jnp.float16(0.5)], "d": 2.0}
    expected = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, apply_updates(params, updates), expected)
    actual = apply_updates({**params, "table": TABLE}, {**updates, "table": G})
    table = actual.pop("table")
    assert jax.tree.map(lambda leaf: leaf.dtype, actual) == jax.tree.map(lambda leaf: leaf.dtype, expected)
    np.testing.assert_allclose(table.weight, 1 + dense(IDS, VALUES), **TOLERANCE)


def test_no_update_leaves_a_parameter_alone():
    params = {"a": jnp.ones(2), "table": TABLE, "none": TABLE, "padded": Table(TABLE.weight, padding_idx=0)}
    none = {"none": RowGrad([], jnp.zeros((0, 3)), ROWS), "padded": jax.tree.map(lambda _: None, params["padded"])}
    new = apply_updates(params, {"a": None, "table": None, **none})
    assert new["a"] is params["a"]
    assert new["table"] is TABLE
    assert bits(new["none"].weight) == bits(new["padded"].weight) == bits(TABLE.weight)


@pytest.mark.parametrize(
    ("update", "error", "match"),
    [
        (jnp.ones((ROWS, 3)), TypeError, "must have a RowGrad or a Table where the parameters have a Table"),
        (RowGrad([1], jnp.ones((1, 3)), ROWS + 1), ValueError, r"must fit the table Table\(float32\[7,3\]\)"),
        (RowGrad([1], jnp.ones((1, 2)), ROWS), ValueError, "must fit the table"),
        (Table(jnp.ones((ROWS, 2))), ValueError, "must fit the table"),
    ],
)
def test_apply_updates_refuses(update, error, match):
    with pytest.raises(error, match=match):
        apply_updates({"table": TABLE}, {"table": update})
    with pytest.raises(ValueError, match="Dict key mismatch"):
        apply_updates({"table": TABLE}, {"other": G})


def test_apply_updates_is_in_place_if_the_table_is_donated():
    temporary = []
    for rows in (10**4, 10**6):
        table = Table(jax.ShapeDtypeStruct((rows, 16), jnp.float32), padding_idx=0)
        update = jax.eval_shape(lambda: RowGrad(jnp.arange(128), jnp.ones((128, 16)), 10**4))
        update = jax.tree.unflatten(jax.tree.structure(RowGrad([], jnp.zeros((0, 16)), rows)), jax.tree.leaves(update))
        memory = jax.jit(apply_updates, donate_argnums=0).lower(table, update).compile().memory_analysis()
        assert memory.alias_size_in_bytes == rows * 16 * 4
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[0] == temporary[1] <= 128 * 16 * 4
