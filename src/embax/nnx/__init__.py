"""Layers for Flax NNX: Embedding and EmbeddingBag, with gradients and an optimizer for row-sparse training."""

try:
    import flax.nnx  # noqa: F401
except ImportError as error:
    raise ImportError('embax.nnx needs Flax, which is not installed: pip install "embax[nnx]"') from error

from ._bag import EmbeddingBag as EmbeddingBag
from ._embedding import Embedding as Embedding
from ._grad import grad as grad
from ._grad import value_and_grad as value_and_grad
from ._optimizer import Optimizer as Optimizer
