"""value_and_grad of losses that look up where they run: equal to jax.value_and_grad, and held as the rows read."""

import dataclasses
import functools
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IDS, ROWS, RULES, WEIGHT, assert_same_gradient, cotangent, dense
from jax.sharding import PartitionSpec
from meshes import mesh_of

import embax
from embax import RowGrad, Table, lookup, renormalize

FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}
# The dense way casts a sum once, the sparse way each value: up to 6 duplicates, one rounding each.
LOW = {"bfloat16": {"rtol": 6 * 2**-8, "atol": 2**-6}, "float16": {"rtol": 6 * 2**-11, "atol": 2**-9}}

both_ways = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["direct", "jit"])


def is_rows(node):
    return isinstance(node, RowGrad)


def loss(table, ids, cotangents, dtype=None):
    return (jnp.sin(lookup(table, ids, dtype)) * cotangents).sum()


def of(params, function, *args, wrap=lambda f: f, **options):
    """The gradient that embax makes of a loss, which is shown to be the one of JAX."""
    value, gradient = wrap(embax.value_and_grad(function, **options))(params, *args)
    expected = wrap(jax.value_and_grad(function, **options))(params, *args)
    np.testing.assert_allclose(value, expected[0], **FLOAT32)
    assert_same_gradient(gradient, expected[1], **FLOAT32)
    return gradient


def of_each(cases, tolerance=lambda name: FLOAT32, are_traced=True):
    """As `of` for named cases `(function, params, *args)`, all in one program: compiling takes longer than running."""

    def both(inputs):
        results = {}
        for name, (params, *args) in inputs.items():
            value, gradient = embax.value_and_grad(cases[name][0])(params, *args)
            expected = jax.value_and_grad(cases[name][0])(params, *args)
            results[name] = gradient, (value, dense(gradient)), dense(expected)
        return results

    inputs = {name: args for name, (_, *args) in cases.items()}
    results = jax.jit(both)(inputs) if are_traced else jax.jit(lambda: both(inputs))()
    for name, (_, actual, expected) in results.items():
        assert_same_gradient(actual, expected, **tolerance(name), err_msg=name)
    return {name: gradient for name, (gradient, _, _) in results.items()}


# ---- Every rule, every shape of ids, every dtype.

# Duplicates, negative ids, padding and all rows but two, in one batch.
EVERY = np.concatenate([IDS["matrix"].ravel(), IDS["negative"]]).reshape(2, 7)


# The gradient passes straight through the clipping by any norm.
SOME_RULES = [name for name in RULES if name not in ("norm_1", "norm_3", "norm_inf", "norm_half")]


def assert_rows(gradient, rules, ids):
    assert gradient.values.shape == (0 if rules.get("freeze") else ids.size, 3)
    assert (gradient.rows, gradient.dim) == (ROWS, (3,))


@pytest.mark.parametrize(
    ("rules", "some_ids", "are_traced"),
    [
        (SOME_RULES, {"scalar": "all", "empty": "all", "empty_matrix": "padding_last", "same": "padding_last"}, True),
        (["none", "padding_negative", "freeze", "all"], {"scalar": "all", "empty_matrix": "all"}, False),
    ],
    ids=["traced_ids", "concrete_ids"],
)
def test_gradient_equals_jax(rules, some_ids, are_traced):
    pairs = {name: (RULES[name], EVERY) for name in rules}
    pairs |= {f"{rules}, {name}": (RULES[rules], IDS[name]) for name, rules in some_ids.items()}

    def case(table, ids):
        batch = ids, cotangent(ids)
        return (loss, table, *batch) if are_traced else (lambda table: loss(table, *batch), table)

    gradients = of_each({name: case(Table(WEIGHT, **rules), ids) for name, (rules, ids) in pairs.items()})
    for name, (rules, ids) in pairs.items():
        assert_rows(gradients[name], rules, ids)


