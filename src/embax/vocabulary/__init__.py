"""Vocabulary: tokens to row numbers and back, without a Python object a token."""

from ._vocabulary import UnknownTokenError as UnknownTokenError
from ._vocabulary import Vocabulary as Vocabulary
