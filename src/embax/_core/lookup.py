"""Lookup and renormalize: gather rows by id, clip their norm, and give each id its gradient."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from jaxtyping import Array, Bool, DTypeLike, Int, Shaped

from .._base.distinct import accumulator
from .._base.tangents import straight_through, with_tangent
from . import ids as _ids
from .read_rows import read_rows
from .table import Table, with_weight


def lookup(table: Table, ids: Any, dtype: DTypeLike | None = None) -> Shaped[Array, "*batch_dim"]:
    """Read one row of the table for each id.

    `out[b] = clip(weight[ids[b]], max_norm)`

    Works under every JAX transformation, and on any mesh: the output is sharded as the ids are. Work and temporary
    memory follow the number of ids, not of rows. A rule that the table does not use adds no operation.

    Args:
      table: The table to read.
      ids: Row numbers in `[-rows, rows)`, negative ones from the end: an array of any integer dtype and any shape, a
        nested list or a scalar. `table.out_of_range` says what other ids read. JAX itself narrows a 64-bit array that
        is passed into `jax.jit` without `jax_enable_x64`, before `lookup` can check it.
      dtype: The dtype of the output; the rows are cast, never the table. Default: the table's.

    Returns:
      The rows, `(*ids.shape, *dim)`.

    Raises:
      TypeError: If the ids are not of an integer dtype.
      IndexError: If a concrete id has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.arange(6.0).reshape(3, 2))
      >>> embax.lookup(table, [2, -1])
      Array([[4., 5.],
             [4., 5.]], dtype=float32)
    """
    ids = _ids.prepare("embax.lookup(ids=...)", ids, table)
    return read(table, ids, None if dtype is None else jnp.dtype(dtype))


def renormalize(table: Table, ids: Any) -> Table:
    """Store the named rows as `lookup` reads them: with their norm clipped to `max_norm`.

    No other row is touched: if the table is donated, time and memory follow the number of ids. The gradient passes
    straight through, as in `lookup`.

    Args:
      table: The table to renormalise; it is not changed. Without `max_norm`, or frozen, it is returned unchanged.
      ids: Row numbers, as in `lookup`. Ids without a row, and the padding row, are skipped.

    Returns:
      A table with the same rules.

    Raises:
      TypeError: If the ids are not of an integer dtype.
      IndexError: If a concrete id has no row and `table.out_of_range` is `"error"`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.asarray([[3.0, 4.0], [6.0, 8.0]]), max_norm=1.0)
      >>> embax.renormalize(table, [0]).weight
      Array([[0.6, 0.8],
             [6. , 8. ]], dtype=float32)
    """
    ids = _ids.prepare("embax.renormalize(ids=...)", ids, table)
    if table.max_norm is None or table.freeze:
        return table
    # The gradient's rule stays outside of the compiled function: inside, `jax.vmap` would sum it over lanes.
    clipped = straight_through(_clipped_table(constant(table), ids), table.weight)
    return dataclasses.replace(table, weight=clipped)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def read(
    table: Table, ids: _ids.Ids, dtype: np.dtype | None, counted: Bool[Array, "*batch"] | None = None
) -> Shaped[Array, "*batch_dim"]:
    """`lookup` of ids that `_ids.prepare` has checked.

    Args:
      table: The table.
      ids: The ids.
      dtype: As in `lookup`.
      counted: Which ids are to be read. The others must be `rows`; they read an arbitrary row, which the caller
        discards, so that checkify finds no error, and they have no gradient. Default: all.

    Returns:
      The rows.
    """
    given = _ids.unwrapped(ids, table) if counted is None else None
    rows = read_resolved(table, _ids.resolve(ids, table.rows, table.out_of_range), counted, given)
    return rows if dtype is None else rows.astype(dtype)


def read_parts(table: Table, ids: Int[Array, " all_ids"], sizes: Sequence[int]) -> Sequence[Shaped[Array, "ids *dim"]]:
    """`read` of row numbers whose rows are wanted in several arrays of given sizes."""
    plain = table.storage.parted(read(table, ids, None), sizes)
    if len(sizes) == 1 or table.max_norm is not None:
        return plain
    return table.storage.take_parts(plain, table.weight, ids, _fill_value(table))


@functools.partial(jax.jit, inline=True)
def read_resolved(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"] | None = None,
    given: Int[Array, "*batch"] | None = None,
) -> Shaped[Array, "*batch_dim"]:
    """`read` of row numbers as `_ids.resolve` gives them; `given` is `_ids.unwrapped`, if all of them count."""
    return clipped_rows(table, ids, _gather(table, ids, counted, given))


def _gather(
    table: Table,
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"] | None,
    given: Int[Array, "*batch"] | None,
) -> Shaped[Array, "*batch_dim"]:
    weight = jax.lax.stop_gradient(table.weight)
    rows = table.storage.take(weight, _or_first(table, ids, counted), _fill_value(table), given=given)
    if table.freeze or not jnp.issubdtype(table.dtype, jnp.inexact):
        return rows
    ids, from_end = ids_of_gradient(table, ids, given)
    tangent = functools.partial(rows_of_tangent, with_weight(table, None), from_end=from_end)
    return with_tangent(tangent, rows, [table.weight], [ids] if counted is None else [ids, counted])


def rows_of_tangent(
    rules: Table,
    tangent: Shaped[Array, "rows *dim"],
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"] | None = None,
    *,
    from_end: int | None = None,
) -> Shaped[Array, "*batch_dim"]:
    """Return the tangent of the rows that `read_resolved` reads.

    Args:
      rules: The table; its weight is not used.
      tangent: The tangent of the weight.
      ids: The row numbers that were read.
      counted: Which of them count, as in `read`.
      from_end: As `ids_of_gradient` returns it.

    Returns:
      The tangent of each row that was read.
    """
    table = with_weight(rules, tangent)
    wide, named = read_of_tangent(rules, tangent, ids, counted)
    return gradient_rules(table, ids, read_rows(wide, named, table.storage, from_end)).astype(table.dtype)


def read_of_tangent(
    rules: Table, tangent: Shaped[Array, "rows *dim"], ids: Int[Array, "*batch"], counted: Bool[Array, "*batch"] | None
) -> tuple[Shaped[Array, "rows *dim"], Int[Array, "*batch"]]:
    """Return the tangent and the ids that `read_rows` is called with: ids without a gradient become `rows`."""
    table = with_weight(rules, tangent)
    # At least float32, since the transpose adds up duplicates: 4096 bfloat16 ones would sum to 256. XLA fuses the cast
    # of the whole tangent into the read.
    wide = tangent.astype(accumulator(table.dtype))
    named = _ids.trained(ids, table)
    return wide, named if counted is None else jnp.where(counted, named, table.rows)


def ids_of_gradient(
    table: Table, ids: Int[Array, "*batch"], given: Int[Array, "*batch"] | None
) -> tuple[Int[Array, "*batch"], int | None]:
    """Return the ids that hold the gradient, and the number of rows, if those in `[-rows, 0)` count from the end.

    They are the given ones, if no rule drops or divides the gradient of any.
    """
    if given is None or table.padding_idx is not None or table.scale_grad_by_freq or not table.storage.is_local:
        return ids, None
    return given, table.rows


def _or_first(table: Table, ids: Int[Array, "*batch"], counted: Bool[Array, "*batch"] | None) -> Int[Array, "*batch"]:
    """Let ids that do not count read row 0. On a mesh they keep the sentinel: else all would ask row 0's owner."""
    return ids if counted is None or not table.storage.is_local else jnp.where(counted, ids, 0)


