"""Reads of parts of a chosen array: the gradient holds their rows, and is that of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_gradient, dense
from closeness import FLOAT32
from jax import lax

import embax
from embax import DenseGradientWarning, RowGrad

ROWS = 40
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)
IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 39]])
SMALL = np.arange(4, dtype=np.int8)


def energy(x):
    return jnp.sin(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum()


def in_lanes(function):
    """The sum over lanes that have a table of their own, so that JAX copies it."""
    return lambda w: jax.vmap(lambda factor: energy(function(w * factor)))(jnp.array([0.5, 2.0, 3.0])).sum()


def of(function):
    return lambda w: energy(function(w))


def scanned(function):
    return lambda w: lax.scan(lambda c, k: (jnp.tanh(c + energy(function(w, k))), None), 0.1, np.arange(3))[0]


@jax.jit
def window(w, start):
    return lax.dynamic_slice(w, (start, 2), (3, 2))


def once_more(w):
    first, _, third, _ = jnp.split(w, 4)
    return jnp.concatenate([third, 2 * first[1:3], w[5:7]])


# Name: a loss of an array; and how many ids its gradient has.
FOLLOWED = {
    "row": (of(lambda w: w[3]), 1),
    "last_row": (of(lambda w: w[-1]), 1),
    "traced_row": (of(lambda w: w[jnp.asarray(IDS)[1, 2]]), 1),
    "numbers_of_a_row": (of(lambda w: w[3, 2:5]), 1),
    "number": (of(lambda w: w[3, 2][None]), 1),
    "slice": (of(lambda w: w[2:7]), 5),
    "last_rows": (of(lambda w: w[-5:]), 5),
    "columns_of_a_slice": (of(lambda w: w[3:5, 2:5]), 2),
    "strides": (of(lambda w: w[::2]), 20),
    "strides_of_a_slice": (of(lambda w: w[2:20:3, ::2]), 6),
    "backwards": (of(lambda w: w[10:2:-2]), 4),
    "backwards_ids": (of(lambda w: w[::-1][IDS]), 12),
    "slice_ids": (of(lambda w: w[1:][IDS % 39]), 12),
    "strides_ids": (of(lambda w: w[1::2][IDS % 20]), 12),
    "columns_of_ids": (of(lambda w: w[IDS, 2:5]), 12),
    "column_of_ids": (of(lambda w: w[IDS, 1]), 12),
    "numbers": (of(lambda w: w[IDS[0], np.arange(4)]), 4),
    "outside": (of(lambda w: w.at[SMALL * 13, SMALL * 2].get(mode="fill", fill_value=0)), 4),
    "ids_of_columns": (of(lambda w: w[:, 2:5][IDS]), 12),
    "columns_twice": (of(lambda w: w[IDS][..., 2:5]), 12),
    "window": (of(lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(7), 3)), 3),
    "window_beyond_the_end": (of(lambda w: window(w, 39)), 3),
    "windows": (lambda w: jax.vmap(lambda k: energy(lax.dynamic_slice_in_dim(w, k, 2)))(IDS[0]).sum(), 8),
    "windows_of_columns": (lambda w: jax.vmap(lambda k: energy(window(w, k)))(IDS[0]).sum(), 12),
    "split": (of(lambda w: jnp.split(w, 4)[1]), 10),
    "split_ids": (of(lambda w: jnp.split(w, [12])[1][IDS % 28]), 12),
    "split_columns_ids": (of(lambda w: jnp.split(w, 2, axis=1)[1][IDS]), 12),
    "concatenate": (of(lambda w: jnp.concatenate([w[:3], w[7:9]])), 5),
    "concatenate_ids": (of(lambda w: jnp.concatenate([w, jnp.ones((2, 6)), w[:3]])[IDS]), 24),
    "concatenate_columns_ids": (of(lambda w: jnp.concatenate([w, jnp.ones((ROWS, 2))], 1)[IDS]), 12),
    "pad": (of(lambda w: jnp.pad(w[:3], ((1, 1), (0, 0)))), 3),
    "pad_ids": (of(lambda w: jnp.pad(w, ((1, 0), (0, 2)))[IDS]), 12),
    "roll_ids": (of(lambda w: jnp.roll(w, 1, axis=0)[IDS]), 24),
    "reshape_ids": (of(lambda w: w.reshape(ROWS, 2, 3)[IDS]), 12),
    "blocks": (of(lambda w: w.reshape(10, 4, 6)[jnp.array([1, 2])]), 8),
    "new_axis": (of(lambda w: w[None, IDS[0]]), 4),
    "mask": (of(lambda w: w[np.arange(ROWS) % 9 == 2]), 5),
    "repeat": (of(lambda w: jnp.repeat(w[:2], 3, axis=0)), 2),
    "copies_slice": (in_lanes(lambda w: w[3:6]), 9),
    "copies_row": (in_lanes(lambda w: w[3]), 3),
    "copies_strides": (in_lanes(lambda w: w[::8, 1:]), 15),
    "copies_ids": (in_lanes(lambda w: w[IDS]), 36),
    "copies_of_slices_ids": (in_lanes(lambda w: w[1:][IDS[1]]), 12),
    "copies_window": (in_lanes(lambda w: window(w, jnp.int32(4))), 9),
    "scan_window": (scanned(lambda w, k: window(w, k)), 9),
    "scan_pad_ids": (scanned(lambda w, k: jnp.pad(w, ((2, 0), (0, 0)))[jnp.asarray(IDS)[k]]), 12),
    "checkpoint_pad_ids": (jax.checkpoint(of(lambda w: jnp.pad(w, ((2, 0), (0, 0)))[IDS])), 12),
    "scan_slice": (scanned(lambda w, k: w[:2] * k.astype(w.dtype)), 6),
    "cond": (lambda w: lax.cond(jnp.asarray(IDS)[0, 0] > 0, lambda: energy(w[:3]), lambda: energy(w[5])), 3),
}

# Name: a loss of an array; and what the warning says.
NOT_FOLLOWED = {
    "most_rows": (of(lambda w: w[:30]), "takes a part of its weight that is no list of rows, at .*test_grad_parts"),
    "column": (of(lambda w: w[:, 1]), "takes a part of its weight that is no list of rows, at .*test_grad_parts"),
    "columns": (of(lambda w: w[:, IDS[0]]), "takes a part of its weight that is no list of rows, at .*test_grad_parts"),
    "column_and_rows": (
        lambda w: energy(w[:, 1]) * energy(w[IDS]),
        "takes a part of its weight that is no list of rows, at .*test_grad_parts",
    ),
    "numbers_of_all": (of(lambda w: w.reshape(-1)[IDS]), "takes a part of its weight that is no list of rows"),
    "transposed": (of(lambda w: w.T[:, IDS]), "computes with all rows of its weight"),
}


def followed(path, leaf):
    return True


@functools.cache
def gradients():
    """The gradients by embax and by JAX, in one program."""
    losses = {name: loss for name, (loss, _) in (FOLLOWED | NOT_FOLLOWED).items()}

    @jax.jit
    def both(weight):
        ours = functools.partial(embax.grad, tables=followed, on_dense="allow")
        return {name: (ours(loss)(weight), jax.grad(loss)(weight)) for name, loss in losses.items()}

    return both(WEIGHT)


@pytest.mark.parametrize("name", FOLLOWED)
def test_parts_are_rows(name):
    ours, expected = gradients()[name]
    assert np.asarray(expected).any()
    assert isinstance(ours, RowGrad)
    assert_same_gradient(ours, expected, **FLOAT32)
    assert len(ours.values) == FOLLOWED[name][1]


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_other_parts_are_dense_whole_and_announced(name):
    loss, match = NOT_FOLLOWED[name]
    ours, expected = gradients()[name]
    assert isinstance(ours, jax.Array)
    assert_same_gradient(ours, expected, **FLOAT32)
    with pytest.warns(DenseGradientWarning, match=match) as record:
        jax.eval_shape(embax.grad(loss, tables=followed), WEIGHT)
    assert len(record) == 1


def test_parts_of_arrays_of_other_shapes_and_dtypes():
    arrays = {"vector": np.arange(40.0), "3 axes": np.ones((40, 2, 3)), "bfloat16": np.ones((40, 2))}
    arrays = {name: jnp.asarray(x, jnp.bfloat16 if name == "bfloat16" else jnp.float32) for name, x in arrays.items()}

    def loss(w):
        return sum(energy(x).astype(jnp.float32) for x in (w[1:][IDS % 39], w[3:9:2], jnp.pad(w, 1)[IDS], w[-1][None]))

    @jax.jit
    def both(arrays):
        return {
            name: (embax.grad(loss, tables=followed, on_dense="error")(w), jax.grad(loss)(w))
            for name, w in arrays.items()
        }

    for name, (ours, expected) in both(arrays).items():
        assert len(ours.values) == 12 + 3 + 12 + 1
        tolerance = {"rtol": 0.05, "atol": 0.05} if name == "bfloat16" else FLOAT32
        assert_same_gradient(dense(ours), expected, **tolerance)
