"""Files: text corpora in, vectors in and out, one module a format."""

from ._atomic import check_writable as check_writable
from ._atomic import replacing as replacing
from ._error import FormatError as FormatError
from ._safetensors import Contents as Contents
from ._safetensors import read_safetensors as read_safetensors
from ._safetensors import write_safetensors as write_safetensors
from ._text import read_text as read_text
