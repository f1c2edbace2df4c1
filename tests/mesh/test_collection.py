"""Collections of tables that are sharded one by one: stored as one where they are laid out alike, refused where not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import mesh_of, on_mesh, waiting

import embax
from embax import Collection, Feature, Ragged, Table

DIM = 4
TABLES = {
    "film": Table(np.random.default_rng(0).normal(size=(13, DIM)).astype(np.float32), padding_idx=0),
    "user": Table(np.random.default_rng(1).normal(size=(6, DIM)).astype(np.float32)),
    "tag": Table(np.random.default_rng(2).normal(size=(3, DIM)).astype(np.float32), padding_idx=(1, 2)),
}
FEATURES = [
    Feature("film", "film"),
    Feature("tag", "tag"),
    Feature("liked", "film", "mean"),
    Feature("seen", "user", "sum"),
    Feature("best", "user", "max"),
]
BATCH = {
    "film": np.array([12, 0, -1, 3]),
    "tag": np.array([[2], [0]]),
    "liked": np.array([[1, 2, 12], [0, 3, 3], [0, 0, 0]]),
    "seen": Ragged.from_lists([[5, 0], [], [1, 1, 1, 2]]),
    "best": np.array([[5, 4], [0, 1]]),
}
TX = embax.optim.lift(optax.adagrad(0.1))

pytestmark = pytest.mark.usefixtures("standard_promotion")


@waiting
@jax.jit
def step(collection, state, batch):
    def loss(collection):
        out = collection(batch)
        return sum(jnp.sum(jnp.sin(x)) for x in out.values()), out

    gradient, out = embax.grad(loss, has_aux=True, on_dense="error")(collection)
    updates, state = TX.update(gradient, state, collection)
    dense = {name: rows.to_dense() for name, rows in gradient.tables.items()}
    return embax.apply_updates(collection, updates), state, (out, dense)


@pytest.mark.parametrize(
    ("layout", "axes", "features"),
    [
        *(
            pytest.param(*case, tuple(BATCH), marks=pytest.mark.exhaustive)
            for case in [("rows-cyclic", "explicit"), ("rows", "auto"), ("columns", "auto"), ("replicated", "explicit")]
        ),
    ],
)
def test_tables_of_one_layout_are_stacked(layout, axes, features):
    mesh = mesh_of({"x": 4}, axes)
    read = [feature for feature in FEATURES if feature.name in features]
    batch = {name: BATCH[name] for name in features}
    on = Collection({name: embax.shard(table, mesh, "x", layout) for name, table in TABLES.items()}, read)
    off = Collection(TABLES, read)
    assert (len(on.stacks), on.stacks[0].rows, on.stacks[0].placement.layout) == (1, 22, layout)
    for name, table in on.tables.items():
        assert (table.rows, table.padding_idx) == (TABLES[name].rows, TABLES[name].padding_idx)
        np.testing.assert_array_equal(embax.unshard(table).weight, TABLES[name].weight)
    state = on_mesh(mesh, TX.init(on))
    of_off = TX.init(off)
    for _ in range(2):
        on, state, seen = step(on, state, batch)
        off, of_off, expected = step(off, of_off, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), seen, expected)
    for name, table in on.tables.items():
        after = embax.unshard(table).weight
        np.testing.assert_allclose(after, off[name].weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_tables_that_differ_in_how_rows_are_exchanged_are_stored_apart():
    mesh = mesh_of({"x": 4})
    tables = {"film": embax.shard(TABLES["film"], mesh, "x", skew=3.0), "user": embax.shard(TABLES["user"], mesh, "x")}
    collection = Collection(tables, [])
    assert [stack.rows for stack in collection.stacks] == [13, 6]


X, Y, ON_X = mesh_of({"x": 4}), mesh_of({"x": 2, "y": 2}), (mesh_of({"x": 4}), "x")
OTHERS = {
    "layout": ((X, "x", "rows-cyclic"), r"'film' on Placement\('rows' over 4 of 'x'\) and 'user' on .*'rows-cyclic'"),
    "columns": ((X, "x", "columns"), r"'film' on Placement\('rows' over 4 of 'x'\) and 'user' on .*'columns' over 4"),
    "axes": ((Y, ("x", "y")), r"'film' on .*over 4 of 'x'\) and 'user' on .*over 2 of 'x' x 2 of 'y'\)"),
    "kind of axes": (
        (mesh_of({"x": 4}, "explicit"), "x"),
        r"'film' on .*'x'\) of Mesh\(.*Auto.* and 'user' on .*Explicit",
    ),
    "devices": (
        (jax.make_mesh((4,), ("x",), axis_types=X.axis_types, devices=jax.devices()[4:]), "x"),
        r"'film' on .*with the devices \[0, 1, 2, 3\] and 'user' on .*with the devices \[4, 5, 6, 7\]",
    ),
    "none": (None, r"'film' on Placement\('rows' over 4 of 'x'\) and 'user' on no mesh"),
}


@pytest.mark.parametrize("width", [DIM, DIM + 4])
@pytest.mark.parametrize("other", OTHERS)
def test_tables_that_are_laid_out_in_different_ways_are_refused(other, width):
    how, match = OTHERS[other]
    user = Table(np.ones((6, width), np.float32))
    tables = {"film": embax.shard(TABLES["film"], *ON_X), "user": user if how is None else embax.shard(user, *how)}
    with pytest.raises(ValueError, match=r"Collection\(tables=...\)` must be laid out alike, got " + match):
        Collection(tables, FEATURES[:1])
