"""grad for brainstate states; the gradient of an Embedding's weight is a RowGrad.

brainstate finds the states that a function reads, and calls `_grad_by_rows` in place of `jax.grad`: with their values,
by the id() of each state. Values of Embeddings become Tables, and `embax.value_and_grad` differentiates.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._base import check as _check
from .._base.typing import PyTreeDef
from .._core.containers.held import as_table
from .._core.table import Table, is_table
from .._gradients.chosen import Chooser, checked, with_tables, without_tables
from .._gradients.differentiate import Options, evaluate
from .._gradients.report_dense import HAS_A_UNIT, OnDense, report_dense
from ._layers import has_unit, table_of

_CALL = "embax.brainstate.grad"


def grad(
    fun: Callable[..., PyTree] | None = None,
    grad_states: PyTree = None,
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
    tables: Chooser | None = None,
) -> Callable[..., PyTree]:
    """Differentiate a function of brainstate states; the gradient of an Embedding's weight holds only the rows read.

    Like `brainstate.transform.grad`, except that the weight of an `embax.Embedding` among `grad_states` gets a RowGrad,
    in which an id occurs as often as it was looked up. Time and memory follow the number of ids, not of rows.
    `embax.brainstate.Optimizer` takes it. A weight that is frozen or not read gets a RowGrad of length 0. All other
    states and arguments get their usual gradient, and so do weights of integers and weights with a unit.

    Reads are followed through `for_loop`, `scan`, `cond`, `vmap`, `jit`, `checkpoint` and JAX's own transformations, as
    in `embax.value_and_grad`. If `fun` computes with all rows of a weight, the gradient is an array, and a warning
    names the line.

    `fun` is traced once for each call; arguments that are not differentiated are passed on unchanged. Inside of
    `embax.brainstate.jit`, a training step is traced in its first call only.

    Args:
      fun: A function that returns a scalar, or `(scalar, aux)` with `has_aux`. Without it, the call returns a
        decorator.
      grad_states: The states to differentiate: one, or a list or dict of them. Gradients have the same structure.
      argnums: The argument or arguments to differentiate, 0 or more. Default: none; without `grad_states`, the first.
      holomorphic: As in `jax.grad`.
      allow_int: As in `jax.grad`.
      has_aux: Whether `fun` returns a pair, whose second element is passed on.
      return_value: Whether to return the value of `fun`, too.
      unit_aware: Whether gradients have units, as in brainstate. A loss with a unit then has dense gradients.
      check_states: Whether a state that `fun` does not read is an error.
      debug_nan: As in `brainstate.transform.grad`.
      on_dense: What to do about a dense gradient of a weight: raise an `"error"`, `"warn"`, or `"allow"` it.
      tables: A predicate `(path, leaf) -> bool` that chooses arrays of `grad_states` as tables, read by other layers
        through `brainstate.nn.Embedding`, `state.value[ids]` or `jnp.take`. They get RowGrads, too. The path is that of
        `jax.tree_util` in the values of `grad_states`, such as `(DictKey(("embedding", "weight")),)` for the dict of
        `model.states(brainstate.ParamState)`.

    Returns:
      A function of the arguments of `fun`. It returns the gradients of the states, or of the arguments, or a pair of
      both; with `return_value` or `has_aux`, a tuple of these, the value, and the auxiliary data.

    Raises:
      TypeError: As `brainstate.transform.grad`, and if `tables` is not a function.
      ValueError: As `brainstate.transform.grad`; for a dense gradient with `on_dense="error"`; if `tables` chooses a
        leaf with a unit, or one that is not a float array with an axis of rows.

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
    on_dense = _check.choice(f"{_CALL}(on_dense=...)", on_dense, OnDense)
    tables = checked(_CALL, tables)
    options: dict[str, PyTree] = {
        "argnums": argnums,
        "holomorphic": holomorphic,
        "allow_int": allow_int,
        "unit_aware": unit_aware,
        "check_states": check_states,
        "debug_nan": debug_nan,
    }
    asked: dict[str, PyTree] = {"has_aux": has_aux, "return_value": return_value}
    if fun is None:
        return functools.partial(grad, grad_states=grad_states, on_dense=on_dense, tables=tables, **options, **asked)
    if isinstance(grad_states, dict):  # `states()` returns a subclass that is not a pytree
        grad_states = dict(grad_states)

    def plain() -> Callable[..., PyTree]:
        # Made for each call: the transform caches its trace, but the rules of a layer may change.
        return brainstate.transform.grad(fun, grad_states, **options, **asked)

    whole = plain()  # checks the arguments
    named, _ = jax.tree.flatten_with_path(grad_states, is_leaf=lambda x: isinstance(x, brainstate.State))

    @functools.wraps(fun)
    def gradient(*args: PyTree, **kwargs: PyTree) -> PyTree:
        paths = {state: path for path, state in reversed(named)}
        rules = {
            id(state): table
            for state in paths
            if (table := table_of(state)) is not None
            and jnp.issubdtype(table.dtype, jnp.inexact)
            and not has_unit(state)
        }
        if not rules and tables is None:
            return whole(*args, **kwargs)
        by_identity = {id(state): path for state, path in paths.items()}
        call = _Call(fun, args, kwargs, argnums, bool(has_aux))
        by_brainstate = brainstate.transform.GradientTransform(
            target=call.run,
            transform=functools.partial(_grad_by_rows, by_identity, rules, tables, on_dense, unit_aware),
            grad_states=grad_states,
            argnums=call.argnums,
            return_value=return_value,
            has_aux=bool(has_aux),
            transform_params={"holomorphic": holomorphic, "allow_int": allow_int},
            check_states=check_states,
            debug_nan=debug_nan,
        )
        return call.returned(by_brainstate(*call.differentiated))

    return gradient


