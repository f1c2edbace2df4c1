"""Files: read text corpora, read and write vectors."""

# Each format has a module in `_formats`.

from ._formats.registry import FORMATS as FORMATS
from ._formats.safetensors.file import read_safetensors as read_safetensors
from ._formats.safetensors.file import write_safetensors as write_safetensors
from ._formats.safetensors.tensor import UnnamedRowsWarning as UnnamedRowsWarning
from ._formats.sequences import read_column as read_column
from ._identify import Identity as Identity
from ._identify import identify as identify
from ._io.atomic import check_writable as check_writable
from ._io.atomic import replacing as replacing
from ._io.contents import Contents as Contents
from ._io.contents import DuplicateTokensWarning as DuplicateTokensWarning
from ._io.encodings import UndecodedTokensWarning as UndecodedTokensWarning
from ._io.error import FormatError as FormatError
from ._io.open import MAX_EXPANSION as MAX_EXPANSION
from ._io.streams import is_standard_output as is_standard_output
from ._io.streams import is_stream as is_stream
from ._lines.text import read_text as read_text
from ._load import format_to_write as format_to_write
from ._load import load as load
from ._load import load_identified as load_identified
from ._load import save as save