@pytest.mark.exhaustive
@both_ways
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradient_equals_jax_for_random_rules_and_ids(rules, ids, wrap):
    assert_rows(of(Table(WEIGHT, **rules), loss, ids, cotangent(ids), wrap=wrap), rules, ids)


def test_padding_row_has_no_gradient_whatever_the_cotangent():
    ids, cases = IDS["matrix"], {}
    bad_of = {"padding_first": np.nan, "padding_last": np.inf, "padding_frequency": np.nan, "all": np.inf}
    for name, bad in bad_of.items():
        table = Table(WEIGHT, **RULES[name])
        cotangents = np.where((ids == table.padding_idx)[..., None], np.float32(bad), cotangent(ids))
        cases[name] = lambda table, c: (lookup(table, ids) * c).sum(), table, cotangents
    for name, gradient in of_each(cases).items():
        assert np.isfinite(gradient.values).all(), name
        assert cases[name][1].padding_idx not in np.asarray(gradient.ids), name


POLICIES = "error", "clip", "nan", "zero"


def test_traced_ids_without_a_row():
    ids, cotangents = np.array([2, 9, -1, -12, 7, 2, -8]), cotangent(np.zeros(7))
    gradients = of_each(
        {
            f"{name}, {policy}": (
                lambda table, ids: (lookup(table, ids) * cotangents).sum(),
                Table(WEIGHT, **RULES[name], out_of_range=policy),
                ids,
            )
            for name, policies in {"none": POLICIES, "all": ["error", "clip"], "padding_last": ["clip"]}.items()
            for policy in policies
        }
    )
    assert np.isfinite(jax.jit(embax.global_norm)([gradients["none, nan"], gradients["all, error"]]))


def some_and_all(some, grid):
    """The cases of every run in one program, and the whole grid in that of an exhaustive run."""
    return pytest.mark.parametrize(
        "cases", [some, pytest.param(grid, marks=pytest.mark.exhaustive)], ids=["some", "all"]
    )


@some_and_all(
    [("float32", "bfloat16"), ("bfloat16", None), ("bfloat16", "float32"), ("float16", None)],
    [*itertools.product(["float32", "bfloat16", "float16"], [None, "float32", "bfloat16"])],
)
def test_dtypes(cases):
    ids = IDS["matrix"]
    cases = {
        f"{stored}, {read}": (
            functools.partial(loss, ids=ids, cotangents=cotangent(ids).astype(jnp.dtype(read or stored)), dtype=read),
            Table(WEIGHT.astype(jnp.dtype(stored)), **RULES["all"]),
        )
        for stored, read in cases
    }

    def tolerance(name):
        stored, read = name.split(", ")
        return LOW.get(stored) or LOW.get(read) or FLOAT32

    for name, gradient in of_each(cases, tolerance).items():
        assert gradient.dtype == name.split(",")[0]


@some_and_all(
    [((), "all"), ((1,), "none"), ((2, 3), "all"), ((0,), "none")],
    [*itertools.product([(), (1,), (2, 3), (0,)], ["none", "all"])],
)
def test_trailing_axes(cases):
    weights = {dim: np.random.default_rng(0).normal(size=(ROWS, *dim)).astype(np.float32) for dim, _ in cases}
    ids = IDS["matrix"]
    gradients = of_each(
        {
            f"{dim}, {rules}": (
                functools.partial(loss, ids=ids, cotangents=cotangent(ids, weights[dim])),
                Table(weights[dim], **RULES[rules]),
            )
            for dim, rules in cases
        }
    )
    for dim, rules in cases:
        # JAX differentiates nothing of width 0, so that such a table may count as not read.
        expected = [(8, *dim)] if dim != (0,) else [(8, 0), (0, 0)]
        assert gradients[f"{dim}, {rules}"].values.shape in expected


# ---- Ways to use tables.


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table", "scale"], meta_fields=["name"])
@dataclasses.dataclass
class Model:
    table: Table
    scale: jax.Array
    name: str


