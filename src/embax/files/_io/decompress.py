"""Compressed files: the bytes that come out of them, with a limit to what comes out of little."""

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
    """Tell what compressed a file, zip included, by its first bytes."""
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)


def decompressed(kind: str, path: str, file: BinaryIO) -> BinaryIO:
    """Return the bytes that come out of a file, which `Unpacked` has still to check.

    Args:
      kind: What compressed it, one of those that `compression_of` tells but zip.
      path: The file, for messages.
      file: Its bytes.

    Raises:
      FormatError: If a library for it is missing.
    """
    return _DECOMPRESSORS[kind](path, file)


class Unpacked:
    """What comes out of a compressed file or an archive; an error where more comes than is likely of an honest file.

    Args:
      path: The file, for messages.
      stream: The bytes.
      limit: How many may come.
      max_expansion: By how much the caller multiplied the size of the file to have that limit.
    """

    def __init__(self, path: str, stream: Any, limit: int, max_expansion: float):
        self._path, self._stream, self._left, self._max_expansion = path, stream, limit, max_expansion

    def read(self, size: int) -> bytes:
        """Read as many bytes, or fewer where there are no more.

        Raises:
          FormatError: If the data are truncated or corrupt, or more than the limit.
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
            # gzip and bz2 complain without a number; of a place before the file, the system does.
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
    """Its error, of the modules that are loaded."""
    return [sys.modules[name].ZstdError for name in _ZSTD if sys.modules.get(name) is not None]


_DECOMPRESSORS = {
    "gzip": lambda path, file: gzip.GzipFile(fileobj=file),
    "xz": lambda path, file: lzma.LZMAFile(file),
    "bz2": lambda path, file: bz2.BZ2File(file),
    "zstd": _zstd,
}
