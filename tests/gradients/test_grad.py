"""value_and_grad of losses that look up where they run: equal to jax.value_and_grad, and held as the rows read."""

import dataclasses
import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IDS, ROWS, RULES, WEIGHT, assert_same_gradient, cotangent
from jax.sharding import AxisType, PartitionSpec

import embax
from embax import RowGrad, Table, lookup, renormalize

FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}
# The dense way casts a sum once, the sparse way each value: up to 6 duplicates, one rounding each.
LOW = {"bfloat16": {"rtol": 6 * 2**-8, "atol": 2**-6}, "float16": {"rtol": 6 * 2**-11, "atol": 2**-9}}

both_ways = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])


def loss(table, ids, cotangents, dtype=None):
    return (jnp.sin(lookup(table, ids, dtype)) * cotangents).sum()


def of(params, function, *args, wrap=lambda f: f, **options):
    """What embax makes of a loss, which is shown to be what JAX makes of it."""
    value, gradient = wrap(embax.value_and_grad(function, **options))(params, *args)
    expected = wrap(jax.value_and_grad(function, **options))(params, *args)
    np.testing.assert_allclose(value, expected[0], **FLOAT32)
    assert_same_gradient(gradient, expected[1], **FLOAT32)
    return gradient


# ---- Every rule, every shape of ids, every dtype.


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradient_is_that_of_jax(rules, ids):
    gradient = of(Table(WEIGHT, **rules), loss, ids, cotangent(ids))
    assert gradient.ids.shape == ((0,) if rules.get("freeze") else (ids.size,))
    assert (gradient.rows, gradient.dim) == (ROWS, (3,))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradient_under_jit_is_that_of_jax(rules):
    table, batches = Table(WEIGHT, **rules), [(ids, cotangent(ids)) for ids in IDS.values()]
    # All in one program, for they take longer to compile than to run.
    actual, expected = (
        jax.jit(lambda table, batches, grad=grad: [grad(loss)(table, *batch) for batch in batches])(table, batches)
        for grad in (embax.grad, jax.grad)
    )
    assert_same_gradient(actual, expected, **FLOAT32)


@both_ways
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["padding_first", "padding_last", "padding_frequency", "all"])
def test_padding_row_has_no_gradient_whatever_the_cotangent(name, bad, wrap):
    table, ids = Table(WEIGHT, **RULES[name]), IDS["matrix"]
    cotangents = np.where((ids == table.padding_idx)[..., None], np.float32(bad), cotangent(ids))
    gradient = of(table, lambda table: (lookup(table, ids) * cotangents).sum(), wrap=wrap)
    assert np.isfinite(gradient.values).all()
    assert table.padding_idx not in np.asarray(gradient.ids)


@pytest.mark.parametrize("policy", ["error", "clip", "nan", "zero"])
@pytest.mark.parametrize("rules", [{}, RULES["padding_last"], RULES["all"]], ids=["none", "padding_last", "all"])
def test_traced_ids_without_a_row(policy, rules):
    ids, cotangents = np.array([2, 9, -1, -12, 7, 2, -8]), cotangent(np.zeros(7))
    table = Table(WEIGHT, **rules, out_of_range=policy)
    gradient = of(table, lambda table, ids: (lookup(table, ids) * cotangents).sum(), ids, wrap=jax.jit)
    assert np.isfinite(embax.global_norm(gradient))


@both_ways
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("read", [None, "float32", "bfloat16"])
def test_dtypes(stored, read, wrap):
    table, ids = Table(jnp.asarray(WEIGHT, stored), **RULES["all"]), IDS["matrix"]
    cotangents = jnp.asarray(cotangent(ids), read or stored)
    gradient = wrap(lambda table: embax.grad(loss)(table, ids, cotangents, read))(table)
    assert gradient.dtype == stored
    tolerance = LOW.get(stored) or LOW.get(read) or FLOAT32
    assert_same_gradient(gradient, jax.grad(loss)(table, ids, cotangents, read), **tolerance)


