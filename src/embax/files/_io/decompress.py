"""Decompress files, with a limit on the size of the result: a tiny file can expand to fill the memory."""

import bz2
import contextlib
import errno
import gzip
import importlib
import io
import lzma
import sys
import tarfile
import zipfile
import zlib
from typing import Any, BinaryIO

from .error import FormatError

_BLOCK = 1 << 24
# In the standard library from Python 3.14 on.
_ZSTD = ("compression.zstd", "backports.zstd")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bz2",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def compression_of(start: bytes) -> str | None:
    """Return the kind of compression of a file with these first bytes, or "zip", or None."""
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)


def decompressed(kind: str, path: str, file: BinaryIO) -> BinaryIO:
    """Return a stream of the uncompressed bytes of a file. Wrap it in `Unpacked`, which checks it.

    Args:
      kind: The kind of compression that `compression_of` returns, except "zip".
      path: The file, for messages.
      file: The file, opened for reading.

    Raises:
      FormatError: If the library for this kind is missing.
    """
    return _DECOMPRESSORS[kind](path, file)


class Unpacked:
    """A stream of uncompressed bytes that raises an error if the data are damaged or larger than a limit.

    Args:
      path: The file, for messages.
      stream: The uncompressed bytes.
      limit: The largest number of bytes.
      max_expansion: The factor by which the limit is larger than the file, for messages.
    """

    def __init__(self, path: str, stream: Any, limit: int, max_expansion: float):
        self._path, self._stream, self._left, self._max_expansion = path, stream, limit, max_expansion

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the data.

        Raises:
          FormatError: If the data are truncated or corrupt, or larger than the limit.
        """
        data = io.BytesIO()
        while size > 0 and (part := self._read(min(size, _BLOCK))):
            data.write(part)
            size -= len(part)
            self._left -= len(part)
            if self._left < 0:
                raise FormatError(
                    self._path,
                    f"more than {self._max_expansion:g} times as much comes out of this compressed file as is in it. "
                    "Raise max_expansion if it is to be trusted.",
                )
        return data.getvalue()

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (
            EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError,
            *_zstd_errors(),
        ) as error:  # fmt: skip
            reason = error
        except OSError as error:
            # gzip and bz2 raise errors without a number; EINVAL is a position before the beginning of the file.
            if error.errno not in (None, errno.EINVAL):
                raise
            reason = error
        raise FormatError(
            self._path, f"the compressed data are truncated or corrupt ({str(reason).rstrip('.')})."
        ) from None


def _zstd(path: str, file: BinaryIO) -> Any:
    for name in _ZSTD:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).ZstdFile(file)
    raise FormatError(path, 'is compressed by zstd, for which a library is missing. pip install "embax[files]".')


def _zstd_errors() -> list[type[Exception]]:
    """Return the error classes of those zstd modules that are loaded."""
    return [sys.modules[name].ZstdError for name in _ZSTD if sys.modules.get(name) is not None]


_DECOMPRESSORS = {
    "gzip": lambda path, file: gzip.GzipFile(fileobj=file),
    "xz": lambda path, file: lzma.LZMAFile(file),
    "bz2": lambda path, file: bz2.BZ2File(file),
    "zstd": _zstd,
}
