"""The plan of a sharding against compiled steps, and its expectations against draws."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import collectives, compiled
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from meshes import usual_and_rest

import embax
from embax.sharding._plan import plan

OPTIMIZERS = {
    "sgd": lambda: embax.optim.lift(optax.sgd(0.1)),
    "adagrad": lambda: embax.optim.lift(optax.adagrad(0.1)),
    "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(0.1),
    "adam": lambda: embax.optim.lift(optax.adam(0.1)),
    "rowwise_adam": lambda: embax.optim.rowwise_adam(0.1),
}
# Each way of the gradients to their rows; those below show nothing more.
STEPS = {
    "rows-cyclic-two-lookups": (
        (4,),
        {"axis": "x", "layout": "rows-cyclic"},
        "rowwise_adagrad",
        "float32",
        [2048, 1020],
    ),
    "columns": ((4,), {"axis": "x", "layout": "columns"}, "rowwise_adam", "float32", [4096]),
    "replicated": ((2, 2), {"axis": "x", "layout": "replicated"}, "adam", "float32", [2048]),
    "copies-sgd-float16": ((2, 2), {"axis": "x", "skew": 1.25}, "sgd", "float16", [2048]),
    "rows-and-columns-sgd": ((2, 2), {"axis": "x", "columns": "y"}, "sgd", "float32", [2048]),
}
MORE_STEPS = {
    "replicated-adagrad": ((2, 2), {"axis": "x", "layout": "replicated"}, "adagrad", "float32", [2048]),
    "copies-sgd": ((2, 2), {"axis": "y"}, "sgd", "float32", [2048]),
    "rows-sgd": ((4,), {"axis": "x"}, "sgd", "float32", [4096]),
    "rows-float16": ((2,), {"axis": "x", "skew": 1.5}, "sgd", "float16", [2048]),
    "rows-cyclic-adam-two-lookups": ((4,), {"axis": "x", "layout": "rows-cyclic"}, "adam", "float32", [2048, 1020]),
    "rows-and-columns-adagrad": ((2, 2), {"axis": "y", "columns": "x", "skew": 1.25}, "adagrad", "float32", [2048]),
    "columns-sgd-float16": ((4,), {"axis": "x", "layout": "columns"}, "sgd", "float16", [2048]),
    "copies-rowwise-adagrad": ((2, 2), {"axis": "x", "skew": 1.25}, "rowwise_adagrad", "float32", [2048]),
    "rows-and-columns-adam": ((2, 2), {"axis": "y", "columns": "x", "skew": 1.25}, "adam", "float32", [2048]),
}


def sent(program):
    """The collectives of a program that a plan knows, which leaves out those of a few flags."""
    found = [x for x in collectives(program) if x.kind in ("all-to-all", "all-gather")]
    return Counter((x.kind.replace("-", "_"), x.devices, x.bytes) for x in found)


@pytest.mark.parametrize("case", [*STEPS, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in MORE_STEPS)])
def test_plan_equals_the_compiled_step(case):
    shape, layout, optimizer, dtype, lookups = {**STEPS, **MORE_STEPS}[case]
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], devices=jax.devices()[: math.prod(shape)])
    tables = embax.shard({"t": embax.Table(jnp.zeros((1001, 32), dtype))}, mesh, **layout)
    tx = OPTIMIZERS[optimizer]()

    def loss(tables, ids):
        return sum((embax.lookup(tables["t"], x).astype(jnp.float32) ** 2).sum() for x in ids)

    def step(tables, state, ids):
        value, gradient = embax.value_and_grad(loss)(tables, ids)
        updates, state = tx.update(gradient, state, tables)
        return embax.apply_updates(tables, updates), state, value

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        state = tx.init(tables)
        over_all = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        ids = [jax.device_put(np.zeros(number, np.int32), over_all) for number in lookups]
        program = compiled(jax.jit(step, donate_argnums=(0, 1)), tables, state, ids)

    planned = plan(tables, mesh, {"t": lookups}, **layout, optimizer=optimizer).tables["t"]
    assert Counter((x.collective, x.devices, x.buffer) for x in planned.transfers) == sent(program)
    assert planned.state_bytes == bytes_of_first_device(state)
    assert planned.weight_bytes == tables["t"].weight.addressable_shards[0].data.nbytes
    assert 0.5 < planned.buffer_bytes / program.memory_analysis().temp_size_in_bytes < 2  # an estimate


def bytes_of_first_device(state):
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    return sum(x.data.nbytes for leaf in arrays for x in leaf.addressable_shards if x.device == jax.devices()[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_each_optimizer_is_planned(optimizer, dtype):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    tables = embax.shard({"t": embax.Table(np.zeros((1001, 32), dtype))}, mesh, "x", columns="y")
    planned = plan(tables, mesh, 2048, "x", columns="y", optimizer=optimizer).tables["t"]
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        state = OPTIMIZERS[optimizer]().init(tables)
    assert planned.state_bytes == bytes_of_first_device(state)


MORE_BAGS = {"rows": ((4,), {"axis": "x"}, jnp.float32, 64)}
BAGS = {
    "rows-cyclic-float16": ((2, 2), {"axis": "x", "layout": "rows-cyclic", "skew": 1.0}, jnp.float16, 32),
    "rows-short": ((4,), {"axis": "x"}, jnp.float32, 1),
    "columns": ((4,), {"axis": "x", "layout": "columns"}, jnp.float32, 16),
    "rows-and-columns": ((2, 2), {"axis": "x", "columns": "y"}, jnp.float32, 32),
}


@pytest.mark.parametrize("case", [*BAGS, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in MORE_BAGS)])
def test_plan_of_bags_equals_the_compiled_program(case):
    shape, layout, dtype, length = {**BAGS, **MORE_BAGS}[case]
    layout = layout | {"pool_at_owners": True}
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], devices=jax.devices()[: math.prod(shape)])
    table = embax.shard(embax.Table(jnp.zeros((1001, 32), dtype), padding_idx=0), mesh, **layout)
    bags = jax.device_put(np.zeros((128, length), np.int32), NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    program = compiled(jax.jit(functools.partial(embax.embedding_bag, mode="sum")), table, bags)
    planned = plan({"t": table}, mesh, bags.size, **layout, bag_length=length).tables["t"]
    assert Counter((x.collective, x.devices, x.buffer) for x in planned.transfers if x.phase == "forward") == sent(
        program
    )
    sums = [x for x in planned.transfers if "sums" in x.what]
    assert len(sums) == {"rows-short": 0, "rows-and-columns": 2}.get(case, 1)


def draws(rows, exponent, number, trials):
    """Ids by Zipf's law, (trials, number)."""
    weights = np.arange(1, rows + 1.0) ** -exponent
    return np.random.default_rng(0).choice(rows, (trials, number), p=weights / weights.sum())


