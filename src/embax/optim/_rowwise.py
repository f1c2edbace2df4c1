"""Row-wise Adagrad and Adam: one second moment for each row of a table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, PyTree

from .._base.distinct import accumulator
from .._core.table import Table, has_weight, is_table, with_weight
from .._gradients.chosen import Chooser
from ._fused import fusable
from ._moments import Numbers, check_decays, not_negative, of_moments


class RowwiseAdagradState(NamedTuple):
    """The state of row-wise Adagrad."""

    sum_of_squares: PyTree  # float32; for a Table, a Table with the weight (rows,); else like the parameter


class RowwiseAdamState(NamedTuple):
    """The state of row-wise Adam."""

    steps: Int32[Array, ""]  # number of steps so far
    mean: PyTree  # like the parameters
    mean_square: PyTree  # float32; for a Table, a Table with the weight (rows,); else like the parameter


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator: float = 0.0,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    tables: Chooser | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad with one accumulator for each row of a table, already lifted.

    `a[r] += mean(g[r]**2); w[r] -= learning_rate * g[r] / (sqrt(a[r]) + eps)`, where `g[r]` is the sum of the row's
    gradients. The state of a table takes 4 bytes for each row, instead of 4 bytes for each entry. Ordinary leaves get
    plain Adagrad, with an accumulator for each entry.

    Args:
      learning_rate: The step size, or a schedule of it.
      initial_accumulator: The start value of accumulators, 0 or more.
      eps: The number added to the root, 0 or more.
      weight_decay: The part of a weight that is added to its scaled gradient; in a table, for the rows that were read.
      tables: As in `lift`.

    Returns:
      A transformation over trees with Tables, like that of `lift`. The result equals dense training.

    Raises:
      ValueError: If an argument is negative.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> params = {"table": embax.Table(jnp.zeros((1_000, 4)))}
      >>> tx = embax.optim.rowwise_adagrad(0.1)
      >>> state = tx.init(params)
      >>> gradient = {"table": embax.RowGrad([7], jnp.full((1, 4), 2.0), rows=1_000)}
      >>> updates, state = jax.jit(tx.update)(gradient, state, params)
      >>> updates["table"].values
      Array([[-0.1, -0.1, -0.1, -0.1]], dtype=float32)

    References:
      Gupta, Bengio, Weston, Training highly multiclass classifiers, 2014,
      https://jmlr.org/papers/v15/gupta14a.html, section 5.2. FBGEMM's EXACT_ROWWISE_ADAGRAD is the same.
    """
    numbers = {"initial_accumulator": initial_accumulator, "eps": eps, "weight_decay": weight_decay}
    start, eps, decay = not_negative("embax.optim.rowwise_adagrad", **numbers)

    def init(params: PyTree) -> PyTree:
        return RowwiseAdagradState(_map(lambda leaf: _second_moment(leaf, start), params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        sums = _map(lambda g, a: _with_values(a, _values(a) + _square(g)), updates, state.sum_of_squares)

        # An accumulator of 0 means that there was no gradient yet: the update is 0, not 0 / 0.
        def inverse_root(a: Float[Array, "..."]) -> Float[Array, "..."]:
            return jnp.where(a > 0, 1 / (jnp.sqrt(jnp.where(a > 0, a, 1)) + eps), 0)

        scaled = _map(lambda g, a: _scale(g, inverse_root(_values(a))), updates, sums)
        return scaled, RowwiseAdagradState(sums)

    scaling = optax.GradientTransformation(init, update)
    states = ("sum_of_squares",)
    return fusable(scaling, "step_rowwise_adagrad", states, lambda _: (eps,), learning_rate, decay, tables)


def rowwise_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    tables: Chooser | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with one second moment for each row of a table, already lifted.

    `m[r] = b1 m[r] + (1 - b1) g[r]; v[r] = b2 v[r] + (1 - b2) mean(g[r]**2);
    w[r] -= learning_rate * m[r] / (1 - b1**t) / (sqrt(v[r] / (1 - b2**t)) + eps)`

    for the rows that were read, while `t` counts all steps; `lift` describes how this differs from dense training.
    Ordinary leaves get plain Adam, with a second moment for each entry.

    Args:
      learning_rate: The step size, or a schedule of it.
      b1: The decay of the first moment, in [0, 1).
      b2: The decay of the second moment, in [0, 1).
      eps: The number added to the root, 0 or more.
      weight_decay: The part of a weight that is added to its scaled gradient; in a table, for the rows that were read.
      tables: As in `lift`.

    Returns:
      A transformation over trees with Tables, like that of `lift`.

    Raises:
      ValueError: If an argument is outside of its range.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> params = {"table": embax.Table(jnp.zeros((1_000, 4)))}
      >>> state = embax.optim.rowwise_adam(1e-3).init(params)

    References:
      Kingma, Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980, algorithm 1.
      FBGEMM's PARTIAL_ROWWISE_ADAM takes the mean over a row, too.
    """
    call = "embax.optim.rowwise_adam"
    eps, decay = not_negative(call, eps=eps, weight_decay=weight_decay)
    check_decays(call, b1, b2)

    def init(params: PyTree) -> PyTree:
        mean_square = _map(lambda leaf: _second_moment(leaf, 0.0), params)
        return RowwiseAdamState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), mean_square)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        steps = jnp.asarray(optax.safe_increment(state.steps))
        mean = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mean)
        mean_square = _map(
            lambda g, v: _with_values(v, b2 * _values(v) + (1 - b2) * _square(g)), updates, state.mean_square
        )

        def corrected(m: PyTree, v: PyTree) -> PyTree:
            first, second = (1 - b ** steps.astype(v.dtype) for b in (b1, b2))
            return _scale(m, 1 / (first * (jnp.sqrt(_values(v) / second) + eps)))

        scaled = _map(corrected, mean, mean_square)
        return scaled, RowwiseAdamState(steps, mean, mean_square)

    def scalars(state: PyTree) -> Numbers:
        return eps, *of_moments(b1, b2, state.steps)

    scaling = optax.GradientTransformation(init, update)
    return fusable(scaling, "step_rowwise_adam", ("mean", "mean_square"), scalars, learning_rate, decay, tables)


def _map(function: Callable[..., PyTree], tree: PyTree, *others: PyTree) -> PyTree:
    """Map over a tree with Tables for leaves; a Table without a weight (not trained) becomes None."""

    def of_leaf(leaf: PyTree, *rest: PyTree) -> PyTree:
        return None if isinstance(leaf, Table) and not has_weight(leaf) else function(leaf, *rest)

    return jax.tree.map(of_leaf, tree, *others, is_leaf=is_table)


def _second_moment(leaf: PyTree, start: float) -> PyTree:
    """The second moment before the first step; for a Table, a Table with one number for each row."""
    values = _values(leaf)
    shape = values.shape[:1] if isinstance(leaf, Table) else values.shape
    return _with_values(leaf, jnp.full(shape, start, accumulator(values.dtype)))


def _values(leaf: PyTree) -> PyTree:
    return leaf.weight if isinstance(leaf, Table) else leaf


def _with_values(leaf: PyTree, values: PyTree) -> PyTree:
    return with_weight(leaf, values) if isinstance(leaf, Table) else values


def _square(gradient: PyTree) -> Float[Array, "..."]:
    """The squares of a gradient; for a Table, their mean over each row."""
    values = _values(gradient)
    squares = jnp.square(jnp.abs(values.astype(accumulator(values.dtype))))
    return squares.mean(axis=tuple(range(1, squares.ndim))) if isinstance(gradient, Table) else squares


def _scale(leaf: PyTree, factor: Float[Array, "..."]) -> PyTree:
    """Multiply a leaf by one factor for each entry; a Table by one factor for each row."""
    if not isinstance(leaf, Table):
        return (leaf.astype(factor.dtype) * factor).astype(leaf.dtype)
    factor = jnp.expand_dims(factor, tuple(range(1, leaf.weight.ndim)))
    return with_weight(leaf, (leaf.weight.astype(factor.dtype) * factor).astype(leaf.dtype))
