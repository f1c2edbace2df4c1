"""Run equations that hold programs (calls, scan, cond, shard_map) so that some outputs come out as rows.

An example: a scan of 10 steps, whose body adds 4 rows to a carry in each step. It runs without the carry. The rows come
out stacked, `(10, 4)` ids and `(10, 4, dim)` values, and are the terms of the sum that was carried:

    scan(body, zeros)    ->    terms of zeros, Rows(stacked ids, stacked values)

An equation runs once, for its outputs as arrays and as rows together. The function that runs it is kept as long as JAX
keeps the equation's program, so that eager calls do not compile again.
"""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PyTree

from ..._base.dtypes import index_dtype
from .equations import CALLS, NO_AXES, ScanSizes, before_sum, inner, programs_of, without_constants
from .form import AllKnown
from .forms import Memo
from .rows import Rows, Term, replicated

Evaluate = Callable[..., tuple[list[PyTree], list[list[Term]]]]
Results = tuple[list[PyTree], list[list[Term]]]


def run_equation(
    evaluate: Evaluate,
    eqn: JaxprEqn,
    known: AllKnown,
    arrays: tuple[int, ...],
    terms: tuple[int, ...],
    given: Sequence[PyTree],
    taken: Mapping[int, Sequence[Term]],
) -> Results:
    """Run an equation that holds programs.

    Args:
      evaluate: `program.evaluate`, with `known` bound.
      eqn: The equation.
      known: What is known of its operands, if it is a call.
      arrays: The outputs that are wanted as arrays.
      terms: The outputs that are wanted as terms.
      given: The operands; None for one that is not needed as an array.
      taken: The operands that are needed as terms.

    Returns:
      The arrays, and the terms.
    """
    programs = programs_of(eqn)
    held = _Held.of(eqn)
    runners = _RUNNERS.setdefault(programs[0], {})
    key = held, known, arrays, terms
    if key not in runners:
        run = functools.partial(RUNNERS[eqn.primitive.name], evaluate, held, arrays, terms)
        run = functools.wraps(_named(held))(run)
        runners[key] = jax.jit(run, inline=eqn.params.get("inline", True))
    return runners[key]([inner(program)[1] for program in programs], given, taken)


# The key is the first of an equation's programs. The functions hold programs weakly, too, so none is kept alive.
_RUNNERS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


class _Held(NamedTuple):
    """An equation that holds its programs by weak references."""

    primitive: Primitive
    programs: tuple[weakref.ref[Any], ...]
    rest: tuple[tuple[str, Any], ...]  # its other parameters
    types: tuple[PyTree, ...]  # of its outputs
    sizes: ScanSizes | None

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "_Held":
        rest = tuple(sorted((name, x) for name, x in eqn.params.items() if name not in _PROGRAMS))
        types = tuple(v.aval for v in eqn.outvars)
        sizes = ScanSizes.of(eqn) if eqn.primitive.name == "scan" else None
        return cls(eqn.primitive, tuple(map(weakref.ref, programs_of(eqn))), rest, types, sizes)

    @property
    def params(self) -> dict[str, PyTree]:
        """The equation's parameters, for `programs_of`."""
        programs = tuple(program() for program in self.programs)
        name = "branches" if self.primitive.name == "cond" else "jaxpr"
        return dict(self.rest) | {name: programs if name == "branches" else programs[0]}

    @property
    def jaxprs(self) -> list[Jaxpr]:
        """The equation's programs, without their constants."""
        return [inner(program)[0] for program in programs_of(self)]


_PROGRAMS = frozenset({"jaxpr", "call_jaxpr", "branches"})


def _named(held: _Held) -> Callable[..., PyTree]:
    """A function with the equation's name, by which profiles show it."""

    def function() -> None:
        pass

    function.__name__ = str(dict(held.rest).get("name", held.primitive.name))
    return function


# ---- One function for each kind of equation. `consts` are the constants of its programs.


