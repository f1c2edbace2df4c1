"""value_and_grad and grad: of NNX modules, in which the gradient of an Embedding is the rows that were read."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from .. import _grad
from .._grad import OnDense
from ._params import tables_of, tree_of, with_values

Argnums = int | nnx.DiffState | Sequence[int | nnx.DiffState]
_CONTEXT = "embax"


def value_and_grad(
    f: Callable[..., Any] | None = None,
    *,
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    on_dense: OnDense = "warn",
) -> Callable[..., Any]:
    """Differentiate a function of NNX modules; the gradient of an Embedding's Param holds the rows that were read.

    As `nnx.value_and_grad`, but that the Param of an `embax.nnx.Embedding` gets a `RowGrad`, in which an id occurs as
    often as it was looked up. Time and memory follow the number of ids, not of rows. `embax.nnx.Optimizer` takes it.
    What the function changes in the modules is kept, rows that `max_norm` has clipped among it.

    That needs the layer to be called where `f` itself runs: `embax.value_and_grad` says when a gradient is dense
    instead, and warns. Put `nnx.jit` around the whole step, not around a part of the loss. `f` is traced twice.

    Args:
      f: A function of modules and pytrees that returns a scalar, or `(scalar, aux)` with `has_aux`. Left out, the call
      is
        a decorator.
      argnums: The arguments to differentiate for: numbers, for the Params of modules and all of other arguments, or
        `nnx.DiffState(number, filter)`.
      has_aux: Whether `f` returns a pair, of which the second is passed on.
      holomorphic: As in `jax.value_and_grad`.
      allow_int: As in `jax.value_and_grad`.
      on_dense: What a dense gradient of a table is: an `"error"`, worth a `"warn"`, or no surprise, `"allow"`.

    Returns:
      A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)` with `has_aux`.
      The gradient of a module is an `nnx.State`.

    Raises:
      TypeError: As `embax.value_and_grad`, when called.
      ValueError: As `embax.value_and_grad`, when called.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> embedding = embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0))
      >>> value, gradient = embax.nnx.value_and_grad(lambda embedding: embedding([3, 5, 3]).sum())(embedding)
      >>> gradient["embedding"].get_value()
      RowGrad(3 ids of 1000 rows, float32[3,4])
    """
    options: dict[str, Any] = {"holomorphic": holomorphic, "allow_int": allow_int, "on_dense": on_dense}
    if f is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux, **options)
    several = isinstance(argnums, Sequence)
    filters = {
        (number.argnum if isinstance(number, nnx.DiffState) else number): (
            number.filter if isinstance(number, nnx.DiffState) else nnx.Param
        )
        for number in (argnums if several else (argnums,))
    }

    @functools.wraps(f)
    @nnx.update_context(_CONTEXT)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        call = _Call(f, filters, has_aux, args, kwargs)
        differentiated = _grad.value_and_grad(call.run, tuple(filters), has_aux=True, **options)
        (value, (changed, plain)), gradients = differentiated(*call.trees)
        aux = call.update(changed, plain)
        gradients = [call.gradient(number, tree) for number, tree in zip(filters, gradients, strict=True)]
        return (value, aux) if has_aux else value, tuple(gradients) if several else gradients[0]

    return value_and_gradient


def grad(f: Callable[..., Any] | None = None, *, has_aux: bool = False, **options: Any) -> Callable[..., Any]:
    """Differentiate a function of NNX modules as `value_and_grad` does, and return the gradient only.

    Args:
      f: As there.
      has_aux: As there.
      **options: As there.

    Returns:
      A function that returns the gradient, or `(gradient, aux)` with `has_aux`.

    Raises:
      TypeError: As there.
      ValueError: As there.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> embedding = embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0))
      >>> embax.nnx.grad(lambda embedding: embedding([3, 5]).sum())(embedding)["embedding"].get_value()
      RowGrad(2 ids of 1000 rows, float32[2,4])
    """
    if f is None:
        return functools.partial(grad, has_aux=has_aux, **options)
    both = value_and_grad(f, has_aux=has_aux, **options)

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        out, gradient = both(*args, **kwargs)
        return (gradient, out[1]) if has_aux else gradient

    return gradient


class _Call:
    """One call of a function of modules, as a pure function of trees in which Tables stand for Params."""

    def __init__(self, f: Callable[..., Any], filters: Mapping[int, Any], has_aux: bool, args: Any, kwargs: Any):
        self.f, self.has_aux, self.kwargs = f, has_aux, kwargs
        self.nodes = {i: arg for i, arg in enumerate(args) if _has_nodes(arg)}
        self.node_kwargs = {name: arg for name, arg in kwargs.items() if _has_nodes(arg)}
        wanted = {i: nnx.filterlib.to_predicate(filter) for i, filter in filters.items()}

        def is_wanted(path: Any, value: Any) -> bool:
            return path[0] == "args" and path[1] in wanted and wanted[path[1]](path[2:], value)

        with nnx.split_context(_CONTEXT) as context:
            everything = {"args": self.nodes, "kwargs": self.node_kwargs}
            self.graphdef, wanted_state, self.rest = context.split(everything, is_wanted, ...)
        self.states = wanted_state.get("args", {})
        tables = tables_of(self.nodes)
        self.trees = [tree_of(self._state(i), tables) if i in self.nodes else arg for i, arg in enumerate(args)]

    def run(self, *trees: Any) -> Any:
        """Call the function."""
        states = {i: with_values(state, trees[i]) for i, state in self.states.items()}
        with nnx.merge_context(_CONTEXT, inner=True) as context:
            nodes = context.merge(self.graphdef, nnx.State({"args": states}), self.rest)
        args = [nodes["args"].get(i, tree) for i, tree in enumerate(trees)]
        out = self.f(*args, **{**self.kwargs, **nodes["kwargs"]})
        value, aux = out if self.has_aux else (out, None)
        with nnx.split_context(_CONTEXT) as context:
            self.changed, state = context.split((nodes, aux if _has_nodes(aux) else None))
        return value, (state, None if _has_nodes(aux) else aux)

    def update(self, state: Any, plain: Any) -> Any:
        """Give the modules what the function has left in them, and return its auxiliary output."""
        with nnx.merge_context(_CONTEXT, inner=False) as context:
            _, aux = context.merge(self.changed, state)
        return plain if aux is None else aux

    def gradient(self, number: int, tree: Any) -> Any:
        """Give the gradient of an argument the form of its state."""
        return with_values(self._state(number), tree) if number in self.nodes else tree

    def _state(self, number: int) -> Any:
        return self.states.get(number, nnx.State({}))


def _has_nodes(tree: Any) -> bool:
    kinds = nnx.Pytree, nnx.Variable
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds)))
