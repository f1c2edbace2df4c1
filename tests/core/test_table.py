"""Table: its rules and their errors, create, resize, and its life as a pytree."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import embax
from embax import Table, lookup

KEY = jax.random.key(0)
WEIGHT = jnp.arange(1.0, 9).reshape(4, 2)
RULES = {
    "padding_idx": 1,
    "max_norm": 2.0,
    "norm_type": 3.0,
    "scale_grad_by_freq": True,
    "freeze": True,
    "out_of_range": "clip",
}


def rules_of(table):
    return {name: getattr(table, name) for name in RULES}


@pytest.mark.parametrize("weight", [np.ones((3, 2), np.float16), jnp.ones((3, 2), jnp.float16)], ids=["numpy", "jax"])
def test_table_keeps_weight_and_dtype(weight):
    table = Table(weight)
    assert isinstance(table.weight, jax.Array)
    assert (table.rows, table.dim, table.dtype) == (3, (2,), np.float16)


def test_table_takes_nested_lists():
    np.testing.assert_array_equal(Table([[1.0, 2.0], [3.0, 4.0]]).weight, [[1, 2], [3, 4]])
    assert Table([1, 2, 3]).dim == ()


def test_table_counts_padding_from_either_end_and_keeps_its_row():
    assert Table(WEIGHT, padding_idx=-1).padding_idx == 3
    assert Table(WEIGHT, padding_idx=np.int64(-4)).padding_idx == 0
    np.testing.assert_array_equal(Table(WEIGHT, padding_idx=-1).weight, WEIGHT)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"padding_idx": 4}, ValueError, r"Table\(padding_idx=...\)` must be a row of the table, in \[-4, 4\), got 4"),
        (
            {"padding_idx": -5},
            ValueError,
            r"Table\(padding_idx=...\)` must be a row of the table, in \[-4, 4\), got -5",
        ),
        ({"padding_idx": 0.5}, TypeError, r"Table\(padding_idx=...\)` must be a whole number, got 0.5"),
        ({"padding_idx": True}, TypeError, r"Table\(padding_idx=...\)` must be a whole number, got True"),
        ({"max_norm": 0}, ValueError, r"Table\(max_norm=...\)` must be positive, got 0.0"),
        ({"max_norm": -1.0}, ValueError, r"Table\(max_norm=...\)` must be positive, got -1.0"),
        ({"max_norm": "1"}, TypeError, r"Table\(max_norm=...\)` must be a positive number, got '1'"),
        ({"norm_type": 0}, ValueError, r"Table\(norm_type=...\)` must be positive, got 0.0"),
        ({"norm_type": None}, TypeError, r"Table\(norm_type=...\)` must be a positive number, got None"),
        ({"scale_grad_by_freq": 1}, TypeError, r"Table\(scale_grad_by_freq=...\)` must be a bool, got 1"),
        ({"freeze": None}, TypeError, r"Table\(freeze=...\)` must be a bool, got None"),
        ({"out_of_range": "wrap"}, ValueError, r"must be one of 'error', 'clip', 'nan', 'zero', got 'wrap'"),
        ({"paddingidx": 1}, TypeError, "unexpected keyword argument 'paddingidx'"),
    ],
    ids=str,
)
def test_table_refuses_bad_rules(rules, error, message):
    with pytest.raises(error, match=message):
        Table(WEIGHT, **rules)
    with pytest.raises(error, match=message):
        Table.create(KEY, 4, 2, **rules)


def test_table_refuses_positional_rules():
    with pytest.raises(TypeError, match="positional argument"):
        Table(WEIGHT, 0)


def test_table_refuses_a_scalar():
    with pytest.raises(ValueError, match=r"`embax.Table\(weight=...\)` must have an axis of rows, got a scalar"):
        Table(jnp.ones(()))


def test_table_refuses_max_norm_for_integers():
    with pytest.raises(TypeError, match=r"must be None for a table of integers, got 1.0 for int32. Cast the weight"):
        Table(jnp.ones((2, 2), jnp.int32), max_norm=1.0)


def test_table_is_frozen_and_compared_by_identity():
    table = Table(WEIGHT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.max_norm = 1.0
    assert table != Table(WEIGHT)
    assert table in {table}


def test_replace_checks_anew():
    table = dataclasses.replace(Table(WEIGHT, padding_idx=0), max_norm=1, padding_idx=-1)
    assert (table.max_norm, table.padding_idx) == (1.0, 3)
    with pytest.raises(ValueError, match="must be positive"):
        dataclasses.replace(table, max_norm=0)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_copies_have_the_same_rules(duplicate):
    table = duplicate(Table(WEIGHT, **RULES))
    np.testing.assert_array_equal(table.weight, WEIGHT)
    assert rules_of(table) == RULES


def test_repr_shows_the_rules_that_are_set():
    assert repr(Table(WEIGHT)) == "Table(float32[4,2])"
    assert repr(Table(WEIGHT, padding_idx=0, max_norm=1)) == "Table(float32[4,2], padding_idx=0, max_norm=1.0)"
    assert repr(jax.tree.map(lambda _: None, Table(WEIGHT, freeze=True))) == "Table(None, freeze=True)"


@pytest.mark.parametrize(
    ("dim", "axes"), [(3, (3,)), ((2, 3), (2, 3)), ([2, 3], (2, 3)), ((), ()), (0, (0,)), (3.0, (3,))]
)
def test_create_makes_rows_of_dim(dim, axes):
    table = Table.create(KEY, 5, dim, dtype=jnp.bfloat16)
    assert (table.weight.shape, table.dtype) == ((5, *axes), jnp.bfloat16)


def test_create_makes_no_rows():
    assert Table.create(KEY, 0, 4).weight.shape == (0, 4)


@pytest.mark.parametrize("dim", [16, (4, 4)])
def test_create_is_normal_with_one_over_the_root_of_dim(dim):
    weight = np.asarray(Table.create(KEY, 5000, dim).weight, np.float64)
    assert abs(weight.mean()) < 0.005  # 80,000 draws: 5 standard errors are 0.0044
    assert abs(weight.std() * 4 - 1) < 0.015  # 5 standard errors are 0.0125
    assert abs((np.abs(weight * 4) < 1).mean() - 0.6827) < 0.01


def test_create_calls_init_with_key_shape_and_dtype():
    calls = []

    def init(key, shape, dtype):
        calls.append((key, shape, dtype))
        return jnp.ones(shape, dtype)

    table = Table.create(KEY, 3, (2, 4), init=init, dtype=jnp.float16)
    assert calls == [(KEY, (3, 2, 4), jnp.float16)]
    np.testing.assert_array_equal(table.weight, np.ones((3, 2, 4), np.float16))


def test_create_zeroes_the_padding_row_and_keeps_the_rules():
    rules = RULES | {"padding_idx": -1}
    table = Table.create(KEY, 4, 2, **rules)
    np.testing.assert_array_equal(table.weight[3], [0, 0])
    assert np.all(np.asarray(table.weight[:3]) != 0)
    assert rules_of(table) == RULES | {"padding_idx": 3}


def test_create_makes_integers_by_init():
    table = Table.create(KEY, 4, 2, init=lambda _, shape, dtype: jnp.ones(shape, dtype), dtype=jnp.int8, padding_idx=0)
    np.testing.assert_array_equal(table.weight, [[0, 0], [1, 1], [1, 1], [1, 1]])
    with pytest.raises(
        TypeError, match=r"create\(init=...\)` must be given for a table of integers, got None for int8"
    ):
        Table.create(KEY, 4, 2, dtype=jnp.int8)


@pytest.mark.parametrize(
    ("rows", "dim", "error", "message"),
    [
        (-1, 2, ValueError, r"`embax.Table.create\(rows=...\)` must not be negative, got -1"),
        (1.5, 2, TypeError, r"`embax.Table.create\(rows=...\)` must be a whole number, got 1.5"),
        (4, -2, ValueError, r"`embax.Table.create\(dim=...\)` must not be negative, got -2"),
        (4, (2, "3"), TypeError, r"`embax.Table.create\(dim=...\)` must be a whole number, got '3'"),
        (4, None, TypeError, r"`embax.Table.create\(dim=...\)` must be a whole number, got None"),
    ],
)
def test_create_refuses_bad_sizes(rows, dim, error, message):
    with pytest.raises(error, match=message):
        Table.create(KEY, rows, dim)


def test_an_init_of_another_shape_is_refused():
    def init(key, shape, dtype):
        return jnp.ones(shape[::-1], dtype)

    message = r"must give the shape it is asked for, \(3, 2\), got \(2, 3\). Use its `shape` argument"
    with pytest.raises(ValueError, match=r"`embax.Table.create\(init=...\)` " + message):
        Table.create(KEY, 3, 2, init=init)
    with pytest.raises(ValueError, match=r"`embax.resize\(init=...\)` " + message):
        embax.resize(Table(WEIGHT), 7, KEY, init=init)


def test_create_under_jit():
    table = jax.jit(lambda key: Table.create(key, 4, 2, padding_idx=0))(KEY)
    np.testing.assert_allclose(table.weight, Table.create(KEY, 4, 2, padding_idx=0).weight, rtol=1e-6)  # float32
    assert table.padding_idx == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_resize_grows_with_fresh_rows(dtype):
    table = embax.resize(Table(WEIGHT.astype(dtype), **RULES), 6, KEY)
    assert (table.weight.shape, table.dtype) == ((6, 2), dtype)
    np.testing.assert_array_equal(table.weight[:4], WEIGHT.astype(dtype))
    np.testing.assert_array_equal(table.weight[4:], Table.create(KEY, 2, 2, dtype=dtype).weight)
    assert rules_of(table) == RULES


def test_resize_takes_an_init():
    table = embax.resize(Table(jnp.ones((2, 3), jnp.int32)), 3, KEY, init=jax.nn.initializers.zeros)
    np.testing.assert_array_equal(table.weight, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("rows", [4, 2, np.int64(2)])
def test_resize_cuts(rows):
    table = embax.resize(Table(WEIGHT, **RULES), rows)
    np.testing.assert_array_equal(table.weight, WEIGHT[: int(rows)])
    assert rules_of(table) == RULES


def test_resize_to_and_from_no_rows():
    assert embax.resize(Table(WEIGHT), 0).weight.shape == (0, 2)
    assert embax.resize(Table(jnp.zeros((0, 2))), 3, KEY).weight.shape == (3, 2)


def test_resize_does_not_change_its_argument():
    table = Table(WEIGHT)
    embax.resize(table, 2)
    np.testing.assert_array_equal(table.weight, WEIGHT)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (-1, ValueError, r"`embax.resize\(rows=...\)` must not be negative, got -1"),
        ("5", TypeError, r"`embax.resize\(rows=...\)` must be a whole number, got '5'"),
        (5, TypeError, r"`embax.resize\(key=...\)` must be a JAX random key where the table grows, got None"),
        (1, ValueError, r"`embax.resize\(rows=...\)` must keep the padding row 1, got 1"),
    ],
)
def test_resize_refuses(rows, error, message):
    with pytest.raises(error, match=message):
        embax.resize(Table(WEIGHT, padding_idx=1), rows)


def test_table_is_a_pytree_of_one_leaf():
    leaves, treedef = jax.tree_util.tree_flatten_with_path(Table(WEIGHT, **RULES))
    ((path, leaf),) = leaves
    assert jax.tree_util.keystr(path) == ".weight"
    assert leaf is WEIGHT
    table = jax.tree.unflatten(treedef, [WEIGHT])
    assert table.weight is WEIGHT
    assert rules_of(table) == RULES


@pytest.mark.parametrize(
    "leaf",
    [None, True, 0, "spec", jax.ShapeDtypeStruct((4, 2), jnp.float32), object()],
    ids=lambda leaf: type(leaf).__name__,
)
def test_table_is_rebuilt_with_any_leaf(leaf):
    table = jax.tree.map(lambda _: leaf, Table(WEIGHT, **RULES))
    assert table.weight is leaf
    assert rules_of(table) == RULES
    assert "padding_idx=1" in repr(table)


def test_treedef_compares_rules_by_value():
    structure = jax.tree.structure(Table(WEIGHT, **RULES))
    assert structure == jax.tree.structure(Table(2 * WEIGHT, **RULES))
    assert hash(structure) == hash(jax.tree.structure(Table(WEIGHT, **RULES)))
    for name, value in Table.__dataclass_fields__.items():
        if name in RULES:
            assert structure != jax.tree.structure(Table(WEIGHT, **RULES | {name: value.default}))


def test_jit_compiles_again_for_other_rules_only():
    traces = []

    @jax.jit
    def read(table):
        traces.append(table)
        return lookup(table, [0])

    for weight, rules in [(WEIGHT, {}), (-WEIGHT, {}), (WEIGHT, {"padding_idx": -4}), (WEIGHT, {"padding_idx": 0})]:
        read(Table(weight, **rules))
    assert len(traces) == 2


def test_jit_takes_gives_and_donates_tables():
    halve = jax.jit(lambda table: jax.tree.map(lambda w: w / 2, table), donate_argnums=0)
    before = Table(jnp.copy(WEIGHT), **RULES)
    after = halve(before)
    assert before.weight.is_deleted()
    np.testing.assert_array_equal(after.weight, WEIGHT / 2)
    assert rules_of(after) == RULES