def _run_call(
    evaluate: Evaluate, held: _Held, arrays: PyTree, terms: PyTree, consts: Any, given: PyTree, taken: PyTree
) -> Results:
    params = held.params
    args = _constrained(params.get("in_shardings"), range(len(given)), given)
    values, found = evaluate(held.jaxprs[0], consts[0], args, taken, arrays, terms)
    return _constrained(params.get("out_shardings"), arrays, values), found


def _constrained(shardings: Any, places: Sequence[int], values: Sequence[PyTree]) -> list[PyTree]:
    if shardings is None:
        return list(values)
    return [
        lax.with_sharding_constraint(x, shardings[k]) if x is not None and isinstance(shardings[k], Sharding) else x
        for k, x in zip(places, values, strict=True)
    ]


def _run_remat(
    evaluate: Evaluate, held: _Held, arrays: PyTree, terms: PyTree, consts: Any, given: PyTree, taken: PyTree
) -> Results:
    flat, structure = jax.tree.flatten((consts, given, taken))
    found: list[PyTree] = []

    def run(*flat: Any) -> PyTree:
        (own,), given, taken = structure.unflatten(flat)
        leaves, of_results = jax.tree.flatten(evaluate(held.jaxprs[0], own, given, taken, arrays, terms))
        found.append(of_results)
        return leaves

    closed = jax.make_jaxpr(run)(*flat)
    # JAX's primitive is bound directly: this is already a backward pass, and `jax.checkpoint` has no option to keep XLA
    # from sharing its results with the forward pass.
    made, more = without_constants(closed)
    params: dict[str, PyTree] = {**held.params, "jaxpr": made}
    if isinstance(params.get("prevent_cse"), tuple):  # one for each input, but the inputs changed
        params["prevent_cse"] = any(params["prevent_cse"])
    return found[0].unflatten(held.primitive.bind(*more, *flat, **params))


def _run_scan(
    evaluate: Evaluate, held: _Held, arrays: PyTree, terms: PyTree, consts: Any, given: PyTree, taken: PyTree
) -> Results:
    params, sizes, jaxpr = held.params, held.sizes, held.jaxprs[0]
    assert sizes is not None
    kept = tuple(j for j in range(len(jaxpr.outvars)) if j in arrays or j not in terms)
    carried = [j for j in kept if j < sizes.carry]

    def body(carry: Sequence[PyTree], of_step: Sequence[PyTree]) -> PyTree:
        values = dict(zip(carried, carry, strict=True))
        full = [values.get(j) for j in range(sizes.carry)]
        none = {sizes.consts + j: () for j in terms}
        out, found = evaluate(jaxpr, consts[0], [*given[: sizes.consts], *full, *of_step], none, kept, terms)
        return out[: len(carried)], (out[len(carried) :], found)

    start = [given[sizes.consts + j] for j in carried]
    of_steps = given[sizes.consts + sizes.carry :]
    options = {name: params[name] for name in ("reverse", "unroll", "_split_transpose") if name in params}
    last, (stacked, found) = lax.scan(body, start, of_steps, length=params["length"], **options)
    values = dict(zip(kept, [*last, *stacked], strict=True))
    found = [
        [*taken[sizes.consts + j], *(_steps_after_lanes(x, held.types[j]) for x in rows)]
        for j, rows in zip(terms, found, strict=True)
    ]
    return [values[j] for j in arrays], found


def _steps_after_lanes(rows: Rows, type_: Any) -> Rows:
    lanes = type_.ndim - 1 - rows.dim
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, lanes), rows)


