"""Openings: how one output of an equation is a sum of its operands and of new rows.

For instance, `d = add_any b c` has `Opening({0: True, 1: True})`: both operands are summed, unchanged. The output of
`add_rows values ids`, of 3 ids, has `Opening({}, (0, 1), ids=3, ...)`: no operand is summed, but it needs both as
arrays and has 3 ids of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from ..._core.dense import DENSE
from ..._core.storage import Storage
from .equations import NO_AXES

# A part of an array is held as rows if the array has at least this many times its rows.
FEW = 2


class Kind(NamedTuple):
    """What the ids of rows refer to; rows of two kinds cannot be joined."""

    lanes: int = 0  # number of leading axes of the array that are lanes
    storage: Storage = DENSE  # the order of the array's rows


class Opening(NamedTuple):
    """How an output of an equation is a sum."""

    terms: Mapping[int, bool] = {}  # operands that are summed: True if unchanged, False if their rows are mapped
    arrays: Sequence[int] = ()  # operands that are needed as arrays
    ids: int = 0  # number of ids that the equation itself adds
    axes: frozenset[frozenset[str]] = frozenset()  # the `axes` of these rows, see `Rows`
    kinds: frozenset[Kind] = frozenset()  # the kinds of these rows
    dense: frozenset[Any] = frozenset()  # reasons for arrays of all rows that it adds
    summed_over: frozenset[str] = NO_AXES  # axes of a `shard_map` over which the operands' rows are to be summed
    of_zeros: bool = False  # whether it is a sum only if the operands are zeros
    joined: int = 0  # number of lanes that are summed over; if negative, number of axes of size 1 added in front
    lanes: int = 0  # number of leading axes of the operands that must be lanes
    by_place: bool = False  # whether rows are treated by their position in the array
    times: int = 1  # how many ids each id of the operands becomes
    laned: frozenset[Any] = frozenset()  # reasons why its rows have lanes
    told: frozenset[int] = frozenset()  # operands whose rows are already counted in `ids`, `axes` and `kinds`


# Returns how many leading axes of a variable are lanes, if it is a sum of rows only; None for any other variable.
Lanes = Callable[[Any], int | None]


def rows_of_arrays(
    operands: Sequence[int], ids: int, lanes: int = 0, terms: Mapping[int, bool] | None = None, **options: Any
) -> Opening:
    """The opening of an equation that turns some operands into rows, and sums others (`terms`)."""
    return Opening(terms or {}, operands, ids, frozenset({NO_AXES}), frozenset({Kind(lanes)}), **options)


def is_zero(x: Any) -> bool:
    """Whether an operand is a literal of zeros."""
    # float0, the gradient of an integer, has no values to compare.
    return (
        isinstance(x, Literal) and jax.typeof(x.val).dtype != jax.dtypes.float0 and bool(np.all(np.asarray(x.val) == 0))
    )
