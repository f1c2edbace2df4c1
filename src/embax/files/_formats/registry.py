"""The list of all formats, and the search for the format of a file."""

from .._io.open import Source
from . import arrow as _arrow
from . import glove as _glove
from . import npy as _npy
from . import parquet as _parquet
from . import word2vec as _word2vec
from .fasttext import file as _fasttext
from .format import Format
from .safetensors import file as _safetensors
from .safetensors import tensor as _tensor

# In the order in which they are tried: formats with a mark of their own come before formats that many texts fit.
ALL: tuple[Format, ...] = (
    _safetensors.FORMAT,
    _tensor.FORMAT,
    _npy.FORMAT,
    _parquet.FORMAT,
    _arrow.FORMAT,
    _fasttext.FORMAT,
    _word2vec.BINARY,
    _word2vec.TEXT,
    _glove.FORMAT,
)
BY_NAME = {format.name: format for format in ALL}

# The names of the formats.
FORMATS: tuple[str, ...] = tuple(BY_NAME)
# Those that keep sub-words.
WITH_SUBWORDS = tuple(format.name for format in ALL if format.keeps_subwords)


def recognised(source: Source) -> Format:
    """Find the format of a file by its content.

    Raises:
      FormatError: If no format recognises it.
    """
    for one in ALL:
        if one.recognises(source):
            return one
    raise source.error(f"is of no format that is known here ({', '.join(FORMATS)}).")