T = Table(jnp.asarray(WEIGHT), padding_idx=2, max_norm=1.5)
PADDED = dataclasses.replace(T, max_norm=None)
TWIN = dataclasses.replace(PADDED, padding_idx=None)
ALL = dataclasses.replace(T, scale_grad_by_freq=True)  # a count of ids is a sort, which takes long to compile
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
    "a_result_twice": (PADDED, lambda t: (rows := lookup(t, [2, 0, 2])).prod() * jnp.sin(rows).sum(), [3]),
    "two_tables": ((PADDED, U), lambda p: (lookup(p[0], [1, 3]) * lookup(p[1], [4, 4])).sum(), [2, 2]),
    "nested": ({"in": [(T, SCALE)], "u": U}, lambda p: energy(p["in"][0][0], [1, 6]) * energy(p["u"], [3]), [2, 1]),
    "dataclass": (Model(PADDED, SCALE, "m"), lambda m: (jnp.sin(lookup(m.table, [1, 1])) * m.scale).sum(), [2]),
    "one_array_two_leaves": ((PADDED, TWIN), lambda p: energy(p[0], [1, 2]) + energy(p[1], [2, 2, 3]), [2, 3]),
    "closed_over": (PADDED, lambda t: (lookup(t, [1, 3]) * lookup(U, [4, 4])).sum(), [2]),
    "closed_over_as_well": (PADDED, lambda t: energy(t, [1, 3]) * (energy(PADDED, [3]) + PADDED.weight.sum()), [2]),
    "never_read": ((PADDED, U), lambda p: energy(p[1], [2]), [0, 1]),
    "no_ids": (PADDED, lambda t: energy(t, []), [0]),
    "shape_only": (PADDED, lambda t: energy(t, [1]) * len(t.weight) + jnp.zeros_like(t.weight).sum(), [1]),
    "frozen": ((PADDED, Table(WEIGHT, freeze=True)), lambda p: energy(p[0], [1]) * energy(p[1], [2]), [1, 0]),
    "frozen_inside": (PADDED, lambda t: energy(dataclasses.replace(t, freeze=True), [1, 2]) * energy(t, [2]), [1]),
    "without_weight": ((PADDED, jax.tree.map(lambda _: None, U)), lambda p: energy(p[0], [1, 2]), [2]),
    "renormalized": (Table(WEIGHT, max_norm=1.5), renormalize_between, [7]),
    "renormalized_with_rules": (T, renormalize_between, [7]),
    "replaced_rules": (COUNTED, lambda t: energy(dataclasses.replace(t, max_norm=1.0), [1, 1, 2]), [3]),
    "constant": (PADDED, lambda t: 1.0, [0]),
}  # fmt: skip


def lengths_of(gradient):
    return [len(g.values) for g in jax.tree.leaves(gradient, is_leaf=is_rows) if is_rows(g)]


# Which depend on whether the weights are tracers.
FOR_CONCRETE_WEIGHTS = ["one_array_two_leaves", "closed_over_as_well", "never_read", "constant"]


@pytest.mark.parametrize(
    ("names", "are_traced"),
    [
        (USES, True),
        (FOR_CONCRETE_WEIGHTS, False),
        pytest.param(USES, False, marks=pytest.mark.exhaustive),
    ],
    ids=["traced", "concrete", "all_concrete"],
)
def test_uses_that_stay_sparse(names, are_traced):
    gradients = of_each({name: (USES[name][1], USES[name][0]) for name in names}, are_traced=are_traced)
    for name, gradient in gradients.items():
        rows = [g for g in jax.tree.leaves(gradient, is_leaf=is_rows) if is_rows(g)]
        assert [len(g.values) for g in rows] == USES[name][2], name