@pytest.mark.parametrize("dim", [(), (1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("rules", [{}, RULES["all"]], ids=["none", "all"])
def test_trailing_axes(dim, rules):
    weight = np.random.default_rng(0).normal(size=(ROWS, *dim)).astype(np.float32)
    gradient = of(Table(weight, **rules), loss, IDS["matrix"], cotangent(IDS["matrix"], weight))
    assert gradient.values.shape == (8, *dim)


# ---- Ways to use tables, all of them seen by the tape.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table", "scale"], meta_fields=["name"])
@dataclasses.dataclass
class Model:
    table: Table
    scale: jax.Array
    name: str


T = Table(jnp.asarray(WEIGHT), **RULES["all"])
TWIN = dataclasses.replace(T, padding_idx=None)
COUNTED = Table(WEIGHT, scale_grad_by_freq=True)
U = Table(jnp.asarray(WEIGHT[:5] / 2), padding_idx=0)
SCALE = jnp.asarray([[1.0, -2.0, 0.5]])


def energy(table, ids):
    return jnp.sin(lookup(table, ids)).sum()


def renormalize_between(table):
    before = lookup(table, [1, 2, 5])
    table = renormalize(table, [1, 5, 1])
    after = lookup(table, [1, 6])
    return (jnp.sin(before[:2]) * after).sum() + energy(renormalize(table, [6]), [6, 5])


# Name: parameters, loss, and the lengths of the RowGrads in the order of the leaves.
USES = {
    "no_table": ({"a": SCALE, "b": [2.0]}, lambda p: (p["a"] ** 2).sum() * p["b"][0], []),
    "two_lookups": (T, lambda t: energy(t, [1, 5]) * energy(t, [[5, 2], [1, 1]]), [6]),
    "frequency_a_call": (COUNTED, lambda t: energy(t, [1, 1, 1]) + 2 * energy(t, [1, 2]), [5]),
    "a_result_twice": (T, lambda t: (rows := lookup(t, [2, 0, 2])).prod() * jnp.sin(rows).sum(), [3]),
    "two_tables": ((T, U), lambda p: (lookup(p[0], [1, 3]) * lookup(p[1], [4, 4])).sum(), [2, 2]),
    "nested": ({"in": [(T, SCALE)], "u": U}, lambda p: energy(p["in"][0][0], [1, 6]) * energy(p["u"], [3]), [2, 1]),
    "dataclass": (Model(T, SCALE, "m"), lambda m: (jnp.sin(lookup(m.table, [1, 1])) * m.scale).sum(), [2]),
    "one_array_two_leaves": ((T, TWIN), lambda p: energy(p[0], [1, 2]) + energy(p[1], [2, 2, 3]), [2, 3]),
    "closed_over": (T, lambda t: (lookup(t, [1, 3]) * lookup(U, [4, 4])).sum(), [2]),
    "closed_over_is_no_argument": (T, lambda t: energy(t, [1, 3]) * energy(T, [3, 4, 5]) + T.weight.sum(), [2]),
    "never_read": ((T, U), lambda p: energy(p[1], [2]), [0, 1]),
    "no_ids": (T, lambda t: energy(t, []), [0]),
    "shape_only": (T, lambda t: energy(t, [1]) * len(t.weight) + jnp.zeros_like(t.weight).sum(), [1]),
    "frozen": ((T, Table(WEIGHT, freeze=True)), lambda p: energy(p[0], [1]) * energy(p[1], [2]), [1, 0]),
    "frozen_inside": (T, lambda t: energy(dataclasses.replace(t, freeze=True), [1, 2]) * energy(t, [2]), [1]),
    "without_weight": ((T, jax.tree.map(lambda _: None, U)), lambda p: energy(p[0], [1, 2]), [2]),
    "renormalized": (Table(WEIGHT, max_norm=1.5), renormalize_between, [7]),
    "renormalized_with_rules": (T, renormalize_between, [7]),
    "replaced_rules": (COUNTED, lambda t: energy(dataclasses.replace(t, max_norm=1.0), [1, 1, 2]), [3]),
    "constant": (T, lambda t: 1.0, [0]),
}  # fmt: skip


@both_ways
@pytest.mark.parametrize("name", USES)
def test_uses_that_stay_sparse(name, wrap):
    params, function, lengths = USES[name]
    gradient = of(params, function, wrap=wrap)
    rows = [g for g in jax.tree.leaves(gradient, is_leaf=lambda g: isinstance(g, RowGrad)) if isinstance(g, RowGrad)]
    assert [g.ids.size for g in rows] == lengths


def test_an_integer_table_gets_no_rows():
    params = {"ids": Table(jnp.asarray([[3], [1], [0]])), "table": T}

    def by_code(params):
        return energy(params["table"], lookup(params["ids"], [0, 1, 1])[:, 0])

    gradient = embax.grad(by_code)(params)
    assert gradient["ids"].values.shape == (0, 1)
    expected = jax.grad(by_code, allow_int=True)(params)
    assert_same_gradient(gradient["table"], expected["table"], **FLOAT32)
    assert_same_gradient(embax.grad(by_code, allow_int=True)(params)["table"], expected["table"], **FLOAT32)


# ---- What may be asked for.


@pytest.mark.parametrize(
    "argnums", [0, 1, 2, -1, -3, (0,), (1,), (0, 2), (2, 0), (-1, 0), [0, 1], np.int64(2)], ids=str
)
def test_argnums(argnums):
    def function(table, scale, other, *, ids):
        return (lookup(table, ids) * scale * lookup(other["u"], ids)).sum()

    args = T, SCALE, {"u": U}
    gradient = embax.grad(function, argnums)(*args, ids=[1, 3, 3])
    expected = jax.grad(function, argnums)(*args, ids=[1, 3, 3])
    assert type(gradient) is (RowGrad if isinstance(argnums, int) and argnums in (0, -3) else type(expected))
    assert_same_gradient(gradient, expected, **FLOAT32)


@both_ways
def test_aux_may_be_anything(wrap):
    static = {"name": "a", "none": None, "number": 3, "float": 2.5, "flag": True, "host": np.arange(3), "f": len}
    if wrap is jax.jit:
        static = {"none": None}

    def function(params, ids):
        rows = lookup(params["t"], ids)
        return rows.sum(), {"rows": rows, "params": params, "pair": (rows.mean(), [ids]), **static}

    params = {"t": T, "scale": SCALE}
    gradient, aux = wrap(embax.grad(function, has_aux=True))(params, np.array([1, 3]))
    _, expected = wrap(jax.grad(function, has_aux=True))(params, np.array([1, 3]))
    assert jax.tree.structure(aux) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(aux), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, jax.Array) if isinstance(other, jax.Array) else type(one) is type(other)
        np.testing.assert_array_equal(one, other)
    assert isinstance(gradient["t"], RowGrad)


@both_ways
def test_a_renormalized_table_may_be_returned(wrap):
    def function(table, ids):
        new = renormalize(renormalize(table, ids), [0])
        return energy(new, ids), [new, table]

    table, ids = Table(WEIGHT, max_norm=1.5), np.array([1, 6, 6])
    gradient, (new, old) = wrap(embax.grad(function, has_aux=True))(table, ids)
    expected, (expected_new, _) = wrap(jax.grad(function, has_aux=True))(table, ids)
    np.testing.assert_array_equal(new.weight, expected_new.weight)
    np.testing.assert_array_equal(old.weight, WEIGHT)
    assert_same_gradient(gradient, expected, **FLOAT32)


def total(table, factor=1):
    return lookup(table, [1]).sum() * factor


# Name: loss, arguments, options.
ERRORS = {
    "not_scalar": (lambda t: lookup(t, [1]), [T], {}),
    "not_a_number": (lambda t: "a", [T], {}),
    "nothing": (lambda t: None, [T], {}),
    "integer": (lambda t: total(t).astype(int), [T], {}),
    "integer_leaf": (total, [T, 3], {"argnums": (0, 1)}),
    "text_leaf": (lambda p: total(p[0]), [(T, "a")], {}),
    "argnums_above": (total, [T], {"argnums": 1}),
    "argnums_below": (total, [T], {"argnums": (0, -2)}),
    "no_pair": (total, [T], {"has_aux": True}),
    "triple": (lambda t: (total(t), 1, 2), [T], {"has_aux": True}),
    "pair_unasked": (lambda t: (total(t), 1), [T], {}),
    "not_callable": (3, [T], {}),
    "holomorphic": (total, [T], {"holomorphic": True}),
    "missing_argument": (lambda t, u: total(t), [T], {}),
    "bad_id": (lambda t: lookup(t, [99]).sum(), [T], {}),
}


@pytest.mark.parametrize(("function", "args", "options"), ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_jax(function, args, options):
    with pytest.raises(Exception) as expected:  # noqa: PT011  (which one it is, is the matter of the test)
        jax.value_and_grad(function, **options)(*args)
    with pytest.raises(expected.type) as seen:
        embax.value_and_grad(function, **options)(*args)
    assert seen.type is expected.type


# What a run makes of the table, given its number.
IMPURE = {
    "more_lookups": lambda table, run: sum(energy(table, [1]) for _ in range(run)),
    "fewer_lookups": lambda table, run: energy(table, [1]) if run == 1 else 0.0,
    "another_shape": lambda table, run: energy(table, [1] * run),
    "another_use": lambda table, run: energy(table, [1]) + (table.weight.sum() if run == 2 else 0),
}


@pytest.mark.parametrize("impure", IMPURE.values(), ids=IMPURE)
def test_a_loss_that_differs_from_run_to_run_is_refused(impure):
    runs = []

    def function(table):
        runs.append(0)
        return impure(table, len(runs))

    with pytest.raises(RuntimeError, match=r"same (lookups )?each time it is traced"):
        embax.grad(function)(T)


# ---- Inside of other transformations.

LANES = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


def lane(index, tree):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_forward_and_reverse_through_the_gradient():
    function = functools.partial(loss, ids=LANES[1], cotangents=cotangent(LANES[1]))
    tangent = dataclasses.replace(T, weight=jnp.cos(T.weight))
    gradient, pushed = jax.jvp(embax.grad(function), (T,), (tangent,))
    expected, expected_pushed = jax.jvp(jax.grad(function), (T,), (tangent,))
    assert_same_gradient(gradient, expected, **FLOAT32)
    assert_same_gradient(RowGrad(gradient.ids, pushed.values, ROWS), expected_pushed, **FLOAT32)
    second, expected_second = (
        jax.grad(lambda t, grad=grad: embax.global_norm(grad(function)(t)))(T) for grad in (embax.grad, jax.grad)
    )
    assert_same_gradient(second, expected_second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True], ids=["ids", "tables_and_ids"])
def test_vmap_is_one_gradient_a_lane(stacked):
    weights = jnp.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]]) if stacked else T.weight
    tables = jax.tree.unflatten(jax.tree.structure(T), [weights])
    cotangents = cotangent(LANES)
    gradients = jax.jit(jax.vmap(embax.grad(loss), (0 if stacked else None, 0, 0)))(tables, LANES, cotangents)
    for k in range(3):
        table = lane(k, tables) if stacked else T
        assert_same_gradient(lane(k, gradients), jax.grad(loss)(table, LANES[k], cotangents[k]), **FLOAT32)


