"""Rows: a term of a gradient that is zero except for some rows.

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
    """Rows to be added to zeros; an id outside of the array stands for no row."""

    ids: Any  # (*lanes, *batch)
    values: Any  # (*lanes, *batch, *dim)
    axes: frozenset[str] = frozenset()  # in a `shard_map`: the mesh axes whose devices' rows are still to be added up


Term = Any  # Rows, or an array of all rows


def replicated(rows: Rows) -> Rows:
    """Replicate rows over the explicit axes of a mesh, so that they can be moved and concatenated."""
    return Rows(on_every_device(rows.ids), on_every_device(rows.values), rows.axes)
