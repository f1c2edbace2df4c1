"""Terms: compute the rows and arrays that a variable is a sum of, without computing the sum.

A term is an array of all rows, or `Rows`. The example of `linear`, with the ids `[1, 3]` and the values `[u, v]`:

    terms of a: Rows([1, 3], [u, v])
    terms of b: Rows([1, 3], [u / 2, v / 2])
    terms of c: c
    terms of d: Rows([1, 3], [u / 2, v / 2]), c
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, PyTree

from ..._base.axes import explicit_sharding, is_explicit
from ..._base.by_bag import ByBag
from ..._core.read_bags import add_bags_p
from ..._core.read_rows import add_rows_p
from .equations import shape_of
from .opening import Opening
from .parts import PARTS
from .rows import Read, Rows, Term, Terms


def terms_of(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    """Compute the terms of an output.

    Args:
      eqn: The equation.
      j: The number of the output.
      opening: How the output is a sum, from `linear.opening_of`.
      read: Returns the value of a variable.
      terms: Returns the terms of a variable.

    Returns:
      The terms.
    """
    if eqn.primitive.name in PARTS:
        return PARTS[eqn.primitive.name].terms(eqn, j, opening, read, terms)
    if eqn.primitive.name in ("mul", "div"):
        return _terms_of_scaled(eqn, read, terms, *opening.terms)
    return _TERMS[eqn.primitive.name](eqn, read, terms)


def _each(terms: Sequence[Term], function: Callable[[Any], Any]) -> list[Term]:
    return [term.mapped(function) if isinstance(term, Rows) else function(term) for term in terms]


def _terms_of_sum(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    a, b = (terms(x) for x in eqn.invars)
    return [*a, *(_each(b, jnp.negative) if eqn.primitive.name == "sub" else b)]


def _terms_of_map(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    if eqn.primitive.name == "convert_element_type":
        return _each(terms(eqn.invars[0]), lambda x: x.astype(eqn.params["new_dtype"]))
    return _each(terms(eqn.invars[0]), jnp.negative)


def _terms_of_scaled(eqn: JaxprEqn, read: Read, terms: Terms, summed: int) -> list[Term]:
    factor = read(eqn.invars[1 - summed])
    apply = operator.truediv if eqn.primitive.name == "div" else operator.mul

    def scaled(term: Term) -> Term:
        if not isinstance(term, Rows):
            return apply(term, factor)
        if jnp.ndim(factor) == 0:
            return term.mapped(lambda values: apply(values, factor))
        return term.with_values(apply(term.values, _at_rows(factor, eqn, term)))

    return [scaled(term) for term in terms(eqn.invars[summed])]


def _at_rows(array: Any, eqn: JaxprEqn, rows: Rows) -> PyTree:
    """Read an array at the ids of rows; 1 where an id has no row. A scalar is returned unchanged."""
    if jnp.ndim(array) == 0:
        return array
    array = jnp.broadcast_to(array, shape_of(eqn.outvars[0]))

    def of_lane(array: Array, ids: Array) -> Array:
        # On explicit axes, sharded as the ids, with whole rows.
        sharding = explicit_sharding(ids, array.ndim - 1)
        return array.at[ids].get(mode="fill", fill_value=1, wrap_negative_indices=False, out_sharding=sharding)

    for _ in range(array.ndim - 1 - rows.dim):
        of_lane = jax.vmap(of_lane)
    return of_lane(array, rows.ids)


def _terms_of_selected(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    which, found = read(eqn.invars[0]), []
    for case, operand in enumerate(eqn.invars[1:]):
        for term in terms(operand):
            if not isinstance(term, Rows):
                found.append(jnp.where(which.astype(jnp.int32) == case, term, jnp.zeros((), term.dtype)))
                continue
            here = _at_rows(which.astype(jnp.int32), eqn, term) == case
            found.append(term.with_values(jnp.where(here, term.values, jnp.zeros_like(term.values))))
    return found


def _terms_of_repeated(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    if isinstance(eqn.invars[0], Literal):
        return []
    added = tuple(range(len(shape_of(eqn.outvars[0])) - len(shape_of(eqn.invars[0]))))
    return [
        Rows(jnp.expand_dims(term.ids, added), jnp.expand_dims(term.values, added), term.axes)
        if isinstance(term, Rows)
        else jnp.expand_dims(term, added)
        for term in terms(eqn.invars[0])
    ]


def _terms_of_joined(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    axes = tuple(eqn.params["axes"])

    def joined(term: Term) -> Term:
        if not isinstance(term, Rows):
            return term.sum(axes)
        lanes = len(shape_of(eqn.invars[0])) - 1 - term.dim
        last = range(lanes - len(axes), lanes)
        ids, values = (jnp.moveaxis(x, axes, last) for x in (term.ids, term.values))
        return Rows(ids, values, term.axes)

    return [joined(term) for term in terms(eqn.invars[0])]


def _terms_of_devices(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    # Each device keeps its own rows; the sum is left to the caller, by `axes`.
    axes = frozenset(eqn.params["axes"])
    return [
        dataclasses.replace(term, axes=term.axes | axes)
        if isinstance(term, Rows)
        else eqn.primitive.bind(term, **eqn.params)[0]
        for term in terms(eqn.invars[0])
    ]


def _terms_of_operand(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    return terms(eqn.invars[0])


def _terms_of_resharded(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    """Reshard arrays as JAX does; rows are replicated if they leave or enter a mesh with explicit axes."""
    output: Any = eqn.outvars[0].aval
    whole = output.sharding

    def resharded(x: Any, sharding: NamedSharding) -> Any:
        return x if jax.typeof(x).sharding == sharding else reshard(x, sharding)

    def on_mesh(x: Any) -> Any:
        return x if is_explicit(jax.typeof(x).sharding.mesh) == is_explicit(whole.mesh) else reshard(x, everywhere)

    everywhere = NamedSharding(whole.mesh, PartitionSpec())
    return [
        Rows(on_mesh(x.ids), on_mesh(x.values), x.axes) if isinstance(x, Rows) else resharded(x, whole)
        for x in terms(eqn.invars[0])
    ]


def _terms_of_rows(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    values, ids = map(read, eqn.invars)
    return [Rows(ids, values, from_end=eqn.params["spec"].from_end)]


def _terms_of_bags(eqn: JaxprEqn, read: Read, terms: Terms) -> list[Term]:
    values, ids, *others = map(read, eqn.invars)
    spec = eqn.params["spec"]
    bag_of, factors = spec.apart(others)
    held = ByBag(values, bag_of, factors, spec.of_rows.weight.shape[0])
    return [Rows(ids, held, from_end=spec.of_rows.from_end)]


_TERMS: dict[str, Callable[..., list[Term]]] = {
    "add_any": _terms_of_sum,
    "add": _terms_of_sum,
    "sub": _terms_of_sum,
    "broadcast_in_dim": _terms_of_repeated,
    **dict.fromkeys(("pvary", "squeeze", "transpose"), lambda eqn, read, terms: []),
    **dict.fromkeys(("copy", "copy_p", "sharding_constraint"), _terms_of_operand),
    "reshard": _terms_of_resharded,
    "convert_element_type": _terms_of_map,
    "neg": _terms_of_map,
    "select_n": _terms_of_selected,
    add_bags_p.name: _terms_of_bags,
    add_rows_p.name: _terms_of_rows,
    "reduce_sum": _terms_of_joined,
    "psum_invariant": _terms_of_devices,
}
