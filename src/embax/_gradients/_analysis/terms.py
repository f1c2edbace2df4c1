"""Terms: the arrays and the rows that a variable of a gradient's program is a sum of, computed without the sum itself.

A term is an array of all rows, or `Rows`. Continuing the example of `_linear`, with the ids `[1, 3]`:

    terms of a: Rows([1, 3], [u, v])
    terms of b: Rows([1, 3], [u / 2, v / 2])
    terms of c: c
    terms of d: Rows([1, 3], [u / 2, v / 2]), c
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal
from jax.lax import GatherScatterMode
from jaxtyping import Array, PyTree

from ..._core import ids as _ids
from ..._core.read_rows import add_rows_p
from .equations import shape_of
from .linear import Opening


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "values"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that are added into zeros; an id outside of the rows stands for none."""

    ids: Any  # (*lanes, *batch)
    values: PyTree  # (*lanes, *batch, *dim)
    axes: frozenset[str] = frozenset()  # axes of a `shard_map` over which devices have rows of their own, to be added


Term = Any  # Rows, or an array of all rows


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


def _each(terms: Sequence[Term], function: Callable[[Any], Any]) -> list[Term]:
    return [
        dataclasses.replace(term, values=function(term.values)) if isinstance(term, Rows) else function(term)
        for term in terms
    ]


def _terms_of_sum(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    a, b = (terms(x) for x in eqn.invars)
    return [*a, *(_each(b, jnp.negative) if eqn.primitive.name == "sub" else b)]


def _terms_of_map(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    if eqn.primitive.name == "convert_element_type":
        return _each(terms(eqn.invars[0]), lambda x: x.astype(eqn.params["new_dtype"]))
    return _each(terms(eqn.invars[0]), jnp.negative)


def _terms_of_scaled(eqn: JaxprEqn, read: Any, terms: PyTree, summed: int) -> list[Term]:
    factor = read(eqn.invars[1 - summed])

    def scaled(term: Term) -> Term:
        by = _at_rows(factor, eqn, term) if isinstance(term, Rows) else factor
        values = term.values if isinstance(term, Rows) else term
        values = values / by if eqn.primitive.name == "div" else values * by
        return dataclasses.replace(term, values=values) if isinstance(term, Rows) else values

    return [scaled(term) for term in terms(eqn.invars[summed])]


def _at_rows(array: Any, eqn: JaxprEqn, rows: Rows) -> PyTree:
    """Read an array, or a number, where rows are; one where an id has none."""
    if jnp.ndim(array) == 0:
        return array
    array = jnp.broadcast_to(array, shape_of(eqn.outvars[0]))

    def of_lane(array: Array, ids: Array) -> Array:
        return array.at[ids].get(mode="fill", fill_value=1, wrap_negative_indices=False)

    for _ in range(array.ndim - 1 - (rows.values.ndim - rows.ids.ndim)):
        of_lane = jax.vmap(of_lane)
    return of_lane(array, rows.ids)


def _terms_of_selected(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    which, found = read(eqn.invars[0]), []
    for case, operand in enumerate(eqn.invars[1:]):
        for term in terms(operand):
            if not isinstance(term, Rows):
                found.append(jnp.where(which.astype(jnp.int32) == case, term, jnp.zeros((), term.dtype)))
                continue
            here = _at_rows(which.astype(jnp.int32), eqn, term) == case
            found.append(dataclasses.replace(term, values=jnp.where(here, term.values, jnp.zeros_like(term.values))))
    return found


def _terms_of_scatter(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    operand, indices, updates = eqn.invars
    numbers, values = eqn.params["dimension_numbers"], read(updates)
    lanes = len(numbers.operand_batching_dims)
    rows, dim = shape_of(operand)[lanes], shape_of(operand)[lanes + 1 :]
    ids = _ids.narrow(read(indices)[..., 0], rows, jnp)
    if eqn.params["mode"] == GatherScatterMode.CLIP:
        ids = jnp.clip(ids, 0, rows - 1)
    window = numbers.update_window_dims
    values = jnp.moveaxis(values, window, range(values.ndim - len(window), values.ndim))
    return [*terms(operand), Rows(ids, jnp.reshape(values, (*ids.shape, *dim)))]


def _terms_of_padded(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    values = read(eqn.invars[0])
    index = _ids.index_dtype(shape_of(eqn.outvars[0])[0])
    return [Rows(eqn.params["padding_config"][0][0] + jnp.arange(values.shape[0], dtype=index), values)]


def _terms_of_updated(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    _, update, start, *_ = eqn.invars
    values, total = read(update), shape_of(eqn.outvars[0])[0]
    first = _ids.narrow(jnp.asarray(read(start)), total, jnp)
    first = jnp.clip(first, 0, total - values.shape[0])  # as it is where the slice would reach beyond the end
    return [Rows(first + jnp.arange(values.shape[0], dtype=first.dtype), values)]


def _terms_of_repeated(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    if isinstance(eqn.invars[0], Literal):
        return []
    added = tuple(range(len(shape_of(eqn.outvars[0])) - len(shape_of(eqn.invars[0]))))
    return [
        Rows(jnp.expand_dims(term.ids, added), jnp.expand_dims(term.values, added), term.axes)
        if isinstance(term, Rows)
        else jnp.expand_dims(term, added)
        for term in terms(eqn.invars[0])
    ]


def _terms_of_joined(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    axes = tuple(eqn.params["axes"])

    def joined(term: Term) -> Term:
        if not isinstance(term, Rows):
            return term.sum(axes)
        lanes = len(shape_of(eqn.invars[0])) - 1 - (term.values.ndim - term.ids.ndim)
        last = range(lanes - len(axes), lanes)
        ids, values = (jnp.moveaxis(x, axes, last) for x in (term.ids, term.values))
        return dataclasses.replace(term, ids=ids, values=values)

    return [joined(term) for term in terms(eqn.invars[0])]


def _terms_of_devices(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    # Each device keeps its own rows.
    axes = frozenset(eqn.params["axes"])
    return [
        dataclasses.replace(term, axes=term.axes | axes)
        if isinstance(term, Rows)
        else eqn.primitive.bind(term, **eqn.params)[0]
        for term in terms(eqn.invars[0])
    ]


def _terms_of_operand(eqn: JaxprEqn, read: Any, terms: PyTree) -> list[Term]:
    return terms(eqn.invars[0])


_TERMS: dict[str, Callable[..., list[Term]]] = {
    "add_any": _terms_of_sum,
    "add": _terms_of_sum,
    "sub": _terms_of_sum,
    "broadcast_in_dim": _terms_of_repeated,
    **dict.fromkeys(("pvary", "reshape", "squeeze", "transpose"), lambda eqn, read, terms: []),
    "dynamic_update_slice": _terms_of_updated,
    **dict.fromkeys(("copy", "copy_p", "reshard", "sharding_constraint"), _terms_of_operand),
    "convert_element_type": _terms_of_map,
    "neg": _terms_of_map,
    "select_n": _terms_of_selected,
    "scatter-add": _terms_of_scatter,
    add_rows_p.name: lambda eqn, read, terms: [Rows(read(eqn.invars[1]), read(eqn.invars[0]))],
    "pad": _terms_of_padded,
    "reduce_sum": _terms_of_joined,
    "psum_invariant": _terms_of_devices,
}