def test_an_integer_table_gets_no_rows():
    params = {"ids": Table(np.array([[3], [1], [0]], np.int32)), "table": T}

    def by_code(params):
        return energy(params["table"], lookup(params["ids"], [0, 1, 1])[:, 0])

    @jax.jit
    def gradients(params):
        ours = [grad(by_code)(params) for grad in (embax.grad, functools.partial(embax.grad, allow_int=True))]
        return ours, jax.grad(by_code, allow_int=True)(params)["table"]

    ours, expected = gradients(params)
    for gradient in ours:
        assert gradient["ids"].values.shape == (0, 1)
        assert_same_gradient(gradient["table"], expected, **FLOAT32)


# ---- What may be asked for.


ARGNUMS = [0, 1, 2, -1, -3, (0,), (1,), (0, 2), (2, 0), (-1, 0), [0, 1], np.int64(2)]


def test_argnums():
    def function(table, scale, other, *, ids):
        return (lookup(table, ids) * scale * lookup(other["u"], ids)).sum()

    @jax.jit
    def both(*args):
        return [[grad(function, n)(*args, ids=[1, 3, 3]) for grad in (embax.grad, jax.grad)] for n in ARGNUMS]

    for argnums, (gradient, expected) in zip(ARGNUMS, both(T, SCALE, {"u": U}), strict=True):
        assert isinstance(gradient, RowGrad if isinstance(argnums, int) and argnums in (0, -3) else type(expected))
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

    def both(*args):
        return [grad(function, has_aux=True)(*args) for grad in (embax.grad, jax.grad)]

    table, ids = Table(WEIGHT, max_norm=1.5), np.array([1, 6, 6])
    (gradient, (new, old)), (expected, (expected_new, _)) = wrap(both)(table, ids)
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
def test_grad_raises_the_errors_of_jax(function, args, options):
    with pytest.raises(Exception) as expected:  # noqa: PT011  (which one it is, is the matter of the test)
        jax.value_and_grad(function, **options)(*args)
    with pytest.raises(expected.type) as seen:
        embax.value_and_grad(function, **options)(*args)
    assert seen.type is expected.type


def test_grad_runs_the_loss_once():
    """What it prints, calls and reads outside of its arguments happens once, whether it is traced or not."""
    runs, seen = [], []

    def function(table, ids, flag, name):
        runs.append(name)
        jax.debug.callback(lambda x: seen.append(int(x)), ids[0])
        return energy(table, ids) if flag and (ids > 0).all() else 0.0 * table.weight.sum()

    expected = jax.grad(function)(T, jnp.array([1, 3]), True, "jax")
    gradient = embax.grad(function)(T, jnp.array([1, 3]), True, "embax")
    jax.effects_barrier()
    assert (runs, seen) == (["jax", "embax"], [1, 1])
    assert_same_gradient(gradient, expected, **FLOAT32)
    assert isinstance(gradient, RowGrad)


def test_concrete_ids_without_a_row_are_named():
    with pytest.raises(IndexError, match=r"got 1000000 at position \(0,\)"):
        embax.grad(lambda table, ids: energy(table, ids))(T, [10**6])


# ---- Inside of other transformations.

LANES = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


def lane(index, tree):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def test_forward_and_reverse_through_the_gradient():
    function = functools.partial(loss, ids=LANES[1], cotangents=cotangent(LANES[1]))

    @jax.jit
    def both(table):
        tangent = dataclasses.replace(table, weight=jnp.cos(table.weight))
        uncounted = dataclasses.replace(table, scale_grad_by_freq=False)
        grads = embax.grad, jax.grad
        return (
            [jax.jvp(grad(function), (table,), (tangent,)) for grad in grads],
            [jax.grad(lambda t, grad=grad: embax.global_norm(grad(function)(t)))(uncounted) for grad in grads],
        )

    ((gradient, pushed), (expected, expected_pushed)), (second, expected_second) = both(ALL)
    assert_same_gradient(gradient, expected, **FLOAT32)
    assert_same_gradient(RowGrad(gradient.ids, pushed.values, ROWS), expected_pushed, **FLOAT32)
    assert_same_gradient(second, expected_second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True], ids=["ids", "tables_and_ids"])
