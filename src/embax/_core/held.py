"""What a layer holds in the place of a Table, where its framework wants an array: the weight, with its storage."""

from typing import Any

from jaxtyping import PyTree

from .dense import DENSE
from .held_rows import HeldRows
from .stored_rows import StoredRows
from .table import Table, with_weight


def held(table: Table) -> PyTree:
    """Take the rules away from a table.

    Args:
      table: The table, or the gradient of one.

    Returns:
      The weight where its rows are in the order of their ids, or the rows of a gradient; else a `StoredRows`.
    """
    return table.weight if isinstance(table.weight, HeldRows) else table.storage.held(table.weight)


def weight_of(value: PyTree) -> tuple[Any, dict[str, PyTree]]:
    """Take what a layer holds apart into the weight, and its storage as an argument of Table, none for a plain one."""
    return (value.weight, {"storage": value.storage}) if isinstance(value, StoredRows) else (value, {})


def table_of(value: PyTree, **rules: Any) -> Table:
    """Make a table of what a layer holds and of its rules."""
    weight, storage = weight_of(value)
    return Table(weight, **storage, **rules)


def as_table(rules: Table, value: PyTree) -> Table:
    """Put the rules of a table around what a layer holds, unchecked."""
    if isinstance(value, StoredRows):
        return with_weight(rules, value.weight, storage=value.storage)
    return with_weight(rules, value, storage=DENSE)
