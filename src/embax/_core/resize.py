"""resize: a table with more or fewer rows, on a mesh or not."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Array, Key, Shaped

from .._base import check as _check
from .table import Initializer, Table, fresh_rows


def resize(table: Table, rows: int, key: Key[Array, ""] | None = None, *, init: Initializer | None = None) -> Table:
    """Return the table with another number of rows: grown with fresh rows, or cut.

    Rows that both tables have keep their values and ids; rules, mesh and layout stay. On a mesh, devices exchange the
    rows that change their owner, and each makes its part of the fresh rows: the same ones as without a mesh, up to
    rounding.

    `embax.optim.carry_over` does the same for the state of an optimizer.

    Args:
      table: The table to resize; it is not changed.
      rows: The new number of rows, 0 or more.
      key: A JAX random key for the fresh rows. Required if the table grows.
      init: The initialiser of fresh rows, as in `Table.create`.

    Returns:
      A new table of `rows` rows.

    Raises:
      TypeError: If `rows` is not a whole number, or the table grows without a key.
      ValueError: If `rows` is negative, or the padding row would be cut off; on a mesh, see `embax.shard`.

    Example:
      >>> import embax, jax
      >>> table = embax.Table.create(jax.random.key(0), rows=10, dim=4)
      >>> embax.resize(table, 12, jax.random.key(1))
      Table(float32[12,4])
      >>> embax.resize(table, 8)
      Table(float32[8,4])
    """
    rows = _check.size("embax.resize(rows=...)", rows)
    if table.padding_idx is not None and rows <= np.max(table.padding_idx):
        raise ValueError(
            f"`embax.resize(rows=...)` must keep the padding row {table.padding_idx}, got {rows}. "
            "Cut less, or drop the rule first with dataclasses.replace(table, padding_idx=None)."
        )
    if rows > table.rows and key is None:
        raise TypeError("`embax.resize(key=...)` must be a JAX random key where the table grows, got None. Pass one.")
    fresh = functools.partial(_fresh, table, rows, key, init)
    weight, storage = table.storage.resized("embax.resize", table.weight, rows, fresh)
    return dataclasses.replace(table, weight=weight, storage=storage)


def _fresh(table: Table, rows: int, key: Any, init: Initializer | None) -> Shaped[Array, "fresh *dim"]:
    return fresh_rows("embax.resize", key, rows - table.rows, table.dim, init, table.dtype).astype(table.dtype)
