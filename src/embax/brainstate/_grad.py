"""grad: gradients of brainstate states, in which those of an Embedding's weight are the rows that were read."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import brainstate
import brainunit
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import _check, _tape
from .._differentiate import OnDense, after_loss, check_same_reads, gathered, impure, report_dense, tap_of
from .._apply import apply_updates
from .._table import with_weight
from ._layers import has_unit, table_of

_CALL = "embax.brainstate.grad"


def grad(
    fun: Callable[..., Any] | None = None,
    grad_states: Any = None,
    argnums: int | Sequence[int] | None = None,
    holomorphic: bool = False,
    allow_int: bool = False,
    has_aux: bool | None = None,
    return_value: bool = False,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
    on_dense: OnDense = "warn",
) -> Callable[..., Any]:
    """Differentiate a function of brainstate states; the gradient of an Embedding's weight holds the rows that it read.

    As `brainstate.transform.grad`, but that the weight of an `embax.Embedding` among `grad_states` gets a RowGrad, in
    which an id occurs as often as it was looked up. Time and memory follow the number of ids, not of rows.
    `embax.brainstate.Optimizer` takes it. A weight that is frozen or not read gets a RowGrad of length 0. All other
    states and arguments get the gradient that they have in brainstate, and so do weights of integers and with a unit.

    That needs the layer to be called where `fun` itself runs. A weight that is used in any other way gets its ordinary
    gradient, an array of all rows: where `fun` computes with `weight.value`, or calls the layer inside of `for_loop`,
    `cond`, `vmap`, `jit`, `checkpoint` or another derivative. It is the whole gradient, and a warning says what to
    move: the call out of the inner transformation, `jit` around the outermost function.

    `fun` is traced twice for each call, of which the states see one: what it writes is stored once, and a random key
    moves on once. Put the training step into `embax.brainstate.jit`, and it is traced in its first call only.

    Args:
      fun: A function that returns a scalar, or `(scalar, aux)` with `has_aux`. Left out, the call is a decorator.
      grad_states: The states to differentiate for: one, or a list or dict of them. The gradients come as these do.
      argnums: The argument or arguments to differentiate for, 0 or more. Default: none, or the first one where there
        are no `grad_states`.
      holomorphic: As in `jax.grad`.
      allow_int: As in `jax.grad`.
      has_aux: Whether `fun` returns a pair, of which the second is passed on.
      return_value: Whether to return the value of `fun`, too.
      unit_aware: Whether gradients have units, as in brainstate. A loss that has a unit gives dense gradients then.
      check_states: Whether a state that `fun` does not read is an error.
      debug_nan: As in `brainstate.transform.grad`.
      on_dense: What a dense gradient of a weight is: an `"error"`, worth a `"warn"`, or no surprise, `"allow"`.

    Returns:
      A function of the arguments of `fun` that returns the gradients of the states, or of the arguments, or
      `(of states, of arguments)` where both are asked for; then, in a tuple, the value and the auxiliary data as they
      are asked for.

    Raises:
      RuntimeError: If `fun` does not do the same when it is traced again, when called.
      TypeError: As `brainstate.transform.grad` does.
      ValueError: As `brainstate.transform.grad` does; with `on_dense="error"` also where a gradient would be dense.

    Example:
      >>> import brainstate, embax, jax.numpy as jnp
      >>> embedding = embax.Embedding(1_000, 4)
      >>> scale = brainstate.ParamState(jnp.ones(()))
      >>> def loss(indices):
      ...     return (embedding(indices) * scale.value).sum()
      ...
      >>> states = {"table": embedding.weight, "scale": scale}
      >>> gradients, value = embax.brainstate.grad(loss, states, return_value=True)([3, 5, 3])
      >>> gradients["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> gradients["scale"].shape
      ()
    """
    on_dense = _check.choice("embax.brainstate.grad(on_dense=...)", on_dense, OnDense)
    options: dict[str, Any] = {
        "argnums": argnums,
        "holomorphic": holomorphic,
        "allow_int": allow_int,
        "unit_aware": unit_aware,
        "check_states": check_states,
        "debug_nan": debug_nan,
    }
    asked: dict[str, Any] = {"has_aux": has_aux, "return_value": return_value}
    if fun is None:
        return functools.partial(grad, grad_states=grad_states, on_dense=on_dense, **options, **asked)
    if isinstance(grad_states, dict):  # of a kind of its own, as `states()` gives, which is not a pytree
        grad_states = dict(grad_states)

    def plain() -> Callable[..., Any]:
        # Made anew for each call, since it keeps what it has traced, and the rules of a layer may change.
        return brainstate.transform.grad(fun, grad_states, **options, **asked)

    whole = plain()  # whose checks of the arguments are those of this function
    named, structure = jax.tree.flatten_with_path(grad_states, is_leaf=lambda x: isinstance(x, brainstate.State))
    states = [state for _, state in named]

    @functools.wraps(fun)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        names = {state: f"grad_states{jax.tree_util.keystr(path)}" for path, state in reversed(named)}
        tables = {
            state: table
            for state in names
            if (table := table_of(state)) is not None
            and jnp.issubdtype(table.dtype, jnp.inexact)
            and not has_unit(state)
        }
        if not tables:
            return whole(*args, **kwargs)
        with _explaining_leaks():
            seen = _find_lookups(fun, bool(has_aux), list(tables), args, kwargs)
            for state, reason in seen.uses.items():
                report_dense(_CALL, on_dense, names[state], tables[state], reason)
            if not seen.returns_pair or len(seen.uses) == len(tables):
                return plain()(*args, **kwargs)  # which says what is wrong, if anything is
            sparse = [state for state in tables if state in seen.read and state not in seen.uses]
            headed = [state for state in sparse if state in seen.whole]
            # Those that are not read at all are left to brainstate, which checks that.
            others = [state for state in names if state not in sparse or state in headed]
            lookups = [(state, lookup) for state, lookup in seen.lookups if state in sparse]
            found = _differentiate(fun, bool(has_aux), sparse, headed, others, lookups, options, args, kwargs)
        gradients = dict(zip(others, found.of_others, strict=True))
        for state in tables.keys() - seen.uses.keys():
            parts = [part for (owner, _), part in zip(lookups, found.of_lookups, strict=True) if owner is state]
            rows = gathered(tables[state], [ids for ids, _ in parts], [rows for _, rows in parts])
            if state in headed:
                rows = apply_updates(with_weight(tables[state], gradients[state]), rows).weight
            gradients[state] = rows
        out = structure.unflatten([gradients[state] for state in states])
        out = out if argnums is None else (out, found.of_arguments)
        more = ((found.value,) if return_value else ()) + ((found.aux,) if has_aux else ())
        return (out, *more) if more else out

    return gradient


class _Seen(NamedTuple):
    """What a first run of a function has shown."""

    lookups: list[tuple[brainstate.State, _tape.Lookup]]  # each with its weight, and the type of its ids for these
    read: set[brainstate.State]  # the weights that a layer has read
    whole: set[brainstate.State]  # those of these of which a head has read all rows
    uses: dict[brainstate.State, str]  # the weights that are used otherwise, with a reason for `report_dense`
    returns_pair: bool  # or need not


def _find_lookups(
    fun: Callable[..., Any], has_aux: bool, states: Sequence[brainstate.State], args: Any, kwargs: Any
) -> _Seen:
    """Run a function for its jaxpr, with a tape on which the values that it sees of some states are the stand-ins.

    Every state has its value of before afterwards.
    """
    weights = [state.value for state in states]
    runs: list[_Seen] = []
    hidden: set[int] = set()

    def on_tape(*args: Any, **kwargs: Any) -> list[Any]:
        stand_ins = [state.value for state in states]
        with _tape.recording(_tape.Tape(stand_ins, weights)) as tape:
            out = fun(*args, **kwargs)
        # No tracer may outlive its trace.
        lookups = [(states[x.table], x._replace(ids=jax.typeof(x.ids))) for x in tape.lookups]
        hidden.update(tape.hidden)
        returns_pair = not has_aux or isinstance(out, tuple | list)
        value = out[0] if has_aux and returns_pair else out
        # Then the gradient has a unit, too, which a RowGrad cannot hold.
        uses = dict.fromkeys(states, "unit_aware") if isinstance(value, brainunit.Quantity) else {}
        read, whole = ({states[k] for k in found} for found in (tape.found, tape.read_whole))
        runs.append(_Seen(lookups, read, whole, uses, returns_pair))
        return stand_ins

    jaxpr = brainstate.transform.StatefulFunction(on_tape, name="gradient").get_jaxpr(*args, **kwargs).jaxpr
    uses = {states[k]: "" if k in hidden else name for k, name in _other_uses(jaxpr, 0, len(states)).items()}
    return runs[-1]._replace(uses=runs[-1].uses | uses)


class _Found(NamedTuple):
    """Gradients, and what the function returned."""

    of_others: Sequence[Any]
    of_lookups: list[tuple[Array, Array]]  # ids and the gradient of their rows
    of_arguments: Any
    value: Any
    aux: Any


def _differentiate(
    fun: Callable[..., Any],
    has_aux: bool,
    sparse: Sequence[brainstate.State],
    whole: Sequence[brainstate.State],
    others: Sequence[brainstate.State],
    lookups: Sequence[tuple[brainstate.State, _tape.Lookup]],
    options: dict[str, Any],
    args: Any,
    kwargs: Any,
) -> _Found:
    """Differentiate a function by brainstate, for a tap on each lookup of the sparse states and for the others."""
    weights = [state.value for state in sparse]
    taps = [brainstate.ParamState(tap_of(lookup, state.value)) for state, lookup in lookups]
    if not taps:  # brainstate would take no states to mean the first argument
        taps = [brainstate.ParamState(jnp.zeros((), jnp.complex64 if options["holomorphic"] else jnp.float32))]

    def with_taps(*args: Any, **kwargs: Any) -> Any:
        stand_ins = [state.value for state in sparse]
        of_heads = {sparse.index(state): state.value for state in whole}
        with _tape.recording(_tape.Tape(stand_ins, weights, [tap.value for tap in taps], of_heads)) as tape:
            out = fun(*args, **kwargs)
        check_same_reads(_CALL, tape, [x._replace(table=sparse.index(state)) for state, x in lookups], of_heads.keys())
        value, aux = (out[0], out[1]) if has_aux else (out, None)
        return value, (stand_ins, [lookup.ids for lookup in tape.lookups], aux)

    states: Any = {"others": list(others), "taps": taps}
    by_brainstate: Any = brainstate.transform.grad(with_taps, states, has_aux=True, return_value=True, **options)
    gradients, value, (_, ids, aux) = by_brainstate(*args, **kwargs)
    jaxpr = by_brainstate.stateful_target.get_jaxpr(*args, **kwargs).jaxpr
    # That of a head is a use of the stand-in itself.
    if any(sparse[k] not in whole for k in _other_uses(jaxpr, 1, len(sparse))):
        raise impure(_CALL, "another use of an Embedding's weight in the second run")
    of_states, of_arguments = (gradients, None) if options["argnums"] is None else gradients
    ids = [after_loss(value, x) for x in ids]
    return _Found(of_states["others"], list(zip(ids, of_states["taps"], strict=False)), of_arguments, value, aux)


def _other_uses(jaxpr: Any, start: int, number: int) -> dict[int, str]:
    """As `_tape.other_uses`, of the stand-ins that a function returns as its outputs from `start` on."""
    stand_ins = jaxpr.outvars[start : start + number]
    inputs = {id(variable) for variable in jaxpr.invars}
    uses = _tape.other_uses(jaxpr, stand_ins)
    # A state may compute the value that it shows.
    return uses | {k: "" for k, variable in enumerate(stand_ins) if id(variable) not in inputs}


@contextmanager
def _explaining_leaks() -> Iterator[None]:
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise RuntimeError(
            "`embax.brainstate.grad(fun=...)` must be of a function that can be traced twice, got one that keeps "
            "values of its first run, as a layer does that is under raw `jax.jit` or `jax.checkpoint`. Use those of "
            "brainstate.transform."
        ) from error
