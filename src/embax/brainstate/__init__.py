"""Layers for brainstate: Embedding and EmbeddingBag, their row-sparse training, and a jit that updates in place."""

from . import _interop as _interop  # registers the conversions to other frameworks
from . import _modules as _modules  # registers brainstate's modules with embax.shard
from ._bag import EmbeddingBag as EmbeddingBag
from ._embedding import Embedding as Embedding
from ._grad import grad as grad
from ._jit import jit as jit
from ._optimizer import Optimizer as Optimizer
