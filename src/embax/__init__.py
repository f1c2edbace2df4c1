"""Embedding tables for JAX: the public names."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._bag import embedding_bag as embedding_bag
from ._collection import Collection as Collection
from ._collection import Feature as Feature
from ._collection import restack as restack
from ._collection import unstack as unstack
from ._compositional import CompositionalTable as CompositionalTable
from ._grad import DenseGradientWarning as DenseGradientWarning
from ._grad import grad as grad
from ._grad import value_and_grad as value_and_grad
from ._hash import hash_ids as hash_ids
from ._lookup import lookup as lookup
from ._lookup import renormalize as renormalize
from ._ragged import Ragged as Ragged
from ._rows import RowGrad as RowGrad
from ._rows import apply_updates as apply_updates
from ._rows import global_norm as global_norm
from ._table import Table as Table
from ._table import resize as resize

if _TYPE_CHECKING:
    from .brainstate import Embedding as Embedding
    from .brainstate import EmbeddingBag as EmbeddingBag

__version__ = "0.1.0"

# Names that need a framework or a heavy library, and the module that each comes from. A module is its own name.
_LAZY = {
    "Embedding": "embax.brainstate",
    "EmbeddingBag": "embax.brainstate",
    "Vectors": "embax.vectors",
    "brainstate": "embax.brainstate",
    "files": "embax.files",
    "optim": "embax.optim",
    "train": "embax.train",
    "vectors": "embax.vectors",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'embax' has no attribute {name!r}")
    module = _importlib.import_module(_LAZY[name])
    return module if _LAZY[name] == f"embax.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")} | set(_LAZY))
