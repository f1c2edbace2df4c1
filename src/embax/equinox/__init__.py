"""Layers for Equinox: Embedding and EmbeddingBag, modules that hold a Table."""

try:
    import equinox  # noqa: F401
except ImportError as error:
    raise ImportError('embax.equinox needs Equinox, which is not installed: pip install "embax[equinox]"') from error

from ._bag import EmbeddingBag as EmbeddingBag
from ._embedding import Embedding as Embedding
from ._serialise import tree_deserialise_leaves as tree_deserialise_leaves
from ._serialise import tree_serialise_leaves as tree_serialise_leaves