def test_vmap_is_one_gradient_a_lane(stacked):
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]]) if stacked else WEIGHT
    tables, cotangents = dataclasses.replace(ALL if stacked else T, weight=weights), cotangent(LANES)

    @jax.jit
    def both(tables):
        lanes = jax.vmap(embax.grad(loss), (0 if stacked else None, 0, 0))(tables, LANES, cotangents)
        of_lane = [lane(k, tables) if stacked else tables for k in range(3)]
        expected = [jax.grad(loss)(*args) for args in zip(of_lane, LANES, cotangents, strict=True)]
        return lanes, [lane(k, lanes) for k in range(3)], expected

    lanes, gradients, expected = both(tables)
    assert (isinstance(lanes, RowGrad), lanes.lanes) == (True, (3,))
    assert_same_gradient(gradients, expected, **FLOAT32)


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
    steps = sparse_step, functools.partial(step, jax.grad, dense_sgd)
    both = jax.jit(lambda table: [jax.lax.scan(step, table, batches) for step in steps])
    (table, losses), (expected, expected_losses) = both(T)
    np.testing.assert_allclose(losses, expected_losses, **FLOAT32)
    np.testing.assert_allclose(table.weight, expected.weight, **FLOAT32)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_each_device_the_rows_that_it_read(check_vma):
    ids, cotangents, table = np.arange(8) % 5, cotangent(np.arange(8)), Table(WEIGHT)
    spec, mesh = PartitionSpec("x"), mesh_of({"x": 2})
    shards = jax.shard_map(
        embax.grad(loss), mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec, check_vma=check_vma
    )

    @jax.jit
    def both(*args):
        gradient = shards(*args)
        return gradient.ids, gradient.to_dense(), jax.grad(loss)(*args).weight

    ids_read, gradient, expected = both(table, ids, cotangents)
    np.testing.assert_array_equal(ids_read, ids)
    np.testing.assert_allclose(gradient, expected, **FLOAT32)


def test_threads_differentiate_at_the_same_time():
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
    step = wrap(embax.value_and_grad(lambda table: energy(renormalize(table, [1, 5]), [1, 5])))
    tables = [Table(k * jnp.ones((11, 3)), padding_idx=2, max_norm=1.5) for k in range(4)]
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        step(tables[0])
        assert any("XLA compilation" in record.getMessage() for record in caplog.records)
        caplog.clear()
        for table in tables[1:]:
            step(table)
        assert not [record for record in caplog.records if "XLA compilation" in record.getMessage()]


def whole_step(function, table, ids):
    value, gradient = embax.value_and_grad(function)(table, ids)
    return embax.apply_updates(table, -0.1 * gradient), value


MILLION = 10**6  # rows: a byte for each is far more than a program may use
BYTES_OF_ROWS = 128 * 16 * 4  # that are read


def shapes(rules):
    table = Table(jax.ShapeDtypeStruct((MILLION, 16), jnp.float32), **rules)
    return table, jax.ShapeDtypeStruct((128,), jnp.int32)


@pytest.mark.parametrize(
    ("function", "rules"),
    [
        (energy, RULES["all"]),
        (lambda table, ids: lookup(table, ids).sum(), {}),  # whose gradient does not depend on the rows
        pytest.param(energy, {}, marks=pytest.mark.exhaustive),
        pytest.param(lambda table, ids: lookup(table, ids).sum(), RULES["all"], marks=pytest.mark.exhaustive),
    ],
    ids=["nonlinear-all", "sum-none", "nonlinear-none", "sum-all"],
)
def test_a_donated_step_copies_no_table_and_its_memory_follows_the_ids(function, rules):
    step = jax.jit(functools.partial(whole_step, function), donate_argnums=0)
    program = step.lower(*shapes(rules)).compile()
    assert program.memory_analysis().alias_size_in_bytes == MILLION * 16 * 4
    assert program.memory_analysis().temp_size_in_bytes <= 10 * BYTES_OF_ROWS
    assert f"f32[{MILLION},16]{{1,0}} copy(" not in program.as_text()
