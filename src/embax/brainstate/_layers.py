"""A registry of the layers that hold a state as their weight: the rules for training it are theirs, not the state's."""

import weakref
from typing import Protocol, runtime_checkable

import brainstate

from .._core.containers import held as _held
from .._core.table import Table, shared_rules
from ._weight import split_unit


@runtime_checkable
class _Layer(Protocol):
    weight: brainstate.State
    padding_idx: int | None
    freeze: bool


# States are hashed by identity. The registry keeps neither states nor layers alive.
_LAYERS: weakref.WeakKeyDictionary[brainstate.State, weakref.WeakSet["_Layer"]] = weakref.WeakKeyDictionary()


def link(state: object, layer: _Layer) -> None:
    """Register that a layer holds a state as its weight. Objects that are no State, such as a FakeState, are skipped.

    Args:
      state: The state.
      layer: The Embedding.
    """
    if isinstance(state, brainstate.State):
        _LAYERS.setdefault(state, weakref.WeakSet()).add(layer)


def table_of(state: brainstate.State) -> Table | None:
    """Return the table that a state holds, with the rules that an optimizer must follow.

    Args:
      state: The state.

    Returns:
      A Table of its value, without the unit, with the rules that all layers holding it share; None if no layer does.
    """
    layers = [layer for layer in _LAYERS.get(state, ()) if layer.weight is state]
    if not layers:
        return None
    weight, _ = split_unit(state.value)
    rules = [{"padding_idx": layer.padding_idx, "freeze": layer.freeze} for layer in layers]
    return shared_rules(_held.table_of(weight, **of_layer) for of_layer in rules)


def has_unit(state: brainstate.State) -> bool:
    """Whether the value of a state is a Quantity, which a RowGrad and a Table cannot hold."""
    return split_unit(state.value)[1] is not None
