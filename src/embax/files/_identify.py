"""What a file of vectors is, before it is read."""

import os
from typing import NamedTuple

from ._formats.registry import recognised
from ._io.open import MAX_EXPANSION, Source, opened, split_path


class Identity(NamedTuple):
    """What a file of vectors is."""

    path: str  # the file, without what follows a colon
    member: str | None  # what does: a tensor, or a file in an archive
    format: str  # one of `FORMATS`
    # "gzip", "xz", "bz2", "zstd", "zip", "tar", or such as "tar and gzip"; None for a plain file.
    compression: str | None
    size: int | None  # in bytes, on disk; of a stream, as many as were read, None before


def identify(
    path: str | os.PathLike[str], *, format: str | None = None, max_expansion: float = MAX_EXPANSION
) -> Identity:
    """Tell what a file of vectors is by its first bytes.

    Args:
      path: The file; see `embax.Vectors.load`. Of a stream, the bytes that are looked at are gone then:
        `load_identified` does both.
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
    with opened(path, max_expansion) as source:
        return identity_of(path, source, format or recognised(source).name)


def identity_of(path: str | os.PathLike[str], source: Source, format: str) -> Identity:
    """Tell what an open file is.

    Args:
      path: As the caller gave it.
      source: The file.
      format: The name of its format.
    """
    file, member = split_path(path)
    return Identity(file, member, format, source.compression, source.on_disk)
