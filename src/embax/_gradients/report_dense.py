"""How a gradient that is dense without need is announced: in terms of what the loss does, and where.

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
    """A table gets a dense gradient, since its loss uses the weight otherwise than by reading rows."""


_ROWS = "Compute with rows that embax.lookup reads"
_WHOLE = "computes with all rows of its weight", _ROWS
NOT_BY_LOOKUP = "reads rows of a sharded table by their place in its array", "Read rows with embax.lookup"
_PARTS = "scatter-add scatter pad slice rev dynamic_update_slice concatenate gather select_n reshape".split()
# By the primitive in the gradient's program: what it is the gradient of, and what to do instead.
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
    """Say that the gradient of a table is dense, as `on_dense` asks.

    Args:
      call: The call for the message.
      on_dense: As in `value_and_grad`.
      name: The table's name.
      table: The table.
      why: What the loss does with the table, and what to do instead.
      stacklevel: That of the user's code, as in `warnings.warn`.

    Raises:
      ValueError: If it is `"error"`.
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
    """Say what a loss does with a weight whose gradient has terms of all rows, for `report_dense`.

    Args:
      form: That of the gradient.

    Returns:
      A reason and an advice; None where there are no such terms, or they are expected.
    """
    unexpected = [reason for reason in form.dense if not reason.is_expected]
    if form.inputs:  # an array that was known before the gradient was computed
        unexpected.append(Reason(None))
    # Rows of lanes are no rows of a table: columns, for all that can be seen, or parts of copies.
    unexpected += form.laned
    if not unexpected:
        return None
    found = sorted({(*_use(reason), _line(reason)) for reason in unexpected})
    use, advice, line = next((x for x in found if x[:2] != _WHOLE), found[0])
    return f"{use}{line}", advice


def _use(reason: Reason) -> tuple[str, str]:
    return _WHOLE if reason.eqn is None else _USES.get(reason.eqn.primitive.name, _WHOLE)


def _line(reason: Reason) -> str:
    """Where the user's code is that an equation is the gradient of, as far as JAX knows it."""
    _leave_out_own_frames()
    try:
        where = source_info_util.summarize(reason.eqn.source_info) if reason.eqn is not None else ""
    except (AttributeError, TypeError):  # of another version, which holds it otherwise
        where = ""
    return f", at {where.strip()}" if where and "<unknown>" not in where else ""


@functools.cache
def _leave_out_own_frames() -> PyTree:
    return source_info_util.register_exclusion(os.path.dirname(__file__))
