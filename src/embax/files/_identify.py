"""What a file of vectors is, before it is read."""

import os
from typing import NamedTuple

from ._load import accepted, recognised
from ._open import MAX_EXPANSION, split_path


class Identity(NamedTuple):
    """What a file of vectors is."""

    path: str  # the file, without what follows a colon
    member: str | None  # what does: a tensor, or a file in an archive
    format: str  # one of `FORMATS`
    compression: str | None  # "gzip", "xz", "bz2", "zip", "zstd", or None for a plain file
    size: int  # in bytes, on disk


def identify(
    path: str | os.PathLike[str], *, format: str | None = None, max_expansion: float = MAX_EXPANSION
) -> Identity:
    """Tell what a file of vectors is by its first bytes.

    Args:
      path: The file; see `embax.Vectors.load`.
      format: The name of its format, where that is known. Default: that of the content.
      max_expansion: How many times its size a compressed file may grow to; 16 MiB are always allowed.

    Returns:
      What it is.

    Raises:
      FormatError: If it is of no format that is known here.
      OSError: If it cannot be opened or read.

    Example:
      >>> import embax, embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.bin")
      >>> embax.Vectors(["a", "b"], [[1.0, 0.0], [0.0, 1.0]]).save(path)
      >>> embax.files.identify(path).format
      'word2vec-binary'
    """
    file, member = split_path(path)
    with accepted(path, max_expansion) as source:
        return Identity(file, member, format or recognised(source).name, source.compression, os.path.getsize(file))
