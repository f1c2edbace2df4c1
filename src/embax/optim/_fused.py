"""step: update and apply in one call; if there is a kernel for the optimizer, in one pass over the rows.

An optimizer of embax has a `Form`: the kernel that does the same, the parts of its state that have rows, and the
numbers of a step. `step` calls `update` and `apply_updates`, and passes their results and the old arrays to the
kernel's primitive, which chooses between the results and the kernel (see `_kernels.primitive`). For instance, for `sgd`
on the ids [3, 5, 3], the kernel sums the two gradients of row 3 and changes the rows 3 and 5, and nothing uses the
plain result.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._core import ids as _ids
from .._core.containers.held_rows import bare
from .._core.table import Table, is_table, with_weight
from .._gradients.apply import apply_updates
from .._gradients.row_grad import RowGrad, is_trained
from .._kernels.step import Optimizer, Step
from ._lift import LiftState, lift
from ._moments import Numbers


class Form(NamedTuple):
    """The description of a lifted chain for a kernel. The first state of the chain has rows."""

    optimizer: Optimizer
    states: tuple[str, ...]  # the attributes of the first state that have rows, in the order of the kernel
    scalars: Callable[[PyTree], Numbers]  # from the first state to the numbers after learning rate and weight decay
    learning_rate: optax.ScalarOrSchedule
    weight_decay: float

    def step_of(self, inner: PyTree) -> Step:
        """Return the step that follows a state."""
        rate = self.learning_rate(inner[-1].count) if callable(self.learning_rate) else self.learning_rate
        numbers = (rate, self.weight_decay, *self.scalars(inner[0]))
        scalars = jnp.stack([jnp.asarray(x).astype(jnp.result_type(float)) for x in numbers])
        return Step(self.optimizer, scalars, self.weight_decay != 0)


class Fusable(optax.GradientTransformationExtraArgs):
    """A transformation with a form. Transformations that are made from it, such as by `optax.chain`, have none."""

    form: Form


def fusable(
    scaling: optax.GradientTransformation,
    optimizer: Optimizer,
    states: tuple[str, ...],
    scalars: Callable[[PyTree], Numbers],
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    tables: PyTree = None,
) -> Fusable:
    """Lift an optimizer and give it a form.

    Args:
      scaling: The transformation of a gradient before weight decay and learning rate.
      optimizer: The kernel.
      states: As in `Form`.
      scalars: As in `Form`.
      learning_rate: The step size, or a schedule of it.
      weight_decay: The part of a weight that is added to its scaled gradient.
      tables: As in `lift`.

    Returns:
      The lifted transformation.
    """
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    lifted = lift(optax.chain(scaling, *decay, optax.scale_by_learning_rate(learning_rate)), tables=tables)
    made = Fusable(*lifted)
    made.form = Form(optimizer, states, scalars, learning_rate, weight_decay)
    return made


def step(
    tx: optax.GradientTransformation, gradients: PyTree, state: PyTree, params: PyTree, **extra_args: object
) -> tuple[PyTree, PyTree]:
    """Take a step of an optimizer: update the state, and apply the updates to the parameters.

    One call does the work of `tx.update` and `embax.apply_updates`. On a CPU with native kernels, a step of `sgd`,
    `adagrad`, `rowwise_adagrad`, `adam` or `rowwise_adam` of `embax.optim` is then one pass over the rows of a
    gradient, which is several times faster. The results equal those of two calls, except for rounding in the last
    digits. Donate `params` and `state`, so that the step changes them in place.

    Args:
      tx: The transformation.
      gradients: The gradients that `embax.value_and_grad` returns.
      state: The state of the transformation.
      params: A pytree of arrays and Tables.
      extra_args: Further arguments of `tx.update`.

    Returns:
      The new parameters, and the new state.

    Raises:
      TypeError: If `tx.update` or `embax.apply_updates` raises it.
      ValueError: If `tx.update` or `embax.apply_updates` raises it.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> tx = embax.optim.adagrad(0.1)
      >>> @jax.jit
      ... def train(table, state, ids):
      ...     gradient = embax.grad(lambda table: (embax.lookup(table, ids) ** 2).sum())(table)
      ...     return embax.optim.step(tx, gradient, state, table)
      ...
      >>> table = embax.Table(jnp.ones((1_000, 4)))
      >>> table, state = train(table, tx.init(table), jnp.array([3, 5, 3]))
    """
    _, new, after = stepped(tx, gradients, state, params, params, **extra_args)
    return new, after


def stepped(
    tx: optax.GradientTransformation,
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
    held: PyTree,
    **extra_args: object,
) -> tuple[PyTree, PyTree, PyTree]:
    """Take a step with the rules that the state was made for, and apply it to tables with their present rules.

    Args:
      tx: The transformation.
      gradients: As for `step`.
      state: As for `step`.
      params: The parameters, with the rules that they had when the state was made.
      held: The same parameters, with their present rules.
      extra_args: As for `step`.

    Returns:
      The updates, the new parameters, and the new state.
    """
    updates, after = optax.with_extra_args_support(tx).update(gradients, state, params, **extra_args)
    new = apply_updates(held, updates)
    if isinstance(tx, Fusable) and isinstance(state, LiftState):
        new, after = _by_kernels(tx.form, gradients, (params, state), (held, new, after))
    return updates, new, after


def _by_kernels(
    form: Form, gradients: PyTree, before: tuple[PyTree, LiftState], after: tuple[PyTree, PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    """Run the kernel for each table; `after` has the results without kernels."""
    (params, state), (held, new, new_state) = before, after
    leaves, structure = jax.tree.flatten(params, is_leaf=is_table)
    of_leaves, as_held, updated = (structure.flatten_up_to(tree) for tree in (gradients, held, new))
    old_rows, new_rows = (
        [structure.flatten_up_to(getattr(x.inner[0], name)) for name in form.states] for x in (state, new_state)
    )
    how = form.step_of(jax.tree.map(jnp.asarray, state.inner))
    for i, (table, gradient) in enumerate(zip(leaves, map(bare, of_leaves), strict=True)):
        if not _is_of_rows(table, gradient, as_held[i]):
            continue
        plain = [updated[i].weight, *(rows[i].weight for rows in new_rows)]
        arrays = [table.weight, *(jnp.asarray(rows[i].weight) for rows in old_rows)]
        ids = _ids.trained(gradient.ids, table)
        given = gradient.given if table.padding_idx is None else None
        found = table.storage.step_by_kernel(plain, arrays, ids, gradient.held, how, given)
        updated[i] = with_weight(updated[i], found[0])
        for rows, array in zip(new_rows, found[1:], strict=True):
            rows[i] = with_weight(rows[i], array)
    replaced = {name: structure.unflatten(rows) for name, rows in zip(form.states, new_rows, strict=True)}
    first = new_state.inner[0]._replace(**replaced) if replaced else new_state.inner[0]
    return structure.unflatten(updated), new_state._replace(inner=(first, *new_state.inner[1:]))


def _is_of_rows(table: PyTree, gradient: PyTree, held: PyTree) -> bool:
    """Return whether a table has a row-sparse gradient, and the same rules as when the state was made."""
    if not (isinstance(table, Table) and isinstance(held, Table) and isinstance(gradient, RowGrad)):
        return False
    return is_trained(table) and (table.padding_idx, table.freeze) == (held.padding_idx, held.freeze)
