"""Openings: how one output of an equation is a sum of its operands and of rows.

For instance, `d = add_any b c` has `Opening({0: True, 1: True})`: the terms of both operands, as they are. With 4 ids,
`add_rows values ids` has `Opening(arrays=(0, 1), ids=4)`: it sums no operand, needs both as arrays, and adds 4 rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from ..._core.dense import DENSE
from ..._core.storage import Storage
from .equations import NO_AXES

# A part of an array is held as rows if the array has so many times as many.
FEW = 2


class Kind(NamedTuple):
    """How ids are to be understood; rows of two kinds do not go together."""

    lanes: int = 0  # number of leading axes of the array that have rows of their own
    storage: Storage = DENSE  # which says in what order the array has its rows


class Opening(NamedTuple):
    """How an output of an equation is a sum."""

    terms: Mapping[int, bool] = {}  # operands that are summed; whether as they are, or after a linear map of their rows
    arrays: Sequence[int] = ()  # other operands that are needed
    ids: int = 0  # number of ids that the equation itself adds
    axes: frozenset[frozenset[str]] = frozenset()  # of the rows that it adds, as in `Rows`
    kinds: frozenset[Kind] = frozenset()  # of the rows that it adds
    dense: frozenset[Any] = frozenset()  # reasons for terms of all rows that it adds
    summed_over: frozenset[str] = NO_AXES  # axes of devices that the operands' rows are to be added over
    of_zeros: bool = False  # whether it is a sum only if the operands are nothing but zeros
    joined: int = 0  # number of lanes that are summed; below 0, of axes of size 1 that are added in front
    lanes: int = 0  # number of leading axes of the operands that have to be lanes
    by_place: bool = False  # whether rows are treated by where they are in the array
    times: int = 1  # how many ids each id of the operands becomes
    laned: frozenset[Any] = frozenset()  # reasons for its rows' having lanes
    told: frozenset[int] = frozenset()  # operands whose rows are counted in the numbers and kinds above already


# Tells how many leading axes of a variable are lanes, if it is a sum of rows and of nothing else; None for others.
Lanes = Callable[[Any], int | None]


def rows_of_arrays(
    operands: Sequence[int], ids: int, lanes: int = 0, terms: Mapping[int, bool] | None = None, **options: Any
) -> Opening:
    """Make the opening of an equation that has some operands for rows, and sums others."""
    return Opening(terms or {}, operands, ids, frozenset({NO_AXES}), frozenset({Kind(lanes)}), **options)


def is_zero(x: Any) -> bool:
    """Tell whether an operand is a literal of zeros."""
    # The gradient of an integer has no numbers at all.
    return (
        isinstance(x, Literal) and jax.typeof(x.val).dtype != jax.dtypes.float0 and bool(np.all(np.asarray(x.val) == 0))
    )
