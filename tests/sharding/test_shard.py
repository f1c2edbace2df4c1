"""shard, unshard and Table.create on a mesh: from every source, between layouts, and on each device only its part."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import compiled
from meshes import AXES, LAYOUTS, mesh_of, on_mesh, usual_and_rest, waiting

import embax
from embax import Collection, Feature, Table, Vectors
from embax._core import table as _table
from embax._mesh import relayout as _moves

WEIGHT = np.random.default_rng(0).normal(size=(101, 8)).astype(np.float32)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def stored(placement, weight):
    """What the array of a placement holds, row by row."""
    out = np.zeros((placement.stored_rows, *weight.shape[1:]), weight.dtype)
    block = -(-len(weight) // placement.shards)
    for row in range(len(weight)):
        out[row % placement.shards * block + row // placement.shards if placement.cyclic else row] = weight[row]
    return out


@pytest.mark.parametrize(
    ("layout", "axes", "traced"),
    usual_and_rest(
        [
            ("rows", "explicit", False),
            ("rows-cyclic", "auto", True),
            ("columns", "explicit", True),
            ("replicated", "auto", False),
            ("rows and copies", "explicit", False),
            ("rows and columns", "auto", False),
            ("rows over two axes", "explicit", True),
        ],
        [(layout, axes, True) for layout in LAYOUTS for axes in AXES],
    ),
)
def test_shard_from_every_source_and_back(layout, axes, traced, tmp_path):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    WEIGHT.tofile(tmp_path / "rows")
    Vectors([f"t{row}" for row in range(len(WEIGHT))], WEIGHT).save(tmp_path / "v.safetensors")
    smaller = mesh_of({"z": 3}, axes)
    sources = {
        "table": Table(WEIGHT, padding_idx=4),
        "array": WEIGHT,
        "memory map": np.memmap(tmp_path / "rows", np.float32, "r", shape=WEIGHT.shape),
        "file": Vectors.load(tmp_path / "v.safetensors"),
        "another layout": embax.shard(WEIGHT, mesh, mesh.axis_names[0], "rows-cyclic"),
        "another mesh": embax.shard(WEIGHT, smaller, "z", "rows-cyclic"),
    }
    for name, source in sources.items():
        table = embax.shard(source, mesh, **how)
        np.testing.assert_array_equal(table.weight, stored(table.placement, WEIGHT), err_msg=name)
        assert table.weight.sharding == table.placement.sharding(table.weight.shape, (8,))
        assert table.weight.addressable_shards[0].data.nbytes <= table.weight.nbytes // pieces(table.placement)
        assert (table.rows, table.dim) == (101, (8,))
        assert table.padding_idx == (4 if name == "table" else None)
        back = embax.unshard({"a": [table, 1]})["a"][0]
        np.testing.assert_array_equal(back.weight, WEIGHT)
        assert back.placement is None
    if traced:
        np.testing.assert_array_equal(jax.jit(embax.unshard)(table).weight, WEIGHT)


def pieces(placement):
    return placement.shards * placement.column_shards


@of_layouts
def test_create_makes_the_same_rows(layout):
    sizes, how = LAYOUTS[layout]
    key = jax.random.key(1)
    table = Table.create(key, 101, 8, padding_idx=4, mesh=mesh_of(sizes, "explicit"), **how)
    expected = Table.create(key, 101, 8, padding_idx=4)
    np.testing.assert_allclose(embax.unshard(table).weight, expected.weight, rtol=1e-6)
    np.testing.assert_array_equal(table.weight, stored(table.placement, np.asarray(embax.unshard(table).weight)))
    assert table.weight.sharding == table.placement.sharding(table.weight.shape, (8,))


def test_create_and_move_hold_a_part_on_each_device(monkeypatch):
    mesh, rows, dim = mesh_of({"x": 8}), 200_001, 16
    programs, real = [], jax.jit

    def jit(function):
        programs.append(compiled(real(function)))
        return programs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(_table.jax, "jit", jit)
        table = Table.create(jax.random.key(0), rows, dim, padding_idx=4, mesh=mesh, axis="x")
    part = table.weight.nbytes / 8
    assert programs[0].memory_analysis().temp_size_in_bytes < 4 * part
    cyclic = dataclasses.replace(table.placement, cyclic=True)
    moved = compiled(_moves.moved, table.placement, table.weight, cyclic).memory_analysis()
    assert moved.temp_size_in_bytes < part
    assert moved.output_size_in_bytes < 1.01 * part


def test_shard_reads_from_a_source_only_the_rows_of_a_device():
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            part = np.asarray(self)[index]
            read.append(part.nbytes)
            return part

    embax.shard(WEIGHT.view(Watched), mesh_of({"x": 8}), "x", "rows-cyclic")
    assert len(read) == 8
    assert max(read) == math.ceil(101 / 8) * 8 * 4


TABLES = {"film": Table(WEIGHT, padding_idx=0), "user": Table(WEIGHT[:30] + 1), "tag": Table(WEIGHT[:9, :4])}
FEATURES = [
    Feature("liked", "film", "mean"),
    Feature("seen", "user", "sum"),
    Feature("tag", "tag"),
]


@pytest.mark.parametrize("axes", ["explicit", pytest.param("auto", marks=pytest.mark.exhaustive)])
def test_a_collection_on_a_mesh_has_the_tables_by_name(axes):
    on = embax.shard(Collection(TABLES, FEATURES), mesh_of({"x": 4}, axes), "x", "rows-cyclic")
    for name, table in on.tables.items():
        assert table.placement.rows == TABLES[name].rows
        assert table.padding_idx == TABLES[name].padding_idx
        np.testing.assert_array_equal(embax.unshard(table).weight, TABLES[name].weight)
    again = embax.restack(embax.unstack({"c": on}), like={"c": on})["c"]
    assert jax.tree.structure(again) == jax.tree.structure(on)
    for one, other in zip(again.stacks, on.stacks, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize("axes", ["auto", pytest.param("explicit", marks=pytest.mark.exhaustive)])
def test_collection_trains_on_a_mesh_like_without_one(axes):
    rng = np.random.default_rng(2)
    lists = [list(rng.integers(0, 30, rng.integers(0, 6))) for _ in range(16)]
    batch = {
        "liked": rng.integers(-1, 101, (16, 4)),
        "seen": embax.Ragged.from_lists(lists),
        "tag": np.array([[1], [8]]),
    }
    batch["liked"][0] = 0  # padding
    tx = embax.optim.lift(optax.sgd(0.1))

    @waiting
    @jax.jit
    def step(params, state, batch):
        def loss(params):
            out = params(batch)
            return sum(jnp.sum(jnp.sin(x)) for x in out.values()), out

        gradient, out = embax.grad(loss, has_aux=True, on_dense="error")(params)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state, out

    off = Collection(TABLES, FEATURES)
    mesh = mesh_of({"x": 4}, axes)
    on = embax.shard(off, mesh, "x")
    state, of_off = on_mesh(mesh, tx.init(on)), tx.init(off)
    for number in range(2):
        on, state, out = step(on, state, batch)
        off, of_off, expected = step(off, of_off, batch)
        for name in expected if number == 0 else ():
            if name == "seen":  # a bag may lie on two devices, so that its sum has another order
                np.testing.assert_allclose(out[name], expected[name], rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(out[name], expected[name], err_msg=name)
    for one, other in zip(embax.unshard(on).stacks, off.stacks, strict=True):
        np.testing.assert_allclose(one.weight, other.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mesh": 8}, TypeError, "must be a jax.sharding.Mesh, got int"),
        ({"layout": "blocks"}, ValueError, "layout"),
        ({"axis": "z"}, ValueError, "must be different axes of the mesh"),
        ({"axis": ()}, ValueError, "must be different axes of the mesh"),
        ({"columns": "x"}, ValueError, "must be different axes of the mesh"),
        ({"layout": "columns", "columns": "y"}, ValueError, "must have one axis and no other for columns"),
        ({"layout": "columns", "axis": ("x", "y")}, ValueError, "must have one axis and no other for columns"),
        ({"skew": 0.5}, ValueError, "must be finite and at least 1, got 0.5"),
        ({"skew": math.inf}, ValueError, "must be finite and at least 1"),
        ({"pool_at_owners": 1}, TypeError, r"`embax.shard\(pool_at_owners=...\)` must be"),
        ({"layout": "columns", "tree": WEIGHT[:, :6]}, ValueError, "whose first axis divides by 4"),
        ({"layout": "columns", "tree": WEIGHT[:, 0]}, ValueError, "whose first axis divides by 4"),
        ({"tree": {"a": Table(WEIGHT)}, "padding_idx": 1}, TypeError, "must be for an array"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_shard_refuses(arguments, error, match):
    arguments = {"tree": WEIGHT, "mesh": mesh_of({"x": 4, "y": 2}), "axis": "x", **arguments}
    with pytest.raises(error, match=match):
        embax.shard(arguments.pop("tree"), arguments.pop("mesh"), arguments.pop("axis"), **arguments)


def test_shard_refuses_traced_tables_and_create_too_many_rows():
    mesh = mesh_of({"x": 8})
    with pytest.raises(TypeError, match="outside of `jit`, got the traced"):
        jax.jit(lambda table: embax.shard(table, mesh, "x"))(Table(WEIGHT))
    with pytest.raises(ValueError, match=r"`embax.Table.create` must have rows that fit in 32 bits"):
        Table.create(jax.random.key(0), 2**31 - 1, 1, mesh=mesh, axis="x")


def test_placement_gives_the_owner_of_each_row():
    placement = embax.shard(WEIGHT, mesh_of({"x": 4, "y": 2}), "x", "rows-cyclic", columns="y").placement
    ids = np.arange(-1, 103)
    exists = (ids >= 0) & (ids < 101)
    positions, back = jax.jit(lambda ids: (x := placement.positions(ids), placement.ids(x)))(ids)
    np.testing.assert_array_equal(back, np.where(exists, ids, 101))
    np.testing.assert_array_equal(placement.positions(ids), positions)
    assert repr(placement) == "Placement('rows-cyclic' over 4 of 'x' x 2 of 'y')"
    assert (placement.layout, placement.block, placement.stored_rows) == ("rows-cyclic", 26, 104)
    assert repr(embax.shard(Table(WEIGHT), placement.mesh, "x")).startswith("Table(float32[101,8], placement=")