def test_scan_and_cond_hold_whole_training_steps():
    cotangents = cotangent(LANES)

    def step(grad, apply, table, batch):
        update = jax.lax.cond(
            batch[2] > 0, lambda: grad(loss)(table, *batch[:2]), lambda: grad(loss)(table, *batch[:2])
        )
        return apply(table, update), loss(table, *batch[:2])

    def dense_sgd(table, gradient):
        return jax.tree.map(lambda w, g: w - 0.1 * g, table, gradient)

    batches = LANES, cotangents, jnp.arange(3)
    sparse_step = functools.partial(step, embax.grad, lambda table, g: embax.apply_updates(table, -0.1 * g))
    table, losses = jax.jit(lambda t: jax.lax.scan(sparse_step, t, batches))(T)
    expected, expected_losses = jax.lax.scan(functools.partial(step, jax.grad, dense_sgd), T, batches)
    np.testing.assert_allclose(losses, expected_losses, **FLOAT32)
    np.testing.assert_allclose(table.weight, expected.weight, **FLOAT32)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_each_device_the_rows_that_it_read(check_vma):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    ids, cotangents, table = np.arange(8) % 5, cotangent(np.arange(8)), Table(WEIGHT)
    spec = PartitionSpec("x")
    shards = jax.shard_map(
        embax.grad(loss), mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec, check_vma=check_vma
    )
    gradient = jax.jit(shards)(table, ids, cotangents)
    np.testing.assert_array_equal(gradient.ids, ids)
    assert_same_gradient(gradient, jax.grad(loss)(table, ids, cotangents), **FLOAT32)


