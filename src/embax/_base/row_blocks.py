"""Row blocks: a table read and written in blocks of rows by a loop that never holds a copy of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from .dtypes import index_dtype


def over_blocks(step: Callable[[Int[Array, ""], int, Any], Any], rows: int, chunk: int, carry: Any) -> Any:
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

    def block(number: Any, carry: Any) -> Any:
        return step(jnp.asarray(number, index) * chunk, chunk, carry)

    if rows >= chunk:
        carry = jax.lax.fori_loop(0, rows // chunk, block, carry)
    rest = rows % chunk
    return step(jnp.asarray(rows - rest, index), rest, carry) if rest else carry


# XLA for CPUs computes with bfloat16 in float32, and takes that to mean the whole table, converted in or before a loop.
# Integers it moves as they are; and of a table behind a barrier it makes no integers beforehand.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def read_block(weight: Float[Array, "rows *dim"], first: Int[Array, ""], size: int) -> Float[Array, "size *dim"]:
    """Return `size` rows from row `first` on."""
    if jnp.finfo(weight.dtype).bits < 32:
        weight, first = jax.lax.optimization_barrier((weight, first))
    return _as_float(jax.lax.dynamic_slice_in_dim(_as_integers(weight), first, size), weight.dtype)


@read_block.defjvp
def _read_block_jvp(size: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    return read_block(*primals, size), jax.lax.dynamic_slice_in_dim(tangents[0], primals[1], size)


@jax.custom_jvp
def write_block(
    weight: Float[Array, "rows *dim"], block: Float[Array, "size *dim"], first: Int[Array, ""]
) -> Float[Array, "rows *dim"]:
    """Put a block in place of the rows from row `first` on."""
    moved = jax.lax.dynamic_update_slice_in_dim(_as_integers(weight), _as_integers(block), first, 0)
    return _as_float(moved, weight.dtype)


@write_block.defjvp
def _write_block_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return write_block(*primals), jax.lax.dynamic_update_slice_in_dim(tangents[0], tangents[1], primals[2], 0)


def _as_integers(values: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    bits = jnp.finfo(values.dtype).bits
    return jax.lax.bitcast_convert_type(values, f"uint{bits}") if bits < 32 else values


def _as_float(values: Shaped[Array, "*shape"], dtype: np.dtype) -> Float[Array, "*shape"]:
    return values if values.dtype == dtype else jax.lax.bitcast_convert_type(values, dtype)
