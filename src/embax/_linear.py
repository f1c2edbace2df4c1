"""Linear equations: how one equation of a gradient's program makes a sum of rows from other sums.

The program of a gradient adds, scales and casts arrays of the weight's shape that are zero but for some rows. Each rule
here says two things of a primitive: how its output is a sum (`opening_of`), and how to compute that sum from the terms of
its operands without the array itself (`terms_of`). A term is an array of all rows, or `Rows`:

    a = add_rows([u, v], [1, 3])     terms of a: Rows([1, 3], [u, v])
    b = mul a 0.5                    terms of b: Rows([1, 3], [u / 2, v / 2])
    c = dot x y                      no rule: it is one term, the array
    d = add_any b c                  terms of d: Rows([1, 3], [u / 2, v / 2]), c
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal
from jax.lax import GatherScatterMode
from jaxtyping import Array

from . import _ids
from ._equations import NO_AXES
from ._placement import Placement
from ._read_rows import add_rows_p, all_rows_p


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "values"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that are added into zeros; an id outside of the rows stands for none."""

    ids: Any  # (*lanes, *batch)
    values: Any  # (*lanes, *batch, *dim)
    axes: frozenset[str] = frozenset()  # axes of a `shard_map` over which devices have rows of their own, to be added


Term = Any  # Rows, or an array of all rows


class Kind(NamedTuple):
    """How ids are to be understood; rows of two kinds do not go together."""

    lanes: int = 0  # number of leading axes of the array that have rows of their own
    placement: Placement | None = None  # of a sharded table, whose array has its rows in another order


class Opening(NamedTuple):
    """How an output of an equation is a sum."""

    terms: Mapping[int, bool] = {}  # operands that are summed; whether as they are, or after a linear map of their rows
    arrays: Sequence[int] = ()  # other operands that are needed
    ids: int = 0  # number of ids that the equation itself adds
    axes: frozenset[frozenset[str]] = frozenset()  # of the rows that it adds, as in `Rows`
    kinds: frozenset[Kind] = frozenset()  # of the rows that it adds
    dense: frozenset[Any] = frozenset()  # reasons for terms of all rows that it adds
    summed_over: frozenset[str] = NO_AXES  # axes of devices that the operands' rows are to be added over
    joined: int = 0  # number of lanes that are summed
    lanes: int = 0  # number of leading axes of the operands that have to be lanes
    by_place: bool = False  # whether rows are treated by where they are in the array


def opening_of(eqn: JaxprEqn, is_sum: Callable[[Any], bool]) -> Opening | None:
    """Say how the output of an equation without inner programs is a sum.

    Args:
      eqn: The equation.
      is_sum: Tells whether an operand is a sum of rows and of nothing else.

    Returns:
      None where no rule knows.
    """
    rule = _OPENINGS.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1:
        return None
    return _scaled(eqn, is_sum) if rule is _scaled else rule(eqn)


def terms_of(
    eqn: JaxprEqn, opening: Opening, read: Callable[[Any], Any], terms: Callable[[Any], list[Term]]
) -> list[Term]:
    """Compute the terms of an output that `opening_of` has opened.

    Args:
      eqn: The equation.
      opening: How the output is a sum.
      read: Gives the value of a variable.
      terms: Gives the terms of a variable.

    Returns:
      The terms.
    """
    if eqn.primitive.name in ("mul", "div"):
        return _terms_of_scaled(eqn, read, terms, *opening.terms)
    return _TERMS[eqn.primitive.name](eqn, read, terms)


# ---- Openings.


def _is_zero(x: Any) -> bool:
    # The gradient of an integer has no numbers at all.
    return isinstance(x, Literal) and x.aval.dtype != jax.dtypes.float0 and bool(np.all(np.asarray(x.val) == 0))


def _is_scalar(x: Any) -> bool:
    return (np.ndim(x.val) if isinstance(x, Literal) else x.aval.ndim) == 0


def _sum(eqn: JaxprEqn) -> Opening | None:
    a, b = eqn.invars
    if isinstance(a, Literal) or isinstance(b, Literal) or a.aval.shape != b.aval.shape:
        return None
    once = a is not b
    return Opening({0: once, 1: once and eqn.primitive.name != "sub"})


def _zeros(eqn: JaxprEqn) -> Opening | None:
    return Opening() if _is_zero(eqn.invars[0]) else None


def _of_zeros_only(eqn: JaxprEqn) -> Opening:
    return Opening({0: False})


def _updated(eqn: JaxprEqn) -> Opening | None:
    """Rows that are written into zeros, as the gradient of `weight[k]` for a traced number `k`."""
    operand, update, *_ = eqn.invars
    rows = update.aval.shape[0]
    if update.aval.shape[1:] != operand.aval.shape[1:] or _FEW * rows > operand.aval.shape[0]:
        return None
    return Opening({0: False}, (1, 2), rows, frozenset({NO_AXES}), frozenset({Kind()}))