class _Call:
    """One call of a function, such that brainstate gets only the differentiated arguments, and returns only arrays.

    Other arguments are passed to the function unchanged, and results that are no arrays bypass brainstate.
    """

    def __init__(
        self,
        fun: Callable[..., PyTree],
        args: Sequence[PyTree],
        kwargs: dict[str, PyTree],
        argnums: int | Sequence[int] | None,
        has_aux: bool,
    ):
        self.fun, self.args, self.kwargs, self.has_aux = fun, args, kwargs, has_aux
        numbers = () if argnums is None else (argnums,) if isinstance(argnums, int) else tuple(argnums)
        self.numbers = tuple(dict.fromkeys(numbers))
        self.differentiated = [args[number] for number in self.numbers]
        places = [self.numbers.index(number) for number in numbers]
        self.argnums = None if argnums is None else places[0] if isinstance(argnums, int) else tuple(places)
        self.aux: tuple[PyTreeDef, list[PyTree]] | None = None  # structure and leaves; None in place of arrays

    def run(self, *differentiated: PyTree) -> PyTree:
        """Call the function; returns its value, and the arrays of the auxiliary data."""
        args = list(self.args)
        for number, value in zip(self.numbers, differentiated, strict=True):
            args[number] = value
        out = self.fun(*args, **self.kwargs)
        if not self.has_aux or not isinstance(out, tuple | list) or len(out) != 2:
            return out
        leaves, structure = jax.tree.flatten(out[1])
        self.aux = structure, [None if _is_array(leaf) else leaf for leaf in leaves]
        return out[0], [leaf for leaf in leaves if _is_array(leaf)]

    def returned(self, results: PyTree) -> PyTree:
        """Restore the auxiliary data, which come last in the results."""
        if self.aux is None:
            return results
        (structure, rest), arrays = self.aux, iter(results[-1])
        return *results[:-1], structure.unflatten([next(arrays) if leaf is None else leaf for leaf in rest])


def _is_array(leaf: PyTree) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _grad_by_rows(
    paths: Mapping[int, PyTree],
    rules: Mapping[int, Table],
    tables: Chooser | None,
    on_dense: OnDense,
    unit_aware: bool,
    fun: Callable[..., PyTree],
    *,
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
) -> Callable[..., PyTree]:
    """`jax.grad` of a function whose first argument holds the values of states, by the id() of each state.

    Args:
      paths: For the id() of each state, its path among the differentiated states.
      rules: For the id() of each state that is a layer's weight, a Table of its value.
      tables: As in `grad`.
      on_dense: As in `grad`.
      unit_aware: As in `grad`.
      fun: The function.
      argnums: As in `jax.grad`.
      has_aux: As in `jax.grad`; always True.
      holomorphic: As in `jax.grad`.
      allow_int: As in `jax.grad`.

    Returns:
      The function that returns the gradient and the auxiliary data.
    """

    def held_as_tables(key: int, value: PyTree) -> PyTree:
        if key in rules:
            return as_table(rules[key], value)
        return with_tables(_CALL, tables, value, paths[key], leaves=(brainunit.Quantity,))

    def name(path: KeyPath) -> str:
        return f"grad_states{jax.tree_util.keystr((*paths[path[0].key], *path[1:]))}"

    def gradient(values: Mapping[int, PyTree], *args: PyTree) -> PyTree:
        held = {key: held_as_tables(key, value) for key, value in values.items()}

        def of_tables(held_now: Mapping[int, PyTree], *args: PyTree) -> PyTree:
            return fun(without_tables(values, held, held_now), *args)

        if unit_aware and isinstance(jax.eval_shape(lambda: fun(values, *args)[0]), brainunit.Quantity):
            for path, node in jax.tree.leaves_with_path(held, is_leaf=is_table):
                if isinstance(node, Table):
                    report_dense(_CALL, on_dense, name(path), node, HAS_A_UNIT, stacklevel=5)
            return brainunit.autograd.grad(fun, argnums, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int)(
                values, *args
            )
        asked = Options(_CALL, argnums, has_aux, holomorphic, allow_int, on_dense, stacklevel=8)
        (_, aux), gradients = evaluate(of_tables, asked, (held, *args), {}, lambda path: name(path[1:]))
        if unit_aware:
            everything = values, *args
            if isinstance(argnums, Sequence):
                gradients = _with_units(tuple(everything[number] for number in argnums), gradients)
            else:
                gradients = _with_units(everything[argnums], gradients)
        of_states = gradients[0] if isinstance(argnums, Sequence) else gradients
        of_states = without_tables(values, held, of_states)
        return (of_states, *gradients[1:]) if isinstance(argnums, Sequence) else of_states, aux

    return gradient


def _with_units(arguments: PyTree, gradients: PyTree) -> PyTree:
    """Give gradients of a loss without a unit the units of brainstate: one over the unit of the argument."""

    def with_unit(argument: PyTree, gradient: PyTree) -> PyTree:
        mantissa = brainunit.get_mantissa(gradient)
        if isinstance(gradient, Table) or mantissa.dtype == jax.dtypes.float0:
            return gradient if isinstance(gradient, Table) else mantissa
        unit = brainunit.UNITLESS / brainunit.get_unit(argument)
        return brainunit.maybe_decimal(brainunit.Quantity(mantissa, unit=unit))

    leaves, structure = jax.tree.flatten(arguments, is_leaf=lambda x: isinstance(x, brainunit.Quantity))
    return structure.unflatten(map(with_unit, leaves, structure.flatten_up_to(gradients)))
