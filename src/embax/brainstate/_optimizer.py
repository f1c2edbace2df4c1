"""Optimizer: train brainstate states by an optax transformation, with row-sparse training of tables."""

from collections.abc import Hashable, Mapping
from typing import Self

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._core.containers.held import as_table, held
from .._core.table import Table, is_table, with_weight
from .._gradients.chosen import tables_at, without_tables
from ..optim import carry_over
from ..optim._fused import stepped
from ..optim._states import check_takes_tables, prepared_gradient, with_chosen
from ._layers import has_unit, table_of
from ._weight import split_unit, with_unit


class Optimizer(brainstate.nn.Module):
    """Trains states by an optax transformation; in weights of Embeddings, only the rows that were read.

    Used like the optimizers of braintools: register the states once, and pass their gradients to `update`, with the
    RowGrads of `embax.brainstate.grad`. Under `embax.brainstate.jit`, weights and optimizer state are updated in place,
    and time and temporary memory follow the number of ids, not of rows.

    The transformation sees the weight of an `embax.Embedding` as a Table with the layer's `padding_idx` and `freeze`.
    So a padding row never changes, nor does a frozen weight, even under weight decay. If layers share a weight, a rule
    holds only if all of them have it. A weight with a unit is a Quantity, trained as a whole except for such rows. Any
    other state is the leaf or tree that it holds. An array of another layer is a table if
    `embax.optim.lift(..., tables=...)` chooses it, by the same predicate as in `embax.brainstate.grad`.

    Args:
      tx: A transformation over trees with Tables: one of `embax.optim`, such as `embax.optim.rowwise_adagrad(0.1)`, or
        a lifted one, such as `embax.optim.lift(optax.adam(1e-3))`. Without Embeddings, any optax transformation.

    Attributes:
      opt_state: The state of `tx` in a `brainstate.LongTermState`; None before weights are registered.

    Raises:
      TypeError: If `tx` is not a transformation.

    Example:
      >>> import brainstate, embax, jax.numpy as jnp
      >>> class Model(brainstate.nn.Module):
      ...     def __init__(self):
      ...         super().__init__()
      ...         self.embedding = embax.Embedding(1_000, 4)
      ...         self.out = brainstate.nn.Linear(4, 1, b_init=None)
      ...
      ...     def update(self, indices):
      ...         return self.out(self.embedding(indices))
      ...
      >>> model = Model()
      >>> weights = model.states(brainstate.ParamState)
      >>> optimizer = embax.brainstate.Optimizer(embax.optim.rowwise_adagrad(0.1))
      >>> optimizer = optimizer.register_trainable_weights(weights)
      >>> @embax.brainstate.jit
      ... def step(indices):
      ...     loss = lambda: (model(indices) ** 2).mean()
      ...     gradients, value = embax.brainstate.grad(loss, weights, return_value=True)()
      ...     optimizer.update(gradients)
      ...     return value
      ...
      >>> values = [step(jnp.array([3, 5, 3])) for _ in range(20)]
      >>> bool(values[-1] < values[0])
      True
    """

    __module__ = "embax.brainstate"

    # The registered states are the model's, so `optimizer.states()` must not list them again.
    graph_invisible_attrs = ("_states", "_rules", "_again", "_chosen")
    opt_state: brainstate.LongTermState | None = None
    _states: Mapping[Hashable, brainstate.State] = {}
    _rules: Mapping[Hashable, Table | None] = {}  # Tables of shapes; None for states that are no tables
    _again: frozenset[Hashable] = frozenset()  # further keys of the same states
    _chosen: Mapping[str, jax.ShapeDtypeStruct] = {}  # the arrays that `tx` chose as tables, by path

    def __init__(self, tx: optax.GradientTransformation):
        super().__init__()
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(
                "`embax.brainstate.Optimizer(tx=...)` must be an optax.GradientTransformation, got "
                f"{type(tx).__name__}. Pass one, such as embax.optim.lift(optax.adam(1e-3))."
            )
        self.tx = tx
        self.opt_state = None

    def register_trainable_weights(self, states: Mapping[Hashable, brainstate.State]) -> Self:
        """Register states to train, and make a new state of the transformation for all registered states.

        The current rules of the Embeddings are used. Weights that are frozen later, and rows that become padding later,
        are not changed any more, either. After other changes of rules or rows, call `carry_over`, or register again to
        start with a new state.

        Args:
          states: The states by key, such as `model.states(brainstate.ParamState)`. States of earlier calls stay
            registered. A state with several keys is trained once, with the gradient of its first key.

        Returns:
          The optimizer.

        Raises:
          TypeError: If it is not a dict of States, or the transformation does not take RowGrads.
          ValueError: If a key is taken by another state.

        Example:
          >>> import embax, optax
          >>> embedding = embax.Embedding(1_000, 4)
          >>> optimizer = embax.brainstate.Optimizer(embax.optim.lift(optax.sgd(0.1)))
          >>> optimizer = optimizer.register_trainable_weights({"table": embedding.weight})
        """
        call = "embax.brainstate.Optimizer.register_trainable_weights(states=...)"
        return self._start(call, self._states, self._again, states, None)

    def carry_over(self, states: Mapping[Hashable, brainstate.State]) -> Self:
        """Convert the transformation's state to the current tables, after their rows or rules changed.

        Like `embax.optim.carry_over`: rows that existed before keep their state. New rows, unfrozen tables and states
        with a new key start as after `register_trainable_weights`.

        Args:
          states: All states to train by key, such as `model.states(brainstate.ParamState)`; they replace the registered
            ones.

        Returns:
          The optimizer.

        Raises:
          TypeError: As `register_trainable_weights`.
          ValueError: If no weights are registered, or a state that is no table has another shape.

        Example:
          >>> import embax, optax
          >>> embedding = embax.Embedding(1_000, 4)
          >>> optimizer = embax.brainstate.Optimizer(embax.optim.lift(optax.adam(0.1)))
          >>> optimizer = optimizer.register_trainable_weights({"table": embedding.weight})
          >>> embedding.resize(1_200)
          >>> optimizer = optimizer.carry_over({"table": embedding.weight})
        """
        call = "embax.brainstate.Optimizer.carry_over"
        if self.opt_state is None:
            raise ValueError(f"`{call}` must follow register_trainable_weights, got no weights. Register them first.")
        before: PyTree = {
            key: _param(state, rules) if rules is None or has_unit(state) else rules
            for key, rules in self._rules.items()
            for state in [self._states[key]]
        }
        shapes: Mapping[str, PyTree] = self._chosen
        before = jax.tree.map_with_path(
            lambda path, x: Table(shapes[name]) if (name := jax.tree_util.keystr(path)) in shapes else x,
            before,
            is_leaf=is_table,
        )
        return self._start(f"{call}(states=...)", {}, frozenset(), states, before)

    def _start(
        self, call: str, kept: Mapping[Hashable, PyTree], again: frozenset[Hashable], states: PyTree, before: PyTree
    ) -> Self:
        """Make the state of the transformation; with the old parameters in `before`, carry it over."""
        if not isinstance(states, Mapping):
            raise TypeError(
                f"`{call}` must be a dict of States, got {type(states).__name__}. "
                "Pass model.states(brainstate.ParamState)."
            )
        kept, more = dict(kept), set(again)
        owners = {state: key for key, state in kept.items()}
        for key, state in states.items():
            if not isinstance(state, brainstate.State):
                raise TypeError(
                    f"`{call}` must have a State for each key, got {type(state).__name__} for {key!r}. "
                    "Pass model.states(brainstate.ParamState)."
                )
            if kept.get(key, state) is not state:
                raise ValueError(
                    f"`{call}` must not have a key of another state that is registered, got {key!r}. Rename it."
                )
            if owners.setdefault(state, key) == key:
                kept[key] = state
            else:
                more.add(key)
        tables = {key: table_of(state) for key, state in kept.items()}
        params, chosen = with_chosen(self.tx, {key: _param(state, tables[key]) for key, state in kept.items()})
        _refuse_units(chosen, params)
        if before is None or self.opt_state is None:
            opt_state = self.tx.init(params)
        else:
            opt_state = carry_over(self.opt_state.value, before, params, self.tx)
        check_takes_tables("embax.brainstate.Optimizer", self.tx, opt_state, params)
        nodes, _ = jax.tree.flatten_with_path(params, is_leaf=is_table)
        shapes = {jax.tree_util.keystr(path): _shape(node.weight) for path, node in nodes if is_table(node)}
        self._chosen = {name: shapes[name] for name in chosen}
        self._states, self._again = kept, frozenset(more)
        self._rules = {key: None if table is None else _without_values(table) for key, table in tables.items()}
        if self.opt_state is None:
            self.opt_state = brainstate.LongTermState(opt_state)
        else:
            self.opt_state.value = opt_state
        return self

    def update(self, grads: Mapping[Hashable, PyTree]) -> None:
        """Make a step: write the new weights into the states.

        Args:
          grads: The gradient of each registered state by key; for an Embedding's weight, a RowGrad or an array of all
            rows.

        Raises:
          TypeError: If it is not a dict.
          ValueError: If no weights are registered; if a key is missing or unknown; if a gradient does not fit its
            state; if a RowGrad is given for a state that is no table; if a weight was unfrozen or resized since it was
            registered (call `carry_over`).

        Example:
          >>> import embax, optax
          >>> embedding = embax.Embedding(1_000, 4)
          >>> weights = {"table": embedding.weight}
          >>> optimizer = embax.brainstate.Optimizer(embax.optim.lift(optax.sgd(0.1)))
          >>> optimizer = optimizer.register_trainable_weights(weights)
          >>> optimizer.update(embax.brainstate.grad(lambda: embedding([3, 5]).sum(), weights)())
        """
        call = "embax.brainstate.Optimizer.update"
        if self.opt_state is None or not self._states:
            raise ValueError(f"`{call}` must follow register_trainable_weights, got no weights. Register them first.")
        if not isinstance(grads, Mapping):
            raise TypeError(
                f"`{call}(grads=...)` must be a dict with the keys of the registered states, got "
                f"{type(grads).__name__}. Differentiate for the same dict of states."
            )
        missing = [key for key in self._states if key not in grads]
        unknown = [key for key in grads if key not in self._states and key not in self._again]
        if missing or unknown:
            raise ValueError(
                f"`{call}(grads=...)` must have the keys of the registered states, got none for {missing} and unknown "
                f"ones {unknown}. Differentiate for the states that are registered."
            )
        now = {}
        for key, state in self._states.items():
            rules, table = self._rules[key], table_of(state)
            now[key] = rules if table is None else table
            if rules is not None and rules.freeze and not now[key].freeze:
                raise ValueError(
                    f"`{call}` must know what is trained, got the weight {key!r}, which was frozen when it was "
                    "registered. Call carry_over, or register_trainable_weights to begin anew."
                )
        params: PyTree = {key: _param(state, self._rules[key]) for key, state in self._states.items()}
        params = tables_at(self._chosen, params)
        gradients = jax.tree.map_with_path(
            lambda path, param, gradient: prepared_gradient(call, jax.tree_util.keystr(path), param, gradient),
            params,
            {key: grads[key] for key in params},
            is_leaf=lambda node: isinstance(node, Table | brainunit.Quantity),
        )
        opt_state = jax.tree.map(jnp.asarray, self.opt_state.value)  # NumPy arrays if it was restored from a file
        as_held: PyTree = {key: _param(state, now[key]) for key, state in self._states.items()}
        current = tables_at(self._chosen, as_held)
        _, new, opt_state = stepped(self.tx, gradients, opt_state, params, current)
        for key, value in without_tables(as_held, current, new).items():
            _store(self._states[key], now[key], value)
        self.opt_state.value = opt_state


