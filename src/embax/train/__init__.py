"""Training of word vectors: sequences of words in, vectors out."""

from ._corpus import CorpusError as CorpusError
from ._corpus import paragraphs as paragraphs
from ._corpus import tokenize as tokenize
from ._resume import CheckpointError as CheckpointError
from ._loop import Progress as Progress
from ._word2vec import cbow as cbow
from ._word2vec import skipgram as skipgram
