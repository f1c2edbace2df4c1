"""Reads of a chosen array on a mesh of explicit axes: the gradient is that of JAX, and holds the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_gradient
from closeness import FLOAT32
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import RowGrad, Table, lookup

WEIGHT = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
IDS = np.array([[2, 0, 2, 1], [1, 2, 5, 2]])
ROWS, COLUMNS = PartitionSpec("x", None), PartitionSpec(None, "x")


def energy(x):
    return jnp.sin(x).sum()


def read(w, ids, *spec):
    return w.at[ids].get(out_sharding=PartitionSpec(*spec, *[None] * (ids.ndim + 1 - len(spec))))


def pooled(w, ids):
    return energy(lookup(Table(w), ids))


doubled = jax.sharding.auto_axes(lambda w: 2 * w, out_sharding=PartitionSpec(None, None))

# Name: a loss of an array and of ids that are split over the devices; and how many ids its gradient has.
LOSSES = {
    "ids": (lambda w, ids: energy(read(w, ids, "x")), 8),
    "ids_in_vmap": (lambda w, ids: jax.vmap(lambda k: energy(read(w, k)))(ids).sum(), 8),
    "slice": (lambda w, ids: energy(w[2:8]), 6),
    "strides": (lambda w, ids: energy(w[::4]), 10),
    "window": (lambda w, ids: energy(lax.dynamic_slice_in_dim(w, jnp.int32(3), 4)), 4),
    "split": (lambda w, ids: energy(jnp.split(w, 4)[1]), 10),
    "concatenate": (lambda w, ids: energy(jnp.concatenate([w[:2], w[4:6]])), 4),
    "cond": (lambda w, ids: lax.cond(jnp.asarray(IDS)[0, 0] > 1, lambda: energy(w[2:8]), lambda: energy(w[2:4])), 6),
    "scan": (
        lambda w, ids: lax.scan(lambda c, k: (jnp.tanh(c + energy(read(w, k))), None), 0.1, jnp.asarray(IDS))[0],
        8,
    ),
    "automatic": (lambda w, ids: energy(read(doubled(w), ids, "x")), 8),
    "scaled_by_rows": (lambda w, ids: pooled(w * jnp.arange(40.0)[:, None], ids), 8),
    "lookup_in_cond": (lambda w, ids: lax.cond(True, lambda: pooled(w, ids), lambda: pooled(w, ids[:, :2])), 8),
    "all": (lambda w, ids: energy(w) * energy(read(w, ids, "x")), None),
}
OF_COLUMNS = {
    "row": (lambda w, ids: energy(w[3]), 1),
    "plain_ids": (lambda w, ids: energy(w[jnp.asarray(IDS)]), 8),
    "reshape": (lambda w, ids: energy(w.reshape(40, 2, 3)[jnp.asarray(IDS)]), 8),
}


@functools.cache
def mesh():
    return jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))


@functools.cache
def gradients(spec):
    """The gradients by embax and by JAX, in one program."""
    losses = {name: loss for name, (loss, _) in losses_of(spec).items()}

    @jax.jit
    def both(weight, ids):
        ours = functools.partial(embax.grad, tables=lambda path, leaf: True, on_dense="allow")
        return {name: (ours(loss)(weight, ids), jax.grad(loss)(weight, ids)) for name, loss in losses.items()}

    args = (WEIGHT, spec), (IDS, PartitionSpec("x"))
    with jax.set_mesh(mesh()):
        return jax.device_get(both(*(jax.device_put(x, NamedSharding(mesh(), of_x)) for x, of_x in args)))


def losses_of(spec):
    return LOSSES | (OF_COLUMNS if spec == COLUMNS else {})


@pytest.mark.parametrize(
    ("spec", "name"), [(spec, name) for spec in (ROWS, COLUMNS) for name in losses_of(spec)], ids=str
)
def test_gradient_on_explicit_axes_equals_jax(spec, name):
    ours, expected = gradients(spec)[name]
    assert np.asarray(expected).any()
    assert_same_gradient(ours, expected, **FLOAT32)
    length = losses_of(spec)[name][1]
    assert isinstance(ours, RowGrad) == (length is not None)
    assert length is None or len(ours.values) == length
