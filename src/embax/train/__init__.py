"""Training of word vectors: sequences of words in, vectors out."""

from ._corpus import CorpusError as CorpusError
from ._loop import Epoch as Epoch
from ._loop import Progress as Progress
from ._resume import CheckpointError as CheckpointError
from ._sources import read_sequences as read_sequences
from ._tensorboard import TensorBoard as TensorBoard
from ._text import paragraphs as paragraphs
from ._text import tokenize as tokenize
from ._word2vec import cbow as cbow
from ._word2vec import skipgram as skipgram
