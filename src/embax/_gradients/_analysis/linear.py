"""Linear equations: how one equation of a gradient's program makes a sum of rows from other sums.

The program of a gradient adds, scales and casts arrays of the weight's shape that are zero but for some rows. Each rule
here says of a primitive how its output is such a sum; `_terms` computes the sum. For instance:

    a = add_rows values ids    adds rows of its own, and needs both operands
    b = mul a 0.5              is a sum of the terms of a, each times 0.5
    c = dot x y                has no rule: it is one term, the array
    d = add_any b c            is a sum of the terms of b and of c, as they are
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.lax import GatherScatterMode

from ..._core.dense import DENSE
from ..._core.read_rows import add_rows_p, all_rows_p
from ..._core.storage import Storage
from .equations import NO_AXES, shape_of


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


def opening_of(eqn: JaxprEqn, is_sum: Callable[[Any], bool]) -> Opening | None:
    """Say how the output of an equation without inner programs is a sum.

    Args:
      eqn: The equation.
      is_sum: Tells whether an operand is a sum of rows and of nothing else.

    Returns:
      None where no rule knows.
    """
    rule = _OPENINGS.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1:
        return None
    return _scaled(eqn, is_sum) if rule is _scaled else rule(eqn)


# ---- Openings.


def _is_zero(x: Any) -> bool:
    # The gradient of an integer has no numbers at all.
    return (
        isinstance(x, Literal) and jax.typeof(x.val).dtype != jax.dtypes.float0 and bool(np.all(np.asarray(x.val) == 0))
    )


def _is_scalar(x: Any) -> bool:
    return (np.ndim(x.val) if isinstance(x, Literal) else len(shape_of(x))) == 0


def _sum(eqn: JaxprEqn) -> Opening | None:
    a, b = eqn.invars
    if isinstance(a, Literal) or isinstance(b, Literal) or shape_of(a) != shape_of(b):
        return None
    once = a is not b
    return Opening({0: once, 1: once and eqn.primitive.name != "sub"})


def _repeated(eqn: JaxprEqn) -> Opening:
    if _is_zero(eqn.invars[0]):
        return Opening()
    added = len(shape_of(eqn.outvars[0])) - len(shape_of(eqn.invars[0]))
    if added > 0 and shape_of(eqn.outvars[0]) == (*[1] * added, *shape_of(eqn.invars[0])):
        return Opening({0: False}, joined=-added)
    return Opening({0: False}, of_zeros=True)


def _of_zeros(eqn: JaxprEqn) -> Opening:
    return Opening({0: False}, of_zeros=True)


def _updated(eqn: JaxprEqn) -> Opening | None:
    """Rows that are written into zeros, as the gradient of `weight[k]` for a traced number `k`."""
    operand, update, *_ = eqn.invars
    rows = shape_of(update)[0]
    if shape_of(update)[1:] != shape_of(operand)[1:] or _FEW * rows > shape_of(operand)[0]:
        return None
    return Opening({0: False}, (1, 2), rows, frozenset({NO_AXES}), frozenset({Kind()}), of_zeros=True)


def _same(eqn: JaxprEqn) -> Opening:
    return Opening({0: True})


def _mapped(eqn: JaxprEqn) -> Opening:
    return Opening({0: False})


def _scaled(eqn: JaxprEqn, is_sum: Callable[[Any], bool]) -> Opening | None:
    a = eqn.invars[0]
    summed = 0 if eqn.primitive.name == "div" or (is_sum(a) and not _is_scalar(a)) else 1
    if isinstance(eqn.invars[summed], Literal) or shape_of(eqn.invars[summed]) != shape_of(eqn.outvars[0]):
        return None  # an axis of size 1 is repeated
    return Opening({summed: False}, (1 - summed,), by_place=not _is_scalar(eqn.invars[1 - summed]))


def _selected(eqn: JaxprEqn) -> Opening:
    cases = range(1, len(eqn.invars))
    return Opening(dict.fromkeys(cases, False), (0,), by_place=not _is_scalar(eqn.invars[0]))


def _scatter(eqn: JaxprEqn) -> Opening | None:
    """Whole rows that are added to an array, as the transpose of `weight[ids]` and of its `jax.vmap` over ids does."""
    operand, indices, updates = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    lanes = len(numbers.operand_batching_dims)
    window = tuple(shape_of(updates)[axis] for axis in numbers.update_window_dims)
    dim = shape_of(operand)[lanes + 1 :]
    is_row = numbers.scatter_dims_to_operand_dims == (lanes,) == numbers.inserted_window_dims and window == dim
    # A slice of one row; where it begins on the other axes is brought to 0, as there is no other place for it.
    is_slice = (
        numbers.scatter_dims_to_operand_dims[:1] == (lanes,)
        and not numbers.inserted_window_dims
        and window == (1, *dim)
        and eqn.params["mode"] == GatherScatterMode.CLIP
    )
    of_lanes = numbers.operand_batching_dims == tuple(range(lanes)) == numbers.scatter_indices_batching_dims
    if not (of_lanes and (is_row or is_slice)):
        return None
    kinds = frozenset({Kind(lanes)})
    return Opening({0: True}, (1, 2), math.prod(shape_of(indices)[:-1]), frozenset({NO_AXES}), kinds)


def _added(eqn: JaxprEqn) -> Opening:
    _, ids = eqn.invars
    spec = eqn.params["spec"]
    kind = Kind(spec.lanes, spec.storage)
    return Opening({}, (0, 1), math.prod(shape_of(ids)), frozenset({NO_AXES}), frozenset({kind}))


def _padded(eqn: JaxprEqn) -> Opening | None:
    """A slice of rows, whose gradient is padded with zeros."""
    (low, high, between), *others = eqn.params["padding_config"]
    rows, total = shape_of(eqn.invars[0])[0], shape_of(eqn.outvars[0])[0]
    whole_rows = all(tuple(other) == (0, 0, 0) for other in others)
    # Where the slice is a large part of the table, an array is the better way to hold it.
    if not (_is_zero(eqn.invars[1]) and whole_rows and min(low, high) >= 0 and between == 0 and _FEW * rows <= total):
        return None
    return Opening({}, (0,), rows, frozenset({NO_AXES}), frozenset({Kind()}))


_FEW = 2


def _joined(eqn: JaxprEqn) -> Opening | None:
    """The sum of lanes."""
    axes = eqn.params["axes"]
    return Opening({0: False}, joined=len(axes), lanes=1 + max(axes)) if axes else Opening({0: True})


def _summed_over_devices(eqn: JaxprEqn) -> Opening | None:
    # JAX sums so the gradient of what all devices have in common.
    axes = frozenset(eqn.params["axes"])
    return Opening({0: False}, summed_over=axes) if all(isinstance(axis, str) for axis in axes) else None


_OPENINGS: dict[str, Callable[..., Opening | None]] = {
    "add_any": _sum,
    "add": _sum,
    "sub": _sum,
    "broadcast_in_dim": _repeated,
    **dict.fromkeys(("pvary", "reshape", "squeeze", "transpose"), _of_zeros),
    "dynamic_update_slice": _updated,
    "copy": _same,
    "copy_p": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "convert_element_type": _mapped,
    "neg": _mapped,
    "mul": _scaled,
    "div": _scaled,
    "select_n": _selected,
    "scatter-add": _scatter,
    add_rows_p.name: _added,
    "pad": _padded,
    "reduce_sum": _joined,
    "psum_invariant": _summed_over_devices,
}
ALL_ROWS = all_rows_p.name
