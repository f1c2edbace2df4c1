"""Replace the tables of a model, for `embax.shard` and `embax.unshard`."""

from typing import Any

import brainstate
from jaxtyping import PyTree

from .._core.containers import modules as _modules
from .._core.containers.held import held, table_of
from .._core.containers.modules import OfTable, copied
from ._embedding import Embedding
from ._optimizer import Optimizer
from ._weight import split_unit


def with_tables(call: str, module: brainstate.nn.Module, function: OfTable) -> brainstate.nn.Module:
    """Copy a module, with states of its own, and apply a function to the tables of its Embeddings."""
    module = brainstate.graph.clone(module)
    states: PyTree = module.states()
    for state in states.values():
        state.value = copied(state.value)
    done: set[int] = set()
    nodes: Any = brainstate.graph.nodes(module)
    for path, node in nodes.items():
        if isinstance(node, Optimizer):
            raise TypeError(
                f"`{call}(tree=...)` must not have an optimizer, whose states are those of a model, got one at {path}. "
                f"Call {call} for the model; then register its states anew, or optimizer.carry_over(states)."
            )
        if not isinstance(node, Embedding) or id(node.weight) in done:
            continue
        weight, unit = split_unit(node.weight.value)
        before = table_of(weight)
        after = function(before)
        if after is before:
            continue
        if unit is not None:
            raise ValueError(
                f"`{call}(tree=...)` must have tables without a unit, got one in {unit} at {path}. Make a layer of "
                "weight.value.mantissa."
            )
        if not isinstance(node.weight, brainstate.State):  # the clone shares a FakeState with the caller's module
            node.weight = type(node.weight)(held(after))
        else:
            node.weight.value = held(after)
        done.add(id(node.weight))
    return module


_modules.register(brainstate.nn.Module, with_tables)
