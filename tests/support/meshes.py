"""Meshes of the test's devices, and the layouts of a table on them."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# The shape and the axes of a mesh, and the arguments of `embax.shard`. On eight devices the last block of rows may be
# empty; the sizes of two axes differ, so that a test sees it when one is taken for the other.
LAYOUTS = {
    "rows": ({"x": 8}, {"axis": "x"}),
    "rows-cyclic": ({"x": 4}, {"axis": "x", "layout": "rows-cyclic"}),
    "columns": ({"x": 4}, {"axis": "x", "layout": "columns"}),
    "replicated": ({"x": 4}, {"axis": "x", "layout": "replicated"}),
    "rows and copies": ({"x": 4, "y": 2}, {"axis": "x"}),
    "rows and columns": ({"x": 4, "y": 2}, {"axis": "x", "layout": "rows-cyclic", "columns": "y"}),
    "rows over two axes": ({"x": 4, "y": 2}, {"axis": ("x", "y")}),
}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def usual_and_rest(usual, grid):
    """The cases of every run, and those of a grid that only an exhaustive run adds."""
    return [*usual, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in grid if case not in usual)]


def mesh_of(sizes, axes="auto"):
    """A mesh of the first of the test's devices."""
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AXES[axes],) * len(sizes))


def split(mesh, array):
    """An array split over all devices of a mesh along its first axis."""
    return jax.device_put(np.asarray(array), NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names))))


def everywhere(mesh, array):
    """An array of which every device of a mesh has a copy; its sharding is written as JAX does for what it returns."""
    axes = [None] * np.ndim(array) if AxisType.Explicit in mesh.axis_types else []
    return jax.device_put(np.asarray(array), NamedSharding(mesh, PartitionSpec(*axes)))


def on_mesh(mesh, tree):
    """Copy what is on one device only to every device of a mesh, so that a step compiles once for a fresh state."""
    return jax.tree.map(lambda x: x if len(x.sharding.device_set) > 1 else everywhere(mesh, x), tree)


def waiting(function):
    """Return a function that waits for its result; for steps that a test runs one after the other.

    A mesh of CPU devices hangs where many programs of several devices are under way at once.
    """

    @functools.wraps(function)
    def run(*args):
        return jax.block_until_ready(function(*args))

    return run
