"""Zip and tar archives: choose a file in one, and read its bytes in order. Nothing is unpacked onto a disk."""

import contextlib
import errno
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Protocol, cast, runtime_checkable

from .error import FormatError

_BLOCK = 1 << 20
# A tar archive begins with a header of 512 bytes. It holds the sum of its own bytes, in octal digits.
TAR_HEADER = 512
_SUM = slice(148, 156)
# Files of an archive that hold no vectors: documents and hidden files (macOS adds some).
_BESIDES = re.compile(
    r"(?:.*/)?(?:(?:readme|licen[cs]e|copying|notice|changelog|citation)\b[^/]*|[^/]*\.md|\..*|__MACOSX/.*)",
    re.IGNORECASE,
)
# If an archive has several files, the first of these kinds that occurs must occur once: that file is read.
# The other files may be its vocabulary.
_KINDS = (".safetensors.index.json", ".safetensors", ".npy")
_SHOWN = 10


@runtime_checkable
class Archive(Protocol):
    """An archive that lists its files and opens them."""

    def names(self) -> list[str]:
        """Return the names of the files, in the order of the archive."""
        ...

    def open(self, name: str, stack: contextlib.ExitStack) -> BinaryIO:
        """Open one of the files; it is closed when the stack ends."""
        ...


class Zip:
    """A zip archive.

    Args:
      path: The archive, for messages.
      file: The archive, opened for reading.
    """

    def __init__(self, path: str, file: BinaryIO):
        self._path = path
        with self._checked():
            self._archive = zipfile.ZipFile(file)

    def names(self) -> list[str]:
        """Return the names of the files."""
        return [info.filename for info in self._archive.infolist() if not info.filename.endswith("/")]

    def open(self, name: str, stack: contextlib.ExitStack) -> BinaryIO:
        """Open one of the files."""
        with self._checked():
            return cast(BinaryIO, stack.enter_context(self._archive.open(name)))

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            reason = f"the zip archive is damaged or not of a kind that can be read ({error})."
            raise FormatError(self._path, reason) from None


class Tar:
    """A tar archive. It has no list of files, so each call reads it from the beginning.

    Links in it are not followed.

    Args:
      path: The archive, for messages.
      unpacked: Opens the archive and returns its uncompressed bytes from the beginning.
    """

    def __init__(self, path: str, unpacked: Callable[[], BinaryIO]):
        self._path, self._unpacked = path, unpacked
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """Return the names of the files, without a leading `./`."""
        if self._names is None:
            with contextlib.ExitStack() as stack:
                self._names = [name for name, _, _ in self._files(stack)]
        return self._names

    def open(self, name: str, stack: contextlib.ExitStack) -> BinaryIO:
        """Open one of the files."""
        for found, archive, info in self._files(stack):
            if found == name:
                return cast(BinaryIO, archive.extractfile(info))
        raise FormatError(self._path, f"holds no file {name!r}.")

    def _files(self, stack: contextlib.ExitStack) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
        try:
            archive = stack.enter_context(tarfile.open(fileobj=self._unpacked(), mode="r|", bufsize=_BLOCK))
            for info in archive:
                if info.isreg() and not info.issparse():
                    yield posixpath.normpath(info.name).lstrip("/"), archive, info
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(self._path, f"the tar archive is damaged ({error}).") from None


def is_tar(start: bytes) -> bool:
    """Return whether a file with these first bytes is a tar archive."""
    header = start[:TAR_HEADER]
    digits = header[_SUM].strip(b" \0")
    if len(header) < TAR_HEADER or not re.fullmatch(b"[0-7]+", digits):
        return False
    # In the sum, the bytes of the digits count as spaces.
    return sum(header) - sum(header[_SUM]) + 8 * ord(" ") == int(digits, 8)


def chosen(path: str, archive: Archive, member: str | None) -> tuple[str, str | None]:
    """Choose a file of an archive.

    Args:
      path: The archive, for messages.
      archive: The open archive.
      member: The part of the path after the colon: "FILE", "FOLDER", "FILE:TENSOR" or "FOLDER:TENSOR". None for the
        only file, or the only model.

    Returns:
      The name of the file, and the name of the tensor or None.

    Raises:
      FormatError: If there is no such file, or several fit.
    """
    names = archive.names()
    if member is None:
        found = _likely(names)
        if found is None:
            raise FormatError(
                path,
                f"holds {len(names)} files, of which one has to be named, as {path}:NAME. It has {names[:_SHOWN]}.",
            )
        return found, None
    if member in names:
        return member, None
    wanted = posixpath.normpath(member)
    # Names may have colons, too: cut at the last colon before which there is a file, or a folder with one model.
    ends = [*(colon.start() for colon in re.finditer(":", wanted)), len(wanted)]
    for end in reversed(ends):
        name, rest = wanted[:end], wanted[end + 1 :] or None
        if name in names:
            return name, rest
        inside = _likely([one for one in names if one.startswith(f"{name}/")])
        if inside is not None:
            return inside, rest
    model = _likely(names)
    if model is not None and model.lower().endswith(_KINDS[:2]):
        return model, member
    raise FormatError(path, f"holds no file {member!r}. It has {names[:_SHOWN]}.")


def beside(names: Sequence[str], name: str) -> dict[str, str]:
    """Map the names of the files in the same folder as `name` to their paths in the archive."""
    folder = posixpath.dirname(name)
    return {posixpath.basename(one): one for one in names if posixpath.dirname(one) == folder}


def _likely(names: Sequence[str]) -> str | None:
    """Return the file with the vectors, or None if several files could have them."""
    if len(names) == 1:
        return names[0]
    files = [name for name in names if not _BESIDES.fullmatch(posixpath.normpath(name))]
    if len(files) == 1:
        return files[0]
    for kind in _KINDS:
        fitting = [name for name in files if name.lower().endswith(kind)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None
