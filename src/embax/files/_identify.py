"""Find out the format and compression of a file of vectors, without reading its vectors."""

import os
from typing import NamedTuple

from ._formats.registry import recognised
from ._io.open import MAX_EXPANSION, Source, opened, split_path


class Identity(NamedTuple):
    """The format, compression and size of a file of vectors."""

    path: str  # the file: the part of the given path before the colon
    member: str | None  # the part after the colon: the name of a tensor, or of a file in an archive
    format: str  # one of `FORMATS`
    compression: str | None  # "gzip", "xz", "bz2", "zstd", "zip", "tar", or "tar and gzip"; None for a plain file
    size: int | None  # in bytes, on disk; for a stream, the number of bytes read, or None before it is read


def identify(
    path: str | os.PathLike[str], *, format: str | None = None, max_expansion: float = MAX_EXPANSION
) -> Identity:
    """Find out the format and compression of a file of vectors from its first bytes.

    Args:
      path: The file; see `embax.Vectors.load`. The first bytes of a stream are consumed, so that it cannot be loaded
        afterwards: use `load_identified` for streams.
      format: The name of its format, if you know it. Default: the format is recognised by the content.
      max_expansion: The uncompressed data may be up to so many times as large as the file; 16 MiB are always allowed.

    Returns:
      The format, compression and size.

    Raises:
      FormatError: If the format is not recognised.
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
    """Return the identity of an open file.

    Args:
      path: The path that the caller gave.
      source: The open file.
      format: The name of its format.
    """
    file, member = split_path(path)
    return Identity(file, member, format, source.compression, source.on_disk)
