"""Open files of vectors: plain or compressed, in an archive, in the folder of a model, or a stream."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

from . import archives as _archives
from .decompress import Unpacked, compression_of, decompressed
from .error import FormatError
from .folders import Folder, folders_of, model_in
from .refused import explain
from .streams import STANDARD, is_stream, name_of_input, reading_from

# The number of first bytes by which the format is recognised.
_START = 1 << 16
# By default, the uncompressed data may be up to so many times as large as the file.
MAX_EXPANSION = 100.0
# Uncompressed data of this size are always allowed, however small the file is.
_HARMLESS = 1 << 24
# Bytes that are copied at once.
_COPIED = 1 << 20


class Source:
    """An open file, from which uncompressed bytes are read in order.

    Args:
      path: The file itself.
      stream: The uncompressed bytes.
      limit: The largest number of uncompressed bytes. Formats with their own compression obey it, too.
      name: The name of the file for messages.
      member: The name of a tensor or a vocabulary that the caller gave after a colon.
      inner: The name of the file in its archive; None if it is in no archive.
      size: The number of uncompressed bytes; None if it is not known before they are read.
      compression: The kind of compression or archive; None for a plain file.
      plain: The path of a plain file with the same bytes, if there is one.
      on_disk: The size of the compressed or plain file; None for a stream that is not copied to disk.
      folders: The folders in which files that belong to this one are looked for.
      expand: For a stream: computes the limit from the size of the stream, once that is known.
    """

    def __init__(
        self,
        path: str,
        stream: BinaryIO,
        limit: int,
        *,
        name: str | None = None,
        member: str | None = None,
        inner: str | None = None,
        size: int | None = None,
        compression: str | None = None,
        plain: str | None = None,
        on_disk: int | None = None,
        folders: tuple[Folder, ...] = (),
        expand: Callable[[int], int] | None = None,
    ):
        self.path, self.name, self.member, self.inner = path, path if name is None else name, member, inner
        self.size, self.limit, self.compression, self.plain, self.on_disk = size, limit, compression, plain, on_disk
        self._stream, self._folders, self._expand = stream, folders, expand
        self._copies = contextlib.ExitStack()
        self.start = self._stream.read(_START)  # the first bytes, to tell the format by
        self._ahead = self.start
        self.position = 0  # of the next byte that `read` gives

    @property
    def whole_name(self) -> str:
        """The path to which a caller may append a colon and the name of a tensor."""
        return self.path if self.inner is None else f"{self.path}:{self.inner}"

    @property
    def in_order(self) -> str | None:
        """The reason why the bytes can be read only from first to last; None if they can be read in any order."""
        if self.plain is not None:
            return None
        return "it is a stream" if self.compression is None else "it is compressed"

    def read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the file.

        Raises:
          FormatError: If compressed data are truncated or corrupt, or larger than the limit.
        """
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += self._stream.read(size - len(data))
        self.position += len(data)
        return data

    def read_exactly(self, size: int, what: str) -> bytes:
        """Read exactly `size` bytes.

        Raises:
          FormatError: If the file ends before; the message says that it ends within `what`.
        """
        if self.size is not None and size > self.size - self.position:  # before memory is allocated
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
        """Read the rest of the file."""
        parts = [self.read(1 << 24)]
        while parts[-1]:
            parts.append(self.read(1 << 24))
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        """Go forward to a position. Plain files skip the bytes between without reading them.

        Raises:
          FormatError: If the data end before the position.
        """
        self.read(min(len(self._ahead), position - self.position))
        if self.in_order is None:
            self._stream.seek(position - self.position, os.SEEK_CUR)
            self.position = position
        while self.position < position:
            if not self.read(min(_HARMLESS >> 2, position - self.position)):
                raise self.truncated(f"what comes before byte {position:,}")

    def as_file(self) -> str:
        """Return the path of a plain file with these bytes, for readers that need random access.

        Streams and compressed files are copied to a temporary file, which exists as long as this file is open.

        Raises:
          FormatError: See `read`.
        """
        if self.plain is None:
            path, size = _copied(self._copies, iter(lambda: self.read(_COPIED), b""))
            if self._expand is not None:
                self.limit = self._expand(size)
            return path
        return self.plain

    @property
    def has_folder(self) -> bool:
        """Whether the file is in a folder, on disk or in an archive. Standard input is in none."""
        return bool(self._folders)

    def beside(self, name: str) -> str | None:
        """Return the path, for `opened`, of a file of this name in the same folder; None if there is none."""
        return next(filter(None, (folder.path(name) for folder in self._folders)), None)

    def names_beside(self) -> list[str]:
        """Return the names of the files in the same folder."""
        return self._folders[0].names() if self._folders else []

    def close(self) -> None:
        """Remove temporary copies."""
        self._copies.close()

    def error(self, reason: str) -> FormatError:
        """Return a `FormatError` that names this file."""
        return FormatError(self.name, reason)

    def truncated(self, what: str) -> FormatError:
        """Return the error for a file that ends too early, within `what`."""
        end = self.size if self.size is not None else self.position
        return self.error(f"the file ends at byte {end:,}, within {what}. Is it whole?")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], max_expansion: float = MAX_EXPANSION) -> Iterator[Source]:
    """Open a file of vectors. Compression and archives are recognised by the first bytes.

    The file may be compressed by gzip, xz, bz2 or zstd, be in a zip or tar archive, or be a stream. A stream that is
    compressed, or whose format needs random access, is copied into the folder of temporary files first.

    Args:
      path: The file, or the folder of a model; `-` is standard input. After a colon, the name of a file in an archive,
        or of a tensor.
      max_expansion: The uncompressed data may be up to so many times as large as the file; 16 MiB are always allowed.

    Yields:
      The source.

    Raises:
      FormatError: If the file is of a kind that is never read, such as a pickle (the message says how to convert it),
        or an archive with several files and no name after the colon.
      OSError: If the file cannot be opened.
    """
    path, member = split_path(path)
    if os.path.isdir(path):
        path = model_in(path)
    with contextlib.ExitStack() as stack:
        source = _Opening(stack, path, member, max_expansion).source()
        stack.callback(source.close)
        if (error := explain(name_of_input(path), source.start)) is not None:
            raise error
        yield source


