"""value_and_grad and grad for NNX modules; the gradient of an Embedding's Param is a RowGrad."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import PyTree

from .._base import check as _check
from .._gradients.chosen import Chooser, checked
from .._gradients.differentiate import Options, checked_pair, evaluate
from .._gradients.report_dense import OnDense
from ._call import CONTEXT, Call

Argnums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def value_and_grad(
    f: Callable[..., PyTree] | None = None,
    *,
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    on_dense: OnDense = "warn",
    tables: Chooser | None = None,
) -> Callable[..., PyTree]:
    """Differentiate a function of NNX modules; the gradient of an Embedding's Param holds only the rows that were read.

    Like `nnx.value_and_grad`, except that the Param of an `embax.nnx.Embedding` gets a `RowGrad`, in which an id occurs
    as often as it was looked up. Time and memory follow the number of ids, not of rows. `embax.nnx.Optimizer` takes it.
    Changes that the function makes to the modules are kept, such as rows clipped to `max_norm`.

    Reads are followed through `nnx.vmap`, `scan`, `remat`, `cond`, `jit` and JAX's own transformations, and a warning
    is given for a dense gradient, as in `embax.value_and_grad`. `f` runs once.

    Args:
      f: A function of modules and pytrees; returns a scalar, or `(scalar, aux)` with `has_aux`. Without it, the call
        returns a decorator.
      argnums: The arguments to differentiate: numbers, or `nnx.DiffState(number, filter)`. A number means the Params of
        a module, or all of any other argument.
      has_aux: Whether `f` returns a pair, whose second element is passed on.
      holomorphic: As in `jax.value_and_grad`.
      allow_int: As in `jax.value_and_grad`.
      on_dense: What to do about a dense gradient of a table: raise an `"error"`, `"warn"`, or `"allow"` it.
      tables: A predicate `(path, leaf) -> bool` that chooses Params of other layers as tables, read by `nnx.Embed`,
        `param[ids]` or `jnp.take`. They get RowGrads, too. The path is that of `jax.tree_util` in the pure State of the
        module, such as `(DictKey("encoder"), DictKey("embedding"))`; the leaf is the array.

    Returns:
      A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)` with `has_aux`.
      The gradient of a module is an `nnx.State`.

    Raises:
      TypeError: If `argnums` or `tables` is of another type. When called: as `embax.value_and_grad`, and if an argument
        does not exist.
      ValueError: When called: as `embax.value_and_grad`, if an argument is named twice, and if `tables` chooses a leaf
        that is not a float array with an axis of rows.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> embedding = embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0))
      >>> value, gradient = embax.nnx.value_and_grad(lambda embedding: embedding([3, 5, 3]).sum())(embedding)
      >>> gradient["embedding"].get_value()
      RowGrad(3 ids of 1000 rows, float32[3,4])
    """
    options = {"holomorphic": holomorphic, "allow_int": allow_int, "on_dense": on_dense, "tables": tables}
    if f is None:
        return functools.partial(value_and_grad, argnums=argnums, has_aux=has_aux, **options)  # pyright: ignore
    return _differentiated("embax.nnx.value_and_grad", f, argnums, has_aux, with_value=True, **options)


def grad(
    f: Callable[..., PyTree] | None = None,
    *,
    argnums: Argnums = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    on_dense: OnDense = "warn",
    tables: Chooser | None = None,
) -> Callable[..., PyTree]:
    """Differentiate a function of NNX modules, like `embax.nnx.value_and_grad`, and return the gradient only.

    Args:
      f: As in `embax.nnx.value_and_grad`.
      argnums: As in `embax.nnx.value_and_grad`.
      has_aux: As in `embax.nnx.value_and_grad`.
      holomorphic: As in `embax.nnx.value_and_grad`.
      allow_int: As in `embax.nnx.value_and_grad`.
      on_dense: As in `embax.nnx.value_and_grad`.
      tables: As in `embax.nnx.value_and_grad`.

    Returns:
      A function that returns the gradient, or `(gradient, aux)` with `has_aux`.

    Raises:
      TypeError: As in `embax.nnx.value_and_grad`.
      ValueError: As in `embax.nnx.value_and_grad`.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> embedding = embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0))
      >>> embax.nnx.grad(lambda embedding: embedding([3, 5]).sum())(embedding)["embedding"].get_value()
      RowGrad(2 ids of 1000 rows, float32[2,4])
    """
    options = {"holomorphic": holomorphic, "allow_int": allow_int, "on_dense": on_dense, "tables": tables}
    if f is None:
        return functools.partial(grad, argnums=argnums, has_aux=has_aux, **options)  # pyright: ignore
    return _differentiated("embax.nnx.grad", f, argnums, has_aux, with_value=False, **options)


def _differentiated(
    call: str,
    f: Callable[..., PyTree],
    argnums: Argnums,
    has_aux: bool,
    on_dense: OnDense,
    tables: Chooser | None,
    with_value: bool,
    **options: Any,
) -> Callable[..., PyTree]:
    """Make the function that returns the gradient, and the value and the auxiliary output where they are asked for."""
    on_dense = _check.choice(f"{call}(on_dense=...)", on_dense, OnDense)
    tables = checked(call, tables)
    several = isinstance(argnums, Sequence)
    asked = [
        (number.argnum, number.filter) if isinstance(number, nnx.DiffState) else (number, nnx.Param)
        for number in (argnums if several else (argnums,))
    ]
    asked = [(_check.integer(f"{call}(argnums=...)", number), filter) for number, filter in asked]

    @functools.wraps(f)
    def differentiated(*args: PyTree, **kwargs: PyTree) -> PyTree:
        filters = {_position(call, number, len(args)): filter for number, filter in asked}
        if len(filters) < len(asked):
            raise ValueError(
                f"`{call}(argnums=...)` must name no argument twice, got {argnums} repeated. Leave one out."
            )
        of_core = Options(call, tuple(filters), True, on_dense=on_dense, tables=tables, stacklevel=6, **options)
        with nnx.update_context(CONTEXT):
            this = Call(lambda *args, **kwargs: checked_pair(call, has_aux, f(*args, **kwargs)), filters, args, kwargs)
            (value, changed), gradients = evaluate(this.run, of_core, this.trees, {})
            aux = this.update(changed)
        gradients = [this.gradient(number, tree) for number, tree in zip(filters, gradients, strict=True)]
        gradient = tuple(gradients) if several else gradients[0]
        if with_value:
            return (value, aux) if has_aux else value, gradient
        return (gradient, aux) if has_aux else gradient

    return differentiated


def _position(call: str, number: int, length: int) -> int:
    if not -length <= number < length:
        least = number + 1 if number >= 0 else -number
        raise TypeError(
            f"`{call}(argnums={number})` requires at least {least} positional arguments, got {length}. "
            "Pass differentiated arguments by position."
        )
    return number % length
