"""Lookups and bags in tables on a mesh: what the same table gives off it, for each layout, every rule and transform."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split

import embax
from embax import Ragged, Table, embedding_bag, lookup

ROWS = 21  # which eight do not divide, and the last of eight blocks of three is empty
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
# Negative ones, duplicates, one without a row, and the padding row.
IDS = np.random.default_rng(1).integers(-ROWS, ROWS, (16, 3)).astype(np.int32)
IDS[2] = 5
IDS[4, 1] = 99
BAGS = np.random.default_rng(2).integers(0, ROWS, (16, 5)).astype(np.int32)
FACTORS = np.random.default_rng(3).normal(size=BAGS.shape).astype(np.float32)
RAGGED = Ragged.from_lists([[1, 2, 3], [], [4], [5, 5, 6, 7, 8, 9, 10], [3], *[[k, 0] for k in range(9)]])
EVERYTHING = {"padding_idx": 3, "max_norm": 2.0, "scale_grad_by_freq": True}

on_axes = pytest.mark.parametrize("axes", AXES)


def placed(layout, axes="auto", weight=WEIGHT, **rules):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    return mesh, embax.shard(Table(weight, **rules), mesh, **how)


def read(table, ids, bags, factors, ragged):
    return {
        "rows": lookup(table, ids),
        "sum": embedding_bag(table, bags, factors),
        "mean": embedding_bag(table, bags, mode="mean"),
        "max": embedding_bag(table, bags, mode="max"),
        "ragged": embedding_bag(table, ragged, mode="sqrtn"),
        "largest": embedding_bag(table, ragged, mode="max"),
    }


def total(table, factors, ids, bags, ragged):
    return sum(jnp.nansum(jnp.sin(out)) for out in read(table, ids, bags, factors, ragged).values())


@jax.jit
def everything(table, ids, bags, factors, ragged):
    def loss(pair):
        return total(*pair, ids, bags, ragged)

    pair = table, factors
    sparse, of_factors = embax.grad(loss, on_dense="error")(pair)
    dense, _ = jax.grad(loss)(pair)
    stored = embax.renormalize(table, jnp.where(ids < ROWS, ids, 0))
    return read(table, ids, bags, factors, ragged), sparse, dense, of_factors, stored


@pytest.mark.parametrize(
    ("layout", "axes", "batch"),
    [
        *[(layout, "explicit", "split") for layout in LAYOUTS],
        *[(layout, "auto", "split") for layout in ("rows", "rows and columns")],
        ("rows-cyclic", "auto", "everywhere"),
        ("rows", "explicit", "everywhere"),
    ],
)
def test_all_of_it_is_as_off_the_mesh(layout, axes, batch):
    mesh, table = placed(layout, axes, **EVERYTHING)
    put = split if batch == "split" else everywhere
    args = put(mesh, IDS), put(mesh, BAGS), put(mesh, FACTORS), RAGGED
    out, sparse, dense, of_factors, stored = everything(table, *args)
    expected, of_sparse, of_dense, of_expected, of_stored = everything(Table(WEIGHT, **EVERYTHING), *args_off(args))
    for name in expected:
        if name == "ragged":  # a bag may lie on two devices, so that its sum has another order
            np.testing.assert_allclose(out[name], expected[name], rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(out[name], expected[name])
    np.testing.assert_allclose(sparse.to_dense(), of_sparse.to_dense(), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(embax.unshard(dense).weight, of_dense.weight, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(of_factors, of_expected, rtol=2e-6, atol=2e-6)
    assert dense.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
    assert stored.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
    np.testing.assert_array_equal(embax.unshard(stored).weight, of_stored.weight)
    assert not np.any(sparse.to_dense()[3])
    if axes == "explicit":
        assert out["rows"].sharding.is_equivalent_to(args[0].sharding, 3)


def args_off(args):
    return tuple(jnp.asarray(np.asarray(x)) if isinstance(x, jax.Array) else x for x in args)


@on_axes
@pytest.mark.parametrize("layout", ["rows", "rows and columns"])
def test_under_transformations(layout, axes):
    _, table = placed(layout, axes)
    ids = np.abs(IDS[:8]) % ROWS
    rows = WEIGHT[ids]
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda ids: lookup(table, ids)))(ids), rows)
    np.testing.assert_array_equal(jax.jvp(lambda t: lookup(t, ids), (table,), (table,))[1], rows)
    scanned = jax.jit(lambda ids: jax.lax.scan(lambda carry, ids: (carry, lookup(table, ids)), 0, ids)[1])
    np.testing.assert_array_equal(scanned(ids), rows)

    def curved(table):
        return (lookup(table, ids) ** 3).sum()

    once = jax.jit(jax.grad(jax.checkpoint(lambda t: jax.grad(curved)(t).weight.sum())))(table)
    counts = np.bincount(ids.ravel(), minlength=ROWS)
    np.testing.assert_allclose(embax.unshard(once).weight, 6 * counts[:, None] * WEIGHT, rtol=1e-5)


def test_ids_of_any_kind():
    _, table = placed("rows-cyclic")
    np.testing.assert_array_equal(lookup(table, -1), WEIGHT[-1])
    np.testing.assert_array_equal(lookup(table, [[1], [2]]), WEIGHT[[[1], [2]]])
    np.testing.assert_array_equal(lookup(table, np.array([-20, 3], np.int8)), WEIGHT[[1, 3]])
    np.testing.assert_array_equal(lookup(table, np.array([20, 2**63], np.uint64) % 64), [WEIGHT[20], WEIGHT[0]])
    assert lookup(table, []).shape == (0, 8)
    assert lookup(table, [3], dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(IndexError, match="got 21 at position"):
        lookup(table, [0, ROWS])
    with pytest.raises(TypeError, match="integer dtype"):
        lookup(table, [0.5])


@pytest.mark.parametrize(
    ("out_of_range", "expected"),
    [("error", np.nan), ("nan", np.nan), ("zero", 0.0), ("clip", None)],
    ids=["error", "nan", "zero", "clip"],
)
def test_ids_without_a_row(out_of_range, expected):
    _, table = placed("rows", out_of_range=out_of_range)
    ids = jnp.array([ROWS, -ROWS - 1, 4])
    read_and_pull_back = jax.jit(lambda t, ids: (lookup(t, ids), embax.grad(lambda t: lookup(t, ids).sum())(t)))
    out, gradient = read_and_pull_back(table, ids)
    np.testing.assert_array_equal(out[2], WEIGHT[4])
    counts = np.zeros(ROWS)
    counts[4] = 1
    if expected is None:
        np.testing.assert_array_equal(out[:2], WEIGHT[[-1, 0]])
        counts[[-1, 0]] = 1
    else:
        np.testing.assert_array_equal(out[:2], np.full((2, 8), expected))
    np.testing.assert_array_equal(gradient.to_dense()[:, 0], counts)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9])
@pytest.mark.parametrize("layout", ["rows", "rows-cyclic"])
def test_fewer_rows_than_devices(layout, rows):
    weight = WEIGHT[:rows]
    mesh, table = placed(layout, weight=weight)
    np.testing.assert_array_equal(embax.unshard(table).weight, weight)
    ids = np.arange(-rows, rows)
    np.testing.assert_array_equal(lookup(table, ids), weight[ids])
    np.testing.assert_array_equal(embedding_bag(table, ids[None]), weight[ids].sum(0)[None])
    assert np.isnan(jax.jit(lookup)(table, split(mesh, np.full(8, rows)))).all()


def test_integers_numbers_a_row_and_several_axes_of_a_row():
    mesh = mesh_of({"x": 8})
    for weight in np.arange(22).reshape(11, 2), WEIGHT[:, 0], WEIGHT.reshape(ROWS, 4, 2):
        np.testing.assert_array_equal(lookup(embax.shard(weight, mesh, "x"), [3, 10, -1]), weight[[3, 10, -1]])


def test_rounds_count_what_crowds():
    mesh, table = placed("rows", weight=np.zeros((512, 2), np.float32))
    assert embax.sharding.rounds(table, np.arange(512)) == 1  # each device asks for its own rows
    assert embax.sharding.rounds(table, np.arange(512)[::-1]) == 3  # and here for those of one other, 64 by 25
    assert embax.sharding.rounds(table, np.random.default_rng(0).permutation(512)) == 1
    assert embax.sharding.rounds(table, np.zeros(512, np.int32)) == 1  # each device asks once
    crowded = np.tile(np.arange(64), 8).astype(np.int32)
    assert jax.jit(embax.sharding.rounds)(table, split(mesh, crowded)) == 3
    generous = embax.shard(table, mesh, "x", skew=8)
    assert embax.sharding.rounds(generous, crowded) == 1
    with pytest.raises(ValueError, match="must be on a mesh"):
        embax.sharding.rounds(Table(WEIGHT), [0])


def test_many_ones_in_bfloat16_add_up():
    for axes in AXES:
        _, table = placed("rows", axes, weight=jnp.zeros((8, 2), jnp.bfloat16))

        def step(table):
            gradient = embax.grad(lambda t: lookup(t, np.full(4096, 5)).astype(jnp.float32).sum())(table)
            return embax.apply_updates(table, gradient)

        np.testing.assert_array_equal(embax.unshard(jax.jit(step)(table)).weight[5], [4096, 4096])


def test_a_frozen_table_stands_still():
    _, table = placed("rows", freeze=True)
    gradient = jax.jit(embax.grad(lambda t: lookup(t, [1, 2]).sum()))(table)
    assert gradient.ids.shape == (0,)
    assert embax.apply_updates(table, gradient) is table


def test_gradients_add_and_scale():
    _, table = placed("rows-cyclic")
    gradient = embax.grad(lambda t: lookup(t, [1, 2, 1]).sum())(table)
    off = embax.grad(lambda t: lookup(t, [1, 2, 1]).sum())(Table(WEIGHT))
    np.testing.assert_array_equal((2 * gradient + gradient).to_dense(), (3 * off).to_dense())
    np.testing.assert_allclose(embax.global_norm(gradient), embax.global_norm(off), rtol=1e-6)


def test_a_placed_table_is_not_resized():
    _, table = placed("rows")
    with pytest.raises(ValueError, match=r"embax.resize\(table=...\)` must not be on a mesh"):
        embax.resize(table, 4)
    with pytest.raises(ValueError, match="must have the 24 stored rows"):
        dataclasses.replace(table, weight=WEIGHT)
