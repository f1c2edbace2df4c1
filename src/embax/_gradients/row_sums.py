"""Sums of rows held as keys and values, with or without lanes.

An example, of the rows 1, 3 and 1 of a table of 4, with values of one number:

    ids [1, 3, 1], values [1, 2, 5]    dense       [0, 6, 0, 2]
                                       distinct    ids [1, 3, 4], values [6, 2, 0]; 4 stands for none

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
    """Add up the values of each row, in float32 or wider, in an array of all rows."""
    dim = values.shape[keys.ndim :]

    def of_lane(ids: Int[Array, " length"], values: Inexact[Array, "length *dim"]) -> Inexact[Array, "rows *dim"]:
        wide = values.astype(_dedupe.accumulator(values.dtype))
        zeros = jnp.zeros((rows, *dim), wide.dtype)
        return zeros.at[ids].add(wide, mode="drop").astype(values.dtype)

    return _of_each_lane(of_lane, keys, values, rows)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def distinct(keys: Keys, values: Values, rows: int) -> tuple[Keys, Values]:
    """Add up the values of each row that has some: every row once, in rising order, and none in the places left."""

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
def joined(keys: Keys, values: Values, summed: tuple[int, ...]) -> tuple[Keys, Values]:
    """Put the rows of some axes of lanes one behind the other."""
    sizes, dim = keys.shape[:-1], values.shape[keys.ndim :]
    kept = [axis for axis in range(len(sizes)) if axis not in summed]
    shape = (*(sizes[axis] for axis in kept), math.prod(sizes[axis] for axis in summed) * keys.shape[-1])
    keys = jnp.transpose(keys, (*kept, *summed, len(sizes))).reshape(shape)
    values = jnp.transpose(values, (*kept, *summed, *range(len(sizes), values.ndim))).reshape(*shape, *dim)
    return keys, values


@functools.partial(jax.jit, inline=True)
def together(one: tuple[Keys, Values], other: tuple[Keys, Values]) -> tuple[Keys, Values]:
    """Put the rows of two gradients of the same lanes one behind the other."""
    axis = one[0].ndim - 1
    return jnp.concatenate([one[0], other[0]], axis), jnp.concatenate([one[1], other[1]], axis)
