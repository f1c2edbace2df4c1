"""What the jaxpr of an update proves of a transformation: it treats rows one by one, or only scales their gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core import Literal as Constant
from jaxtyping import PyTree

# `scaled`: the update of a row is its gradient times a number that has nothing to do with tables.
# `rowwise`: the update of a row, and its state, follow from that row's gradient, weight and state and from numbers that
#   have nothing to do with tables, and nothing else depends on the rows.
# `joint`: anything else, such as clipping by a common norm.
Kind = Literal["scaled", "rowwise", "joint"]

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh div
    eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split())
_CALLS = frozenset("jit pjit closed_call core_call custom_jvp_call custom_vjp_call".split())


def is_scaled(jaxpr: Jaxpr, gradient: int, update: int, weight: int) -> bool:
    """Say whether an update is the gradient times a factor in which the table has no part.

    Args:
      jaxpr: Of a step.
      gradient: Which of its inputs is the gradient of the table.
      update: Which of its outputs is the update of the table.
      weight: Which of its inputs is the weight of the table.

    Returns:
      Whether it is so.
    """
    scaled = {jaxpr.invars[gradient]}
    for eqn in jaxpr.eqns:
        inputs = [_is_in(x, scaled) for x in eqn.invars]
        if any(x is jaxpr.invars[weight] for x in eqn.invars):
            return False
        if any(inputs):
            if (eqn.primitive.name, inputs) not in _SCALES:
                return False
            scaled.add(eqn.outvars[0])
    return [i for i, x in enumerate(jaxpr.outvars) if _is_in(x, scaled)] == [update]


_SCALES = (("neg", [True]), ("mul", [True, False]), ("mul", [False, True]), ("div", [True, False]))


def is_rowwise(jaxpr: Jaxpr, inputs: Sequence[int], outputs: Sequence[int], rows: int) -> bool:
    """Say whether some outputs follow, row by row, from some inputs, and no other output from these.

    Sound but not complete: an operation that is not known here counts as mixing rows.

    Args:
      jaxpr: Of a step.
      inputs: Which of its inputs have the table's rows along their first axis.
      outputs: Which of its outputs have.
      rows: The number of rows, which no other axis has.

    Returns:
      Whether it is so.
    """
    found = _by_row(jaxpr, [i in inputs for i in range(len(jaxpr.invars))], rows)
    if found is None:
        return False
    return all(kind in ("row", "constant") if i in outputs else kind != "row" for i, kind in enumerate(found))


def _by_row(jaxpr: Jaxpr, inputs: Sequence[bool], rows: int) -> list[str | None] | None:
    """Find which outputs have rows along their first axis ("row"), or the same in each row ("constant").

    Returns:
      For each output, which of the two, or None; None instead of a list where rows mix.
    """
    kinds: dict[Var, str | None] = {}
    for variable, has_rows in zip(jaxpr.invars, inputs, strict=True):
        kinds[variable] = "row" if has_rows else None

    def kind(variable: Var | Constant) -> str | None:
        return None if isinstance(variable, Constant) else kinds.get(variable)

    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        of_inputs = [kind(x) for x in eqn.invars]
        out: list[str | None] = [None] * len(eqn.outvars)
        if name in _CALLS and (inner := _inner(params)) is not None and "row" in of_inputs:
            found = _by_row(inner, [k == "row" for k in of_inputs], rows)
            if found is None:
                return None
            out = found
        elif name == "broadcast_in_dim" and "row" not in of_inputs:
            is_new = _shape(eqn.outvars[0])[:1] == (rows,) and 0 not in params["broadcast_dimensions"]
            out = ["constant" if is_new else None]
        elif "row" in of_inputs or "constant" in of_inputs:
            if not _keeps_rows(eqn, of_inputs, rows):
                if "row" in of_inputs:
                    return None
            else:
                out = ["row" if "row" in of_inputs else "constant"] * len(eqn.outvars)
        for variable, k in zip(eqn.outvars, out, strict=True):
            kinds[variable] = k
    return [kind(x) for x in jaxpr.outvars]


def _keeps_rows(eqn: JaxprEqn, of_inputs: Sequence[str | None], rows: int) -> bool:
    """Say whether an operation makes each row of its result from the same row of its operands."""
    name, params, out = eqn.primitive.name, eqn.params, _shape(eqn.outvars[0])
    if name in _ELEMENTWISE:
        # An operand without rows must be a scalar: one that has other values in other rows cannot be told apart.
        return all(k is not None or not _shape(x) for k, x in zip(of_inputs, eqn.invars, strict=True))
    if out[:1] != (rows,):
        return False
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,)
    if name == "transpose":
        return params["permutation"][0] == 0
    return name in ("reshape", "squeeze", "expand_dims")


def _shape(variable: Var | Constant) -> tuple[int, ...]:
    aval = variable.aval
    return aval.shape if isinstance(aval, ShapedArray) else ()


def follows(jaxpr: Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Say for each output whether it may follow from any of some inputs.

    Args:
      jaxpr: Of a step.
      inputs: Whether each of its inputs is one of them.

    Returns:
      For each output, whether it may. Of a loop, all outputs may follow from all inputs.
    """
    reached = {x for x, is_one in zip(jaxpr.invars, inputs, strict=True) if is_one}
    for eqn in jaxpr.eqns:
        of_inputs = [_is_in(x, reached) for x in eqn.invars]
        if not any(of_inputs):
            continue
        out = [True] * len(eqn.outvars)
        if eqn.primitive.name == "cond" and not of_inputs[0]:
            branches = [follows(branch.jaxpr, of_inputs[1:]) for branch in eqn.params["branches"]]
            out = [any(x) for x in zip(*branches, strict=True)]
        elif eqn.primitive.name in _CALLS and (inner := _inner(eqn.params)) is not None:
            out = follows(inner, of_inputs)
        reached.update(x for x, is_reached in zip(eqn.outvars, out, strict=True) if is_reached)
    return [_is_in(x, reached) for x in jaxpr.outvars]


def _inner(params: Mapping[str, object]) -> Jaxpr | None:
    for name in ("jaxpr", "call_jaxpr"):
        if isinstance(program := params.get(name), ClosedJaxpr):
            return program.jaxpr
    return None


def _is_in(variable: Var | Constant, variables: set[Var]) -> bool:
    return not isinstance(variable, Constant) and variable in variables


def step_jaxpr(update: Callable[..., PyTree], *args: PyTree) -> Jaxpr:
    """Trace a step of abstract arrays."""
    return jax.make_jaxpr(update)(*args).jaxpr
