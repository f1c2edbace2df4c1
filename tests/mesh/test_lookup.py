"""Lookups and bags on a mesh equal those of the table on one device, for each layout, rule and transformation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split, usual_and_rest

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


def placed(layout, axes="auto", weight=WEIGHT, **rules):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    return mesh, embax.shard(Table(weight, **rules), mesh, **how)


@functools.partial(jax.jit, static_argnames="names")
def rows_and_gradients(table, ids, cotangent, names):
    """The rows and the gradient by rows, and those of these names: that of all rows, the table stored clipped."""

    def read(table):
        rows = lookup(table, ids)
        return jnp.nansum(rows * cotangent), rows

    sparse, rows = embax.grad(read, has_aux=True, on_dense="error")(table)
    out = {"rows": rows, "sparse": sparse.to_dense()}
    if "dense" in names:
        out["dense"] = jax.vjp(lambda table: lookup(table, ids), table)[1](cotangent)[0]
    if "stored" in names:
        out["stored"] = embax.renormalize(table, jnp.where(ids < ROWS, ids, 0))
    return out


@functools.partial(jax.jit, static_argnames="names")
def bags_and_gradients(table, bags, factors, ragged, names):
    """The bags of these names, and the gradients of each: by rows, and of all rows where ids have factors."""
    pooled = {
        "weighted": lambda table, factors: embedding_bag(table, bags, factors, mode="sum"),
        "mean": lambda table, _: embedding_bag(table, bags, mode="mean"),
        "largest": lambda table, _: embedding_bag(table, bags, mode="max"),
        "ragged": lambda table, _: embedding_bag(table, ragged, mode="sqrtn"),
        "largest of ragged": lambda table, _: embedding_bag(table, ragged, mode="max"),
    }

    def loss(pair, name):
        out = pooled[name](*pair)
        return (out * jnp.cos(jnp.arange(8.0))[None]).sum(), out

    out = {}
    for name in names:
        if name == "weighted":
            (dense, out["factors"]), out[name] = jax.grad(loss, has_aux=True)((table, factors), name)
            out["dense"] = dense
        else:
            (sparse, _), out[name] = embax.grad(loss, has_aux=True, on_dense="error")((table, factors), name)
            out[f"sparse of {name}"] = sparse.to_dense()
    return out


OF_LOOKUP = IDS, np.random.default_rng(4).normal(size=(*IDS.shape, 8)).astype(np.float32)
OF_BAGS = BAGS, FACTORS, RAGGED
READ = ("dense", "stored")
POOLED = ("weighted", "ragged", "largest of ragged", "largest", "mean")


@functools.cache
def off_the_mesh(function, names):
    return function(Table(WEIGHT, **EVERYTHING), *(OF_LOOKUP if function is rows_and_gradients else OF_BAGS), names)


def assert_as_off_the_mesh(function, layout, axes, batch, names):
    mesh, table = placed(layout, axes, **EVERYTHING)
    put = functools.partial(split if batch == "split" else everywhere, mesh)
    args = [x if isinstance(x, Ragged) else put(x) for x in (OF_LOOKUP if function is rows_and_gradients else OF_BAGS)]
    out = jax.block_until_ready(function(table, *args, names))  # no other program runs beside one for many devices
    expected = off_the_mesh(function, READ if function is rows_and_gradients else names)
    assert out.keys() <= expected.keys()
    for name, value in out.items():
        of_expected = expected[name]
        if isinstance(value, Table):
            assert value.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
            value, of_expected = embax.unshard(value).weight, of_expected.weight
        if name in ("dense", "factors") or name.startswith("sparse"):
            np.testing.assert_allclose(value, of_expected, rtol=2e-6, atol=2e-6, err_msg=name)
        elif name == "ragged":  # a bag may lie on two devices, so that its sum has another order
            np.testing.assert_allclose(value, of_expected, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(value, of_expected, err_msg=name)
        if name.startswith("sparse"):
            assert not np.any(np.asarray(value)[3]), name
    return args, out


def rest(*names):
    """A case of the exhaustive run."""
    return pytest.param(*names, marks=pytest.mark.exhaustive)


GRID = list(itertools.product(LAYOUTS, AXES, ("split", "everywhere")))


@pytest.mark.parametrize(
    ("layout", "axes", "batch", "names"),
    usual_and_rest(
        [
            ("rows", "explicit", "split", ("dense",)),
            ("replicated", "auto", "split", ("dense",)),
            ("rows and copies", "explicit", "everywhere", ("dense",)),
            ("rows and columns", "auto", "split", READ),
            ("rows over two axes", "explicit", "split", ()),
        ],
        [(*case, READ) for case in GRID],
    ),
)
def test_rows_and_gradients_equal_those_without_a_mesh(layout, axes, batch, names):
    (ids, _), out = assert_as_off_the_mesh(rows_and_gradients, layout, axes, batch, names)
    if axes == "explicit":
        assert out["rows"].sharding.is_equivalent_to(ids.sharding, 3)


@pytest.mark.parametrize(
    ("layout", "axes", "batch", "names"),
    usual_and_rest(
        [("columns", "explicit", "split", POOLED[:2])],
        [(*case, POOLED) for case in GRID],
    ),
)
def test_bags_and_gradients_equal_those_without_a_mesh(layout, axes, batch, names):
    assert_as_off_the_mesh(bags_and_gradients, layout, axes, batch, names)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("rows and columns", "explicit"),
        rest("rows", "auto"),
        rest("rows", "explicit"),
        rest("rows and columns", "auto"),
    ],
)
def test_under_transformations(layout, axes):
    _, table = placed(layout, axes)
    ids = np.abs(IDS[:8]) % ROWS
    rows = WEIGHT[ids]

    def curved(table):
        return (lookup(table, ids) ** 3).sum()

    @jax.jit
    def run(table, ids):
        once = jax.grad(jax.checkpoint(lambda t: jax.grad(curved)(t).weight.sum()))(table)
        of_rows = {
            "vmap": jax.vmap(lambda ids: lookup(table, ids))(ids),
            "jvp": jax.jvp(lambda t: lookup(t, ids), (table,), (table,))[1],
            "scan": jax.lax.scan(lambda carry, ids: (carry, lookup(table, ids)), 0, ids)[1],
        }
        return once, of_rows

    once, of_rows = run(table, ids)
    for name, out in of_rows.items():
        np.testing.assert_array_equal(out, rows, err_msg=name)
    counts = np.bincount(ids.ravel(), minlength=ROWS)
    np.testing.assert_allclose(embax.unshard(once).weight, 6 * counts[:, None] * WEIGHT, rtol=1e-5)


def test_ids_of_any_kind():
    _, table = placed("rows-cyclic")
    np.testing.assert_array_equal(lookup(table, -1), WEIGHT[-1])
    of_bfloat16 = lookup(table, [[1], [2]], dtype=jnp.bfloat16)
    assert of_bfloat16.dtype == jnp.bfloat16
    np.testing.assert_array_equal(of_bfloat16, WEIGHT.astype(jnp.bfloat16)[[[1], [2]]])
    np.testing.assert_array_equal(lookup(table, np.array([-20, 3], np.int8)), WEIGHT[[1, 3]])
    np.testing.assert_array_equal(lookup(table, np.array([20, 2**63], np.uint64) % 64), [WEIGHT[20], WEIGHT[0]])
    assert lookup(table, []).shape == (0, 8)
    with pytest.raises(IndexError, match="got 21 at position"):
        lookup(table, [0, ROWS])
    with pytest.raises(TypeError, match="integer dtype"):
        lookup(table, [0.5])


def test_ids_without_a_row():
    expected = {"error": np.nan, "nan": np.nan, "zero": 0.0, "clip": WEIGHT[[-1, 0]]}
    tables = {out_of_range: placed("rows", out_of_range=out_of_range)[1] for out_of_range in expected}

    @jax.jit
    def run(tables, ids):
        def loss(tables):
            out = {name: lookup(table, ids) for name, table in tables.items()}
            return sum(x.sum() for x in out.values()), out

        gradients, out = embax.grad(loss, has_aux=True)(tables)
        return out, {name: gradient.to_dense() for name, gradient in gradients.items()}

    out, gradients = jax.device_get(run(tables, np.array([ROWS, -ROWS - 1, 4])))
    for name, of_missing in expected.items():
        np.testing.assert_array_equal(out[name][2], WEIGHT[4], err_msg=name)
        np.testing.assert_array_equal(out[name][:2], np.broadcast_to(of_missing, (2, 8)), err_msg=name)
        counts = np.zeros(ROWS)
        counts[[4, -1, 0] if name == "clip" else [4]] = 1
        np.testing.assert_array_equal(gradients[name][:, 0], counts, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ("rows", 0),
        ("rows-cyclic", 1),
        ("rows", 9),
        *[rest("rows", rows) for rows in (1, 2, 7, 8)],
        *[rest("rows-cyclic", rows) for rows in (0, 2, 3, 4, 5)],
    ],
)
def test_fewer_rows_than_devices(layout, rows):
    weight = WEIGHT[:rows]
    mesh, table = placed(layout, weight=weight)
    np.testing.assert_array_equal(embax.unshard(table).weight, weight)
    inside, outside = np.arange(-rows, rows), np.full(8 - 2 * rows % 8, rows)

    @jax.jit
    def run(table, ids):
        return lookup(table, ids), embedding_bag(table, inside[None], mode="sum")

    out, of_bag = jax.device_get(run(table, split(mesh, np.concatenate([inside, outside]))))
    np.testing.assert_array_equal(out[: 2 * rows], weight[inside])
    assert np.isnan(out[2 * rows :]).all()
    np.testing.assert_array_equal(of_bag, weight[inside].sum(0)[None])


def test_integers_numbers_a_row_and_several_axes_of_a_row():
    mesh = mesh_of({"x": 4})
    weights = np.arange(22).reshape(11, 2), WEIGHT[:, 0], WEIGHT.reshape(ROWS, 4, 2)
    read = jax.jit(lambda tables: [lookup(table, [3, 10, -1]) for table in tables])
    for weight, out in zip(weights, read([embax.shard(weight, mesh, "x") for weight in weights]), strict=True):
        np.testing.assert_array_equal(out, weight[[3, 10, -1]])


def test_rounds_count_ids_beyond_the_capacity():
    mesh, table = placed("rows", weight=np.zeros((512, 2), np.float32))
    assert embax.sharding.rounds(table, np.arange(512)) == 1  # each device asks for its own rows
    assert embax.sharding.rounds(table, np.arange(512)[::-1]) == 3  # and here for those of one other, 64 by 25
    assert embax.sharding.rounds(table, np.random.default_rng(0).permutation(512)) == 1
    assert embax.sharding.rounds(table, np.zeros(512, np.int32)) == 1  # each device asks once
    crowded = np.tile(np.arange(64), 8).astype(np.int32)
    assert jax.jit(embax.sharding.rounds)(table, split(mesh, crowded)) == 3
    generous = embax.shard(np.zeros((512, 2), np.float32), mesh, "x", skew=8)
    assert embax.sharding.rounds(generous, crowded) == 1
    with pytest.raises(ValueError, match="must be on a mesh"):
        embax.sharding.rounds(Table(WEIGHT), [0])


@pytest.mark.parametrize("axes", ["explicit", rest("auto")])
def test_many_ones_in_bfloat16_add_up(axes):
    _, table = placed("rows-cyclic", axes, weight=np.zeros((8, 2), jnp.bfloat16))

    def step(table):
        gradient = embax.grad(lambda t: lookup(t, np.full(4096, 5)).astype(jnp.float32).sum())(table)
        return embax.apply_updates(table, gradient)

    stepped = np.asarray(embax.unshard(jax.jit(step)(table)).weight)
    np.testing.assert_array_equal(stepped[5], [4096, 4096])


def test_a_frozen_table_stands_still():
    _, table = placed("rows", freeze=True)
    gradient, ids = jax.jit(lambda t: (g := embax.grad(lambda t: lookup(t, [1, 2]).sum())(t), g.ids))(table)
    assert ids.shape == (0,)
    assert embax.apply_updates(table, gradient) is table


def test_gradients_add_and_scale():
    _, table = placed("rows-cyclic")

    @jax.jit
    def run(table):
        gradient = embax.grad(lambda t: lookup(t, [1, 2, 1]).sum())(table)
        return (2 * gradient + gradient).to_dense(), embax.global_norm(gradient)

    counts = np.bincount([1, 2, 1], minlength=ROWS)[:, None] * np.ones(8)
    total, norm = run(table)
    np.testing.assert_array_equal(total, 3 * counts)
    np.testing.assert_allclose(norm, np.sqrt((counts**2).sum()), rtol=1e-6)


def test_a_placed_table_has_the_rows_of_its_placement():
    _, table = placed("rows")
    with pytest.raises(ValueError, match="must have the 24 stored rows"):
        dataclasses.replace(table, weight=WEIGHT)
