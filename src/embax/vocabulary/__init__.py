"""Vocabulary: convert tokens to row numbers and back."""

from ._vocabulary import UnknownTokenError as UnknownTokenError
from ._vocabulary import Vocabulary as Vocabulary
