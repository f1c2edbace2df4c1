"""Which layers hold a state as their weight, and so by which rules it is trained: a state alone does not say."""

import weakref
from typing import Protocol, runtime_checkable

import brainstate

from .._core import held as _held
from .._core.table import Table, shared_rules
from ._weight import split_unit


@runtime_checkable
class _Layer(Protocol):
    weight: brainstate.State
    padding_idx: int | None
    freeze: bool


# A state is hashed by its identity. Neither states nor layers are kept alive from here.
_LAYERS: weakref.WeakKeyDictionary[brainstate.State, weakref.WeakSet["_Layer"]] = weakref.WeakKeyDictionary()


def link(state: object, layer: _Layer) -> None:
    """Note that a layer holds a state as its weight; what is no state, such as a FakeState, is left out.

    Args:
      state: The state.
      layer: The Embedding.
    """
    if isinstance(state, brainstate.State):
        _LAYERS.setdefault(state, weakref.WeakSet()).add(layer)


def table_of(state: brainstate.State) -> Table | None:
    """Return the weight that a state holds, with the rules that an optimizer has to keep.

    Args:
      state: The state.

    Returns:
      A Table of its value, in units of that, with the rules that the layers which hold it share; None where no layer
      does.
    """
    layers = [layer for layer in _LAYERS.get(state, ()) if layer.weight is state]
    if not layers:
        return None
    weight, _ = split_unit(state.value)
    rules = [{"padding_idx": layer.padding_idx, "freeze": layer.freeze} for layer in layers]
    return shared_rules(_held.table_of(weight, **of_layer) for of_layer in rules)


def has_unit(state: brainstate.State) -> bool:
    """Say whether the value of a state is a Quantity, which a RowGrad and a Table cannot hold."""
    return split_unit(state.value)[1] is not None
