"""Rules of equations that hold programs: how the outputs of a call, a scan, a cond or a shard_map are sums.

Each rule turns the forms of the inner programs into openings in terms of the outer equation's operands. For instance,
the body of a scan of 10 steps adds 4 ids to the carry, which is operand 2:

    body:   out 0 = Form({2: True}, ids=4)         the carry, unchanged, and 4 ids
    scan:   output 0 = Opening({2: True}, ids=40)

If an output is no such sum, its opening is None, or the reasons if they are known. A rule also returns, for each
output, the operands that it needs as arrays; None for all of them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jax.extend.core import JaxprEqn, Literal

from ..._base.dtypes import index_dtype
from .equations import CALLS, NO_AXES, ScanSizes, before_sum, inner, programs_of
from .form import AllKnown, Form, Forms, Reason
from .opening import Kind, Opening

Openings = list[Opening | frozenset[Reason] | None]
Operands = list[Sequence[int] | None]

# Returns the forms of a program, given the known inputs.
FormsOf = Callable[..., Forms]

_Item = TypeVar("_Item")


def needed_by_effects(eqn: JaxprEqn, known: AllKnown, openings: Openings, forms_of: FormsOf) -> Sequence[int]:
    """Return the operands of an equation that its effects need as arrays."""
    if eqn.primitive.name in CALLS:
        return _positions(forms_of(inner(programs_of(eqn)[0])[0], known).effects)
    summed = {k for x in openings if isinstance(x, Opening) for k in x.terms} if eqn.primitive.name == "scan" else ()
    return [k for k in range(len(eqn.invars)) if k not in summed]


def _positions(bits: int) -> list[int]:
    return [k for k in range(bits.bit_length()) if bits >> k & 1]


def _of_call(eqn: JaxprEqn, known: AllKnown, forms_of: FormsOf) -> tuple[Openings, Operands]:
    forms, told = forms_of(inner(programs_of(eqn)[0])[0], known), frozenset(k for k, x in enumerate(known) if x)
    openings: Openings = []
    operands: Operands = []
    for v in forms.jaxpr.outvars:
        form = forms.form(v)
        of_rows = form.ids, form.axes, form.kinds, form.dense
        openings.append(Opening(form.inputs, _positions(form.needs), *of_rows, laned=form.laned, told=told))
        if form.dense and not form.ids and not form.inputs:
            openings[-1] = form.dense
        operands.append([] if isinstance(v, Literal) else _positions(forms.depends[v]))
    return openings, operands


def _of_scan(eqn: JaxprEqn, known: AllKnown, forms_of: FormsOf) -> tuple[Openings, Operands]:
    """A carry that the body only adds to is a sum of the rows of each step."""
    forms, sizes = forms_of(inner(programs_of(eqn)[0])[0]), ScanSizes.of(eqn)
    outvars = forms.jaxpr.outvars
    openings: Openings = [None] * len(outvars)
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
    """Return the carried sums that the body also uses in another way than adding to them."""
    bits = forms.effects
    for j, v in enumerate(forms.jaxpr.outvars):
        if j in candidates:
            bits |= forms.form(v).needs
        elif not isinstance(v, Literal):
            bits |= forms.depends[v]
    return [j for j in candidates if bits >> (sizes.consts + j) & 1]


def _outgrow(ids: int, form: Form, aval: Any) -> bool:
    """Return whether the rows that a scan stacks take more memory than an array of all rows."""
    if not ids:
        return False
    lanes = max(kind.lanes for kind in form.kinds)
    of_row = math.prod(aval.shape[lanes + 1 :]) * aval.dtype.itemsize + index_dtype(aval.shape[lanes]).itemsize
    return ids * of_row > math.prod(aval.shape) * aval.dtype.itemsize


def _of_cond(eqn: JaxprEqn, known: AllKnown, forms_of: FormsOf) -> tuple[Openings, Operands]:
    """The rows of the branch that runs, padded to the largest number of ids of any branch."""
    branches = [forms_of(inner(branch)[0]) for branch in programs_of(eqn)]
    openings: Openings = []
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
    return openings, [None] * len(openings)


def _of_one_kind(kinds: frozenset[Kind]) -> bool:
    """Return whether rows can be concatenated: they are of one kind, without lanes."""
    return len(kinds) <= 1 and not any(kind.lanes for kind in kinds)


def _union(sets: Iterable[frozenset[_Item]]) -> frozenset[_Item]:
    return frozenset().union(*sets)


def _of_shards(eqn: JaxprEqn, known: AllKnown, forms_of: FormsOf) -> tuple[Openings, Operands]:
    """An output that is summed over devices is the rows of all devices."""
    number = len(eqn.outvars)
    return [_of_shard(eqn, j, forms_of) for j in range(number)], [None] * number


def _of_shard(eqn: JaxprEqn, j: int, forms_of: FormsOf) -> Opening | frozenset[Reason] | None:
    if any(part is not None for part in eqn.params["out_specs"][j]):
        return None
    forms = forms_of(inner(programs_of(eqn)[0])[0])
    v, axes = before_sum(eqn, j)
    form = forms.form(v)
    if form.dense:
        return form.dense
    if form.inputs or any(axes & of_rows for of_rows in form.axes) or not _of_one_kind(form.kinds):
        return None
    sizes = eqn.params["mesh"].shape
    devices = max((math.prod(sizes[axis] for axis in axes | of_rows) for of_rows in form.axes), default=1)
    return Opening({}, range(len(eqn.invars)), devices * form.ids, frozenset({NO_AXES}), form.kinds)


# The rule of each primitive. Its arguments are the equation, the known operands of a call, and a `FormsOf`.
NESTED: dict[str, Callable[[JaxprEqn, AllKnown, FormsOf], tuple[Openings, Operands]]] = {
    **dict.fromkeys(CALLS, _of_call),
    "scan": _of_scan,
    "cond": _of_cond,
    "shard_map": _of_shards,
}