def gradient_rules(
    table: Table, ids: Int[Array, "*batch"], rows: Shaped[Array, "*batch_dim"]
) -> Shaped[Array, "*batch_dim"]:
    """Apply the rules for gradients to row tangents. The map is linear, so its transpose applies them to gradients.

    Args:
      table: The table with the rules; its weight is not used.
      ids: Row numbers as `_ids.resolve` gives them.
      rows: The tangent of each row that was read.

    Returns:
      The tangents, zero for padding rows (by selection, since 0 * NaN is NaN) and divided by the frequency of their id.
    """
    if table.scale_grad_by_freq:
        rows = _divided_by_frequency(table, ids, rows)
    if table.padding_idx is not None:
        rows = jnp.where(_over_rows(_ids.is_padding(ids, table.padding_idx), rows), jnp.zeros((), rows.dtype), rows)
    return rows


def _divided_by_frequency(
    table: Table, ids: Int[Array, "*batch"], rows: Shaped[Array, "*batch_dim"]
) -> Shaped[Array, "*batch_dim"]:
    # All occurrences take the row of the first one, so the transpose sums before it divides: 70,000 ones give
    # 70,000 / 70,000 = 1, while the float32 sum of 70,000 quotients is 1.0006.
    first, count = _ids.occurrences(ids)
    if not table.storage.is_local:  # the first occurrence may be on another device
        return rows / _over_rows(jnp.reshape(count, ids.shape), rows).astype(rows.dtype)
    flat = jnp.reshape(_ids.on_every_device(rows), (ids.size, *rows.shape[ids.ndim :]))
    flat = flat / _over_rows(count, flat).astype(rows.dtype)
    first = jnp.reshape(first, ids.shape)
    if (sharding := _ids.explicit_sharding(ids)) is not None:
        first = reshard(first, sharding)
    return Table(flat).storage.take(flat, first, 0, linear=True)


