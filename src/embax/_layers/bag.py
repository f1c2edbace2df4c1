"""PoolsBags: what the EmbeddingBags of all frameworks share: how bags are pooled, and which rows they store."""

import dataclasses
from typing import ClassVar

from jaxtyping import DTypeLike, PyTree

from .._bags.embedding_bag import Read, read_bags
from .._bags.pool import Mode
from .._base import check as _check
from .._core import ids as _ids
from .._core.table import Table


class PoolsBags:
    """A layer whose calls pool the rows of each bag. It stands before the framework's Embedding among the bases."""

    mode: Mode
    include_last_offset: bool
    _CALL: ClassVar[str]  # the name of the class for the messages

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
    """What a layer stores clipped after it has read bags: a table and the ids of its rows.

    Args:
      table: The table that was read.
      read: What was read of it.

    Returns:
      The table with rules by which an id of no row stays one, since what is in no bag may not be clipped to a row; and
      the ids.
    """
    return dataclasses.replace(table, out_of_range="nan"), read.named(table)
