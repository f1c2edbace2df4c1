"""Bags that owners pool: their results equal those on one device; and the bytes that they send."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import arrays, collectives, compiled
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split, usual_and_rest

import embax
from embax import Table, embedding_bag

ROWS, DIM, LENGTH = 21, 8, 40
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
# Bags of negative ids, of one row only, of a padding row, of nothing else, and with one id without a row.
BAGS = np.random.default_rng(1).integers(-ROWS, ROWS, (16, LENGTH)).astype(np.int32)
BAGS[1], BAGS[2, :7], BAGS[3], BAGS[5, 3] = 5, 3, 3, 99
FACTORS = np.random.default_rng(2).normal(size=BAGS.shape).astype(np.float32)
MODES = "sum", "mean", "sqrtn"
# Layouts whose owners sum these bags: not those without a split of rows, or whose sums would be as many as rows.
POOLED = [layout for layout, (_, how) in LAYOUTS.items() if how.get("layout") not in ("columns", "replicated")]
summed = functools.partial(embedding_bag, mode="sum")


def placed(layout, axes="auto", weight=WEIGHT, **rules):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    return mesh, embax.shard(Table(weight, **rules), mesh, **how, pool_at_owners=True)


@functools.partial(jax.jit, static_argnames=("plain", "weighted"))
def modes(table, bags, factors, plain, weighted):
    """Bags in some modes without weights and in some with weights."""
    pooled = {mode: embedding_bag(table, bags, mode=mode) for mode in plain}
    return pooled, {mode: embedding_bag(table, bags, factors, mode) for mode in weighted}


def rest(*args):
    """A case of the exhaustive run."""
    return pytest.param(*args, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("layout", "axes", "batch", "plain", "weighted"),
    [
        ("rows-cyclic", "explicit", everywhere, ("sqrtn",), ("mean",)),
        ("rows and columns", "auto", everywhere, (), ("sqrtn",)),
        ("rows over two axes", "explicit", split, ("mean",), ("sum",)),
        *[rest(*case, MODES, MODES) for case in itertools.product(POOLED, AXES, (split, everywhere))],
    ],
)
def test_sums_equal_those_without_a_mesh(layout, axes, batch, plain, weighted):
    rules = {"padding_idx": 3} if layout == "rows and columns" else {"padding_idx": 3, "max_norm": 2.0}
    mesh, table = placed(layout, axes, **rules)
    factors = FACTORS.copy()
    factors[2, 0] = np.nan  # of a padding row, which does not count
    out = modes(table, batch(mesh, BAGS), batch(mesh, factors), plain, weighted)
    expected = modes(Table(WEIGHT, **rules), BAGS, factors, plain, weighted)
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert np.isnan(np.asarray(one)[5]).any()  # it has an id without a row


@pytest.mark.parametrize(
    ("layout", "axes"),
    usual_and_rest([("rows and columns", "explicit")], itertools.product(POOLED, AXES)),
)
def test_sums_of_whole_numbers_are_exact_and_gradients_equal_lookups(layout, axes):
    weight = np.round(8 * WEIGHT)
    rules = {"padding_idx": 3, "scale_grad_by_freq": True, "out_of_range": "zero"}
    mesh, table = placed(layout, axes, weight=weight, **rules)
    factors = np.round(FACTORS)

    @jax.jit
    def run(table, bags, factors):
        def loss(pair):
            out = embedding_bag(pair[0], bags, pair[1], mode="sum")
            return (out * jnp.arange(float(DIM))[None]).sum(), out

        (of_table, of_factors), out = embax.grad(loss, has_aux=True, on_dense="error")((table, factors))
        return out, of_table.to_dense(), of_factors

    out, expected = run(table, split(mesh, BAGS), split(mesh, factors)), run(Table(weight, **rules), BAGS, factors)
    np.testing.assert_array_equal(out[0], expected[0])
    np.testing.assert_allclose(out[1], expected[1], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(out[2], expected[2])


@pytest.mark.parametrize("layout", ["rows", "rows and columns"])
def test_ids_that_crowd_on_one_device_are_all_summed(layout):
    mesh, table = placed(layout, weight=np.round(8 * WEIGHT))
    bags = np.zeros((32, LENGTH), np.int32)  # all of them the first device's
    bags[:, ::3] = 1
    out = jax.jit(summed)(table, split(mesh, bags))
    np.testing.assert_array_equal(out, np.round(8 * WEIGHT)[bags].sum(1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", ["explicit", rest("auto")])
def test_bags_of_any_shape_and_number(axes):
    whole = np.round(8 * WEIGHT)
    shapes = (3, 5, LENGTH), (11, LENGTH), (LENGTH,), (0, LENGTH), (4, 0)
    mesh, table = placed("rows-cyclic", axes, weight=whole)
    split_rows = embax.shard(Table(whole.reshape(ROWS, 4, 2)), mesh, "x", pool_at_owners=True)
    given = {str(shape): np.resize(np.abs(BAGS) % ROWS, shape) for shape in shapes}

    @jax.jit
    def run(table, split_rows, given):
        ids = given[str((11, LENGTH))]
        out = {name: summed(table, ids) for name, ids in given.items()}
        return out, jax.vmap(summed, (None, 0))(table, ids), summed(split_rows, ids)

    out, of_lanes, of_split_rows = run(table, split_rows, given)
    for name, ids in given.items():
        np.testing.assert_array_equal(out[name], whole[ids].sum(-2), err_msg=name)
    expected = whole[given[str((11, LENGTH))]].sum(1)
    np.testing.assert_array_equal(of_lanes, expected)
    np.testing.assert_array_equal(of_split_rows, expected.reshape(11, 4, 2))


@pytest.mark.parametrize("numbers", [(0, 1, 9), rest((2, 7, 8))])
def test_fewer_rows_than_devices(numbers):
    tables = {rows: placed("rows", weight=WEIGHT[:rows], out_of_range="zero")[1] for rows in numbers}
    run = jax.jit(lambda tables, bags: {rows: summed(table, bags) for rows, table in tables.items()})
    for rows, out in run(tables, np.where(BAGS == 0, 0, 99)).items():
        expected = np.where((BAGS == 0)[..., None], WEIGHT[0], 0).sum(1) if rows else np.zeros((16, DIM))
        np.testing.assert_allclose(out, expected, rtol=1e-6, err_msg=rows)


def test_many_ones_in_bfloat16_add_up():
    _, table = placed("rows", weight=np.ones((ROWS, 2), jnp.bfloat16))
    out = jax.jit(lambda table, bags: embedding_bag(table, bags, mode="mean"))(table, np.tile(BAGS[:1], (8, 100)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.ones((8, 2)))


def program_of(table, bags):
    return compiled(jax.jit(summed), table, split(table.placement.mesh, bags))


def test_long_bags_send_sums_and_short_ones_rows():
    number, dim, length = 512, 32, 32
    weight, bags = np.zeros((8_000, dim), np.float32), np.zeros((number, length), np.int32)
    mesh, table = placed("rows", weight=weight)
    plain = embax.shard(Table(weight), mesh, "x")
    programs = program_of(table, bags), program_of(plain, bags)
    sent, of_rows = (sum(x.bytes for x in collectives(program)) for program in programs)
    assert sent < of_rows / 5
    memory, of_rows = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert memory < of_rows
    # Neither the rows of all bags nor of all tables are on a device.
    for _, shape in arrays(programs[0].as_text()):
        assert np.prod(shape) < number * length * dim / 2
    short = [program_of(x, bags[:, :1]) for x in (table, plain)]
    assert [(x.kind, x.arrays) for x in collectives(short[0])] == [(x.kind, x.arrays) for x in collectives(short[1])]