def clipped_rows(
    table: Table, ids: Int[Array, "*batch"], rows: Shaped[Array, "*batch_dim"]
) -> Shaped[Array, "*batch_dim"]:
    """Clip rows to the table's norm, except padding rows.

    Args:
      table: The table with the rules; its weight is not read.
      ids: The row number of each row.
      rows: The rows.

    Returns:
      The clipped rows. The gradient passes straight through.
    """
    if table.max_norm is None:
        return rows
    axes = tuple(range(ids.ndim, rows.ndim))
    clipped = _clip_norm(jax.lax.stop_gradient(rows), axes, table.max_norm, table.norm_type)
    clipped = straight_through(clipped, rows)
    if table.padding_idx is None:
        return clipped
    return jnp.where(_over_rows(_ids.is_padding(ids, table.padding_idx), rows), rows, clipped)


def _clip_norm(rows: Array, axes: tuple[int, ...], max_norm: float, norm_type: float) -> Array:
    wide = rows.astype(accumulator(rows.dtype))
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0)
    # XLA divides by multiplying with the reciprocal, which it flushes to zero for numbers above 2**126. So huge rows
    # are scaled down first, by a power of two, which is exact.
    scale = jnp.where(largest > 2.0**64, 2.0**-64, 1.0).astype(largest.dtype)
    scaled, largest = wide * scale.astype(wide.dtype), largest * scale
    if np.isinf(norm_type):
        norm = largest
    else:
        # Relative to the largest entry, no power of an entry overflows or underflows float32.
        relative = jnp.abs(scaled) / jnp.where(largest > 0, largest, 1)
        norm = largest * jnp.sum(relative**norm_type, axis=axes, keepdims=True) ** (1 / norm_type)
    longer = norm > max_norm * scale
    factor = max_norm / jnp.where(longer, norm, 1)  # never by zero, for checkify and debug_nans
    return jnp.where(longer, scaled * factor.astype(wide.dtype), wide).astype(rows.dtype)


@jax.jit
def _clipped_table(table: Table, ids: _ids.Ids) -> Shaped[Array, "rows *dim"]:
    # Duplicates write equal values; the padding row is written back unchanged. The rows are read as in a lookup, so
    # that XLA merges both reads, and runs the lookup of a donated table before the write.
    given, clipped = _ids.unwrapped(ids, table), functools.partial(clipped_rows, table)
    ids = _ids.resolve(ids, table.rows, table.out_of_range)
    return table.storage.replace(table.weight, ids, clipped, _fill_value(table), given=given)


def _fill_value(table: Table) -> float:
    """Return the number that is read for an id without a row."""
    # np.nan, not a fresh float("nan"): NaN differs from itself, so a new object would recompile every eager call.
    return np.nan if jnp.issubdtype(table.dtype, jnp.inexact) and table.out_of_range != "zero" else 0


def constant(table: Table) -> Table:
    """Return the table without derivatives, by `stop_gradient`."""
    return with_weight(table, jax.lax.stop_gradient(table.weight))


def _over_rows(values: Shaped[Array, "*batch"], rows: Shaped[Array, "*batch_dim"]) -> Shaped[Array, "*batch_ones"]:
    """Append axes of size 1 to one value per id, so that it broadcasts against rows."""
    return jnp.expand_dims(values, tuple(range(values.ndim, rows.ndim)))
