"""The warning about a dense gradient of a table: it says which operation of the loss caused it, and on which line.

For instance, `table.weight.sum()` gives every row a gradient. The program of the gradient ends in `broadcast_in_dim`:
the message says that the loss sums over all rows of its weight, names the line, and advises `embax.lookup`.
"""

import functools
import os
import warnings
from typing import Literal

from jax.extend import source_info_util
from jaxtyping import PyTree

from .._core.table import Table
from ._analysis.form import Form, Reason

OnDense = Literal["error", "warn", "allow"]


class DenseGradientWarning(UserWarning):
    """A table gets a dense gradient, since the loss does more with its weight than read rows."""


_ROWS = "Compute with rows that embax.lookup reads"
_WHOLE = "computes with all rows of its weight", _ROWS
NOT_BY_LOOKUP = "reads rows of a sharded table by their place in its array", "Read rows with embax.lookup"
_PARTS = "scatter-add scatter pad slice rev dynamic_update_slice concatenate gather select_n reshape".split()
# For a primitive in the gradient's program: what the loss does, and what to do instead.
_USES = {
    "add_any": NOT_BY_LOOKUP,
    "broadcast_in_dim": ("sums over all rows of its weight", _ROWS),
    "dot_general": ("multiplies by its whole weight", "Call embax.attend or embax.sampled_softmax"),
    "reduce_sum": ("maps over copies of its weight", "Give jax.vmap None for the axis of the table"),
    "scan": ("changes its weight from step to step of a loop", "Leave the table as it is in the loop"),
    "while": ("changes its weight from step to step of a loop", "Leave the table as it is in the loop"),
    "cond": ("changes its weight in a branch", "Leave the table as it is in the branches"),
    "shard_map": ("reads it in a shard_map that does not add up rows of its devices", "Give it the table whole"),
    **dict.fromkeys(
        _PARTS,
        ("takes a part of its weight that is no list of rows", "Read rows with embax.lookup"),
    ),
}
HAS_A_UNIT = "has a unit, which a RowGrad cannot hold", "Divide by the unit first"
OVER_DEVICES = "adds up some of its rows over devices, and others not", "Read all of them with ids of each device"


def report_dense(
    call: str, on_dense: OnDense, name: str, table: Table, why: tuple[str, str], stacklevel: int = 3
) -> None:
    """Warn or raise, as `on_dense` says, since the gradient of a table is dense.

    Args:
      call: The call, for the message.
      on_dense: As in `value_and_grad`.
      name: The table's name.
      table: The table.
      why: What the loss does with the table, and what to do instead.
      stacklevel: The level of the user's code, as in `warnings.warn`.

    Raises:
      ValueError: If `on_dense` is `"error"`.
    """
    if on_dense == "allow":
        return
    use, advice = why
    message = (
        f"`{call}`: the gradient of {name}, {table!r}, is dense, {table.rows} rows, since the loss {use}. {advice}, or "
        "expect it with on_dense='allow'."
    )
    if on_dense == "error":
        raise ValueError(message)
    warnings.warn(message, DenseGradientWarning, stacklevel=stacklevel)


def why_dense(form: Form) -> tuple[str, str] | None:
    """Say what makes a gradient dense, for `report_dense`.

    Args:
      form: The form of the gradient.

    Returns:
      A reason and an advice; None if the gradient is not dense, or is dense by design.
    """
    unexpected = [reason for reason in form.dense if not reason.is_expected]
    if form.inputs:  # an array that the program got as an input
        unexpected.append(Reason(None))
    # Rows in lanes are not rows of the table: they may be columns, or rows of copies under vmap.
    unexpected += form.laned
    if not unexpected:
        return None
    found = sorted({(*_use(reason), _line(reason)) for reason in unexpected})
    use, advice, line = next((x for x in found if x[:2] != _WHOLE), found[0])
    return f"{use}{line}", advice


def _use(reason: Reason) -> tuple[str, str]:
    return _WHOLE if reason.eqn is None else _USES.get(reason.eqn.primitive.name, _WHOLE)


def _line(reason: Reason) -> str:
    """The line of the user's code that an equation differentiates, as far as JAX knows it."""
    _leave_out_own_frames()
    try:
        where = source_info_util.summarize(reason.eqn.source_info) if reason.eqn is not None else ""
    except (AttributeError, TypeError):  # other versions of JAX
        where = ""
    return f", at {where.strip()}" if where and "<unknown>" not in where else ""


@functools.cache
def _leave_out_own_frames() -> PyTree:
    return source_info_util.register_exclusion(os.path.dirname(__file__))
