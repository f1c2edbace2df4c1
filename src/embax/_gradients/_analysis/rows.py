"""Rows: some rows of an array of zeros, a term of a gradient.

For instance, `Rows(ids=[1, 3, 9], values=[u, v, w])` of an array of 4 rows is `[0, u, 0, v]`: there is no row 9.
"""

import dataclasses
import functools
from typing import Any

import jax

from ..._base.axes import on_every_device


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "values"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that are added into zeros; an id outside of the rows stands for none."""

    ids: Any  # (*lanes, *batch)
    values: Any  # (*lanes, *batch, *dim)
    axes: frozenset[str] = frozenset()  # axes of a `shard_map` over which devices have rows of their own, to be added


Term = Any  # Rows, or an array of all rows


def replicated(rows: Rows) -> Rows:
    """Copy rows to every device where the axes of a mesh are explicit, so that they can be moved and joined."""
    return Rows(on_every_device(rows.ids), on_every_device(rows.values), rows.axes)
