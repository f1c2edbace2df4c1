"""Tables inside layers: a framework's parameter holds the weight with its storage, the layer holds the rules."""

from typing import Any

from jaxtyping import PyTree

from ..dense import DENSE
from ..table import Table, with_weight
from .held_rows import HeldRows
from .stored_rows import StoredRows


def held(table: Table) -> PyTree:
    """Return the value that a layer's parameter holds for a table.

    Args:
      table: The table, or a gradient of one.

    Returns:
      The weight if it is in row order, a `StoredRows` if it is not, the `RowGrad` of a gradient.
    """
    return table.weight if isinstance(table.weight, HeldRows) else table.storage.held(table.weight)


def weight_of(value: PyTree) -> tuple[Any, dict[str, PyTree]]:
    """Split a held value into its weight and the `storage=` argument for Table, which is left out for a plain array."""
    return (value.weight, {"storage": value.storage}) if isinstance(value, StoredRows) else (value, {})


def table_of(value: PyTree, **rules: Any) -> Table:
    """Make a Table of a held value and rules."""
    weight, storage = weight_of(value)
    return Table(weight, **storage, **rules)


def as_table(rules: Table, value: PyTree) -> Table:
    """Make a Table of a held value and the rules of another Table, unchecked."""
    if isinstance(value, StoredRows):
        return with_weight(rules, value.weight, storage=value.storage)
    return with_weight(rules, value, storage=DENSE)
