"""Run a gradient's program with rows for some outputs: decide which equations are needed, and run these.

A pass from the last equation to the first decides which variables are needed as arrays and which as terms (`forms` says
how each is a sum); all others are left out. An example: the gradient of `lookup(table, ids).sum() * 2`, wanted as
terms:

    a = broadcast_in_dim 2.0     needed as an array, by b
    b = add_rows a ids           needed as terms: Rows(ids, a)
    c = broadcast_in_dim 0.0     needed as terms: there are none
    d = add_any c b              needed as terms: the terms of c and of b

Equations whose outputs are needed as arrays run unchanged, in segments as long as possible, with their names, contexts
and effects. A call, a scan or a cond with both kinds of outputs runs once for both (`calls`). A missing value raises a
KeyError; no value is ever assumed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree

from .calls import RUNNERS, run_equation
from .equations import CALLS, ScanSizes, inner, programs_of, without_constants
from .form import AllKnown, Forms
from .forms import Memo
from .opening import Opening
from .rows import Term
from .terms import terms_of


class Segment(NamedTuple):
    """Consecutive equations that run unchanged."""

    run: Callable[..., Sequence[PyTree]]
    invars: list[Var]
    outvars: list[Var]


class Opened(NamedTuple):
    """An equation with outputs that are wanted as terms."""

    eqn: JaxprEqn
    arrays: tuple[int, ...]  # outputs that are wanted as arrays
    terms: tuple[int, ...]  # outputs that are wanted as terms
    given: frozenset[int]  # operands that are needed as arrays
    taken: frozenset[int]  # operands that are needed as terms
    opening: Opening  # the opening of the first output in `terms`
    known: AllKnown  # what is known of the operands, if it is a call


class Schedule(NamedTuple):
    """The steps that compute some outputs."""

    steps: list[Segment | Opened]
    arrays: frozenset[int]  # inputs that are needed as arrays
    terms: frozenset[int]  # inputs that are needed as terms


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[PyTree],
    args: Sequence[PyTree],
    terms: Mapping[int, Sequence[Term]],
    arrays_out: Sequence[int],
    terms_out: Sequence[int],
    memo: Memo | None = None,
    known: AllKnown = (),
) -> tuple[list[Any], list[list[Term]]]:
    """Run a program.

    Args:
      jaxpr: The program.
      consts: Its constants.
      args: Its inputs; None for one that is not needed as an array.
      terms: Inputs that are given as terms.
      arrays_out: Outputs that are wanted as arrays.
      terms_out: Outputs that are wanted as terms.
      memo: A cache of forms.
      known: What is known of its inputs.

    Returns:
      The arrays, and the terms of each output in `terms_out`.
    """
    schedule = schedule_of(jaxpr, tuple(arrays_out), tuple(terms_out), memo or Memo(), known)
    arrays: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    arrays.update((v, x) for v, x in zip(jaxpr.invars, args, strict=True) if x is not None)
    sums: dict[Any, list[Term]] = {jaxpr.invars[k]: list(x) for k, x in terms.items()}

    def read(v: Any) -> PyTree:
        return v.val if isinstance(v, Literal) else arrays[v]

    def read_terms(v: Any) -> list[Term]:
        return sums[v] if not isinstance(v, Literal) and v in sums else [read(v)]

    for step in schedule.steps:
        if isinstance(step, Segment):
            arrays.update(zip(step.outvars, step.run(*(arrays[v] for v in step.invars)), strict=True))
            continue
        eqn = step.eqn
        with jax.named_scope(str(eqn.source_info.name_stack) or "gradient"), eqn.ctx.manager:
            if eqn.primitive.name not in RUNNERS:
                for j in step.terms:
                    sums[eqn.outvars[j]] = terms_of(eqn, j, step.opening, read, read_terms)
                continue
            given = [read(v) if k in step.given else None for k, v in enumerate(eqn.invars)]
            taken = {k: read_terms(eqn.invars[k]) for k in sorted(step.taken)}
            run = functools.partial(evaluate, known=step.known) if step.known else evaluate
            values, found = run_equation(run, eqn, step.known, step.arrays, step.terms, given, taken)
        arrays.update(zip((eqn.outvars[j] for j in step.arrays), values, strict=True))
        sums.update(zip((eqn.outvars[j] for j in step.terms), found, strict=True))
    return [read(jaxpr.outvars[j]) for j in arrays_out], [read_terms(jaxpr.outvars[j]) for j in terms_out]


def schedule_of(
    jaxpr: Jaxpr, arrays_out: tuple[int, ...], terms_out: tuple[int, ...], memo: Memo, known: AllKnown = ()
) -> Schedule:
    """Decide which equations to run."""
    return _Scheduler(jaxpr, memo.forms(jaxpr, known), memo).schedule(arrays_out, terms_out)


class _Scheduler:
    """Goes through a program from its end, and collects the steps."""

    def __init__(self, jaxpr: Jaxpr, forms: Forms, memo: Memo):
        self.jaxpr, self.forms, self.memo = jaxpr, forms, memo
        self.arrays: set[Var] = set()  # variables that later equations need as arrays
        self.terms: set[Var] = set()  # variables that later equations need as terms
        self.steps: list[Segment | Opened] = []
        self.plain: list[JaxprEqn] = []  # the equations of the open segment, last one first
        self.after: set[Var] = set()  # arrays that are needed after the open segment

    def schedule(self, arrays_out: tuple[int, ...], terms_out: tuple[int, ...]) -> Schedule:
        for j in arrays_out:
            self._need(self.jaxpr.outvars[j])
        for j in terms_out:
            self._need_terms(self.jaxpr.outvars[j])
        for eqn in reversed(self.jaxpr.eqns):
            self._visit(eqn)
        self._close()
        places = {v: k for k, v in enumerate(self.jaxpr.invars)}
        arrays, terms = (frozenset(places[v] for v in some if v in places) for some in (self.arrays, self.terms))
        return Schedule(self.steps[::-1], arrays, terms)

    def _need(self, v: Any) -> None:
        if not isinstance(v, Literal):
            self.arrays.add(v)

    def _need_terms(self, v: Any) -> None:
        if isinstance(v, Literal):
            return
        if v in self.jaxpr.invars or self.forms.opening(v) is not None:
            self.terms.add(v)
        else:  # one term
            self.arrays.add(v)

    def _visit(self, eqn: JaxprEqn) -> None:
        arrays = tuple(j for j, v in enumerate(eqn.outvars) if v in self.arrays)
        terms = tuple(j for j, v in enumerate(eqn.outvars) if v in self.terms)
        if not terms:
            if arrays or eqn.effects:
                self._run_as_it_is(eqn)
            return
        known = self.forms.known_of(eqn) if eqn.primitive.name in CALLS else ()
        given, taken = self._operands(eqn, arrays, terms, known)
        holds_programs = eqn.primitive.name in RUNNERS
        if arrays and not holds_programs:  # wanted in both ways: run it, and compute its terms
            self._run_as_it_is(eqn)
        self._close()
        opening = self.forms.openings[eqn.outvars[terms[0]]]
        self.steps.append(Opened(eqn, arrays if holds_programs else (), terms, given, taken, opening, known))
        for k in given:
            self._need(eqn.invars[k])
        for k in taken:
            self._need_terms(eqn.invars[k])

    def _operands(
        self, eqn: JaxprEqn, arrays: tuple[int, ...], terms: tuple[int, ...], known: AllKnown
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Which operands an equation needs as arrays, and which as terms."""
        if eqn.primitive.name in CALLS:
            schedule = schedule_of(inner(programs_of(eqn)[0])[0], arrays, terms, self.memo, known)
            return schedule.arrays, schedule.terms
        openings = [self.forms.openings[eqn.outvars[j]] for j in terms]
        taken = frozenset(k for opening in openings for k in opening.terms)
        if eqn.primitive.name not in RUNNERS:
            return frozenset(k for opening in openings for k in opening.arrays), taken
        if eqn.primitive.name == "cond":
            schedules = [schedule_of(inner(branch)[0], arrays, terms, self.memo) for branch in programs_of(eqn)]
            return frozenset({0}).union(*({k + 1 for k in schedule.arrays} for schedule in schedules)), taken
        dropped = set()
        if eqn.primitive.name == "scan":
            consts = ScanSizes.of(eqn).consts
            dropped = {consts + j for j in terms if j not in arrays}
        return frozenset(range(len(eqn.invars))) - dropped, taken

    def _run_as_it_is(self, eqn: JaxprEqn) -> None:
        if not self.plain:
            self.after = set(self.arrays)
        self.plain.append(eqn)
        for v in eqn.invars:
            self._need(v)

    def _close(self) -> None:
        """Turn the open segment into a step."""
        if not self.plain:
            return
        eqns = self.plain[::-1]
        made = {v for eqn in eqns for v in eqn.outvars}
        outvars = [v for eqn in eqns for v in eqn.outvars if v in self.after]
        used = (v for eqn in eqns for v in eqn.invars if not isinstance(v, Literal) and v not in made)
        invars = list(dict.fromkeys(used))
        effects = frozenset().union(*(eqn.effects for eqn in eqns))
        segment = without_constants(self.jaxpr)[0].replace(invars=invars, outvars=outvars, eqns=eqns, effects=effects)
        self.steps.append(Segment(jaxpr_as_fun(ClosedJaxpr(segment, [])), invars, outvars))
        self.plain.clear()
