"""Files: text corpora in, vectors in and out, one module a format."""

from ._atomic import check_writable as check_writable
from ._atomic import replacing as replacing
from ._contents import Contents as Contents
from ._contents import DuplicateTokensWarning as DuplicateTokensWarning
from ._encodings import UndecodedTokensWarning as UndecodedTokensWarning
from ._error import FormatError as FormatError
from ._formats import FORMATS as FORMATS
from ._identify import Identity as Identity
from ._identify import identify as identify
from ._load import format_to_write as format_to_write
from ._load import load as load
from ._load import load_identified as load_identified
from ._load import save as save
from ._open import MAX_EXPANSION as MAX_EXPANSION
from ._safetensors import read_safetensors as read_safetensors
from ._safetensors import write_safetensors as write_safetensors
from ._streams import is_standard_output as is_standard_output
from ._streams import is_stream as is_stream
from ._tensor import UnnamedRowsWarning as UnnamedRowsWarning
from ._text import read_text as read_text