def _run_cond(
    evaluate: Evaluate, held: _Held, arrays: PyTree, terms: PyTree, consts: Any, given: PyTree, taken: PyTree
) -> Results:
    index, *operands = given
    memo = Memo()
    forms = [[memo.forms(jaxpr).form(jaxpr.outvars[j]) for jaxpr in held.jaxprs] for j in terms]
    lengths = [max(form.ids for form in of_output) for of_output in forms]
    axes = [frozenset().union(*(axes for form in of_output for axes in form.axes)) for of_output in forms]

    def branch(k: int, *operands: Any) -> PyTree:
        # Terms of operands are added after the cond: they are the same in all branches.
        none = {operand - 1: () for operand in taken}
        values, found = evaluate(held.jaxprs[k], consts[k], operands, none, arrays, terms)
        filled = [_filled(x, n, held.types[j], a) for x, n, j, a in zip(found, lengths, terms, axes, strict=True)]
        return values, filled

    branches = [functools.partial(branch, k) for k in range(len(held.programs))]
    values, found = lax.switch(index.astype(jnp.int32), branches, *operands)
    passed = [[place + 1 for place in of_output[0].inputs] for of_output in forms]
    return values, [[x for k in some for x in taken[k]] + [rows] for some, rows in zip(passed, found, strict=True)]


def _filled(terms: Sequence[PyTree], length: int, type_: Any, axes: frozenset[str]) -> Rows:
    """Concatenate rows, and pad them to `length` with the sentinel."""
    rows, dim = type_.shape[0], type_.shape[1:]
    joined = _joined(terms, type_, axes)
    missing = length - joined.ids.size
    ids = jnp.concatenate([joined.ids, jnp.full(missing, rows, joined.ids.dtype)])
    values = jnp.concatenate([joined.values, jnp.zeros((missing, *dim), type_.dtype)])
    varying = type_.manual_axis_type.varying | axes
    return Rows(_varying(ids, varying), _varying(values, varying), axes)


def _joined(terms: Sequence[Any], type_: Any, axes: frozenset[str]) -> Rows:
    terms = [replicated(x) for x in terms]
    index, dim = index_dtype(type_.shape[0]), type_.shape[1:]
    ids = [jnp.zeros(0, index), *(jnp.ravel(x.ids).astype(index) for x in terms)]
    values = [jnp.zeros((0, *dim), type_.dtype), *(jnp.reshape(x.values, (x.ids.size, *dim)) for x in terms)]
    return Rows(jnp.concatenate(ids), jnp.concatenate(values), axes)


def _varying(x: Any, axes: frozenset[str]) -> PyTree:
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def _run_shards(
    evaluate: Evaluate, held: _Held, arrays: PyTree, terms: PyTree, consts: Any, given: PyTree, taken: PyTree
) -> Results:
    params, whole = held.params, held.jaxprs[0]
    ends = [before_sum(held, j) for j in terms]
    jaxpr = whole.replace(outvars=[*whole.outvars, *(v for v, _ in ends)])
    memo = Memo()
    kinds = [sorted(memo.forms(jaxpr).form(v).axes, key=sorted) for v, _ in ends]

    def of_device(consts: Any, *args: PyTree) -> PyTree:
        first = len(whole.outvars)
        values, found = evaluate(jaxpr, consts, args, {}, arrays, tuple(range(first, first + len(terms))), memo)
        # Concatenate rows that are to be summed over the same devices.
        parted = [
            [_joined([x for x in rows if x.axes == axes], held.types[j], NO_AXES) for axes in of_output]
            for rows, j, of_output in zip(found, terms, kinds, strict=True)
        ]
        return values, parted

    of_rows = [
        [PartitionSpec(tuple(sorted(axes | last)) or None) for axes in of_output]
        for of_output, (_, last) in zip(kinds, ends, strict=True)
    ]
    out_specs = [params["out_specs"][j] for j in arrays], of_rows
    names = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    mapped = jax.shard_map(
        of_device,
        mesh=params["mesh"],
        in_specs=(PartitionSpec(), *params["in_specs"]),
        out_specs=out_specs,
        check_vma=params["check_vma"],
        axis_names=set(names),
    )
    return mapped(consts[0], *given)


RUNNERS: dict[str, Callable[..., Results]] = {
    **dict.fromkeys(CALLS, _run_call),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _run_remat),
    "scan": _run_scan,
    "cond": _run_cond,
    "shard_map": _run_shards,
}
