"""Training: sequences of tokens in, vectors out."""

from ._corpus import CorpusError as CorpusError
from ._corpus import tokenize as tokenize
from ._skipgram import Progress as Progress
from ._skipgram import skipgram as skipgram
