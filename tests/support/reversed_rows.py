"""A third storage, as an example: one array, the last row first."""

import dataclasses

import jax.numpy as jnp

from embax._core.one_array import OneArray


@dataclasses.dataclass(frozen=True)
class Reversed(OneArray):
    """One array, the last row first."""

    @property
    def descriptions(self):
        return ("the last row first",)

    def positions(self, ids, rows):
        return rows - 1 - ids

    def ids(self, positions, rows):
        return jnp.where((positions >= 0) & (positions < rows), rows - 1 - positions, rows)

    def to_rows(self, leaf):
        return leaf[::-1]

    def from_rows(self, values):
        return jnp.asarray(values)[::-1]
