"""Training of word vectors: sequences of words in, vectors out."""

from ._corpus import CorpusError as CorpusError
from ._corpus import paragraphs as paragraphs
from ._corpus import tokenize as tokenize
from ._resume import CheckpointError as CheckpointError
from ._skipgram import Progress as Progress
from ._skipgram import skipgram as skipgram
