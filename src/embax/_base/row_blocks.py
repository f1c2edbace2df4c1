"""Row blocks: a table read and written in blocks of rows by a loop that never holds a copy of it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from .dtypes import index_dtype
from .tangents import with_tangent


def over_blocks(step: Callable[[Int[Array, ""], int, PyTree], PyTree], rows: int, chunk: int, carry: PyTree) -> PyTree:
    """Run a step on blocks of `chunk` rows, one after the other, and on the block of the rows that are left over.

    Args:
      step: Called as `step(first_row, number_of_rows, carry)`; returns the carry. It is traced once for the blocks, and
        once for the rest: to pad the table would be to copy it.
      rows: The number of rows of the table.
      chunk: The rows of a block, 1 or more.
      carry: A pytree of arrays.

    Returns:
      The last carry.
    """
    index = index_dtype(rows)

    def block(number: Int[Array, ""], carry: PyTree) -> PyTree:
        return step(jnp.asarray(number, index) * chunk, chunk, carry)

    if rows >= chunk:
        carry = jax.lax.fori_loop(0, rows // chunk, block, carry)
    rest = rows % chunk
    return step(jnp.asarray(rows - rest, index), rest, carry) if rest else carry


# XLA for CPUs computes with bfloat16 in float32, and takes that to mean the whole table, converted in or before a loop.
# Integers it moves as they are; and of a table behind a barrier it makes no integers beforehand.


def read_block(weight: Float[Array, "rows *dim"], first: Int[Array, ""], size: int) -> Float[Array, "size *dim"]:
    """Return `size` rows from row `first` on."""
    held, start = jax.lax.stop_gradient(weight), first
    if jnp.finfo(weight.dtype).bits < 32:
        held, start = jax.lax.optimization_barrier((held, start))
    block = _as_float(jax.lax.dynamic_slice_in_dim(_as_integers(held), start, size), weight.dtype)
    tangent = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    return with_tangent(tangent, block, [weight], [first])


def write_block(
    weight: Float[Array, "rows *dim"], block: Float[Array, "size *dim"], first: Int[Array, ""]
) -> Float[Array, "rows *dim"]:
    """Put a block in place of the rows from row `first` on."""
    held, new = (_as_integers(jax.lax.stop_gradient(array)) for array in (weight, block))
    moved = _as_float(jax.lax.dynamic_update_slice_in_dim(held, new, first, 0), weight.dtype)
    tangent = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return with_tangent(tangent, moved, [weight, block], [first])


def _as_integers(values: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    bits = jnp.finfo(values.dtype).bits
    return jax.lax.bitcast_convert_type(values, f"uint{bits}") if bits < 32 else values


def _as_float(values: Shaped[Array, "*shape"], dtype: np.dtype) -> Float[Array, "*shape"]:
    return values if values.dtype == dtype else jax.lax.bitcast_convert_type(values, dtype)
