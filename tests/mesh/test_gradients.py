"""Gradients of sharded tables that are read inside of transformations: as off the mesh, for each layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import LAYOUTS, everywhere, mesh_of, split, usual_and_rest

import embax
from embax import RowGrad, Table, embedding_bag, lookup

ROWS = 601
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 3.0, "out_of_range": "zero"}
IDS = np.random.default_rng(1).integers(0, ROWS, (8, 16)).astype(np.int32)


def energy(table, ids):
    return jnp.sin(lookup(table, ids)).sum()


def scanned(table, ids):
    def step(number, ids):
        return jnp.tanh(number + 0.01 * jax.checkpoint(energy)(table, ids)), None

    return jax.lax.scan(step, 0.1, ids)[0]


def branched(table, ids):
    return jax.lax.cond(ids[0, 0] > 0, lambda: energy(table, ids), lambda: energy(table, ids[:1]))


LOSSES = {
    "scan of checkpoint": (scanned, 128),
    "vmap": (lambda table, ids: jax.vmap(lambda ids: energy(table, ids))(ids).sum(), 128),
    "cond": (branched, 128),
    "jit": (jax.jit(energy), 128),
    "scaled": (lambda table, ids: energy(jax.tree.map(lambda weight: 0.5 * weight, table), ids), 128),
    "bags": (jax.checkpoint(lambda table, ids: jnp.sin(embedding_bag(table, ids)).sum()), 128),
}


ALL = tuple(LOSSES)


@functools.partial(jax.jit, static_argnames="names")
def gradients(table, ids, names):
    """The gradients of these losses, and the whole of each."""
    found = {name: embax.grad(LOSSES[name][0], on_dense="error")(table, ids) for name in names}
    return found, {name: gradient.to_dense() for name, gradient in found.items()}


@functools.cache
def off_the_mesh():
    return jax.jit(lambda table: {name: jax.grad(loss)(table, IDS).weight for name, (loss, _) in LOSSES.items()})(
        Table(WEIGHT, **RULES)
    )


@pytest.mark.parametrize(
    ("layout", "axes", "names"),
    usual_and_rest(
        [
            ("rows and columns", "auto", ("vmap", "jit", "scaled")),
            ("columns", "auto", ("scan of checkpoint", "cond")),
        ],
        [(layout, axes, ALL) for layout in LAYOUTS for axes in ("auto", "explicit")],
    ),
)
def test_transformations_are_followed_on_a_mesh(layout, axes, names):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    ids = split(mesh, IDS) if axes == "auto" else everywhere(mesh, IDS)  # as a scan wants them
    found, whole = jax.block_until_ready(gradients(table, ids, names))
    for name, gradient in found.items():
        assert isinstance(gradient, RowGrad), name
        assert gradient.values.shape[0] == LOSSES[name][1], name
        np.testing.assert_allclose(whole[name], off_the_mesh()[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_indexing_the_weight_of_a_sharded_table_is_a_dense_use():
    table = embax.shard(Table(WEIGHT), mesh_of({"x": 4}), "x", layout="rows-cyclic")
    both = lambda table: energy(table, [1, 2]) + table.weight[3].sum()  # noqa: E731
    with pytest.warns(embax.DenseGradientWarning, match="by their place in its array"):
        gradient, expected = jax.jit(lambda table: (embax.grad(both)(table), jax.grad(both)(table)))(table)
    np.testing.assert_allclose(gradient.weight, expected.weight, rtol=1e-6)  # float32
