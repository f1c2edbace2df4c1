"""The layer for brainstate: Embedding, and a jit that updates its table in place."""

from . import _interop as _interop  # registers the conversions to other frameworks
from ._embedding import Embedding as Embedding
from ._jit import jit as jit