def _same(eqn: JaxprEqn) -> Opening:
    return Opening({0: True})


def _mapped(eqn: JaxprEqn) -> Opening:
    return Opening({0: False})


def _scaled(eqn: JaxprEqn, is_sum: Callable[[Any], bool]) -> Opening | None:
    a, b = eqn.invars
    summed = 0 if eqn.primitive.name == "div" or (is_sum(a) and not _is_scalar(a)) else 1
    if isinstance(eqn.invars[summed], Literal) or eqn.invars[summed].aval.shape != eqn.outvars[0].aval.shape:
        return None  # an axis of size 1 is repeated
    return Opening({summed: False}, (1 - summed,), by_place=not _is_scalar(eqn.invars[1 - summed]))


def _selected(eqn: JaxprEqn) -> Opening:
    cases = range(1, len(eqn.invars))
    return Opening(dict.fromkeys(cases, False), (0,), by_place=not _is_scalar(eqn.invars[0]))


def _scatter(eqn: JaxprEqn) -> Opening | None:
    """Whole rows that are added to an array, as the transpose of `weight[ids]` does."""
    operand, indices, updates = eqn.invars
    numbers = eqn.params["dimension_numbers"]
    window = tuple(updates.aval.shape[axis] for axis in numbers.update_window_dims)
    is_of_rows = (
        numbers.scatter_dims_to_operand_dims == (0,)
        and numbers.inserted_window_dims == (0,)
        and not numbers.operand_batching_dims
        and not numbers.scatter_indices_batching_dims
        and window == operand.aval.shape[1:]
        and indices.aval.shape[-1] == 1
    )
    if not is_of_rows:
        return None
    return Opening({0: True}, (1, 2), math.prod(indices.aval.shape[:-1]), frozenset({NO_AXES}), frozenset({Kind()}))


def _added(eqn: JaxprEqn) -> Opening:
    values, ids = eqn.invars
    spec = eqn.params["spec"]
    kind = Kind(spec.lanes, spec.placement)
    return Opening({}, (0, 1), math.prod(ids.aval.shape), frozenset({NO_AXES}), frozenset({kind}))


def _padded(eqn: JaxprEqn) -> Opening | None:
    """A slice of rows, whose gradient is padded with zeros."""
    (low, high, between), *others = eqn.params["padding_config"]
    rows, total = eqn.invars[0].aval.shape[0], eqn.outvars[0].aval.shape[0]
    whole_rows = all(tuple(other) == (0, 0, 0) for other in others)
    # Where the slice is a large part of the table, an array is the better way to hold it.
    if not (_is_zero(eqn.invars[1]) and whole_rows and min(low, high) >= 0 and between == 0 and _FEW * rows <= total):
        return None
    return Opening({}, (0,), rows, frozenset({NO_AXES}), frozenset({Kind()}))


_FEW = 2


def _joined(eqn: JaxprEqn) -> Opening | None:
    """The sum of lanes."""
    axes = eqn.params["axes"]
    return Opening({0: False}, joined=len(axes), lanes=1 + max(axes)) if axes else Opening({0: True})


def _summed_over_devices(eqn: JaxprEqn) -> Opening | None:
    # JAX sums so the gradient of what all devices have in common.
    axes = frozenset(eqn.params["axes"])
    return Opening({0: False}, summed_over=axes) if all(isinstance(axis, str) for axis in axes) else None


_OPENINGS: dict[str, Callable[..., Opening | None]] = {
    "add_any": _sum,
    "add": _sum,
    "sub": _sum,
    "broadcast_in_dim": _zeros,
    "pvary": _of_zeros_only,
    "dynamic_update_slice": _updated,
    "copy": _same,
    "copy_p": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "convert_element_type": _mapped,
    "neg": _mapped,
    "mul": _scaled,
    "div": _scaled,
    "select_n": _selected,
    "scatter-add": _scatter,
    add_rows_p.name: _added,
    "pad": _padded,
    "reduce_sum": _joined,
    "psum_invariant": _summed_over_devices,
}
ZEROS_ONLY = frozenset({"pvary", "dynamic_update_slice"})  # where operand 0 has to be nothing but zeros
ALL_ROWS = all_rows_p.name


# ---- Terms.


def _each(terms: Sequence[Term], function: Callable[[Any], Any]) -> list[Term]:
    return [
        dataclasses.replace(term, values=function(term.values)) if isinstance(term, Rows) else function(term)
        for term in terms
    ]


