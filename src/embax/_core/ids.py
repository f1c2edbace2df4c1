"""Ids: any integers in, row numbers out. An id without a row becomes a sentinel outside of `[0, rows)`.

In a table of 5 rows: `[0, -1, 7]` is checked by `prepare` (7 is an IndexError, if the table says so) and becomes
`[0, 4, 5]` by `narrow` and `resolve`: -1 counts from the end, 5 stands for no row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import auto_axes
from jaxtyping import Array, Bool, Int, Integer, PyTree, Shaped

from .._base.arrays import as_jax
from .._base.axes import explicit_sharding as explicit_sharding
from .._base.axes import on_every_device as on_every_device
from .._base.dtypes import index_dtype as index_dtype
from .table import OutOfRange, PaddingRows, Table

Ids = Integer[Array, "*batch"] | Integer[np.ndarray, "*batch"]  # also unsigned ones, before they are narrowed
Given = Shaped[Array, "*batch"] | Shaped[np.ndarray, "*batch"]


def prepare(
    argument: str, ids: object, table: Table, used: int | None = None, *, wrap: bool = True, ignored: int | None = None
) -> Ids:
    """Check the ids of a caller; concrete ids are checked by value, too.

    Args:
      argument: The call and its argument for the messages, as in `embax.lookup(ids=...)`.
      ids: An array, nested list or scalar of integers.
      table: The table to be read.
      used: Only the first `used` ids must have a row; the rest is not read. Default: all.
      wrap: Whether ids in `[-rows, 0)` count from the end. Labels of a loss do not.
      ignored: A label that needs no row, such as `ignore_index`.

    Returns:
      The ids as an array. Ids from the host are narrowed here, so that JAX does not cut 64-bit ids to other rows.

    Raises:
      TypeError: If the ids are not of an integer dtype.
      IndexError: If `table.out_of_range` is `"error"` and a concrete id has no row.
      ValueError: If `out_of_range` is `"clip"` and the table has no row, or nested lists differ in length.
    """
    try:
        ids = as_array(ids)
    except (ValueError, TypeError):  # errors of NumPy and JAX, which do not mention ids
        if not isinstance(ids, list | tuple):
            raise
        raise ValueError(
            f"`{argument}` must be an array, or nested lists of equal lengths, got lists of different lengths. Pad "
            "them, or pool them by embax.embedding_bag, which takes embax.Ragged.from_lists(lists)."
        ) from None
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        way = "Cast them, as in ids.astype(int)"
        if ids.dtype == object:
            way = "Lists of different lengths go into embax.Ragged.from_lists, for embax.embedding_bag"
        raise TypeError(f"`{argument}` must be of an integer dtype, got {ids.dtype}. {way}.")
    if table.out_of_range == "clip" and table.rows == 0 and (number := ids.size if used is None else used):
        raise ValueError(
            f"`{argument}` must be empty for a table without rows, got {number} ids and out_of_range='clip', "
            "which has no row to clip to. Resize the table first."
        )
    if isinstance(ids, Tracer):
        return ids
    if table.out_of_range == "error" and (isinstance(ids, np.ndarray) or ids.is_fully_addressable):
        checked = np.asarray(ids)[:used] if used is not None else np.asarray(ids)
        _raise_if_out_of_range(argument, checked, table.rows, wrap, ignored)
    return np.asarray(narrow(ids, table.rows, np)) if isinstance(ids, np.ndarray) else ids


def resolve(ids: Ids, rows: int, out_of_range: OutOfRange, wrap: bool = True) -> Int[Array, "*batch"]:
    """Turn prepared ids into row numbers in `[0, rows)`; a number outside stands for no row.

    Negative ids are wrapped here, once, so that padding, frequency and gradient all see the same row. An id without a
    row keeps its value, so that checkify's index checks name it. (`checkify.debug_check` would name it, too, but its
    effect takes every program with a lookup off JAX's fast dispatch: 10 us a call became 180.)

    Args:
      ids: Ids of any integer dtype, as `prepare` gives them.
      rows: The number of rows of the table.
      out_of_range: The table's policy.
      wrap: As in `prepare`. If False, a negative id has no row and becomes `rows`, so that no later step wraps it.

    Returns:
      Row numbers of the same shape, in the index dtype.
    """
    numbers = narrow(as_jax(ids), rows, jnp)
    if wrap:
        numbers = jnp.where((numbers < 0) & (numbers >= -rows), numbers + rows, numbers)
    if out_of_range == "clip":
        return jnp.clip(numbers, 0, max(rows - 1, 0))
    return numbers if wrap else jnp.where(numbers < 0, rows, numbers)


def row_numbers(ids: Int[Array, "*batch"], from_end: int | None) -> Int[Array, "*batch"]:
    """Resolve ids from `unwrapped`, if `from_end` is the number of rows; with None, ids are row numbers already."""
    return ids if from_end is None else _wrapped(ids, from_end)


@functools.partial(jax.jit, static_argnums=1, inline=True)  # one program for an eager call
def _wrapped(ids: Int[Array, "*batch"], rows: int) -> Int[Array, "*batch"]:
    return resolve(ids, rows, "error")


def unwrapped(ids: Ids, table: Table) -> Int[Array, "*batch"] | None:
    """Return prepared ids for a kernel that wraps negative ones itself; None if `resolve` does more than this."""
    return as_jax(ids) if table.out_of_range != "clip" and ids.dtype in (np.int32, np.int64) else None


def padding_rows(padding_idx: PaddingRows) -> tuple[int, ...]:
    """List the padding rows of a table."""
    return () if padding_idx is None else padding_idx if isinstance(padding_idx, tuple) else (padding_idx,)


def is_padding(ids: Int[Array, "*batch"], padding_idx: PaddingRows) -> Bool[Array, "*batch"]:
    """Tell which row numbers are padding."""
    rows = padding_rows(padding_idx)
    if len(rows) <= 1:
        return ids == rows[0] if rows else jnp.zeros(ids.shape, bool)

    def is_known(ids: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
        known = jnp.asarray(rows, ids.dtype)
        return known[jnp.clip(jnp.searchsorted(known, ids), 0, len(rows) - 1)] == ids

    sharding = explicit_sharding(ids)  # JAX's searchsorted needs a set mesh for explicit axes
    if sharding is None:
        return is_known(ids)
    by_xla: Any = auto_axes(is_known, out_sharding=sharding)
    return by_xla(ids)


def trained(ids: Int[Array, "*batch"], table: Table) -> Int[Array, "*batch"]:
    """Replace padding rows by the sentinel `rows`, since they get no gradient."""
    if table.padding_idx is None:
        return ids
    return jnp.where(is_padding(ids, table.padding_idx), table.rows, ids)


def occurrences(ids: Int[Array, "*batch"]) -> tuple[Int[Array, " ids"], Int[Array, " ids"]]:
    """Find the first occurrence of each id and count its occurrences; cost follows the number of ids, not of rows.

    Args:
      ids: Row numbers.

    Returns:
      For each of the flattened ids, in int32 and replicated: the position where the same id occurs first, and how
      often it occurs, 1 or more.
    """
    flat = jnp.ravel(on_every_device(ids))
    order = jnp.argsort(flat)  # stable
    ordered = flat[order]
    start, end = (jnp.searchsorted(ordered, flat, side=side) for side in ("left", "right"))
    return order[start].astype(jnp.int32), (end - start).astype(jnp.int32)


def as_array(ids: object) -> Given:
    """Return a caller's ids as an array of their own dtype, checked by nobody yet."""
    if isinstance(ids, jax.Array | np.ndarray):
        return ids
    if isinstance(ids, list | tuple) and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ids)):
        return jnp.asarray(ids)
    array = np.asarray(ids)
    # An empty list has no dtype of its own; NumPy makes it float64.
    return array.astype(np.int32) if isinstance(ids, list | tuple) and array.size == 0 else array


