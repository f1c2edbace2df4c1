"""Embedding tables for JAX: the public names."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from ._bags.embedding_bag import embedding_bag as embedding_bag
    from ._bags.ragged import Ragged as Ragged
    from ._core.lookup import lookup as lookup
    from ._core.lookup import renormalize as renormalize
    from ._core.resize import resize as resize
    from ._core.table import Table as Table
    from ._features.collection import Collection as Collection
    from ._features.collection import Feature as Feature
    from ._features.collection import restack as restack
    from ._features.collection import unstack as unstack
    from ._features.compositional import CompositionalTable as CompositionalTable
    from ._features.hashing import hash_ids as hash_ids
    from ._gradients.apply import apply_updates as apply_updates
    from ._gradients.apply import global_norm as global_norm
    from ._gradients.row_grad import RowGrad as RowGrad
    from ._gradients.value_and_grad import DenseGradientWarning as DenseGradientWarning
    from ._gradients.value_and_grad import grad as grad
    from ._gradients.value_and_grad import value_and_grad as value_and_grad
    from ._heads.attend import attend as attend
    from ._heads.candidates import Unigram as Unigram
    from ._heads.cross_entropy import softmax_cross_entropy as softmax_cross_entropy
    from ._heads.sampled_softmax import sampled_softmax as sampled_softmax
    from ._layers.state_dict import from_state_dict as from_state_dict
    from ._layers.state_dict import to_state_dict as to_state_dict
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
    "Collection": "embax._features.collection",
    "CompositionalTable": "embax._features.compositional",
    "DenseGradientWarning": "embax._gradients.value_and_grad",
    "Embedding": "embax.brainstate",
    "EmbeddingBag": "embax.brainstate",
    "Feature": "embax._features.collection",
    "Ragged": "embax._bags.ragged",
    "RowGrad": "embax._gradients.row_grad",
    "Table": "embax._core.table",
    "Unigram": "embax._heads.candidates",
    "Vectors": "embax.vectors",
    "Vocabulary": "embax.vocabulary",
    "apply_updates": "embax._gradients.apply",
    "attend": "embax._heads.attend",
    "brainstate": "embax.brainstate",
    "checkpoint": "embax.checkpoint",
    "embedding_bag": "embax._bags.embedding_bag",
    "equinox": "embax.equinox",
    "evaluate": "embax.evaluate",
    "files": "embax.files",
    "from_state_dict": "embax._layers.state_dict",
    "global_norm": "embax._gradients.apply",
    "grad": "embax._gradients.value_and_grad",
    "hash_ids": "embax._features.hashing",
    "lookup": "embax._core.lookup",
    "maps": "embax.maps",
    "nnx": "embax.nnx",
    "optim": "embax.optim",
    "renormalize": "embax._core.lookup",
    "resize": "embax._core.resize",
    "restack": "embax._features.collection",
    "sampled_softmax": "embax._heads.sampled_softmax",
    "shard": "embax.sharding",
    "sharding": "embax.sharding",
    "softmax_cross_entropy": "embax._heads.cross_entropy",
    "to_state_dict": "embax._layers.state_dict",
    "train": "embax.train",
    "unshard": "embax.sharding",
    "unstack": "embax._features.collection",
    "value_and_grad": "embax._gradients.value_and_grad",
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
