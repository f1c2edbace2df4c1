"""Equations that hold programs of their own: calls, scans, conds and `shard_map`, as the versions of JAX write them.

For instance, `jit` holds one program, whose inputs are its operands; `scan` holds its body, whose inputs are constants,
then what is carried, then the values of one step; `cond` holds its branches, whose inputs are all its operands but the
first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import PyTree

# Equations that call one program, by the names of their primitives.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})


def inner(program: Any) -> tuple[Jaxpr, Sequence[PyTree]]:
    """Take a program that an equation holds apart into a jaxpr and its constants."""
    if hasattr(program, "jaxpr"):
        return program.jaxpr, program.consts
    return program, ()


def programs_of(eqn: Any) -> list[PyTree]:
    """The programs that a call, a scan, a cond or a shard_map holds."""
    if eqn.primitive.name == "cond":
        return list(eqn.params["branches"])
    return [eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]]


def shape_of(v: Any) -> tuple[int, ...]:
    """The shape of a variable or a literal."""
    return v.aval.shape


class ScanSizes(NamedTuple):
    """How many operands of a scan are constants, and how many are carried."""

    consts: int
    carry: int

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "ScanSizes":
        """Tell them by the axis of the steps, since the versions of JAX say it in different ways."""
        body, _ = inner(programs_of(eqn)[0])
        of_steps = sum(len(shape_of(x)) > len(shape_of(y)) for x, y in zip(eqn.invars, body.invars, strict=True))
        stacked = sum(len(shape_of(x)) > len(shape_of(y)) for x, y in zip(eqn.outvars, body.outvars, strict=True))
        carry = len(eqn.outvars) - stacked
        return cls(len(eqn.invars) - of_steps - carry, carry)


NO_AXES: frozenset[str] = frozenset()


def before_sum(eqn: Any, j: int) -> tuple[Any, frozenset[str]]:
    """What of a shard_map's body is summed over devices to give an output, and over which axes.

    With `check_vma=False`, the gradient of what all devices have in common ends with a sum that JAX has added. With
    `check_vma=True` it need not come last, and the body has a primitive of its own for it, so that it has a rule.
    """
    body, _ = inner(programs_of(eqn)[0])
    v = body.outvars[j]
    if not eqn.params["check_vma"]:
        for last in body.eqns:
            if v in last.outvars and last.primitive.name == "psum" and len(last.invars) == 1:
                axes = frozenset(last.params["axes"])
                if last.params.get("axis_index_groups") is None and all(isinstance(axis, str) for axis in axes):
                    return last.invars[0], axes
    return v, NO_AXES


def without_constants(program: Any) -> tuple[Jaxpr, list[PyTree]]:
    """Make the constants of a program its first inputs: they may be tracers, which nothing that stays may hold."""
    jaxpr, consts = inner(program)
    more = {"consts": ()} if hasattr(jaxpr, "consts") else {}
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], **more), list(consts)
