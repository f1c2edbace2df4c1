"""Proofs from the jaxpr of an update: the transformation treats rows independently, or only scales their gradient.

For instance, in `mu = 0.9 * mu + 0.1 * g; update = -lr * mu`, each operation is elementwise between arrays of rows and
scalars, so row `r` of the update follows from row `r` of `mu` and `g`: "rowwise". A `reduce_sum` over the axis of rows
would mix them. The proof is sound but not complete: an unknown operation counts as mixing rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.extend.core import Literal as Constant
from jaxtyping import PyTree

# `scaled`: the update of a row is its gradient times a factor that does not depend on the table.
# `rowwise`: the update and the state of a row depend only on that row's gradient, weight and state, and on numbers that
#   do not depend on tables; and nothing else depends on the rows.
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
    """Whether an update is the gradient times a factor that does not depend on the table.

    Args:
      jaxpr: The jaxpr of a step.
      gradient: The input that is the gradient of the table.
      update: The output that is the update of the table.
      weight: The input that is the weight of the table.

    Returns:
      True if this is proved.
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
    """Whether some outputs follow row by row from some inputs, and no other output depends on these inputs.

    Args:
      jaxpr: The jaxpr of a step.
      inputs: The inputs whose first axis is the table's rows.
      outputs: The outputs whose first axis is the table's rows.
      rows: The number of rows; no other axis may have this size.

    Returns:
      True if this is proved.
    """
    found = _by_row(jaxpr, [i in inputs for i in range(len(jaxpr.invars))], rows)
    if found is None:
        return False
    return all(kind in ("row", "constant") if i in outputs else kind != "row" for i, kind in enumerate(found))


def _by_row(jaxpr: Jaxpr, inputs: Sequence[bool], rows: int) -> list[str | None] | None:
    """Classify outputs: "row" if their first axis is rows, "constant" if all rows are equal, None otherwise.

    Returns:
      One answer for each output; None instead of the list if rows mix.
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
    """Whether an operation computes each row of its result from the same row of its operands."""
    name, params, out = eqn.primitive.name, eqn.params, _shape(eqn.outvars[0])
    if name in _ELEMENTWISE:
        # An operand without rows must be a scalar: an array could hold different values for different rows.
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
    """For each output, whether it may depend on some inputs.

    Args:
      jaxpr: The jaxpr of a step.
      inputs: For each input, whether it is one of them.

    Returns:
      One answer for each output. All outputs of a loop count as depending on all of its inputs.
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
    """Trace a step for abstract arrays."""
    return jax.make_jaxpr(update)(*args).jaxpr