def test_threads_do_not_see_each_others_tape():
    inside, done = {1: threading.Event(), 3: threading.Event()}, threading.Event()

    def function(table, thread):
        first = energy(table, [thread])
        inside[thread].set()
        assert (inside[3] if thread == 1 else done).wait(60)
        return first * energy(table, [thread] * 2)

    def work(thread):
        assert thread == 1 or inside[1].wait(60)
        gradient = embax.grad(function)(T, thread)
        done.set()
        return np.asarray(gradient.ids)

    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(list(pool.map(work, [1, 3])), [[1] * 3, [3] * 3])


# ---- Cost.


@both_ways
def test_a_loop_compiles_nothing_after_its_first_turn(caplog, wrap):
    step = wrap(embax.value_and_grad(renormalize_between))
    tables = [Table(k * jnp.ones((11, 3)), **RULES["all"]) for k in range(4)]
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        step(tables[0])
        assert any("XLA compilation" in record.getMessage() for record in caplog.records)
        caplog.clear()
        for table in tables[1:]:
            step(table)
        assert not [record for record in caplog.records if "XLA compilation" in record.getMessage()]


@pytest.mark.parametrize("rules", [{}, RULES["all"]], ids=["none", "all"])
@pytest.mark.parametrize("function", [energy, lambda t, ids: lookup(t, ids).sum()], ids=["nonlinear", "sum"])
def test_memory_follows_the_ids_and_a_donated_step_copies_no_table(function, rules):
    def step(table, ids):
        value, gradient = embax.value_and_grad(function)(table, ids)
        return embax.apply_updates(table, -0.1 * gradient), value

    ids, temporary = jax.ShapeDtypeStruct((128,), jnp.int32), []
    for rows in (10**4, 10**6):
        table = Table(jax.ShapeDtypeStruct((rows, 16), jnp.float32), **rules)
        gradient = jax.jit(embax.value_and_grad(function)).lower(table, ids).compile().memory_analysis()
        program = jax.jit(step, donate_argnums=0).lower(table, ids).compile()
        assert program.memory_analysis().alias_size_in_bytes == rows * 16 * 4
        assert f"f32[{rows},16]{{1,0}} copy(" not in program.as_text()
        temporary.append((gradient.temp_size_in_bytes, program.memory_analysis().temp_size_in_bytes))
    assert temporary[0] == temporary[1]
    assert max(temporary[0]) <= 10 * 128 * 16 * 4
