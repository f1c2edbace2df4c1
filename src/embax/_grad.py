"""value_and_grad: the gradient of a loss in which the tables' are held as the rows that were read."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

from . import _check, _tape
from ._rows import RowGrad, is_trained, no_rows, row_grad, trained_ids
from ._table import Table, with_weight

OnDense = Literal["error", "warn", "allow"]


class DenseGradientWarning(UserWarning):
    """A table gets a dense gradient, since its weight is used otherwise than by lookups that can be followed."""


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    on_dense: OnDense = "warn",
) -> Callable[..., Any]:
    """Differentiate a function; the gradient of a table holds the rows that were read and no others.

    As `jax.value_and_grad`, but that each Table in the arguments gets a RowGrad, in which an id occurs as often as it
    was looked up. Time and memory follow the number of ids, not of rows. A table that is frozen, of integers or not
    read gets a RowGrad of length 0.

    That needs `embax.lookup` to be called where `fun` itself runs. Of a table whose weight is used in any other way, the
    gradient is dense and comes as a Table with the gradient for its weight: where the loss computes with the weight (a
    cast, a slice, a sum over it), or looks up inside of `jit`, `scan`, `while_loop`, `cond`, `vmap`, `checkpoint` or
    another derivative. It is the whole gradient, lookups included, and a warning says what to move: the
    lookup out of the inner transformation, `jit` around the outermost function.

    `fun` is traced twice before it is differentiated, so that it has to be as pure as under `jax.jit`, and its control
    flow cannot depend on values that are computed from the arguments.

    Args:
      fun: A function of pytrees, Tables among them, that returns a scalar, or `(scalar, aux)` with `has_aux`.
      argnums: The argument or arguments to differentiate for.
      has_aux: Whether `fun` returns a pair, of which the second is passed on.
      holomorphic: As in `jax.value_and_grad`.
      allow_int: As in `jax.value_and_grad`.
      on_dense: What a dense gradient of a table is: an `"error"`, worth a `"warn"`, or no surprise, `"allow"`.

    Returns:
      A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)` with `has_aux`.

    Raises:
      TypeError: As `jax.value_and_grad` does, when called.
      ValueError: As `jax.value_and_grad` does, when called; with `on_dense="error"` also where a gradient would be
        dense.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> params = {"table": embax.Table.create(jax.random.key(0), rows=1_000, dim=4), "scale": jnp.ones(4)}
      >>> def loss(params, ids):
      ...     return (embax.lookup(params["table"], ids) * params["scale"]).sum()
      >>> value, gradient = embax.value_and_grad(loss)(params, [3, 5, 3])
      >>> gradient["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> gradient["scale"].shape
      (4,)
    """
    on_dense = _check.choice("embax.value_and_grad(on_dense=...)", on_dense, OnDense)
    plain = jax.value_and_grad(fun, argnums, has_aux, holomorphic, allow_int)

    @functools.wraps(fun)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        if not all(-len(args) <= number < len(args) for number in numbers):
            return plain(*args, **kwargs)  # which says what is wrong
        nodes, structure = jax.tree.flatten_with_path(
            [args[number] for number in numbers], is_leaf=lambda node: isinstance(node, Table)
        )
        leaves = [leaf for _, leaf in nodes]
        trained = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Table) and is_trained(leaf)]

        def run(leaves: Sequence[Any]) -> Any:
            full = list(args)
            for number, value in zip(numbers, structure.unflatten(leaves), strict=True):
                full[number] = value
            return fun(*full, **kwargs)

        lookups, dense = _find_lookups(run, leaves, trained)
        for i, reason in dense.items():
            path = nodes[i][0]
            name = f"argument {numbers[path[0].idx]}{jax.tree_util.keystr(path[1:])}"
            report_dense(on_dense, name, leaves[i], reason)
        sparse = [i for i in trained if i not in dense]
        lookups = [x._replace(table=sparse.index(trained[x.table])) for x in lookups if trained[x.table] in sparse]
        options = {"holomorphic": holomorphic, "allow_int": allow_int}
        out, gradients = _differentiate(run, leaves, sparse, lookups, has_aux, options)
        gradient = structure.unflatten(gradients)
        return out, gradient[0] if isinstance(argnums, int) else tuple(gradient)

    return value_and_gradient


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    on_dense: OnDense = "warn",
) -> Callable[..., Any]:
    """Differentiate a function, as `embax.value_and_grad` does, and return the gradient only.

    Args:
      fun: As in `embax.value_and_grad`.
      argnums: As there.
      has_aux: As there.
      holomorphic: As there.
      allow_int: As there.
      on_dense: As there.

    Returns:
      A function that returns the gradient, or `(gradient, aux)` with `has_aux`.

    Raises:
      TypeError: As there.
      ValueError: As there.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.ones((1_000, 4)))
      >>> embax.grad(lambda table: embax.lookup(table, [3, 5]).sum())(table)
      RowGrad(2 ids of 1000 rows, float32[2,4])
    """
    both = value_and_grad(fun, argnums, has_aux, holomorphic, allow_int, on_dense=on_dense)

    @functools.wraps(fun)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        out, gradient = both(*args, **kwargs)
        return (gradient, out[1]) if has_aux else gradient

    return gradient


def report_dense(on_dense: OnDense, name: str, table: Table, reason: str) -> None:
    """Say that the gradient of a table is dense, as `on_dense` asks.

    Args:
      on_dense: As in `value_and_grad`.
      name: The table's name.
      table: The table.
      reason: A primitive that uses the weight, or an empty string for a lookup in an inner transformation.

    Raises:
      ValueError: If it is `"error"`.
    """
    if on_dense == "allow":
        return
    if not reason or reason in _TRANSFORMATIONS:
        inside = f"of `{reason}`" if reason else "an inner transformation"
        why = f"inside {inside}, where its lookups cannot be followed. Look up outside and pass the rows in"
    else:
        why = f"by `{reason}`, which is no lookup. Compute with rows that embax.lookup reads"
    message = (
        f"`embax.value_and_grad`: the gradient of {name}, {table!r}, is dense, {table.rows} rows, since the loss uses "
        f"its weight {why}, or expect it with on_dense='allow'."
    )
    if on_dense == "error":
        raise ValueError(message)
    warnings.warn(message, DenseGradientWarning, stacklevel=3)


# Primitives that hold a function of their own; the jaxpr of an inner derivative is part of the loss's.
_TRANSFORMATIONS = frozenset(
    "jit pjit scan while cond checkpoint remat remat2 custom_jvp_call custom_vjp_call shard_map pmap".split()
)


def _find_lookups(
    run: Callable[[Sequence[Any]], Any], leaves: Sequence[Any], trained: Sequence[int]
) -> tuple[list[_tape.Lookup], dict[int, str]]:
    """Run a loss on stand-ins for the weights of its trained tables.

    Returns:
      Its lookups; and the leaves that are tables whose weight it uses otherwise, with a reason for `report_dense`.
    """
    weights = [leaves[i].weight for i in trained]
    tapes: list[_tape.Tape] = []

    def on_tape(stand_ins: Sequence[Any]) -> None:
        with _tape.recording(_tape.Tape(stand_ins, weights)) as tape:
            run(_with_weights(leaves, trained, stand_ins))
        tapes.append(tape)

    jaxpr = jax.make_jaxpr(on_tape)(weights).jaxpr
    used = _tape.other_uses(jaxpr, jaxpr.invars)
    reasons = {trained[k]: "" if k in tapes[0].hidden else name for k, name in used.items()}
    return tapes[0].lookups, reasons


def _differentiate(
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    sparse: Sequence[int],
    lookups: Sequence[_tape.Lookup],
    has_aux: bool,
    options: dict[str, bool],
) -> tuple[Any, list[Any]]:
    """Differentiate a loss for a tap on each of its lookups, and for its other leaves.

    The second run of the loss gives a jaxpr, and it is that jaxpr which is differentiated. So a stand-in of which it
    makes no use cannot have had a part in the loss.

    Returns:
      What the loss returns, and the gradients.
    """
    weights = [leaves[i].weight for i in sparse]
    constant = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Table) and not is_trained(leaf)]
    others = [None if i in (*sparse, *constant) else leaf for i, leaf in enumerate(leaves)]
    taps = [jnp.zeros(lookup.shape, lookup.dtype) for lookup in lookups]
    outputs: list[Any] = []

    def with_taps(others: Sequence[Any], taps: Sequence[Array], stand_ins: Sequence[Any]) -> Any:
        filled = [leaf if other is None else other for leaf, other in zip(leaves, others, strict=True)]
        with _tape.recording(_tape.Tape(stand_ins, weights, taps)) as tape:
            out = run(_with_weights(filled, sparse, stand_ins))
        if len(tape.lookups) != len(lookups):
            raise _impure(f"{len(tape.lookups)} lookups in the second run and {len(lookups)} in the first")
        # Only arrays can leave a jaxpr. An auxiliary output may be anything.
        parts, structure = jax.tree.flatten(out)
        arrays = [_is_array(part) for part in parts]
        outputs.append((structure, arrays, [None if is_array else part for part, is_array in zip(parts, arrays)]))
        return [part for part, is_array in zip(parts, arrays) if is_array], [lookup.ids for lookup in tape.lookups]

    traced = jax.make_jaxpr(with_taps)(others, taps, weights)
    stand_ins = traced.jaxpr.invars[len(traced.jaxpr.invars) - len(weights) :]
    if _tape.other_uses(traced.jaxpr, stand_ins):
        raise _impure("another use of a table's weight in the second run")
    structure, arrays, parts = outputs[0]
    evaluate = jaxpr_as_fun(traced)

    def loss(others: Sequence[Any], taps: Sequence[Array]) -> Any:
        values = iter(evaluate(*jax.tree.leaves((others, taps, weights))))
        out = structure.unflatten([next(values) if is_array else part for part, is_array in zip(parts, arrays)])
        ids = list(values)
        if not has_aux:
            return out, (out, ids)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                "`embax.value_and_grad(has_aux=True)` must be of a function that returns a pair, a scalar and anything "
                f"else, got {type(out).__name__}. Return both, or leave has_aux out."
            )
        return out[0], (out, ids)

    (_, (out, ids)), (gradients, cotangents) = jax.value_and_grad(loss, (0, 1), has_aux=True, **options)(others, taps)
    ids = [_after(out[0] if has_aux else out, x) for x in ids]
    for i in constant:
        gradients[i] = _none_read(leaves[i])
    for k, i in enumerate(sparse):
        of_table = [n for n, lookup in enumerate(lookups) if lookup.table == k]
        gradients[i] = _gathered(leaves[i], [ids[n] for n in of_table], [cotangents[n] for n in of_table])
    return out, gradients


def _with_weights(leaves: Sequence[Any], tables: Sequence[int], weights: Sequence[Any]) -> list[Any]:
    replaced = list(leaves)
    for i, weight in zip(tables, weights, strict=True):
        replaced[i] = with_weight(leaves[i], weight)
    return replaced


def _none_read(table: Table) -> Any:
    if table.weight is None:  # as Equinox leaves out what is not differentiated
        return table
    return no_rows(table.rows, table.dim, table.dtype if jnp.issubdtype(table.dtype, jnp.inexact) else jnp.float32)


def _gathered(table: Table, ids: Sequence[Array], cotangents: Sequence[Array]) -> RowGrad:
    """Put the gradients of a table's lookups together."""
    if not ids:
        return _none_read(table)
    flat_ids = jnp.concatenate([jnp.ravel(x) for x in ids])
    values = jnp.concatenate([jnp.reshape(x, (-1, *table.dim)) for x in cotangents])
    return row_grad(trained_ids(table, flat_ids), values, table.rows)


def _after(value: Array, ids: Array) -> Array:
    """Make ids depend on the loss, so that the rows are read before a donated table is written in their place.

    Where the gradient of the rows does not depend on them, as in a sum, XLA would be free to write first, and copy the
    table to be able to. (It drops an optimization_barrier before it decides.) No number has 64 bits set of 32, but XLA
    does not reason about that.
    """
    bits = jax.lax.bitcast_convert_type(jnp.real(value).astype(jnp.float32), jnp.int32)
    return ids + jax.lax.shift_right_logical(jax.lax.population_count(bits), jnp.int32(6)).astype(ids.dtype)


def _is_array(part: Any) -> bool:
    return isinstance(part, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _impure(seen: str) -> RuntimeError:
    return RuntimeError(
        "`embax.value_and_grad(fun=...)` must be of a function that does the same each time it is traced, got "
        f"{seen}. Make it depend on nothing but its arguments."
    )
