"""The interface of a format: how it is recognised, read and written."""

import os
from collections.abc import Callable
from typing import NamedTuple

from .._io.contents import Contents, Options
from .._io.open import Source


class Format(NamedTuple):
    """A format of vector files.

    `read` takes the file, opened at its start, and what the caller wants, and raises a FormatError, which names the
    place, for a file that is not of the format or damaged. `write` replaces an existing file when the new one is whole,
    and raises a ValueError for contents that the format cannot hold, and an OSError if the file cannot be written.
    """

    name: str  # its name in `format=`
    suffixes: tuple[str, ...]  # files with these suffixes, such as ".bin", are written in this format
    recognises: Callable[[Source], bool]  # whether a file has this format, by `source.start` and the size
    read: Callable[[Source, Options], Contents]
    write: Callable[[str | os.PathLike[str], Contents], None]
    # Raises a ValueError if the format cannot be written to a path. Called before long work.
    check: Callable[[str | os.PathLike[str]], None] = lambda path: None
    keeps_subwords: bool = False  # whether `write` keeps sub-words