def split_path(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Split a path at a colon into a file and a name within it. A file with the colon in its own name is not split.

    If there are several colons, the path is split at the last one before which there is the name of a file.
    """
    path = os.fspath(path)
    if os.path.exists(path):
        return path, None
    end = path.rfind(":")
    while end > 0:
        if path[:end] == STANDARD or os.path.exists(path[:end]):
            return path[:end], path[end + 1 :]
        end = path.rfind(":", 0, end)
    return path, None


class _Opening:
    """Opens a file, and its compression and archive one after the other, and makes the Source."""

    def __init__(self, stack: contextlib.ExitStack, path: str, member: str | None, max_expansion: float):
        self._stack, self._path, self._member, self._max_expansion = stack, path, member, max_expansion
        self._shown = name_of_input(path)
        self._name = self._shown if member is None else f"{self._shown}:{member}"
        self._plain, self._size, self._folders = path, 0, folders_of(path)

    def source(self) -> Source:
        """Open the file according to its first bytes."""
        if is_stream(self._path):
            file = self._stack.enter_context(reading_from(self._path))
            start = file.read(_archives.TAR_HEADER)
            if compression_of(start) is None and not _archives.is_tar(start):
                return self._made(_Rejoined(start, file), member=self._member, expand=self._limit)
            self._plain, self._size = _copied(self._stack, _from(start, file))
        file = self._again()
        self._size = os.fstat(file.fileno()).st_size
        start = file.read(_archives.TAR_HEADER)
        file.seek(0)
        kind = compression_of(start)
        if kind == "zip":
            if (error := explain(self._shown, start, self._plain)) is not None:  # torch's files are archives
                raise error
            return self._in_archive(kind, _archives.Zip(self._shown, file))
        if kind is not None:
            source = self._made(self._decompressed(kind), member=self._member, compression=kind)
            if not _archives.is_tar(source.start):
                return source
            return self._in_archive(f"tar and {kind}", _archives.Tar(self._shown, lambda: self._decompressed(kind)))
        if _archives.is_tar(start):
            return self._in_archive("tar", _archives.Tar(self._shown, self._again))
        return self._made(file, member=self._member, size=self._size, plain=self._plain)

    def _in_archive(self, kind: str, archive: _archives.Archive) -> Source:
        inner, member = _archives.chosen(self._shown, archive, self._member)
        around = _archives.beside(archive.names(), inner)
        folder = Folder(lambda: list(around), lambda name: f"{self._plain}:{around[name]}" if name in around else None)
        self._folders = (folder, *self._folders)
        stream = self._unpacked(archive.open(inner, self._stack))
        return self._made(stream, member=member, inner=inner, compression=kind)

    def _made(self, stream: Any, **options: Any) -> Source:
        on_disk = None if "expand" in options else self._size
        common = {"name": self._name, "on_disk": on_disk, "folders": self._folders}
        return Source(self._path, stream, self._limit(self._size), **common, **options)

    def _limit(self, size: int) -> int:
        return max(_HARMLESS, int(self._max_expansion * size))

    def _again(self) -> BinaryIO:
        return self._stack.enter_context(open(self._plain, "rb"))

    def _decompressed(self, kind: str) -> BinaryIO:
        return self._unpacked(self._stack.enter_context(decompressed(kind, self._shown, self._again())))

    def _unpacked(self, stream: Any) -> BinaryIO:
        return cast(BinaryIO, Unpacked(self._name, stream, self._limit(self._size), self._max_expansion))


def _copied(stack: contextlib.ExitStack, parts: Iterable[bytes]) -> tuple[str, int]:
    """Write bytes to a temporary file, which is removed when `stack` ends; return its path and size."""
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="embax-"))
    for part in parts:
        file.write(part)
    file.flush()
    return file.name, file.tell()


def _from(start: bytes, rest: BinaryIO) -> Iterator[bytes]:
    yield start
    yield from iter(lambda: rest.read(_COPIED), b"")


class _Rejoined:
    """A stream that cannot be rewound, with the bytes that were read from it put back."""

    def __init__(self, start: bytes, rest: BinaryIO):
        self._start, self._rest = start, rest

    def read(self, size: int) -> bytes:
        parts, self._start = [self._start[:size]], self._start[size:]
        size -= len(parts[0])
        # In pieces: `read` of a file allocates all the memory that is asked for, before it reads anything.
        while size > 0 and (part := self._rest.read(min(size, _HARMLESS))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
