"""Training of word vectors: sequences of words in, vectors out."""

from ._input.corpus import CorpusError as CorpusError
from ._input.sources import read_sequences as read_sequences
from ._input.text import paragraphs as paragraphs
from ._input.text import tokenize as tokenize
from ._loop import Epoch as Epoch
from ._loop import Progress as Progress
from ._resume import CheckpointError as CheckpointError
from ._tensorboard import TensorBoard as TensorBoard
from ._word2vec import cbow as cbow
from ._word2vec import skipgram as skipgram
