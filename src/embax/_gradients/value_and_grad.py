"""value_and_grad and grad: JAX's functions, with a RowGrad as the gradient of each Table.

For instance, for `lookup(table, [4, 1, 4]).sum()` the value is a number, and the gradient is three ids and three rows
of ones, however many rows the table has.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jaxtyping import PyTree

from .._base import check as _check
from .chosen import Chooser, checked
from .differentiate import Options, evaluate
from .report_dense import DenseGradientWarning as DenseGradientWarning
from .report_dense import OnDense


def value_and_grad(
    fun: Callable[..., PyTree],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    on_dense: OnDense = "warn",
    tables: Chooser | None = None,
) -> Callable[..., PyTree]:
    """Differentiate a function; the gradient of a table holds only the rows that were read.

    Like `jax.value_and_grad`, except that each Table in the arguments gets a RowGrad, in which an id occurs as often as
    it was looked up. Time and memory follow the number of ids, not of rows. A table that is frozen, of integers, or not
    read gets a RowGrad of length 0.

    Reads are followed through every transformation: `jax.vmap`, `scan`, `map`, `fori_loop`, `cond`, `switch`, `jit`,
    `jax.checkpoint`, `shard_map`, custom derivatives and inner gradients, nested in any way. `table.weight[ids]` is a
    read, too. If the loss computes with all rows of the weight (its norm, a product with it), the gradient is a Table
    with a dense weight, and a warning names the line. `embax.attend` and `embax.softmax_cross_entropy` read all rows by
    nature, so their gradient is dense without a warning. It is also dense, without a warning, if a scan would stack
    more bytes of rows than the weight has.

    Arguments may hold Equinox modules. Their leaves that are not float arrays have the gradient None, as in
    `equinox.filter_grad`.

    `fun` runs once, as under `jax.value_and_grad`; arguments that are not differentiated are passed on unchanged.

    Args:
      fun: A function of pytrees, which may hold Tables. Returns a scalar, or `(scalar, aux)` with `has_aux`.
      argnums: The argument or arguments to differentiate.
      has_aux: Whether `fun` returns a pair, whose second element is passed on.
      holomorphic: As in `jax.value_and_grad`.
      allow_int: As in `jax.value_and_grad`.
      on_dense: What to do about a dense gradient of a table: raise an `"error"`, `"warn"`, or `"allow"` it.
      tables: A predicate `(path, leaf) -> bool` that chooses plain arrays as tables: weights that layers of other
        libraries read by `weight[ids]` or `jnp.take`. They get RowGrads, too. The path is that of `jax.tree_util`,
        within the argument; `jax.tree_util.keystr` writes it as text. The leaf may be a tracer.

    Returns:
      A function of the same arguments that returns `(value, gradient)`, or `((value, aux), gradient)` with `has_aux`.

    Raises:
      TypeError: When called, as `jax.value_and_grad` does.
      ValueError: When called, as `jax.value_and_grad` does, and for a dense gradient with `on_dense="error"`.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> params = {"table": embax.Table.create(jax.random.key(0), rows=1_000, dim=4), "scale": jnp.ones(4)}
      >>> def loss(params, ids):
      ...     return (embax.lookup(params["table"], ids) * params["scale"]).sum()
      ...
      >>> value, gradient = jax.jit(embax.value_and_grad(loss))(params, jnp.array([3, 5, 3]))
      >>> gradient["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> gradient["scale"].shape
      (4,)
    """
    plain = jax.value_and_grad(fun, argnums, has_aux, holomorphic, allow_int)  # checks the arguments
    options = _options("embax.value_and_grad", argnums, has_aux, holomorphic, allow_int, on_dense, tables)
    return _differentiated(fun, plain, options, lambda out, gradient: (out, gradient))


def grad(
    fun: Callable[..., PyTree],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    on_dense: OnDense = "warn",
    tables: Chooser | None = None,
) -> Callable[..., PyTree]:
    """Differentiate a function, like `embax.value_and_grad`, and return the gradient only.

    Args:
      fun: As in `embax.value_and_grad`.
      argnums: As in `embax.value_and_grad`.
      has_aux: As in `embax.value_and_grad`.
      holomorphic: As in `embax.value_and_grad`.
      allow_int: As in `embax.value_and_grad`.
      on_dense: As in `embax.value_and_grad`.
      tables: As in `embax.value_and_grad`.

    Returns:
      A function that returns the gradient, or `(gradient, aux)` with `has_aux`.

    Raises:
      TypeError: As in `embax.value_and_grad`.
      ValueError: As in `embax.value_and_grad`.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> table = embax.Table(jnp.ones((1_000, 4)))
      >>> embax.grad(lambda table: embax.lookup(table, [3, 5]).sum())(table)
      RowGrad(2 ids of 1000 rows, float32[2,4])
    """
    plain = jax.grad(fun, argnums, has_aux, holomorphic, allow_int)
    options = _options("embax.grad", argnums, has_aux, holomorphic, allow_int, on_dense, tables)
    return _differentiated(fun, plain, options, lambda out, gradient: (gradient, out[1]) if has_aux else gradient)


def _options(
    call: str,
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    allow_int: bool,
    on_dense: OnDense,
    tables: Chooser | None,
) -> Options:
    on_dense = _check.choice(f"{call}(on_dense=...)", on_dense, OnDense)
    return Options(call, argnums, has_aux, holomorphic, allow_int, on_dense, checked(call, tables))


def _differentiated(
    fun: Callable[..., PyTree],
    plain: Callable[..., PyTree],
    options: Options,
    result: Callable[[PyTree, PyTree], PyTree],
) -> Callable[..., PyTree]:
    """Make the function that is returned to the caller. It returns `result(out, gradient)`."""

    @functools.wraps(fun)
    def differentiated(*args: PyTree, **kwargs: PyTree) -> PyTree:
        if not options.fit(args):
            return plain(*args, **kwargs)  # raises JAX's own error
        return result(*evaluate(fun, options, args, kwargs))

    return differentiated
