"""value_and_grad and grad: gradients of a loss in which the tables' are held as the rows that were read.

For instance, of `lookup(table, [4, 1, 4]).sum()` the value is a number, and the gradient three ids and three rows of
ones, of a table of any number of rows.
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
    """Differentiate a function; the gradient of a table holds the rows that were read and no others.

    As `jax.value_and_grad`, but that each Table in the arguments gets a RowGrad, in which an id occurs as often as it
    was looked up. Time and memory follow the number of ids, not of rows. A table that is frozen, of integers or not
    read gets a RowGrad of length 0.

    Reads are followed through every transformation: `jax.vmap`, `scan`, `map`, `fori_loop`, `cond`, `switch`, `jit`,
    `jax.checkpoint`, `shard_map`, custom derivatives and inner gradients, nested as you like, and `table.weight[ids]`
    is a read, too. If the loss computes with all rows of the weight (a norm, a product with it), that table gets the
    whole gradient, as a Table with the gradient for its weight, and a warning says which line does so. `embax.attend`
    and `embax.softmax_cross_entropy` read all rows by nature: the gradient is dense without a warning. So it is where a
    scan would stack more bytes of rows than the weight has.

    An Equinox module may stand anywhere in the arguments. Of its leaves, those that are no arrays of floats have None
    for their gradient, as in `equinox.filter_grad`.

    `fun` runs once, as under `jax.value_and_grad`: arguments that are not differentiated reach it as they are given.

    Args:
      fun: A function of pytrees, Tables among them, that returns a scalar, or `(scalar, aux)` with `has_aux`.
      argnums: The argument or arguments to differentiate for.
      has_aux: Whether `fun` returns a pair, of which the second is passed on.
      holomorphic: As in `jax.value_and_grad`.
      allow_int: As in `jax.value_and_grad`.
      on_dense: What a dense gradient of a table is: an `"error"`, worth a `"warn"`, or no surprise, `"allow"`.
      tables: A predicate `(path, leaf) -> bool` that chooses arrays which are read as tables by layers of other
        libraries, by `weight[ids]` or `jnp.take`. Their gradients are RowGrads, too. The path is that of
        `jax.tree_util`, within the argument; `jax.tree_util.keystr` writes it as text. The leaf may be a tracer.

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
      ...
      >>> value, gradient = jax.jit(embax.value_and_grad(loss))(params, jnp.array([3, 5, 3]))
      >>> gradient["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> gradient["scale"].shape
      (4,)
    """
    plain = jax.value_and_grad(fun, argnums, has_aux, holomorphic, allow_int)  # which checks them
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
    """Differentiate a function, as `embax.value_and_grad` does, and return the gradient only.

    Args:
      fun: As in `embax.value_and_grad`.
      argnums: As there.
      has_aux: As there.
      holomorphic: As there.
      allow_int: As there.
      on_dense: As there.
      tables: As there.

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
    """Make the function that a caller gets; `result(out, gradient)` is what it returns."""

    @functools.wraps(fun)
    def differentiated(*args: PyTree, **kwargs: PyTree) -> PyTree:
        if not options.fit(args):
            return plain(*args, **kwargs)  # which says what is wrong
        return result(*evaluate(fun, options, args, kwargs))

    return differentiated
