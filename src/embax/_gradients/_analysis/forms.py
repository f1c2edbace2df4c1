"""Forms: for each variable of a gradient's program, the terms that it is a sum of.

One pass from the first equation to the last finds for every variable: the inputs of the program that it adds, and
whether each is unchanged; how many rows it adds; and the reasons for terms that are arrays of all rows. An example: a
loss that looks up 4 ids in each step of a scan. The body of the gradient's scan has the carry `a`:

    scan body:  b = add_rows values ids       b: 4 ids
                c = add_any a b               c: input a, unchanged, and 4 ids
    program:    z = broadcast_in_dim 0.0      z: nothing
                g = scan[10 steps] z ...      g: nothing (from z), and 40 ids, which the scan can stack

If no rule knows an equation, its output is one term: the array itself. So a missing rule costs speed, but never gives a
wrong value. `program` runs a program by its forms.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from ..._base.dtypes import index_dtype
from ..._core.dense import DENSE
from .equations import CALLS, NO_AXES, ScanSizes, before_sum, inner, programs_of
from .linear import ALL_ROWS, opening_of
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
    """The forms of a program's variables.

    Attributes:
      jaxpr: The program, kept alive.
      of: The form of each variable.
      openings: The opening of each variable that an equation makes as a sum.
      depends: For each variable, a bit for each input that is needed to compute it as an array.
      effects: A bit for each input that the program's effects need.
    """

    def __init__(self, jaxpr: Jaxpr, memo: "Memo", known: AllKnown = ()):
        self.jaxpr = jaxpr
        self.known = dict(enumerate(known))
        constant = Form(dense=frozenset({Reason(None)}))
        self.of: dict[Var, Form] = dict.fromkeys(jaxpr.constvars, constant)
        self.of.update((v, self._of_input(k)) for k, v in enumerate(jaxpr.invars))
        self.depends: dict[Var, int] = dict.fromkeys(jaxpr.constvars, 0)
        self.depends.update((v, 1 << k) for k, v in enumerate(jaxpr.invars))
        self.openings: dict[Var, Opening] = {}
        self.effects = 0
        for eqn in jaxpr.eqns:
            self._add(eqn, memo)

    def _of_input(self, k: int) -> Form:
        known = self.known.get(k)
        if known is None:
            return Form({k: True})
        return Form({k: True}, *known) if known.ids else Form()  # which is zeros

    def known_of(self, eqn: JaxprEqn) -> AllKnown:
        """What is known of the operands of a call."""
        known = tuple(self._known(v) for v in eqn.invars)
        return known if any(x is not None for x in known) else ()

    def _known(self, v: Any) -> Known | None:
        form = self.form(v)
        return None if self.lanes(v) is None else Known(form.ids, form.axes, form.kinds)

    def form(self, v: Any) -> Form:
        """The form of a variable or a literal."""
        return Form(dense=frozenset({Reason(None)})) if isinstance(v, Literal) else self.of[v]

    def opening(self, v: Any) -> Opening | None:
        """How a variable is a sum; None if it is one array, or an input."""
        if isinstance(v, Literal):
            return None
        form = self.of[v]
        return None if form.dense and not form.ids and not form.inputs else self.openings.get(v)

    def lanes(self, v: Any) -> int | None:
        """The number of lanes of a variable that is a sum of rows only, or zeros; None for any other variable."""
        form = self.form(v)
        unknown = form.dense or any(self.known.get(place) is None for place in form.inputs)
        return None if unknown else max((kind.lanes for kind in form.kinds), default=0)

    def _add(self, eqn: JaxprEqn, memo: "Memo") -> None:
        openings, operands = _outputs(eqn, self, memo)
        whole = self._bits(eqn, range(len(eqn.invars)))
        for v, opening, used in zip(eqn.outvars, openings, operands, strict=True):
            self.depends[v] = whole if used is None else self._bits(eqn, used)
            if not isinstance(opening, Opening):
                reasons = opening
            elif isinstance(found := self._opened(eqn, opening), Form):
                self.of[v], self.openings[v] = found, opening
                continue
            else:
                reasons = found
            self.of[v] = Form(dense=reasons or frozenset({Reason(eqn)}), needs=self.depends[v])
        if eqn.effects:
            self.effects |= self._bits(eqn, _needed_by_effects(eqn, self.known_of(eqn), openings, memo))

    def _opened(self, eqn: JaxprEqn, opening: Opening) -> Form | frozenset[Reason] | None:
        """Combine the forms of the operands that an output sums; else return the reasons, or None if there are none."""
        inputs: dict[int, bool] = {}
        ids, axes, kinds, dense = opening.ids, opening.axes, opening.kinds, opening.dense
        laned = opening.laned
        if any(kind.lanes for kind in kinds):
            laned = laned or frozenset({Reason(eqn)})
        needs = self._bits(eqn, opening.arrays)
        for k, as_it_is in opening.terms.items():
            form = self.form(eqn.invars[k])
            if opening.of_zeros and (form.inputs or form.ids or form.dense):
                return None
            for place, once in form.inputs.items():
                inputs[place] = as_it_is and once and place not in inputs
            if any(opening.summed_over & of_rows for of_rows in form.axes):  # rows may be summed over devices once only
                return None
            needs |= form.needs
            if k in opening.told:
                continue
            ids += opening.times * form.ids
            laned |= form.laned
            axes |= {of_rows | opening.summed_over for of_rows in form.axes}
            if any(kind.lanes < opening.lanes for kind in form.kinds):
                return None
            kinds |= {Kind(lanes - opening.joined, storage) for lanes, storage in form.kinds}
            dense |= form.dense
        if len({kind.lanes for kind in kinds}) > 1:
            return laned
        if len(kinds) > 1 or (opening.by_place and any(kind.storage != DENSE for kind in kinds)):
            return None
        # An input of the program may be rows of any kind, so nothing that depends on the kind is allowed.
        unknown = any(self.known.get(place) is None for place in inputs)
        if unknown and (opening.joined or opening.summed_over or opening.by_place):
            return None
        # If all operands are arrays of all rows, the warning shall name this equation.
        if opening.arrays and not (inputs or ids) and not all(reason.is_expected for reason in dense):
            return None
        laned = laned if any(kind.lanes for kind in kinds) else frozenset()
        return Form(inputs, ids, axes, kinds, dense, needs, laned)

    def _bits(self, eqn: JaxprEqn, operands: Any) -> int:
        bits = 0
        for k in operands:
            v = eqn.invars[k]
            if not isinstance(v, Literal):
                bits |= self.depends[v]
        return bits


class Memo:
    """A cache of the forms of programs, for the analysis of one gradient."""

    def __init__(self):
        self._forms: dict[tuple[int, AllKnown], Forms] = {}

    def forms(self, jaxpr: Jaxpr, known: AllKnown = ()) -> Forms:
        """The forms of a program whose inputs are known as `known` says."""
        key = id(jaxpr), known
        if key not in self._forms:
            self._forms[key] = Forms(jaxpr, self, known)
        return self._forms[key]


# ---- For each output of an equation: its opening, or the reasons why it is one array, or None; and the operands that
# it needs as arrays, None for all.

_Openings = list[Opening | frozenset[Reason] | None]
_Operands = list[Sequence[int] | None]


def _outputs(eqn: JaxprEqn, forms: Forms, memo: Memo) -> tuple[_Openings, _Operands]:
    name, number = eqn.primitive.name, len(eqn.outvars)
    if name in CALLS:
        return _of_call(eqn, forms.known_of(eqn), memo)
    if name == "scan":
        return _of_scan(eqn, memo)
    if name == "cond":
        return _of_cond(eqn, memo), [None] * number
    if name == "shard_map":
        return [_of_shards(eqn, j, memo) for j in range(number)], [None] * number
    if name == ALL_ROWS:
        return [frozenset({Reason(eqn, is_expected=True)})], [None]
    return [opening_of(eqn, forms.lanes)] * number, [None] * number


def _needed_by_effects(eqn: JaxprEqn, known: AllKnown, openings: Sequence[Any], memo: Memo) -> Sequence[int]:
    if eqn.primitive.name in CALLS:
        return _positions(memo.forms(inner(programs_of(eqn)[0])[0], known).effects)
    summed = {k for x in openings if isinstance(x, Opening) for k in x.terms} if eqn.primitive.name == "scan" else ()
    return [k for k in range(len(eqn.invars)) if k not in summed]


def _positions(bits: int) -> list[int]:
    return [k for k in range(bits.bit_length()) if bits >> k & 1]


def _of_call(eqn: JaxprEqn, known: AllKnown, memo: Memo) -> tuple[_Openings, _Operands]:
    forms, told = memo.forms(inner(programs_of(eqn)[0])[0], known), frozenset(k for k, x in enumerate(known) if x)
    openings: _Openings = []
    operands: _Operands = []
    for v in forms.jaxpr.outvars:
        form = forms.form(v)
        of_rows = form.ids, form.axes, form.kinds, form.dense
        openings.append(Opening(form.inputs, _positions(form.needs), *of_rows, laned=form.laned, told=told))
        if form.dense and not form.ids and not form.inputs:
            openings[-1] = form.dense
        operands.append([] if isinstance(v, Literal) else _positions(forms.depends[v]))
    return openings, operands


def _of_scan(eqn: JaxprEqn, memo: Memo) -> tuple[_Openings, _Operands]:
    """A carry that the body only adds to is a sum of the rows of each step."""
    forms, sizes = memo.forms(inner(programs_of(eqn)[0])[0]), ScanSizes.of(eqn)
    outvars = forms.jaxpr.outvars
    openings: _Openings = [None] * len(outvars)
    for j in range(sizes.carry):
        form, length = forms.form(outvars[j]), eqn.params["length"]
        if form.dense:
            openings[j] = form.dense
        elif form.inputs == {sizes.consts + j: True} and len(form.axes) <= 1:
            if _outgrow(length * form.ids, form, eqn.outvars[j].aval):
                openings[j] = frozenset({Reason(eqn, is_expected=True)})
            else:
                # The needed operands are set below: the body may need one by way of another carry.
                openings[j] = Opening(
                    {sizes.consts + j: True}, (), length * form.ids, form.axes, form.kinds, laned=form.laned
                )
    while used := _used_otherwise(forms, sizes, [j for j, x in enumerate(openings) if isinstance(x, Opening)]):
        for j in used:
            openings[j] = None
    carried = {sizes.consts + j for j, opening in enumerate(openings) if isinstance(opening, Opening)}
    others = [k for k in range(len(eqn.invars)) if k not in carried]
    openings = [x._replace(arrays=others) if isinstance(x, Opening) else x for x in openings]
    return openings, [None if isinstance(x, Opening) else others for x in openings]


def _used_otherwise(forms: Forms, sizes: ScanSizes, candidates: Sequence[int]) -> list[int]:
    """Which of the carried sums a body also uses in another way than adding to them."""
    bits = forms.effects
    for j, v in enumerate(forms.jaxpr.outvars):
        if j in candidates:
            bits |= forms.form(v).needs
        elif not isinstance(v, Literal):
            bits |= forms.depends[v]
    return [j for j in candidates if bits >> (sizes.consts + j) & 1]


def _outgrow(ids: int, form: Form, aval: Any) -> bool:
    """Whether the rows that a scan stacks take more memory than an array of all rows."""
    if not ids:
        return False
    lanes = max(kind.lanes for kind in form.kinds)
    of_row = math.prod(aval.shape[lanes + 1 :]) * aval.dtype.itemsize + index_dtype(aval.shape[lanes]).itemsize
    return ids * of_row > math.prod(aval.shape) * aval.dtype.itemsize


def _of_cond(eqn: JaxprEqn, memo: Memo) -> _Openings:
    """The rows of the branch that runs, padded to the largest number of ids of any branch."""
    branches = [memo.forms(inner(branch)[0]) for branch in programs_of(eqn)]
    openings: _Openings = []
    for j in range(len(eqn.outvars)):
        forms = [branch.form(branch.jaxpr.outvars[j]) for branch in branches]
        inputs, axes, kinds = forms[0].inputs, _union(f.axes for f in forms), _union(f.kinds for f in forms)
        if dense := _union(f.dense for f in forms):
            openings.append(dense)
        elif (
            any(f.inputs != inputs for f in forms)
            or not all(inputs.values())
            or len(axes) > 1
            or not _of_one_kind(kinds)
        ):
            openings.append(None)
        else:
            # Operand 0 is the index of the branch.
            terms = {k + 1: True for k in inputs}
            arrays = [0, *(k + 1 for f in forms for k in _positions(f.needs))]
            openings.append(Opening(terms, arrays, max(f.ids for f in forms), axes, kinds))
    return openings


def _of_one_kind(kinds: frozenset[Kind]) -> bool:
    """Whether rows can be concatenated: they are of one kind, without lanes."""
    return len(kinds) <= 1 and not any(kind.lanes for kind in kinds)


def _union(sets: Any) -> frozenset[Any]:
    return frozenset().union(*sets)


def _of_shards(eqn: JaxprEqn, j: int, memo: Memo) -> Opening | frozenset[Reason] | None:
    """An output that is summed over devices is the rows of all devices."""
    if any(part is not None for part in eqn.params["out_specs"][j]):
        return None
    forms = memo.forms(inner(programs_of(eqn)[0])[0])
    v, axes = before_sum(eqn, j)
    form = forms.form(v)
    if form.dense:
        return form.dense
    if form.inputs or any(axes & of_rows for of_rows in form.axes) or not _of_one_kind(form.kinds):
        return None
    sizes = eqn.params["mesh"].shape
    devices = max((math.prod(sizes[axis] for axis in axes | of_rows) for of_rows in form.axes), default=1)
    return Opening({}, range(len(eqn.invars)), devices * form.ids, frozenset({NO_AXES}), form.kinds)
