"""Dense: the default storage, one array whose row `i` is the row of id `i`."""

import dataclasses

import numpy as np
from jaxtyping import Array, PyTree

from .._base.arrays import as_jax
from .one_array import OneArray


@dataclasses.dataclass(frozen=True)
class Dense(OneArray):
    """The rows in one ordinary JAX array, in the order of their ids."""

    def positions(self, ids: Array, rows: int) -> Array:
        """The ids themselves: row `i` is stored at `i`."""
        return ids

    def ids(self, positions: Array, rows: int) -> Array:
        """The positions themselves: the row stored at `i` is row `i`."""
        return positions

    @property
    def descriptions(self) -> tuple[str, ...]:
        """In a user's words, the alternative to a table on a mesh."""
        return ("no mesh",)

    @property
    def noted(self) -> str | None:
        """None, since the rows are in row order."""
        return None

    def to_rows(self, leaf: PyTree) -> PyTree:
        """The leaf itself, which is in row order."""
        return leaf

    def from_rows(self, values: PyTree) -> Array:
        """The values themselves; a NumPy array goes to the default device."""
        return as_jax(values) if isinstance(values, np.ndarray) else values

    def held(self, leaf: PyTree) -> PyTree:
        """The leaf itself, which is in row order."""
        return leaf


DENSE = Dense()