def _terms_of_sum(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    a, b = (terms(x) for x in eqn.invars)
    return [*a, *(_each(b, jnp.negative) if eqn.primitive.name == "sub" else b)]


def _terms_of_map(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    if eqn.primitive.name == "convert_element_type":
        return _each(terms(eqn.invars[0]), lambda x: x.astype(eqn.params["new_dtype"]))
    return _each(terms(eqn.invars[0]), jnp.negative)


def _terms_of_scaled(eqn: JaxprEqn, read: Any, terms: Any, summed: int) -> list[Term]:
    factor = read(eqn.invars[1 - summed])

    def scaled(term: Term) -> Term:
        by = _at_rows(factor, eqn, term) if isinstance(term, Rows) else factor
        values = term.values if isinstance(term, Rows) else term
        values = values / by if eqn.primitive.name == "div" else values * by
        return dataclasses.replace(term, values=values) if isinstance(term, Rows) else values

    return [scaled(term) for term in terms(eqn.invars[summed])]


def _at_rows(array: Any, eqn: JaxprEqn, rows: Rows) -> Any:
    """Read an array, or a number, where rows are; one where an id has none."""
    if jnp.ndim(array) == 0:
        return array
    array = jnp.broadcast_to(array, eqn.outvars[0].aval.shape)

    def of_lane(array: Array, ids: Array) -> Array:
        return array.at[ids].get(mode="fill", fill_value=1, wrap_negative_indices=False)

    for _ in range(array.ndim - 1 - (rows.values.ndim - rows.ids.ndim)):
        of_lane = jax.vmap(of_lane)
    return of_lane(array, rows.ids)


def _terms_of_selected(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    which, found = read(eqn.invars[0]), []
    for case, operand in enumerate(eqn.invars[1:]):
        for term in terms(operand):
            if not isinstance(term, Rows):
                found.append(jnp.where(which.astype(jnp.int32) == case, term, jnp.zeros((), term.dtype)))
                continue
            here = _at_rows(which.astype(jnp.int32), eqn, term) == case
            found.append(dataclasses.replace(term, values=jnp.where(here, term.values, jnp.zeros_like(term.values))))
    return found


def _terms_of_scatter(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    operand, indices, updates = eqn.invars
    rows, dim = operand.aval.shape[0], operand.aval.shape[1:]
    ids = _ids.narrow(read(indices)[..., 0], rows, jnp)
    if eqn.params["mode"] == GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, rows - 1)
    window = eqn.params["dimension_numbers"].update_window_dims
    values = read(updates)
    values = jnp.moveaxis(values, window, range(values.ndim - len(dim), values.ndim))
    return [*terms(operand), Rows(ids, values)]


def _terms_of_padded(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    values = read(eqn.invars[0])
    index = _ids.index_dtype(eqn.outvars[0].aval.shape[0])
    return [Rows(eqn.params["padding_config"][0][0] + jnp.arange(values.shape[0], dtype=index), values)]


def _terms_of_updated(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    _, update, start, *_ = eqn.invars
    values, total = read(update), eqn.outvars[0].aval.shape[0]
    first = _ids.narrow(jnp.asarray(read(start)), total, jnp)
    first = jnp.clip(first, 0, total - values.shape[0])  # as it is where the slice would reach beyond the end
    return [Rows(first + jnp.arange(values.shape[0], dtype=first.dtype), values)]


def _terms_of_joined(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    axes = tuple(eqn.params["axes"])

    def joined(term: Term) -> Term:
        if not isinstance(term, Rows):
            return term.sum(axes)
        lanes = eqn.invars[0].aval.ndim - 1 - (term.values.ndim - term.ids.ndim)
        last = range(lanes - len(axes), lanes)
        ids, values = (jnp.moveaxis(x, axes, last) for x in (term.ids, term.values))
        return dataclasses.replace(term, ids=ids, values=values)

    return [joined(term) for term in terms(eqn.invars[0])]


def _terms_of_devices(eqn: JaxprEqn, read: Any, terms: Any) -> list[Term]:
    # Each device keeps its own rows.
    axes = frozenset(eqn.params["axes"])
    return [
        dataclasses.replace(term, axes=term.axes | axes)
        if isinstance(term, Rows)
        else eqn.primitive.bind(term, **eqn.params)[0]
        for term in terms(eqn.invars[0])
    ]


_TERMS: dict[str, Callable[..., list[Term]]] = {
    "add_any": _terms_of_sum,
    "add": _terms_of_sum,
    "sub": _terms_of_sum,
    "broadcast_in_dim": lambda eqn, read, terms: [],
    "pvary": lambda eqn, read, terms: [],
    "dynamic_update_slice": _terms_of_updated,
    **dict.fromkeys(("copy", "copy_p", "reshard", "sharding_constraint"), lambda eqn, read, terms: terms(eqn.invars[0])),
    "convert_element_type": _terms_of_map,
    "neg": _terms_of_map,
    "select_n": _terms_of_selected,
    "scatter-add": _terms_of_scatter,
    add_rows_p.name: lambda eqn, read, terms: [Rows(read(eqn.invars[1]), read(eqn.invars[0]))],
    "pad": _terms_of_padded,
    "reduce_sum": _terms_of_joined,
    "psum_invariant": _terms_of_devices,
}
