"""PoolsBags: a mixin for the EmbeddingBags of all frameworks, which pools bags and names the rows to write back."""

import dataclasses
from typing import ClassVar

from jaxtyping import DTypeLike, PyTree

from .._bags.embedding_bag import Read, read_bags
from .._bags.pool import Mode
from .._base import check as _check
from .._core import ids as _ids
from .._core.table import Table


class PoolsBags:
    """A mixin for layers that pool the rows of each bag. In the list of bases it comes before Embedding."""

    mode: Mode
    include_last_offset: bool
    _CALL: ClassVar[str]  # the name of the class, for error messages

    def _set_pooling(self, mode: object, include_last_offset: object) -> None:
        self.mode = _check.choice(f"{self._CALL}(mode=...)", mode, Mode)
        self.include_last_offset = _check.flag(f"{self._CALL}(include_last_offset=...)", include_last_offset)

    def _read_bags(
        self,
        table: Table,
        input: PyTree,
        offsets: PyTree,
        per_sample_weights: PyTree,
        dtype: DTypeLike | None,
        call: str | None = None,
    ) -> Read:
        options = self.mode, self.include_last_offset, dtype
        return read_bags(call or self._CALL, table, input, offsets, per_sample_weights, *options)


def stored_rows_of(table: Table, read: Read) -> tuple[Table, _ids.Ids]:
    """The table and the ids whose clipped rows a layer stores after it has read bags.

    Args:
      table: The table that was read.
      read: The result of reading it.

    Returns:
      The table, and the ids. Unused places of a Ragged have the sentinel for an id, so `out_of_range` becomes "nan":
      "clip" would turn the sentinel into the last row.
    """
    return dataclasses.replace(table, out_of_range="nan"), read.named(table)
