"""RowGrads with leading axes: lanes, of vmap and of scan, and their sum; arithmetic that users write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from meshes import mesh_of

import embax
from embax import RowGrad, Table, lookup

ROWS = 7
TABLE = Table(np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32), padding_idx=2)
IDS = np.array([[1, 2, 1], [0, 6, 6], [3, -1, 1], [5, 5, 5]])


def loss(table, ids):
    return jnp.sin(lookup(table, ids)).sum()


def stepped(table, batches):
    return jax.lax.scan(lambda carry, ids: (carry, embax.grad(loss)(table, ids)), 0, batches)[1]


MAKERS = {"vmap": lambda table, ids: jax.vmap(lambda i: embax.grad(loss)(table, i))(ids), "scan": stepped}


@functools.cache
def by_example():
    return np.stack(jax.jit(lambda: [jax.grad(loss)(TABLE, ids).weight for ids in IDS])())


@functools.cache
def some_lanes():
    return jax.jit(MAKERS["vmap"])(TABLE, IDS)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_leading_axes_are_lanes(make):
    @jax.jit
    def run(table, ids):
        lanes = make(table, ids)
        joined, once = lanes.sum(axis=0), lanes.deduplicated()
        outs = {
            "dense": lanes.to_dense(),
            "deduplicated": once.to_dense(),
            "doubled": (lanes + lanes).to_dense(),
            "difference": (lanes - 3 * lanes).to_dense(),
            "sum": joined.to_dense(),
            "sum of all": lanes.sum().to_dense(),
            "norm": embax.global_norm({"t": lanes}),
            "stepped": embax.apply_updates(table, joined).weight,
        }
        return lanes, joined, once.ids, outs

    lanes, joined, once, outs = run(TABLE, IDS)
    dense = by_example()
    expected = {
        "dense": dense,
        "deduplicated": dense,
        "doubled": 2 * dense,
        "difference": -2 * dense,
        "sum": dense.sum(0),
        "sum of all": dense.sum(0),
        "norm": np.linalg.norm(dense),
        "stepped": TABLE.weight + dense.sum(0),
    }
    for name, out in outs.items():
        np.testing.assert_allclose(out, expected[name], rtol=2e-6, atol=2e-6, err_msg=name)  # float32
    assert (lanes.lanes, lanes.dim, lanes.ids.shape) == ((4,), (3,), (4, 3))
    assert (joined.lanes, joined.ids.shape) == ((), (12,))
    assert repr(lanes) == "RowGrad(lanes (4,), each of 3 ids of 7 rows, float32[4,3,3])"
    assert set(np.asarray(once)[3].tolist()) == {5, ROWS}


def test_lanes_of_lanes():
    @jax.jit
    def run(table, ids):
        lanes = jax.vmap(lambda batches: stepped(table, batches))(ids)
        found = lanes, lanes.deduplicated(), *(lanes.sum(axis) for axis in (0, -1, (0, 1)))
        return found, [gradient.to_dense() for gradient in found]

    (lanes, deduplicated, *_), outs = run(TABLE, IDS.reshape(2, 2, 3))
    dense = by_example().reshape(2, 2, ROWS, 3)
    assert lanes.lanes == deduplicated.lanes == (2, 2)
    for actual, expected in zip(outs, [dense, dense, dense.sum(0), dense.sum(1), dense.sum((0, 1))], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [1, -2, (0, 0), (0, -1)])
def test_sum_refuses_other_axes(axis):
    lanes = some_lanes()
    with pytest.raises(ValueError, match=r"RowGrad.sum\(axis=...\)` must name axes of the lanes \(4,\)"):
        lanes.sum(axis)


def test_sum_without_lanes():
    gradient = RowGrad([1, 2], jnp.ones((2, 3)), rows=ROWS)
    assert gradient.sum().ids.shape == (2,)
    with pytest.raises(ValueError, match="axes of the lanes"):
        gradient.sum(0)


def test_gradients_with_other_lanes_do_not_add():
    lanes = some_lanes()
    for other in lanes.sum(), jax.tree.map(lambda leaf: leaf[:2], lanes):
        with pytest.raises(ValueError, match=r"must have the same lanes, got \(4,\) and"):
            lanes + other


def updates_of(tx):
    return lambda lanes: tx.update({"t": lanes}, tx.init({"t": TABLE}), {"t": TABLE})


REFUSED = {
    "apply_updates": lambda lanes: embax.apply_updates(TABLE, lanes),
    "lift": updates_of(embax.optim.lift(optax.sgd(0.1))),
    "lifted adam": updates_of(embax.optim.lift(optax.adam(0.1))),
    "rowwise": updates_of(embax.optim.rowwise_adagrad(0.1)),
    "clip": updates_of(embax.optim.clip_by_global_norm(1.0)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_steps_refuse_lanes(call):
    lanes = some_lanes()
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"got the lanes \(4,\).* Sum them: gradient.sum\(axis=0\)"),
    ):
        call(lanes)


def test_psum_over_a_mapped_axis():
    def gradient(ids):
        return embax.grad(loss)(TABLE, ids).psum("batch")

    summed = by_example().sum(0)
    lanes, dense = jax.jit(jax.vmap(lambda ids: ((g := gradient(ids)), g.to_dense()), axis_name="batch"))(IDS)
    assert (lanes.lanes, lanes.values.shape) == ((4,), (4, 12, 3))
    np.testing.assert_allclose(dense, [summed] * 4, rtol=2e-6, atol=2e-6)
    mesh = mesh_of({"batch": 4})
    spec = PartitionSpec("batch")
    mapped = jax.shard_map(lambda ids: gradient(ids[0]).to_dense()[None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(mapped)(IDS), [summed] * 4, rtol=2e-6, atol=2e-6)


def test_arithmetic():
    two = np.float32(2)

    @jax.jit
    def results(one, other):
        found = {
            "one / 2": one / 2,
            "one / two": one / two,
            "one / array": one / jnp.asarray(2.0),
            "-one": -one,
            "+one": +one,
            "one - one": one - one,
            "one - other": one - other,
            "sum": sum([one, other]),
            "sum from one": sum([one, other], start=one),
            "all of it": two * one + one * 3 - other / 4,
        }
        assert all(isinstance(gradient, RowGrad) for gradient in found.values())
        return {name: gradient.to_dense() for name, gradient in found.items()}

    of_one, of_other = np.zeros((2, 6, 2), np.float32)
    of_one[[1, 4]], of_other[1] = [[1], [2]], 8
    expected = {
        "one / 2": of_one / 2,
        "one / two": of_one / 2,
        "one / array": of_one / 2,
        "-one": -of_one,
        "+one": of_one,
        "one - one": 0 * of_one,
        "one - other": of_one - of_other,
        "sum": of_one + of_other,
        "sum from one": 2 * of_one + of_other,
        "all of it": 5 * of_one - of_other / 4,
    }
    one = RowGrad([4, 1, 4], np.ones((3, 2), np.float32), rows=6)
    other = RowGrad([1], np.full((1, 2), 8, np.float32), rows=6)
    for name, actual in results(one, other).items():
        np.testing.assert_array_equal(actual, expected[name], err_msg=name)


WRONG = {
    "g / g": lambda g: g / g,
    "g * g": lambda g: g * g,
    "1 / g": lambda g: 1 / g,
    "g + 1": lambda g: g + 1,
    "1 + g": lambda g: 1 + g,
    "g - 1": lambda g: g - 1,
    "1 - g": lambda g: 1 - g,
    "g / text": lambda g: g / "2",
    "g + array": lambda g: g + jnp.ones(2),
    "array - g": lambda g: jnp.ones(2) - g,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_arithmetic_without_a_meaning_is_a_type_error(wrong):
    with pytest.raises(TypeError):
        wrong(RowGrad([4, 1], jnp.ones((2, 2)), rows=6))


def test_a_divisor_is_a_scalar():
    with pytest.raises(ValueError, match=r"`RowGrad / divisor` must have a scalar factor, got shape \(2,\)"):
        RowGrad([4, 1], jnp.ones((2, 2)), rows=6) / jnp.ones(2)