MESHES = {
    "rows": ({"x": 8}, {"axis": "x"}),
    "rows-cyclic": ({"x": 8}, {"axis": "x", "layout": "rows-cyclic"}),
    "copies": ({"x": 4, "y": 2}, {"axis": "x", "layout": "rows-cyclic"}),
    "rows-and-columns": ({"x": 4, "y": 2}, {"axis": "x", "layout": "rows-cyclic", "columns": "y"}),
}


EXPECTED = usual_and_rest(
    [("rows", 1.05), ("rows-cyclic", 0.0), ("copies", 1.05), ("rows-and-columns", 1.05)],
    itertools.product(MESHES, (0.0, 1.05)),
)


@pytest.mark.parametrize(("case", "exponent"), EXPECTED)
def test_expectations_equal_the_mean_of_draws(case, exponent):
    mesh, layout = MESHES[case]
    rows, number, trials = 5003, 256, 400
    table = jax.ShapeDtypeStruct((rows, 8), np.float32)
    plans = {
        name: plan({"t": table}, mesh, number, **layout, skew=1.5, frequencies=exponent, optimizer=name).tables["t"]
        for name in ("sgd", "adam")
    }
    where, devices = plans["sgd"].placement, math.prod(mesh.values())
    shards, columns = where.shards, where.column_shards
    groups = draws(rows, exponent, number, trials).reshape(trials, devices // columns, -1)
    owners = groups % shards if where.cyclic else groups // where.block
    # Which group asks which owner for how many rows; devices with the same rows come one after the other.
    asked = np.array(
        [
            [[len(np.unique(ids[own == k])) for k in range(shards)] for ids, own in zip(*trial, strict=True)]
            for trial in zip(groups, owners, strict=True)
        ]
    )
    at_home = np.repeat(np.arange(shards), devices // columns // shards)[:, None] == np.arange(shards)
    foreign = np.where(at_home, 0, asked)
    capacity = where.capacity(number // devices * columns)

    distinct = np.mean([len(np.unique(ids)) for ids in groups.reshape(trials, -1)])
    rows_of_owner, ids_of_owner = asked.mean((0, 1)), np.bincount(owners.ravel(), minlength=shards)
    rounds = -(-foreign.max((1, 2)) // capacity)
    sent = np.minimum(foreign, capacity).sum(2).mean()
    for planned in plans.values():
        assert planned.distinct == pytest.approx(distinct, rel=0.01)
        assert planned.asked == pytest.approx(asked.sum(2).mean(), rel=0.01)
        assert planned.rows_balance == pytest.approx(rows_of_owner.max() / rows_of_owner.mean(), rel=0.05)
        assert planned.ids_balance == pytest.approx(ids_of_owner.max() / ids_of_owner.mean(), rel=0.05)
        assert planned.further == pytest.approx(np.mean(rounds > 1), abs=0.08)
        assert planned.rounds == pytest.approx(np.maximum(rounds, 1).mean(), rel=0.1)
        useful = {x.what: x.useful for x in planned.transfers if x.phase == "forward"}
        assert useful["rows"] == pytest.approx(sent * 8 // columns * 4, rel=0.05)
    crowded = np.mean(asked.max((1, 2)) > capacity)
    assert plans["adam"].crowded == pytest.approx(crowded, abs=0.08)


@pytest.mark.parametrize(("case", "exponent"), EXPECTED)
def test_expectations_of_bags_equal_the_mean_of_draws(case, exponent):
    mesh, layout = MESHES[case]
    rows, bags, length, trials = 5003, 32, 40, 100
    planned = plan(
        {"t": jax.ShapeDtypeStruct((rows, 64), np.float32)},
        mesh,
        bags * length,
        **layout,
        skew=1.0,
        pool_at_owners=True,
        bag_length=length,
        frequencies=exponent,
    ).tables["t"]
    where, devices = planned.placement, math.prod(mesh.values())
    shards, columns = where.shards, where.column_shards
    ids = draws(rows, exponent, bags * length, trials).reshape(trials, devices // columns, -1, length)
    owners = ids % shards if where.cyclic else ids // where.block
    asked = np.stack([(owners == k).sum((2, 3)) for k in range(shards)], -1)  # of each group, of each owner
    sums = np.stack([(owners == k).any(3).sum(2) for k in range(shards)], -1)
    capacity, others = where.capacity(ids[0, 0].size), (shards - 1) / shards
    useful = {x.what: x.useful for x in planned.transfers if x.phase == "forward"}
    assert useful["ids"] == pytest.approx(4 * np.minimum(asked, capacity).sum(2).mean() * others, rel=0.05)
    assert useful["sums"] == pytest.approx(4 * 64 // columns * sums.sum(2).mean() * others, rel=0.05)
    rounds = -(-asked.max((1, 2)) // capacity)
    assert planned.further == pytest.approx(np.mean(rounds > 1), abs=0.1)
    assert planned.rounds == pytest.approx(rounds.mean(), rel=0.1)


@pytest.mark.parametrize(
    ("exponent", "layout"),
    usual_and_rest(
        [(0.7, "rows"), (1.0, "rows-cyclic"), (1.3, "replicated")],
        itertools.product((0.7, 1.0, 1.3), ("rows", "rows-cyclic", "replicated")),
    ),
)
def test_zipf_is_the_sum_over_all_rows(exponent, layout):
    rows, mesh = 1_000_003, {"x": 96}
    counts = np.arange(1, rows + 1.0) ** -exponent
    table = {"t": jax.ShapeDtypeStruct((rows, 4), np.float32)}
    by_law, by_rows = (plan(table, mesh, 1 << 18, "x", layout, frequencies=f).tables["t"] for f in (exponent, counts))
    assert by_law.distinct == pytest.approx(by_rows.distinct, rel=1e-9)
    for name in ("asked", "ids_balance", "rows_balance", "rounds", "further", "crowded"):
        assert getattr(by_law, name) == pytest.approx(getattr(by_rows, name), rel=1e-3), name


def test_plan_of_a_billion_rows_takes_no_memory_or_device():
    tables = {
        "items": jax.ShapeDtypeStruct((10**9, 128), jnp.float32),
        "users": jax.ShapeDtypeStruct((3 * 10**9, 64), jnp.bfloat16),
    }
    planned = plan(
        tables, {"x": 1024}, {"items": [1 << 22, 1 << 20], "users": 1 << 22}, "x", "rows-cyclic", frequencies=1.05
    )
    items, users = planned.tables.values()
    assert items.weight_bytes == 976_563 * 512
    assert items.state_bytes == 976_563 * 4
    assert users.transfers[0].buffer == 1024 * 16 * 8  # ids of 64 bits
    assert users.transfers[1].buffer == 1024 * 16 * 64 * 2
    assert users.transfers[-1].buffer == 1024 * 16 * 64 * 4  # gradients are summed in float32
    assert 1e6 < items.distinct < 1 << 22
    assert items.rows_balance < 2 < items.ids_balance
    assert planned.sent() == items.sent("forward") + items.sent("backward") + users.sent()
    assert planned.useful("forward") == items.useful("forward") + users.useful("forward")
    assert 0 < planned.useful() < planned.sent()
    assert planned.memory == items.memory + users.memory


def test_meshes_and_tables_may_be_real_or_shapes():
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    table = embax.Table(jnp.zeros((101, 8)))
    plans = [
        plan({"t": leaf}, of, 64, "x", columns="y", frequencies=1.2)
        for leaf in (table, embax.shard(table, mesh, "x"), jax.ShapeDtypeStruct((101, 8), np.float32))
        for of in (mesh, AbstractMesh((2, 2), ("x", "y")), {"x": 2, "y": 2})
    ]
    assert all(x == plans[0] for x in plans)


@pytest.mark.parametrize(
    "table",
    [embax.Table(np.zeros((64, 8), np.float32), freeze=True), jax.ShapeDtypeStruct((64, 8), np.int8)],
    ids=["frozen", "integers"],
)
def test_untrained_table_has_no_gradient_and_no_state(table):
    planned = plan({"t": table}, {"x": 4}, 32, "x", optimizer="adam").tables["t"]
    assert {x.phase for x in planned.transfers} == {"forward"}
    assert planned.state_bytes == planned.crowded == 0


@pytest.mark.parametrize(
    ("rows", "dim", "ids"), [(0, 8, 16), (8, 0, 16), (8, 8, 0)], ids=["no-rows", "no-dim", "no-ids"]
)
@pytest.mark.parametrize("frequencies", ["uniform", 1.05])
def test_nothing_sends_nothing(rows, dim, ids, frequencies):
    planned = plan({"t": jax.ShapeDtypeStruct((rows, dim), np.float32)}, {"x": 4}, ids, "x", frequencies=frequencies)
    assert planned.sent() == planned.useful() == planned.tables["t"].buffer_bytes == 0


def test_one_device_sends_nothing_and_certain_rows_count_once():
    tables = {"t": jax.ShapeDtypeStruct((5, 2), np.float32)}
    planned = plan(tables, {"x": 1}, 64, "x", frequencies=[0, 0, 3, 0, 0])
    assert planned.sent() == 0
    assert planned.tables["t"].distinct == 1
    crowded = plan(tables, {"x": 5}, 100, "x", frequencies=[0, 0, 3, 0, 0]).tables["t"]
    assert (crowded.rounds, crowded.further, crowded.rows_balance) == (1, 0, 5)


def test_str_has_a_line_for_each_table_and_their_sum():
    tables = {name: jax.ShapeDtypeStruct((1 << 20, 64), np.float32) for name in ("films", "users")}
    text = str(plan(tables, {"x": 16}, 1 << 14, "x", frequencies={"films": 1.1, "users": "uniform"}))
    first, *lines = text.splitlines()
    assert first == "Placement('rows' over 16 of 'x')"
    assert [line.split()[0] for line in lines] == ["a", "films", "users", "in", "ids", "films", "users"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert "16.00 MiB" in lines[1]  # of the weight
    assert "32.00 MiB" in lines[3]


TABLE = {"t": jax.ShapeDtypeStruct((10, 6), np.float32)}
REFUSED = {
    "tables-list": (dict(tables=[(10, 6)]), TypeError, r"plan\(tables=...\)` must be Tables or jax.ShapeDtypeStructs"),
    "tables-tuple": (dict(tables={"t": (10, 6)}), TypeError, r"plan\(tables=...\)` must be Tables or"),
    "tables-scalar": (
        dict(tables={"t": jax.ShapeDtypeStruct((), np.float32)}),
        ValueError,
        "must have an axis of rows",
    ),
    "mesh-number": (dict(mesh=256), TypeError, r"plan\(mesh=...\)` must be a mesh, or the sizes of its axes by name"),
    "mesh-empty": (dict(mesh={}), TypeError, r"plan\(mesh=...\)` must be a mesh, or the sizes"),
    "mesh-zero": (dict(mesh={"x": 0}), ValueError, r"plan\(mesh=...\)` must have axes of 1 device or more"),
    "mesh-float": (dict(mesh={"x": 1.5}), TypeError, r"plan\(mesh=...\)` must be a whole number"),
    "ids-negative": (dict(ids=-1), ValueError, r"plan\(ids=...\)` must not be negative"),
    "ids-text": (dict(ids="64"), TypeError, r"plan\(ids=...\)` must be a whole number"),
    "ids-of-another": (dict(ids={"u": 3}), ValueError, r"plan\(ids=...\)` must have an entry for each table, got none"),
    "frequencies-of-another": (dict(frequencies={}), ValueError, r"plan\(frequencies=...\)` must have an entry for"),
    "frequencies-name": (dict(frequencies="zipf"), ValueError, r"plan\(frequencies=...\)` must be one of 'uniform'"),
    "frequencies-exponent": (dict(frequencies=-1.0), ValueError, r"plan\(frequencies=...\)` must be positive"),
    "frequencies-infinite": (
        dict(frequencies=np.inf),
        ValueError,
        r"plan\(frequencies=...\)` must be a finite exponent",
    ),
    "frequencies-shape": (dict(frequencies=[1.0, 2.0]), ValueError, r"must be a count for each of the 10 rows of 't'"),
    "frequencies-negative": (dict(frequencies=np.arange(-1, 9)), ValueError, "none negative and not all 0"),
    "frequencies-zero": (dict(frequencies=np.zeros(10)), ValueError, "none negative and not all 0"),
    "frequencies-nan": (dict(frequencies=np.full(10, np.nan)), ValueError, "none negative and not all 0"),
    "axis": (dict(axis="z"), ValueError, r"plan\(axis=..., columns=...\)` must be different axes of the mesh"),
    "layout": (dict(layout="diagonal"), ValueError, r"plan\(layout=...\)` must be one of"),
    "columns": (dict(layout="columns"), ValueError, r"plan` must have rows whose first axis divides by 4"),
    "skew": (dict(skew=0.5), ValueError, r"plan\(skew=...\)` must be finite and at least 1"),
    "pool_at_owners": (dict(pool_at_owners="yes"), TypeError, r"plan\(pool_at_owners=...\)` must be"),
    "bag_length": (dict(bag_length=3), ValueError, r"plan\(bag_length=...\)` must be 1 or more and divide the ids of"),
    "bag_length-zero": (dict(bag_length={"t": 0}), ValueError, r"plan\(bag_length=...\)` must be 1 or more"),
    "bag_length-integers": (
        dict(tables={"t": jax.ShapeDtypeStruct((10, 6), np.int8)}, bag_length=4),
        TypeError,
        r"plan\(bag_length=...\)` must be None for 't', which is of int8",
    ),
    "optimizer": (dict(optimizer="lamb"), ValueError, r"plan\(optimizer=...\)` must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_refuses(case):
    given, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        plan(**{"tables": TABLE, "mesh": {"x": 4}, "ids": 16, "axis": "x", **given})
