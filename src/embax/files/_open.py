"""Files of vectors as they are, plain or compressed, with a limit to what comes out of little."""

import bz2
import contextlib
import errno
import gzip
import importlib
import io
import lzma
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from ._error import FormatError

# How much of a file is looked at to find out its format.
_START = 1 << 16
# How many times its size a compressed file may grow to, unless the caller says otherwise.
MAX_EXPANSION = 100.0
# What comes out of a compressed file may always be so large, whatever its ratio.
_HARMLESS = 1 << 24
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


class Source:
    """A file to read: its bytes in order, uncompressed on the way.

    Args:
      path: The file itself.
      member: What follows the colon after the path: a tensor, or a file in an archive, or None.
      stream: Its bytes, uncompressed.
      size: How many there are, where that is known before they are read.
      limit: How many bytes may come out of the file, by formats, too, that compress by themselves.
      compression: What compressed it, or None.
    """

    def __init__(
        self,
        path: str,
        member: str | None,
        stream: BinaryIO,
        size: int | None,
        limit: int,
        compression: str | None = None,
    ):
        self.path, self.member, self.size, self.limit, self.compression = path, member, size, limit, compression
        self._stream = stream
        self.start = self._read(_START)  # the first bytes, to tell the format by
        self._ahead = self.start
        self.position = 0  # of the next byte that `read` gives

    @property
    def compressed(self) -> bool:
        """Whether the bytes come out of a compressed file, and so cannot be mapped into memory."""
        return self.compression is not None

    @property
    def name(self) -> str:
        """The file, for messages."""
        return self.path if self.member is None else f"{self.path}:{self.member}"

    def read(self, size: int) -> bytes:
        """Read as many bytes, or fewer where the file ends.

        Raises:
          FormatError: If compressed data are truncated or corrupt, or far larger than the file.
        """
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += self._read(size - len(data))
        self.position += len(data)
        return data

    def read_exactly(self, size: int, what: str) -> bytes:
        """Read as many bytes.

        Raises:
          FormatError: If there are fewer, naming what is cut off.
        """
        if self.size is not None and size > self.size - self.position:  # before memory is taken
            raise self.truncated(what)
        data = self.read(size)
        if len(data) < size:
            raise self.truncated(what)
        return data

    def unread(self, data: bytes) -> None:
        """Give back the last bytes that were read, to be read again."""
        self._ahead = data + self._ahead
        self.position -= len(data)

    def read_all(self) -> bytes:
        """Read what is left."""
        parts = [self.read(1 << 24)]
        while parts[-1]:
            parts.append(self.read(1 << 24))
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        """Go forward, without reading what lies between where that is possible.

        Raises:
          FormatError: If the data end before.
        """
        self.read(min(len(self._ahead), position - self.position))
        if not self.compressed:
            self._stream.seek(position - self.position, os.SEEK_CUR)
            self.position = position
        while self.position < position:
            if not self.read(min(_HARMLESS >> 2, position - self.position)):
                raise self.truncated(f"what comes before byte {position:,}")

    def error(self, reason: str) -> FormatError:
        """Make the error of this file."""
        return FormatError(self.name, reason)

    def truncated(self, what: str) -> FormatError:
        """Make the error of a file that ends too early."""
        end = self.size if self.size is not None else self.position
        return self.error(f"the file ends at byte {end:,}, within {what}. Is it whole?")

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, *_zstd_errors()) as e:
            reason = e
        except OSError as e:
            # gzip and bz2 complain without a number; of a place before the file, the system does.
            if not self.compressed or e.errno not in (None, errno.EINVAL):
                raise
            reason = e
        raise self.error(f"the compressed data are truncated or corrupt ({str(reason).rstrip('.')}).")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], max_expansion: float = MAX_EXPANSION) -> Iterator[Source]:
    """Open a file of vectors, plain or compressed by gzip, xz, bz2, zip or zstd, as its first bytes tell.

    Args:
      path: The file. After a colon, the name of a file in a zip archive or of a tensor.
      max_expansion: How many times as large as the file its uncompressed bytes may be; 16 MiB may always come.

    Yields:
      The source.

    Raises:
      FormatError: If it is no regular file, or an archive of several files of which none is named.
      OSError: If it cannot be opened.
    """
    path, member = split_path(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise FormatError(path, "not a regular file.")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        file.seek(0)
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        limit = max(_HARMLESS, int(max_expansion * size))
        if kind is None:
            yield Source(path, member, file, size, limit)
            return
        if kind == "zip":
            stream = stack.enter_context(_zip_member(path, member, file))
        else:
            stream = stack.enter_context(_DECOMPRESSORS[kind](path, file))
        limited = cast(BinaryIO, _Limited(path, stream, limit, max_expansion))
        yield Source(path, member, limited, None, limit, compression=kind)


def split_path(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split a path from what follows its last colon, unless there is a file of the whole name."""
    path = os.fspath(path)
    file, colon, member = path.rpartition(":")
    if not colon or os.path.exists(path) or not os.path.exists(file):
        return path, None
    return file, member


def _zip_member(path: str, member: str | None, file: BinaryIO) -> BinaryIO:
    try:
        archive = zipfile.ZipFile(file)
        names = [info.filename for info in archive.infolist() if not info.filename.endswith("/")]
        if member is None and len(names) != 1:
            raise FormatError(
                path, f"holds {len(names)} files, of which one has to be named, as {path}:NAME. It has {names[:10]}."
            )
        if member is not None and member not in names:
            raise FormatError(path, f"holds no file {member!r}. It has {names[:10]}.")
        return cast(BinaryIO, archive.open(member or names[0]))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        if isinstance(error, FormatError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise FormatError(path, f"the zip archive is damaged or not of a kind that can be read ({error}).") from None


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


class _Limited:
    """A stream that ends with an error where more comes out of it than is likely of an honest file."""

    def __init__(self, path: str, stream: Any, limit: int, max_expansion: float):
        self._path, self._stream, self._left, self._max_expansion = path, stream, limit, max_expansion

    def read(self, size: int) -> bytes:
        data = io.BytesIO()
        while size > 0 and (part := self._stream.read(min(size, 1 << 24))):
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
