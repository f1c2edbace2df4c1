"""Distinct ids: sum the values that belong to one row, by slots or by sort."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, PyTree, Shaped

Slots = Int32[Array, "_"] | None  # of a table each, which have other numbers of rows


def scratch(rows: int) -> Slots:
    """Make what `combine` needs to work by slots, where that is the fastest way on the default platform.

    By slots: every position writes its own number into a slot of its row and reads it back; all positions of a row read
    the same number, which names the one that stands for them. The slots never need clearing, so that the cost follows
    the ids as long as they are kept, and donated, from call to call. Measured on a CPU only, where it is 20 times
    faster than a sort (16,384 ids). On a GPU the float32 scatter-add after it is slow under contention
    (https://github.com/jax-ml/jax/issues/38806), so the sort is the choice for all but the CPU until it is measured.

    Args:
      rows: The number of rows of the table.

    Returns:
      The slots, or None where `combine` is to sort.
    """
    return jnp.zeros(rows, jnp.int32) if jax.default_backend() == "cpu" else None


class Distinct(NamedTuple):
    """Values summed by row."""

    ids: Int[Array, " ids"]  # the distinct row numbers in some order, then `rows` in the places that are left over
    values: PyTree  # (ids, *dim), the sum of each, in the dtype of the values; 0 in the places left over
    number: Int32[Array, ""]  # how many places are not left over


@functools.partial(jax.jit, static_argnums=3, inline=True)  # one program for an eager call
def combine(
    slots: Slots, ids: Int[Array, " ids"], values: PyTree[Shaped[Array, "ids ..."]], rows: int
) -> tuple[Slots, Distinct]:
    """Sum the values of each row, in float32 or wider.

    Args:
      slots: What `scratch` gives, or this function gave before; None to sort.
      ids: Row numbers in `[0, rows)`, and `rows` where there is no row.
      values: One value an id, or a pytree of them.
      rows: The number of rows of the table.

    Returns:
      The slots for the next call, and the sums.

    Raises:
      MemoryError: If there are more ids than 32 bits number; their places alone would take 8 GB.
    """
    if ids.shape[0] > np.iinfo(np.int32).max:
        raise MemoryError(f"A gradient must have fewer than 2**31 ids, got {ids.shape[0]:,}. Take smaller batches.")
    if slots is None:
        order = jnp.argsort(ids)  # stable, so that sums are the same each time
        ids, values = ids[order], jax.tree.map(lambda x: x[order], values)
        starts = jnp.concatenate([jnp.ones_like(ids[:1], bool), ids[1:] != ids[:-1]]) & (ids < rows)
        places = _numbered(starts)
    else:
        position = jnp.arange(ids.shape[0], dtype=jnp.int32)
        slots = slots.at[ids].set(position, mode="drop", wrap_negative_indices=False)
        # An id without a row gets a position behind the last one.
        owner = slots.at[ids].get(mode="fill", fill_value=ids.shape[0], wrap_negative_indices=False)
        starts = owner == position
        places = _numbered(starts).at[owner].get(mode="fill", fill_value=0)
    # Ids without a row go nowhere.
    places = jnp.where(ids < rows, places, ids.shape[0])
    sorted_ = slots is None
    distinct = jnp.full_like(ids, rows).at[places].set(ids, mode="drop", indices_are_sorted=sorted_)

    def total(values: Shaped[Array, "ids *dim"]) -> Shaped[Array, "ids *dim"]:
        wide = values.astype(accumulator(values.dtype))
        summed = jnp.zeros_like(wide).at[places].add(wide, mode="drop", indices_are_sorted=sorted_)
        return summed.astype(values.dtype)

    return slots, Distinct(distinct, jax.tree.map(total, values), jnp.sum(starts, dtype=jnp.int32))


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype in which values of this one are summed: at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype(np.float32)


def _numbered(starts: Bool[Array, " ids"]) -> Int32[Array, " ids"]:
    """Number the places at which something starts, from 0 on, and give the others the number before."""
    return jnp.cumsum(starts.astype(jnp.int32)) - 1
