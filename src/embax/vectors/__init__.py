"""Vectors: a vector for each token of a vocabulary, with queries by token."""

from ..vocabulary import UnknownTokenError as UnknownTokenError
from ._vectors import Filled as Filled
from ._vectors import MissingTokensWarning as MissingTokensWarning
from ._vectors import NotFiniteWarning as NotFiniteWarning
from ._vectors import Vectors as Vectors
