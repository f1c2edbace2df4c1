"""Row blocks: a loop reads and writes a table in blocks of rows, without ever copying the table.

For instance, 10 rows in blocks of 4: a loop runs the step on rows 0 to 3 and 4 to 7, then a step of 2 rows ends it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from .dtypes import index_dtype
from .tangents import with_tangent


def over_blocks(step: Callable[[Int[Array, ""], int, PyTree], PyTree], rows: int, chunk: int, carry: PyTree) -> PyTree:
    """Run a step on consecutive blocks of `chunk` rows, and on the shorter block that remains.

    Args:
      step: Called as `step(first_row, number_of_rows, carry)`; returns the carry. It is traced once for the blocks and
        once for the remainder, since padding the table would copy it.
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


# XLA's CPU backend computes bfloat16 in float32, and would convert the whole table before or in a loop. So blocks are
# moved as integers, and a barrier keeps XLA from converting the whole table to integers before the loop.


def read_block(weight: Float[Array, "rows *dim"], first: Int[Array, ""], size: int) -> Float[Array, "size *dim"]:
    """Return the `size` rows that begin at row `first`."""
    held, start = jax.lax.stop_gradient(weight), first
    if jnp.finfo(weight.dtype).bits < 32:
        held, start = jax.lax.optimization_barrier((held, start))
    block = _as_float(jax.lax.dynamic_slice_in_dim(_as_integers(held), start, size), weight.dtype)
    tangent = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    return with_tangent(tangent, block, [weight], [first])


def write_block(
    weight: Float[Array, "rows *dim"], block: Float[Array, "size *dim"], first: Int[Array, ""]
) -> Float[Array, "rows *dim"]:
    """Overwrite the rows that begin at row `first` with a block."""
    held, new = (_as_integers(jax.lax.stop_gradient(array)) for array in (weight, block))
    moved = _as_float(jax.lax.dynamic_update_slice_in_dim(held, new, first, 0), weight.dtype)
    tangent = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return with_tangent(tangent, moved, [weight, block], [first])


def _as_integers(values: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    bits = jnp.finfo(values.dtype).bits
    return jax.lax.bitcast_convert_type(values, f"uint{bits}") if bits < 32 else values


def _as_float(values: Shaped[Array, "*shape"], dtype: np.dtype) -> Float[Array, "*shape"]:
    return values if values.dtype == dtype else jax.lax.bitcast_convert_type(values, dtype)