def _shape(weight: PyTree) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype)


def _refuse_units(chosen: frozenset[str], params: PyTree) -> None:
    """Raise a ValueError if a Quantity's mantissa was chosen as a table."""
    for path, node in jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, Table | brainunit.Quantity)):
        leaves = jax.tree.leaves_with_path(node, is_leaf=is_table)
        inside = {jax.tree_util.keystr((*path, *below)) for below, _ in leaves}
        if isinstance(node, brainunit.Quantity) and inside & chosen:
            raise ValueError(
                "`embax.brainstate.Optimizer(tx=...)` must choose tables without a unit, got a Quantity in "
                f"{brainunit.get_unit(node)} at {jax.tree_util.keystr(path)}. Leave it out of lift(tx, tables=...)."
            )


def _without_values(table: Table) -> Table:
    return with_weight(table, _shape(table.weight))


def _param(state: brainstate.State, rules: Table | None) -> PyTree:
    """The parameter that a transformation gets for a state."""
    return state.value if rules is None or has_unit(state) else as_table(rules, state.value)


def _store(state: brainstate.State, rules: Table | None, new: PyTree) -> None:
    if rules is None:
        state.value = new
    elif not rules.freeze:
        old, _ = split_unit(state.value)
        weight, unit = (held(new), None) if isinstance(new, Table) else split_unit(new)
        if unit is not None and rules.padding_idx is not None:  # `apply_updates` protects padding of Tables only
            weight = weight.at[rules.padding_idx].set(old[rules.padding_idx])
        state.value = with_unit(weight, unit)
