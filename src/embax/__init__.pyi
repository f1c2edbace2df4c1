"""The public names and the module that each comes from: the one list, read by type checkers and by `__init__.py`."""

from . import brainstate as brainstate
from . import checkpoint as checkpoint
from . import equinox as equinox
from . import evaluate as evaluate
from . import files as files
from . import kernels as kernels
from . import maps as maps
from . import nnx as nnx
from . import optim as optim
from . import sharding as sharding
from . import train as train
from . import vectors as vectors
from . import vocabulary as vocabulary
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

__version__: str
