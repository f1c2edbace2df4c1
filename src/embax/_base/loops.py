"""Let one loop run on a single device, on a mesh with explicit axes, and inside of a `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array, PyTree, Shaped

from .axes import explicit_sharding


def varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Let all arrays vary over the axes of a `shard_map` that any of them varies over.

    The transpose sums the gradient of an array over the axes that are new to it.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(frozenset().union(*axes) - of_one) for of_one in axes]
    return tuple(
        jax.lax.pcast(array, names, to="varying") if names else array
        for array, names in zip(arrays, missing, strict=True)
    )


def zeros_as(like: Array, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[Array, "*shape"]:
    """Make zeros that vary over the same axes of a `shard_map` as `like`."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def with_auto_axes(
    function: Callable[..., tuple[Array, ...]], specs: Sequence[PartitionSpec], args: Sequence[PyTree]
) -> tuple[Array, ...]:
    """Call a function with the explicit axes of a mesh left to XLA.

    Args:
      function: A function that returns several arrays.
      specs: The layout of each returned array, if the arguments are on a mesh with explicit axes.
      args: Pytrees of arrays.

    Returns:
      The function's results.
    """
    meshes = [sharding.mesh for array in jax.tree.leaves(args) if (sharding := explicit_sharding(array))]
    if not meshes:
        return function(*args)
    layouts = tuple(NamedSharding(meshes[0], spec) for spec in specs)
    by_xla: Any = auto_axes(function, out_sharding=layouts)
    return by_xla(*args)
