"""The formats of vector files, and how a file is told to be of one."""

from . import _arrow, _fasttext, _glove, _npy, _parquet, _safetensors, _tensor, _word2vec
from ._format import Format
from ._open import Source

# In the order in which they are tried: what has a mark of its own goes before what any text could be.
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


def recognised(source: Source) -> Format:
    """Find the format of a file by its content.

    Raises:
      FormatError: If it is of none.
    """
    for one in ALL:
        if one.recognises(source):
            return one
    raise source.error(f"is of no format that is known here ({', '.join(FORMATS)}).")
