"""step: update and apply in one call, which runs in one pass over the rows where a kernel knows the optimizer.

An optimizer of embax carries its form, `Form`: which kernel does the same, where its state holds rows, and the numbers
of a step. `step` computes what `update` and `apply_updates` make of everything, and gives the kernel's primitive both
that and the arrays from before; see `_kernels.primitive` for how one of the two is chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._core import ids as _ids
from .._core.held_rows import bare
from .._core.table import Table, is_table, with_weight
from .._gradients.apply import apply_updates
from .._gradients.row_grad import RowGrad, is_trained
from .._kernels.step import Optimizer, Step
from ._lift import LiftState, lift
from ._moments import Numbers


class Form(NamedTuple):
    """What a kernel has to know of a lifted chain, whose first state holds rows."""

    optimizer: Optimizer
    states: tuple[str, ...]  # the attributes of the first state that hold rows, in the order of the kernel
    scalars: Callable[[PyTree], Numbers]  # of the first state, behind the learning rate and the weight decay
    learning_rate: optax.ScalarOrSchedule
    weight_decay: float

    def step_of(self, inner: PyTree) -> Step:
        """The numbers of the step that follows a state."""
        rate = self.learning_rate(inner[-1].count) if callable(self.learning_rate) else self.learning_rate
        numbers = (rate, self.weight_decay, *self.scalars(inner[0]))
        scalars = jnp.stack([jnp.asarray(x).astype(jnp.result_type(float)) for x in numbers])
        return Step(self.optimizer, scalars, self.weight_decay != 0)


class Fusable(optax.GradientTransformationExtraArgs):
    """A transformation that carries its form; what is made of it is an ordinary one."""

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
    """Lift an optimizer and note its form.

    Args:
      scaling: What it does to a gradient before the learning rate.
      optimizer: The kernel.
      states: As in `Form`.
      scalars: As in `Form`.
      learning_rate: The step size, or a schedule of it.
      weight_decay: What part of a weight is added to its scaled gradient.
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

    As `tx.update` and `embax.apply_updates`, in one call. On a CPU with native kernels, a step of `sgd`, `adagrad`,
    `rowwise_adagrad`, `adam` or `rowwise_adam` of `embax.optim` is one pass over the rows of a gradient then, which is
    several times faster; results agree with those of two calls to some units in the last place. Donate `params` and
    `state`, so that it works in place.

    Args:
      tx: The transformation.
      gradients: As `embax.value_and_grad` gives them.
      state: That of the transformation.
      params: A pytree of arrays and Tables.
      extra_args: Further arguments of `tx.update`.

    Returns:
      The new parameters, and the new state.

    Raises:
      TypeError: As `tx.update` and `embax.apply_updates`.
      ValueError: As `tx.update` and `embax.apply_updates`.

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
    """Take a step for parameters that the optimizer of a framework sees, and apply it to those that a model holds.

    Args:
      tx: The transformation.
      gradients: As for `step`.
      state: As for `step`.
      params: The parameters by the rules that they had when the state was made.
      held: The same parameters by the rules that they have.
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
    """Give the rows of tables to the kernel; `after` has what they are without one."""
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
        found = table.storage.step_by_kernel(plain, arrays, ids, gradient.values, how)
        updated[i] = with_weight(updated[i], found[0])
        for rows, array in zip(new_rows, found[1:], strict=True):
            rows[i] = with_weight(rows[i], array)
    replaced = {name: structure.unflatten(rows) for name, rows in zip(form.states, new_rows, strict=True)}
    first = new_state.inner[0]._replace(**replaced) if replaced else new_state.inner[0]
    return structure.unflatten(updated), new_state._replace(inner=(first, *new_state.inner[1:]))


def _is_of_rows(table: PyTree, gradient: PyTree, held: PyTree) -> bool:
    """Say whether a table that is held as it was when the state was made has a gradient of its rows."""
    if not (isinstance(table, Table) and isinstance(held, Table) and isinstance(gradient, RowGrad)):
        return False
    return is_trained(table) and (table.padding_idx, table.freeze) == (held.padding_idx, held.freeze)
