"""Teach `flax.serialization` to save Tables and Collections, without importing Flax."""

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
    """Register a type with `flax.serialization`: now if that is imported, else when it will be.

    Args:
      kind: The type.
      to_state_dict: Returns the state of an instance.
      from_state_dict: Called with an instance and a state; returns a copy of the instance with that state.
    """
    _KINDS[kind] = to_state_dict, from_state_dict
    if hasattr(sys.modules.get(_NAME), "register_serialization_state"):
        _register_all()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # Flax has no protocol for foreign types, only its own registry, so we wait for its import.
        sys.meta_path.insert(0, _Finder())


def of_table(table: Any) -> dict[str, Any]:
    """The state of a Table: its rows in row order, whatever its storage."""
    return {"weight": to_state(table.storage.to_rows(table.weight))}


def to_table(table: Any, state: Any) -> Any:
    """A Table with the rows of a state, and the rules and storage of `table`."""
    from ..table import has_weight, with_weight

    if not isinstance(state, dict) or set(state) != {"weight"}:
        raise ValueError(
            f"`flax.serialization.from_state_dict(state=...)` must have the weight of a Table for {table!r}, got "
            f"{sorted(state) if isinstance(state, dict) else type(state).__name__}. Pass what to_state_dict returned."
        )
    weight = from_state(table.weight, state["weight"], "weight")
    wanted = (table.rows, *table.dim) if has_weight(table) else None
    saved = np.shape(weight) if hasattr(weight, "shape") else None
    if wanted != saved:
        raise ValueError(
            f"`flax.serialization.from_state_dict(target=...)` must have tables of the shapes that were saved, got "
            f"{table!r} for one of {saved}. Make the target of that shape; to change its rows afterwards, use "
            "embax.resize and embax.optim.carry_over."
        )
    return with_weight(table, weight if saved is None else table.storage.from_rows(np.asarray(weight)))


def to_state(node: Any) -> Any:
    """Call `flax.serialization.to_state_dict` for a child node; Flax is imported by then."""
    return sys.modules[_NAME].to_state_dict(node)


def from_state(target: Any, state: Any, name: str) -> Any:
    """Call `flax.serialization.from_state_dict` for a child node; Flax is imported by then."""
    return sys.modules[_NAME].from_state_dict(target, state, name=name)


def register_fields(kind: type, *names: str) -> None:
    """Register a dataclass whose state is the named fields."""

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
    """Finds `flax.serialization` by the usual finders, and wraps its loader to register our types after import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs another loader, then registers our types."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        # Leave no trace: the module keeps its own loader.
        module.__loader__ = module.__spec__.loader = self._loader
        _register_all()
