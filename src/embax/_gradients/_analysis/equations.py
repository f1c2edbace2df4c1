"""Equations that hold programs of their own: calls, scan, cond and shard_map, in the forms of several JAX versions.

For instance, `jit` holds one program, with the same inputs as the equation. `scan` holds its body, whose inputs are
constants, the carry, and the values of one step. `cond` holds its branches, whose inputs are the equation's operands
without the first one, the index of the branch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn
from jaxtyping import PyTree

# The primitives that call one program.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})


def inner(program: Any) -> tuple[Jaxpr, Sequence[PyTree]]:
    """Split a program that an equation holds into its jaxpr and its constants."""
    if hasattr(program, "jaxpr"):
        return program.jaxpr, program.consts
    return program, ()


def programs_of(eqn: Any) -> list[PyTree]:
    """The programs of a call, a scan, a cond or a shard_map."""
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
        """Find the sizes: only values of steps have one axis more than the body's. The parameters vary by version."""
        body, _ = inner(programs_of(eqn)[0])
        of_steps = sum(len(shape_of(x)) > len(shape_of(y)) for x, y in zip(eqn.invars, body.invars, strict=True))
        stacked = sum(len(shape_of(x)) > len(shape_of(y)) for x, y in zip(eqn.outvars, body.outvars, strict=True))
        carry = len(eqn.outvars) - stacked
        return cls(len(eqn.invars) - of_steps - carry, carry)


NO_AXES: frozenset[str] = frozenset()


def before_sum(eqn: Any, j: int) -> tuple[Any, frozenset[str]]:
    """Return the variable of a shard_map's body that a final psum turns into output `j`, and the axes of the psum.

    With `check_vma=False`, JAX ends the gradient of a replicated input by a psum, which is skipped here. With
    `check_vma=True`, JAX sums by `psum_invariant`, anywhere in the body, for which `linear` has a rule.
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
    """Turn the constants of a program into its first inputs: they may be tracers, which must not be kept."""
    jaxpr, consts = inner(program)
    more = {"consts": ()} if hasattr(jaxpr, "consts") else {}
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], **more), list(consts)
