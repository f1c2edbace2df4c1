"""Optimizer: NNX's Optimizer with row-sparse training of tables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import PyTree

from .._core.containers import modules as _modules
from .._core.containers.held import as_table, held
from .._core.scratch import Scratch, is_with_slots
from .._core.table import Table, has_weight, is_table, with_weight
from .._gradients.chosen import tables_at
from ..optim import carry_over
from ..optim._fused import stepped
from ..optim._states import check_takes_tables, prepared_gradient, with_chosen
from ._params import tables_of, tree_of, with_values

_CALL = "embax.nnx.Optimizer"


class ScratchArray(nnx.OptArray, Scratch):
    """Scratch memory of an optimizer, which checkpoints leave out."""


class Optimizer(nnx.Optimizer):
    """Trains a module by an optax transformation; in Params of Embeddings, only the rows that were read.

    Used like `nnx.Optimizer`. `update` takes gradients from `embax.nnx.value_and_grad`, with their RowGrads, and from
    `nnx.value_and_grad`. If model and optimizer are donated, by `nnx.jit(step, donate_argnums=(0, 1))`, both are
    updated in place, and time and temporary memory follow the number of ids, not of rows.

    The transformation sees the Param of an `embax.nnx.Embedding` as a Table with the layer's `padding_idx` and
    `freeze`. So a padding row never changes, nor does a frozen weight, even under weight decay. If layers share a
    Param, a rule holds only if all of them have it. A Param of another layer is a table if
    `embax.optim.lift(..., tables=...)` chooses it, by the same predicate as in `embax.nnx.value_and_grad`.

    Args:
      model: The module.
      tx: A transformation over trees with Tables: one of `embax.optim`, such as `embax.optim.rowwise_adagrad(0.1)`, or
        a lifted one, such as `embax.optim.lift(optax.adam(1e-3))`.
      wrt: Which Variables are trained, as in `nnx.Optimizer`.

    Attributes:
      step: The number of updates, an `nnx.OptState`.
      opt_state: The state of `tx`.

    Raises:
      TypeError: If `tx` is not a transformation, or does not take RowGrads.

    Example:
      >>> import embax.nnx, jax, optax
      >>> from flax import nnx
      >>> model = nnx.Sequential(embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
      >>> optimizer = embax.nnx.Optimizer(model, embax.optim.lift(optax.adam(0.1)))
      >>> @nnx.jit(donate_argnums=(0, 1))
      ... def step(model, optimizer, ids):
      ...     value, gradient = embax.nnx.value_and_grad(lambda model: (model(ids) ** 2).mean())(model)
      ...     optimizer.update(model, gradient)
      ...     return value
      ...
      >>> values = [step(model, optimizer, jax.numpy.array([3, 5, 3])) for _ in range(20)]
      >>> bool(values[-1] < values[0])
      True
    """

    __module__ = "embax.nnx"

    def __init__(self, model: nnx.Pytree, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param):
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(
                f"`{_CALL}(tx=...)` must be an optax.GradientTransformation, got {type(tx).__name__}. "
                "Pass one, such as embax.optim.lift(optax.adam(1e-3))."
            )
        params, chosen = with_chosen(tx, tree_of(nnx.state(model, wrt), tables_of(model)))
        opt_state = tx.init(params)
        check_takes_tables(_CALL, tx, opt_state, params)
        self.step = nnx.OptState(jnp.zeros((), jnp.uint32))
        self.tx, self.wrt, self.graph = tx, wrt, None
        self._start(params, opt_state, chosen)

    def _start(self, params: PyTree, opt_state: PyTree, chosen: frozenset[str]) -> None:
        """Store a state, and record the tables it was made for."""
        self.opt_state = nnx.data(_as_variables(opt_state))
        self._chosen = chosen
        nodes, _ = _flatten(params)
        tables = {jax.tree_util.keystr(path): node for path, node in nodes if isinstance(node, Table)}
        self._rules = nnx.static({name: (table.padding_idx, table.freeze) for name, table in tables.items()})
        stored = {name: (table.weight.shape, str(table.dtype), table.storage) for name, table in tables.items()}
        self._stored = nnx.static(stored)

    def update(self, model: nnx.Pytree, grads: PyTree, /, **kwargs: PyTree) -> PyTree:
        """Make a step: write the new weights into the model.

        Args:
          model: The module that the optimizer was made for.
          grads: Its gradient, an `nnx.State`; for an Embedding's Param, a RowGrad or an array of all rows.
          **kwargs: Further arguments for `tx`.

        Returns:
          The updates, a nested dict; for an Embedding's Param, a RowGrad or a Table.

        Raises:
          ValueError: If a gradient is missing or does not fit; if a RowGrad is given for a Param that is no table; if a
            table was unfrozen or resized since the state was made (call `carry_over`).
        """
        call = f"{_CALL}.update"
        state = nnx.state(model, self.wrt)
        now = tables_at(self._chosen, tree_of(state, tables_of(model)))
        nodes, structure = _flatten(now)
        names = [jax.tree_util.keystr(path) for path, _ in nodes]
        # `tx` gets the rules that its state was made for. `apply_updates` below follows the current rules.
        params = [self._at_start(call, name, param) for name, (_, param) in zip(names, nodes, strict=True)]
        try:
            given = structure.flatten_up_to(tree_of(nnx.state(grads, self.wrt), {}))
        except ValueError as error:
            raise ValueError(
                f"`{call}(grads=...)` must have a gradient for each Variable that is trained, {', '.join(names)}, got "
                f"another structure ({error}). Differentiate for the same filter."
            ) from error
        gradients = [prepared_gradient(call, *parts) for parts in zip(names, params, given, strict=True)]
        params = structure.unflatten(params)
        gradients = structure.unflatten(gradients)
        updates, new, opt_state = stepped(self.tx, gradients, self._pure_state(), params, now, **kwargs)
        nnx.update(model, with_values(state, new))
        for variable, value in zip(self._variables(), _values(opt_state), strict=True):
            variable.set_value(value)
        self.step[...] += 1
        return updates

    def carry_over(self, model: nnx.Pytree) -> None:
        """Convert the state to the model's current tables, after their rows or rules changed.

        Like `embax.optim.carry_over`: rows that existed before keep their state. New rows, unfrozen tables and new
        Embeddings start as in a new optimizer.

        Args:
          model: The module. Variables that are no tables must have the same shapes as before.

        Raises:
          ValueError: If a Variable that is no table has another shape.

        Example:
          >>> import embax.nnx, jax, optax
          >>> from flax import nnx
          >>> model = embax.nnx.Embedding(1_000, 4, rngs=nnx.Rngs(0))
          >>> optimizer = embax.nnx.Optimizer(model, embax.optim.lift(optax.adam(0.1)))
          >>> model.resize(1_200, jax.random.key(0))
          >>> optimizer.carry_over(model)
        """
        params, chosen = with_chosen(self.tx, tree_of(nnx.state(model, self.wrt), tables_of(model)))
        nodes, structure = _flatten(params)
        before = structure.unflatten([self._before(jax.tree_util.keystr(path), node) for path, node in nodes])
        self._start(params, carry_over(self._pure_state(), before, params, self.tx), chosen)

    def _before(self, name: str, param: PyTree) -> PyTree:
        """A parameter as it was when the state was made; a new table counts as one that was frozen, without a state."""
        if not isinstance(param, Table):
            return param
        if name not in self._rules:
            return with_weight(param, param.weight, freeze=True)
        padding_idx, freeze = self._rules[name]
        *stored, storage = self._stored[name]
        rules = {"padding_idx": padding_idx, "freeze": freeze, "storage": storage}
        return with_weight(param, jax.ShapeDtypeStruct(*stored), **rules)

    def _variables(self) -> list[PyTree]:
        return jax.tree.leaves(self.opt_state, is_leaf=_is_variable)

    def _pure_state(self) -> PyTree:
        return jax.tree.map(_without_variables, self.opt_state, is_leaf=_is_node)

    def _at_start(self, call: str, name: str, param: PyTree) -> PyTree:
        """Give a table the rules that it had when the state was made."""
        if not isinstance(param, Table) or name not in self._rules:
            return param
        padding_idx, freeze = self._rules[name]
        if freeze and not param.freeze:
            raise ValueError(
                f"`{call}(model=...)` must not have a table trained that was frozen when the optimizer was made, got "
                f"{name}. Call optimizer.carry_over(model)."
            )
        return Table(param.weight, padding_idx=padding_idx, freeze=freeze, storage=param.storage)


def _flatten(params: PyTree) -> PyTree:
    return jax.tree.flatten_with_path(params, is_leaf=is_table)


def _refused(call: str, optimizer: nnx.Optimizer, function: Callable[..., PyTree]) -> nnx.Optimizer:
    raise TypeError(
        f"`{call}(tree=...)` must not have an optimizer, whose state is that of a model, got a "
        f"{type(optimizer).__name__}. Call {call} for the model, and then optimizer.carry_over(model)."
    )


_modules.register(Optimizer, _refused)


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def _is_node(node: object) -> bool:
    return isinstance(node, Table | nnx.Variable)


def _as_variables(opt_state: PyTree) -> PyTree:
    """Put each array of a state into a Variable; rows of a table together with their storage."""

    def variable(node: PyTree) -> PyTree:
        if is_with_slots(node):
            rest = node._replace(slots=())
            rest = jax.tree.map(variable, rest, is_leaf=lambda x: x is not rest and (_is_node(x) or is_with_slots(x)))
            return rest._replace(slots=jax.tree.map(ScratchArray, node.slots))
        if isinstance(node, Table) and has_weight(node):
            return with_weight(node, nnx.OptArray(held(node)))
        return jax.tree.map(nnx.OptArray, node)

    return jax.tree.map(variable, opt_state, is_leaf=lambda x: _is_node(x) or is_with_slots(x))


def _values(opt_state: PyTree) -> list[PyTree]:
    """List the values for the Variables of a state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Table) and has_weight(node))
    return [held(node) if isinstance(node, Table) else node for node in nodes]


def _without_variables(node: PyTree) -> PyTree:
    """Take a value out of its Variable; refuse rows whose storage is not the table's."""
    if isinstance(node, nnx.Variable):
        return node.get_value()
    if not isinstance(node.weight, nnx.Variable):
        return jax.tree.map(lambda x: x.get_value(), node, is_leaf=_is_variable)
    value = as_table(node, node.weight.get_value())
    if value.storage != node.storage:
        raise ValueError(
            f"`{_CALL}.update` must have a state that is laid out as the tables that it was made for, got "
            f"{value.storage.descriptions[0]} for {node.storage.descriptions[0]}. Restore it by "
            "embax.checkpoint.restore(path, nnx.state(optimizer)), or make the optimizer for the model as it was and "
            "call optimizer.carry_over(model)."
        )
    return value
