"""Linear equations: how one equation of a gradient's program makes a sum of rows from other sums.

The program of a gradient adds, scales and casts arrays of the weight's shape in which most rows are zero. Each rule
here states for a primitive how its output is a sum; `terms` computes the terms. For instance:

    a = add_rows values ids    rows of its own; needs both operands as arrays
    b = mul a 0.5              the terms of a, each times 0.5
    c = dot x y                no rule: one term, the array
    d = add_any b c            the terms of b and the terms of c, unchanged
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from ..._core.read_bags import add_bags_p
from ..._core.read_rows import add_rows_p, all_rows_p
from .equations import NO_AXES, shape_of
from .opening import Kind, Lanes, Opening, is_zero
from .parts import PARTS


def opening_of(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    """Say how the outputs of an equation without inner programs are sums; one answer for all outputs.

    Args:
      eqn: The equation.
      lanes: Returns the number of lanes of an operand that is a sum of rows only; None for others.

    Returns:
      The opening; None if there is no rule.
    """
    name = eqn.primitive.name
    if name in PARTS:
        return PARTS[name].opening(eqn, lanes)
    if len(eqn.outvars) != 1:
        return None
    if name in ("mul", "div"):
        return _scaled(eqn, lanes)
    return _OPENINGS[name](eqn) if name in _OPENINGS else None


# ---- Openings.


def _is_scalar(x: Any) -> bool:
    return (np.ndim(x.val) if isinstance(x, Literal) else len(shape_of(x))) == 0


def _sum(eqn: JaxprEqn) -> Opening | None:
    a, b = eqn.invars
    if isinstance(a, Literal) or isinstance(b, Literal) or shape_of(a) != shape_of(b):
        return None
    once = a is not b
    return Opening({0: once, 1: once and eqn.primitive.name != "sub"})


def _repeated(eqn: JaxprEqn) -> Opening:
    if is_zero(eqn.invars[0]):
        return Opening()
    added = len(shape_of(eqn.outvars[0])) - len(shape_of(eqn.invars[0]))
    if added > 0 and shape_of(eqn.outvars[0]) == (*[1] * added, *shape_of(eqn.invars[0])):
        return Opening({0: False}, joined=-added)
    return Opening({0: False}, of_zeros=True)


def _of_zeros(eqn: JaxprEqn) -> Opening:
    return Opening({0: False}, of_zeros=True)


def _same(eqn: JaxprEqn) -> Opening:
    return Opening({0: True})


def _mapped(eqn: JaxprEqn) -> Opening:
    return Opening({0: False})


def _scaled(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    a = eqn.invars[0]
    summed = 0 if eqn.primitive.name == "div" or (lanes(a) is not None and not _is_scalar(a)) else 1
    if isinstance(eqn.invars[summed], Literal) or shape_of(eqn.invars[summed]) != shape_of(eqn.outvars[0]):
        return None  # the sum is broadcast
    return Opening({summed: False}, (1 - summed,), by_place=not _is_scalar(eqn.invars[1 - summed]))


def _selected(eqn: JaxprEqn) -> Opening:
    cases = range(1, len(eqn.invars))
    return Opening(dict.fromkeys(cases, False), (0,), by_place=not _is_scalar(eqn.invars[0]))


def _added(eqn: JaxprEqn) -> Opening:
    _, ids, *_ = eqn.invars
    spec = eqn.params["spec"]
    spec = spec.of_rows if eqn.primitive is add_bags_p else spec
    kind = Kind(spec.lanes, spec.storage)
    return Opening({}, range(len(eqn.invars)), math.prod(shape_of(ids)), frozenset({NO_AXES}), frozenset({kind}))


def _joined(eqn: JaxprEqn) -> Opening | None:
    """A sum over lanes: the rows of all lanes."""
    axes = eqn.params["axes"]
    return Opening({0: False}, joined=len(axes), lanes=1 + max(axes)) if axes else Opening({0: True})


def _summed_over_devices(eqn: JaxprEqn) -> Opening | None:
    # JAX sums the gradient of a replicated array by this primitive.
    axes = frozenset(eqn.params["axes"])
    return Opening({0: False}, summed_over=axes) if all(isinstance(axis, str) for axis in axes) else None


_OPENINGS: dict[str, Callable[..., Opening | None]] = {
    "add_any": _sum,
    "add": _sum,
    "sub": _sum,
    "broadcast_in_dim": _repeated,
    **dict.fromkeys(("pvary", "squeeze", "transpose"), _of_zeros),
    "copy": _same,
    "copy_p": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "convert_element_type": _mapped,
    "neg": _mapped,
    "select_n": _selected,
    add_rows_p.name: _added,
    add_bags_p.name: _added,
    "reduce_sum": _joined,
    "psum_invariant": _summed_over_devices,
}
ALL_ROWS = all_rows_p.name
