"""Form: the terms that a variable of a gradient's program is a sum of.

For instance, a variable of the form `Form({0: True}, ids=4)` is the sum of input 0, added once and unchanged, and rows
of 4 ids. `Form()` is zeros, and `Form(dense={Reason(eqn)})` is one array of all rows that the equation `eqn` computes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from .opening import Kind, Opening


class Reason:
    """Why a term is an array of all rows.

    Attributes:
      eqn: The equation that computes the term; None for a constant.
      is_expected: Whether it is dense by design, so that no warning is due.
    """

    __slots__ = ("eqn", "is_expected")

    def __init__(self, eqn: JaxprEqn | None, is_expected: bool = False):
        self.eqn, self.is_expected = eqn, is_expected


class Form(NamedTuple):
    """The terms that a variable is a sum of."""

    inputs: Mapping[int, bool] = {}  # inputs of the program; True if added once and unchanged
    ids: int = 0  # number of ids of all rows
    axes: frozenset[frozenset[str]] = frozenset()  # the `axes` of the rows, see `Rows`
    kinds: frozenset[Kind] = frozenset()  # the kinds of the rows
    dense: frozenset[Reason] = frozenset()  # why there are terms that are arrays of all rows
    needs: int = 0  # a bit for each input that is needed as an array to compute the terms
    laned: frozenset[Reason] = frozenset()  # why there are rows with lanes


class Known(NamedTuple):
    """What the caller knows of an input of a program: that it is a sum of rows only, and of how many."""

    ids: int
    axes: frozenset[frozenset[str]]
    kinds: frozenset[Kind]


# One entry for each input; empty if nothing is known of any.
AllKnown = tuple[Known | None, ...]


class Forms:
    """The forms of a program's variables, which the pass in `forms` fills in.

    Attributes:
      jaxpr: The program, kept alive.
      known: The known inputs, by their places.
      of: The form of each variable.
      openings: The opening of each variable that an equation makes as a sum.
      depends: For each variable, a bit for each input that is needed to compute it as an array.
      effects: A bit for each input that the program's effects need.
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
        return Form({k: True}, *known) if known.ids else Form()  # no rows: zeros

    def known_of(self, eqn: JaxprEqn) -> AllKnown:
        """Return what is known of the operands of a call."""
        known = tuple(self._known(v) for v in eqn.invars)
        return known if any(x is not None for x in known) else ()

    def _known(self, v: Any) -> Known | None:
        form = self.form(v)
        return None if self.lanes(v) is None else Known(form.ids, form.axes, form.kinds)

    def form(self, v: Any) -> Form:
        """Return the form of a variable or a literal."""
        return Form(dense=frozenset({Reason(None)})) if isinstance(v, Literal) else self.of[v]

    def opening(self, v: Any) -> Opening | None:
        """Return how a variable is a sum; None if it is one array, or an input."""
        if isinstance(v, Literal):
            return None
        form = self.of[v]
        return None if form.dense and not form.ids and not form.inputs else self.openings.get(v)

    def lanes(self, v: Any) -> int | None:
        """Return the number of lanes of a variable that is a sum of rows only, or zeros; None for any other."""
        form = self.form(v)
        unknown = form.dense or any(self.known.get(place) is None for place in form.inputs)
        return None if unknown else max((kind.lanes for kind in form.kinds), default=0)

    def bits(self, eqn: JaxprEqn, operands: Iterable[int]) -> int:
        """Return a bit for each input that is needed to compute these operands of an equation as arrays."""
        bits = 0
        for k in operands:
            v = eqn.invars[k]
            if not isinstance(v, Literal):
                bits |= self.depends[v]
        return bits
