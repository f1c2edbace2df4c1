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
    return np.stack([jax.grad(loss)(TABLE, ids).weight for ids in IDS])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_leading_axes_are_lanes(make):
    @jax.jit
    def run(table, ids):
        lanes = make(table, ids)
        joined = lanes.sum(axis=0)
        outs = {
            "dense": lanes.to_dense(),
            "deduplicated": lanes.deduplicated().to_dense(),
            "doubled": (lanes + lanes).to_dense(),
            "difference": (lanes - 3 * lanes).to_dense(),
            "sum": joined.to_dense(),
            "sum of all": lanes.sum().to_dense(),
            "norm": embax.global_norm({"t": lanes}),
            "stepped": embax.apply_updates(table, joined).weight,
        }
        return lanes, joined, outs

    lanes, joined, outs = run(TABLE, IDS)
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
    assert set(np.asarray(lanes.deduplicated().ids[3]).tolist()) == {5, ROWS}


def test_lanes_of_lanes():
    @jax.jit
    def run(table, ids):
        lanes = jax.vmap(lambda batches: stepped(table, batches))(ids)
        return lanes, [lanes.sum(axis), lanes.sum(-1), lanes.sum((0, 1)), lanes.deduplicated()]

    axis = 0
    lanes, (over_first, over_last, over_both, deduplicated) = run(TABLE, IDS.reshape(2, 2, 3))
    dense = by_example().reshape(2, 2, ROWS, 3)
    assert lanes.lanes == deduplicated.lanes == (2, 2)
    for actual, expected in (
        (lanes, dense),
        (deduplicated, dense),
        (over_first, dense.sum(0)),
        (over_last, dense.sum(1)),
        (over_both, dense.sum((0, 1))),
    ):
        np.testing.assert_allclose(actual.to_dense(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [1, -2, (0, 0), (0, -1)])
def test_sum_refuses_what_is_no_axis_of_lanes(axis):
    lanes = MAKERS["vmap"](TABLE, IDS)
    with pytest.raises(ValueError, match=r"RowGrad.sum\(axis=...\)` must name axes of the lanes \(4,\)"):
        lanes.sum(axis)


def test_sum_without_lanes():
    gradient = RowGrad([1, 2], jnp.ones((2, 3)), rows=ROWS)
    assert gradient.sum().ids.shape == (2,)
    with pytest.raises(ValueError, match="axes of the lanes"):
        gradient.sum(0)


def test_gradients_with_other_lanes_do_not_add():
    lanes = MAKERS["vmap"](TABLE, IDS)
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
    lanes = MAKERS["vmap"](TABLE, IDS)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"got the lanes \(4,\).* Sum them: gradient.sum\(axis=0\)"),
    ):
        call(lanes)


def test_psum_over_a_mapped_axis():
    def gradient(ids):
        return embax.grad(loss)(TABLE, ids).psum("batch")

    summed = by_example().sum(0)
    lanes = jax.jit(jax.vmap(gradient, axis_name="batch"))(IDS)
    assert (lanes.lanes, lanes.ids.shape) == ((4,), (4, 12))
    np.testing.assert_allclose(lanes.to_dense(), [summed] * 4, rtol=2e-6, atol=2e-6)
    mesh = mesh_of({"batch": 4})
    spec = PartitionSpec("batch")
    mapped = jax.shard_map(lambda ids: gradient(ids[0]).to_dense()[None], mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(mapped)(IDS), [summed] * 4, rtol=2e-6, atol=2e-6)


def test_arithmetic():
    one, other = RowGrad([4, 1, 4], jnp.ones((3, 2)), rows=6), RowGrad([1], jnp.full((1, 2), 8.0), rows=6)
    dense, of_other = np.asarray(one.to_dense()), np.asarray(other.to_dense())
    two = np.float32(2)
    for actual, expected in (
        (one / 2, dense / 2),
        (one / two, dense / 2),
        (one / jnp.asarray(2.0), dense / 2),
        (-one, -dense),
        (+one, dense),
        (one - one, 0 * dense),
        (one - other, dense - of_other),
        (sum([one, other]), dense + of_other),
        (sum([one, other], start=one), 2 * dense + of_other),
        (two * one + one * 3 - other / 4, 5 * dense - of_other / 4),
    ):
        assert isinstance(actual, RowGrad)
        np.testing.assert_array_equal(actual.to_dense(), expected)


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
