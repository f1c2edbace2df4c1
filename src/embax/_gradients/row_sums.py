"""Sums of rows that are stored as keys and values, with or without lanes.

For instance, for the ids [1, 3, 1] of a table of 4 rows, with the values [1, 2, 5] of one number each:

    dense       [0, 6, 0, 2]
    distinct    ids [1, 3, 4], values [6, 2, 0]     4 is the sentinel: no row

Each function is compiled, so that an eager call runs one program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, Key, PyTree

from .._base import distinct as _dedupe
from .._core import ids as _ids
from .row_keys import decode, encode

Keys = Key[Array, "*lanes length"]
Values = Inexact[Array, "*lanes_length_dim"]


@functools.partial(jax.jit, static_argnums=2, inline=True)
def dense(keys: Keys, values: Values, rows: int) -> Inexact[Array, "*lanes_rows_dim"]:
    """Sum the values of each row, in float32 or wider, in an array of all rows."""
    dim = values.shape[keys.ndim :]

    def of_lane(ids: Int[Array, " length"], values: Inexact[Array, "length *dim"]) -> Inexact[Array, "rows *dim"]:
        wide = values.astype(_dedupe.accumulator(values.dtype))
        zeros = jnp.zeros((rows, *dim), wide.dtype)
        return zeros.at[ids].add(wide, mode="drop").astype(values.dtype)

    return _of_each_lane(of_lane, keys, values, rows)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def distinct(keys: Keys, values: Values, rows: int) -> tuple[Keys, Values]:
    """Sum the values of each row that occurs. Return each row once, in rising order, then sentinels."""

    def of_lane(
        ids: Int[Array, " length"], values: Inexact[Array, "length *dim"]
    ) -> tuple[Key[Array, " length"], Inexact[Array, "length *dim"]]:
        _, combined = _dedupe.combine(None, ids, values, rows)
        return encode(combined.ids, rows), combined.values

    return _of_each_lane(of_lane, keys, values, rows)


def _of_each_lane(function: Callable[[Any, Any], PyTree], keys: Keys, values: Values, rows: int) -> PyTree:
    for _ in range(keys.ndim - 1):
        function = jax.vmap(function)
    return function(_ids.on_every_device(decode(keys, rows)), _ids.on_every_device(values))


@functools.partial(jax.jit, static_argnums=2, inline=True)
def joined(
    keys: Keys, values: Values, summed: tuple[int, ...]
) -> tuple[Key[Array, "*kept total"], Inexact[Array, "*kept_total_dim"]]:
    """Sum some axes of lanes: concatenate their rows."""
    sizes, dim = keys.shape[:-1], values.shape[keys.ndim :]
    kept = [axis for axis in range(len(sizes)) if axis not in summed]
    shape = (*(sizes[axis] for axis in kept), math.prod(sizes[axis] for axis in summed) * keys.shape[-1])
    keys = jnp.transpose(keys, (*kept, *summed, len(sizes))).reshape(shape)
    values = jnp.transpose(values, (*kept, *summed, *range(len(sizes), values.ndim))).reshape(*shape, *dim)
    return keys, values


@functools.partial(jax.jit, inline=True)
def together(
    one: tuple[Key[Array, "*lanes one"], Inexact[Array, "*lanes_one_dim"]],
    other: tuple[Key[Array, "*lanes other"], Inexact[Array, "*lanes_other_dim"]],
) -> tuple[Key[Array, "*lanes total"], Inexact[Array, "*lanes_total_dim"]]:
    """Sum two gradients with the same lanes: concatenate their rows."""
    axis = one[0].ndim - 1
    return jnp.concatenate([one[0], other[0]], axis), jnp.concatenate([one[1], other[1]], axis)