def narrow(ids: Any, rows: int, xp: Any) -> PyTree:
    """Cast ids of any width to the index dtype; ids without a row keep no row."""
    index = index_dtype(rows)
    info = jnp.iinfo(ids.dtype)
    if info.bits < jnp.iinfo(index).bits or ids.dtype == index:
        return ids.astype(index)
    if info.min == 0:
        return xp.minimum(ids, xp.asarray(rows, ids.dtype)).astype(index)
    return xp.clip(ids, xp.asarray(-rows - 1, ids.dtype), xp.asarray(rows, ids.dtype)).astype(index)


def _raise_if_out_of_range(argument: str, ids: np.ndarray, rows: int, wrap: bool, ignored: int | None) -> None:
    least = -rows if wrap else 0
    if not ids.size or (int(ids.min()) >= least and int(ids.max()) < rows):
        return
    bad = ids >= rows if ids.dtype.kind == "u" else (ids < least) | (ids >= rows)
    if ignored is not None:
        bad &= ids != ignored
    if not bad.any():
        return
    position = tuple(int(i) for i in np.argwhere(bad)[0])
    rule = f"in [{least}, {rows})" if ignored is None else f"in [{least}, {rows}) or ignore_index={ignored}"
    raise IndexError(
        f"`{argument}` must be {rule}, the table having {rows} rows, got {int(ids[position])} at "
        f"position {position}. Correct the ids, or choose what they read: out_of_range='clip', 'nan' or 'zero'."
    )
