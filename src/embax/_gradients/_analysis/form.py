"""Form: what each variable of a gradient's program is a sum of.

For instance, `Form({0: True}, ids=4)` is input 0 of the program, added once and as it is, and rows of 4 ids; `Form()`
is nothing but zeros; and `Form(dense={Reason(eqn)})` is one array of all rows, which `eqn` computes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .opening import Kind, Opening


class Reason:
    """Why a term is of all rows.

    Attributes:
      eqn: The equation that computes it; None for a constant.
      is_expected: Whether that is by design, and no surprise.
    """

    __slots__ = ("eqn", "is_expected")

    def __init__(self, eqn: JaxprEqn | None, is_expected: bool = False):
        self.eqn, self.is_expected = eqn, is_expected


class Form(NamedTuple):
    """What a variable is a sum of."""

    inputs: Mapping[int, bool] = {}  # inputs of the program; whether each is added once, as it is
    ids: int = 0  # number of ids that are added
    axes: frozenset[frozenset[str]] = frozenset()  # of the rows, as in `Rows`
    kinds: frozenset[Kind] = frozenset()  # of the rows
    dense: frozenset[Reason] = frozenset()  # why there are terms of all rows
    needs: int = 0  # inputs, as bits, that are needed as arrays to compute the terms
    laned: frozenset[Reason] = frozenset()  # why there are rows that have lanes


class Known(NamedTuple):
    """What is known of an input of a program that is a sum of rows and of nothing else."""

    ids: int
    axes: frozenset[frozenset[str]]
    kinds: frozenset[Kind]


# What is known of each input; empty where there is nothing.
AllKnown = tuple[Known | None, ...]


class Forms:
    """The forms of a program's variables, which the pass in `forms` fills in.

    Attributes:
      jaxpr: The program, which these keep alive.
      known: What is known of its inputs, by their places.
      of: The form of each variable.
      openings: How each variable that can be taken apart is taken apart.
      depends: Inputs, as bits, that are needed to compute each variable as an array.
      effects: Inputs, as bits, that the effects of the program need.
    """

    def __init__(self, jaxpr: Jaxpr, known: AllKnown = ()):
        self.jaxpr = jaxpr
        self.known = dict(enumerate(known))
        constant = Form(dense=frozenset({Reason(None)}))
        self.of: dict[Var, Form] = dict.fromkeys(jaxpr.constvars, constant)
        self.of.update((v, self._of_input(k)) for k, v in enumerate(jaxpr.invars))
        self.depends: dict[Var, int] = dict.fromkeys(jaxpr.constvars, 0)
        self.depends.update((v, 1 << k) for k, v in enumerate(jaxpr.invars))
        self.openings: dict[Var, Opening] = {}
        self.effects = 0

    def _of_input(self, k: int) -> Form:
        known = self.known.get(k)
        if known is None:
            return Form({k: True})
        return Form({k: True}, *known) if known.ids else Form()  # which is zeros

    def known_of(self, eqn: JaxprEqn) -> AllKnown:
        """What is known of the operands of an equation that calls a program."""
        known = tuple(self._known(v) for v in eqn.invars)
        return known if any(x is not None for x in known) else ()

    def _known(self, v: Any) -> Known | None:
        form = self.form(v)
        return None if self.lanes(v) is None else Known(form.ids, form.axes, form.kinds)

    def form(self, v: Any) -> Form:
        """The form of a variable or a literal."""
        return Form(dense=frozenset({Reason(None)})) if isinstance(v, Literal) else self.of[v]

    def opening(self, v: Any) -> Opening | None:
        """How a variable is to be taken apart; None where it is one array, or an input."""
        if isinstance(v, Literal):
            return None
        form = self.of[v]
        return None if form.dense and not form.ids and not form.inputs else self.openings.get(v)

    def lanes(self, v: Any) -> int | None:
        """The number of lanes of a sum of rows and of nothing else, which may be zeros; None for others."""
        form = self.form(v)
        unknown = form.dense or any(self.known.get(place) is None for place in form.inputs)
        return None if unknown else max((kind.lanes for kind in form.kinds), default=0)

    def bits(self, eqn: JaxprEqn, operands: Iterable[int]) -> int:
        """Inputs, as bits, that are needed to compute some operands of an equation as arrays."""
        bits = 0
        for k in operands:
            v = eqn.invars[k]
            if not isinstance(v, Literal):
                bits |= self.depends[v]
        return bits
