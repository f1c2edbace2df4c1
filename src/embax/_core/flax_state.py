"""How Flax's serialization takes Tables and Collections, without a need for Flax."""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

_NAME = "flax.serialization"

ToStateDict = Callable[[Any], Any]
FromStateDict = Callable[[Any, Any], Any]

_KINDS: dict[type, tuple[ToStateDict, FromStateDict]] = {}


def register(kind: type, to_state_dict: ToStateDict, from_state_dict: FromStateDict) -> None:
    """Teach `flax.serialization` a type: at once where it is imported, else as soon as it will be.

    Args:
      kind: The type.
      to_state_dict: Called with an instance, gives its state.
      from_state_dict: Called with an instance and a state, gives an instance with that state.
    """
    _KINDS[kind] = to_state_dict, from_state_dict
    if hasattr(sys.modules.get(_NAME), "register_serialization_state"):
        _register_all()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # Flax asks nobody how to save what it does not know, and only its own registry helps.
        sys.meta_path.insert(0, _Finder())


def of_table(table: Any) -> dict[str, Any]:
    """The state of a Table: its rows in the order of their ids, wherever they are stored."""
    return {"weight": to_state(table.storage.to_rows(table.weight))}


def to_table(table: Any, state: Any) -> Any:
    """A Table with the rules and the layout of another one, and the rows of a state."""
    from .table import has_weight, with_weight

    if not isinstance(state, dict) or set(state) != {"weight"}:
        raise ValueError(
            f"`flax.serialization.from_state_dict(state=...)` must have the weight of a Table for {table!r}, got "
            f"{sorted(state) if isinstance(state, dict) else type(state).__name__}. Pass what to_state_dict gave."
        )
    weight = from_state(table.weight, state["weight"], "weight")
    wanted = (table.rows, *table.dim) if has_weight(table) else None
    saved = np.shape(weight) if hasattr(weight, "shape") else None
    if wanted != saved:
        raise ValueError(
            f"`flax.serialization.from_state_dict(target=...)` must have tables of the shapes that were saved, got "
            f"{table!r} for one of {saved}. Make the target so; embax.resize and embax.optim.carry_over bring it to "
            "other rows."
        )
    return with_weight(table, weight if saved is None else table.storage.from_rows(np.asarray(weight)))


def to_state(node: Any) -> Any:
    """`flax.serialization.to_state_dict`, called by it."""
    return sys.modules[_NAME].to_state_dict(node)


def from_state(target: Any, state: Any, name: str) -> Any:
    """`flax.serialization.from_state_dict`, called by it."""
    return sys.modules[_NAME].from_state_dict(target, state, name=name)


def register_fields(kind: type, *names: str) -> None:
    """Teach `flax.serialization` a dataclass of which these fields are the state."""

    def of_fields(node: Any) -> dict[str, Any]:
        return {name: to_state(getattr(node, name)) for name in names}

    def to_fields(node: Any, state: Any) -> Any:
        return dataclasses.replace(node, **{name: from_state(getattr(node, name), state[name], name) for name in names})

    register(kind, of_fields, to_fields)


def _register_all() -> None:
    serialization = sys.modules[_NAME]
    for kind, functions in _KINDS.items():
        if not serialization.is_serializable(kind):
            serialization.register_serialization_state(kind, *functions)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the others do, and has our types registered when it has run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as another one does, and then has our types registered."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        # As if nobody had been in between.
        module.__loader__ = module.__spec__.loader = self._loader
        _register_all()
