"""Embedding tables for JAX: the public names."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from ._apply import apply_updates as apply_updates
    from ._apply import global_norm as global_norm
    from ._attend import attend as attend
    from ._bag import embedding_bag as embedding_bag
    from ._candidates import Unigram as Unigram
    from ._collection import Collection as Collection
    from ._collection import Feature as Feature
    from ._collection import restack as restack
    from ._collection import unstack as unstack
    from ._compositional import CompositionalTable as CompositionalTable
    from ._cross_entropy import softmax_cross_entropy as softmax_cross_entropy
    from ._grad import DenseGradientWarning as DenseGradientWarning
    from ._grad import grad as grad
    from ._grad import value_and_grad as value_and_grad
    from ._hash import hash_ids as hash_ids
    from ._lookup import lookup as lookup
    from ._lookup import renormalize as renormalize
    from ._ragged import Ragged as Ragged
    from ._resize import resize as resize
    from ._rows import RowGrad as RowGrad
    from ._sampled_softmax import sampled_softmax as sampled_softmax
    from ._state_dict import from_state_dict as from_state_dict
    from ._state_dict import to_state_dict as to_state_dict
    from ._table import Table as Table
    from .brainstate import Embedding as Embedding
    from .brainstate import EmbeddingBag as EmbeddingBag
    from .sharding import shard as shard
    from .sharding import unshard as unshard
    from .vectors import Vectors as Vectors
    from .vocabulary import Vocabulary as Vocabulary

__version__ = "0.2.0"

# The module that each name comes from, loaded at its first use: the command line answers before JAX is there. A module
# is its own name.
_LAZY = {
    "Collection": "embax._collection",
    "CompositionalTable": "embax._compositional",
    "DenseGradientWarning": "embax._grad",
    "Embedding": "embax.brainstate",
    "EmbeddingBag": "embax.brainstate",
    "Feature": "embax._collection",
    "Ragged": "embax._ragged",
    "RowGrad": "embax._rows",
    "Table": "embax._table",
    "Unigram": "embax._candidates",
    "Vectors": "embax.vectors",
    "Vocabulary": "embax.vocabulary",
    "apply_updates": "embax._apply",
    "attend": "embax._attend",
    "brainstate": "embax.brainstate",
    "checkpoint": "embax.checkpoint",
    "embedding_bag": "embax._bag",
    "equinox": "embax.equinox",
    "evaluate": "embax.evaluate",
    "files": "embax.files",
    "from_state_dict": "embax._state_dict",
    "global_norm": "embax._apply",
    "grad": "embax._grad",
    "hash_ids": "embax._hash",
    "lookup": "embax._lookup",
    "maps": "embax.maps",
    "nnx": "embax.nnx",
    "optim": "embax.optim",
    "renormalize": "embax._lookup",
    "resize": "embax._resize",
    "restack": "embax._collection",
    "sampled_softmax": "embax._sampled_softmax",
    "shard": "embax.sharding",
    "sharding": "embax.sharding",
    "softmax_cross_entropy": "embax._cross_entropy",
    "to_state_dict": "embax._state_dict",
    "train": "embax.train",
    "unshard": "embax.sharding",
    "unstack": "embax._collection",
    "value_and_grad": "embax._grad",
    "vectors": "embax.vectors",
    "vocabulary": "embax.vocabulary",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'embax' has no attribute {name!r}")
    module = _importlib.import_module(_LAZY[name])
    globals()[name] = value = module if _LAZY[name] == f"embax.{name}" else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if not name.startswith("_")} | set(_LAZY))
