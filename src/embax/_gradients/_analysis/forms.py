"""Forms: for each variable of a gradient's program, the terms that it is a sum of.

One pass from the first equation to the last finds for every variable: the inputs of the program that it adds, and
whether each is unchanged; how many rows it adds; and the reasons for terms that are arrays of all rows. An example: a
loss that looks up 4 ids in each step of a scan. The body of the gradient's scan has the carry `a`:

    scan body:  b = add_rows values ids       b: 4 ids
                c = add_any a b               c: input a, unchanged, and 4 ids
    program:    z = broadcast_in_dim 0.0      z: nothing
                g = scan[10 steps] z ...      g: nothing (from z), and 40 ids, which the scan can stack

If no rule knows an equation, its output is one term: the array itself. So a missing rule costs speed, but never gives a
wrong value. `linear` has the rules of single equations, `nested` those of equations that hold programs, and `program`
runs a program by its forms.
"""

from jax.extend.core import Jaxpr, JaxprEqn

from ..._core.dense import DENSE
from .equations import CALLS
from .form import AllKnown, Form, Forms, Reason
from .linear import ALL_ROWS, opening_of
from .nested import NESTED, Openings, Operands, needed_by_effects
from .opening import Kind, Opening


class Memo:
    """A cache of the forms of programs, for the analysis of one gradient."""

    def __init__(self):
        self._forms: dict[tuple[int, AllKnown], Forms] = {}

    def forms(self, jaxpr: Jaxpr, known: AllKnown = ()) -> Forms:
        """The forms of a program whose inputs are known as `known` says."""
        key = id(jaxpr), known
        if key not in self._forms:
            forms = Forms(jaxpr, known)
            for eqn in jaxpr.eqns:
                _add(forms, eqn, self)
            self._forms[key] = forms
        return self._forms[key]


def _add(forms: Forms, eqn: JaxprEqn, memo: Memo) -> None:
    """Fill in the forms of the outputs of an equation."""
    known = forms.known_of(eqn) if eqn.primitive.name in CALLS else ()
    openings, operands = _outputs(eqn, known, forms, memo)
    whole = forms.bits(eqn, range(len(eqn.invars)))
    for v, opening, used in zip(eqn.outvars, openings, operands, strict=True):
        forms.depends[v] = whole if used is None else forms.bits(eqn, used)
        if not isinstance(opening, Opening):
            reasons = opening
        elif isinstance(found := _opened(forms, eqn, opening), Form):
            forms.of[v], forms.openings[v] = found, opening
            continue
        else:
            reasons = found
        forms.of[v] = Form(dense=reasons or frozenset({Reason(eqn)}), needs=forms.depends[v])
    if eqn.effects:
        forms.effects |= forms.bits(eqn, needed_by_effects(eqn, known, openings, memo.forms))


def _outputs(eqn: JaxprEqn, known: AllKnown, forms: Forms, memo: Memo) -> tuple[Openings, Operands]:
    """Return the opening of each output, or the reasons why it is dense; and the operands that each needs as arrays."""
    name = eqn.primitive.name
    if name in NESTED:
        return NESTED[name](eqn, known, memo.forms)
    if name == ALL_ROWS:
        return [frozenset({Reason(eqn, is_expected=True)})], [None]
    number = len(eqn.outvars)
    return [opening_of(eqn, forms.lanes)] * number, [None] * number


def _opened(forms: Forms, eqn: JaxprEqn, opening: Opening) -> Form | frozenset[Reason] | None:
    """Combine the forms of the operands that an output sums; else return the reasons, or None if there are none."""
    inputs: dict[int, bool] = {}
    ids, axes, kinds, dense = opening.ids, opening.axes, opening.kinds, opening.dense
    laned = opening.laned
    if any(kind.lanes for kind in kinds):
        laned = laned or frozenset({Reason(eqn)})
    needs = forms.bits(eqn, opening.arrays)
    for k, as_it_is in opening.terms.items():
        form = forms.form(eqn.invars[k])
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
    unknown = any(forms.known.get(place) is None for place in inputs)
    if unknown and (opening.joined or opening.summed_over or opening.by_place):
        return None
    # If all operands are arrays of all rows, the warning shall name this equation.
    if opening.arrays and not (inputs or ids) and not all(reason.is_expected for reason in dense):
        return None
    laned = laned if any(kind.lanes for kind in kinds) else frozenset()
    return Form(inputs, ids, axes, kinds, dense, needs, laned)
