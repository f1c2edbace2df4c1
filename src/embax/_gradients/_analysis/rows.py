"""Rows: a term of a gradient that is zero except for some rows.

For instance, `Rows([1, 3, 9], [u, v, w])` of an array of 4 rows is `[0, u, 0, v]`: there is no row 9. The rows of bags
are held as one value for each bag, see `ByBag`, as long as no rule asks for the values of their ids. Ids are held as
they were given to a lookup, as long as no rule asks for row numbers. So a kernel gets both as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from ..._base.axes import on_every_device
from ..._base.by_bag import ByBag, Held, expanded
from ..._core import ids as _ids


@functools.partial(jax.tree_util.register_dataclass, data_fields=["given", "held"], meta_fields=["axes", "from_end"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows to be added to zeros; an id outside of the array stands for no row."""

    given: Any  # (*lanes, *batch), the ids
    held: Held  # (*lanes, *batch, *dim), or a ByBag
    axes: frozenset[str] = frozenset()  # in a `shard_map`: the mesh axes whose devices' rows are still to be added up
    from_end: int | None = None  # the number of rows, if the ids in [-rows, 0) count from the end

    @property
    def ids(self) -> Any:
        """Row numbers, (*lanes, *batch); a number outside of the array stands for no row."""
        return _ids.row_numbers(self.given, self.from_end)

    @property
    def values(self) -> Any:
        """A value for each id, (*lanes, *batch, *dim)."""
        return expanded(self.ids, self.held)

    @property
    def dim(self) -> int:
        """The number of axes of a row."""
        array = self.held.values if isinstance(self.held, ByBag) else self.held
        return array.ndim - self.given.ndim

    def mapped(self, function: Callable[[Any], Any]) -> "Rows":
        """Map the values by a function that treats each number alone, and is linear."""
        held = self.held.mapped(function) if isinstance(self.held, ByBag) else function(self.held)
        return dataclasses.replace(self, held=held)

    def with_values(self, values: Any) -> "Rows":
        """The same rows with other values."""
        return dataclasses.replace(self, held=values)


Term = Any  # Rows, or an array of all rows
Read = Callable[[Any], Any]  # returns the value of a variable
Terms = Callable[[Any], list[Term]]  # returns the terms of a variable


def replicated(rows: Rows) -> Rows:
    """Replicate rows over the explicit axes of a mesh, so that they can be moved and concatenated."""
    return Rows(on_every_device(rows.ids), on_every_device(rows.values), rows.axes)
