"""Standard streams, pipes and devices: paths that are not plain files.

A shell names them in many ways: `-`, `/dev/stdout`, `/dev/fd/63` for a process substitution, a named pipe, or a link to
one of these. `/dev/stdout` may be a plain file to which other commands of a script write, too. So a path that names
an open descriptor is never opened anew or replaced: the descriptor itself is read or written, at its current position.
"""

import contextlib
import errno
import io
import os
import re
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from .error import FormatError

STANDARD = "-"
_STANDARD_INPUT = "standard input"
# The folders that list the descriptors of a process, with links resolved: on Linux, and on macOS and BSD.
_DESCRIPTORS = re.compile(r"/proc/([0-9]+)(?:/task/[0-9]+)?/fd|/dev/fd")
# Linux follows this number of links.
_MOST_LINKS = 40


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a stream: not a plain file, a folder, or a path that does not exist.

    Args:
      path: Any path.

    Returns:
      True for `-` (standard input or output), pipes, devices, and open descriptors such as `/dev/fd/3`.

    Example:
      >>> import embax.files
      >>> embax.files.is_stream("-"), embax.files.is_stream("vectors.txt")
      (True, False)
    """
    path = os.fspath(path)
    if path == STANDARD or _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_named_pipe(path: str) -> bool:
    """Return whether a path is a named pipe."""
    try:
        return _descriptor(path) is None and stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_standard_output(path: str | os.PathLike[str]) -> bool:
    """Return whether writing to a path writes to standard output.

    Args:
      path: A destination.

    Returns:
      True for `-`, `/dev/stdout`, and every other path to the same stream.

    Example:
      >>> import embax.files
      >>> embax.files.is_standard_output("-"), embax.files.is_standard_output("vectors.txt")
      (True, False)
    """
    path = os.fspath(path)
    if path == STANDARD:
        return True
    try:
        return is_stream(path) and os.path.samestat(os.stat(path), os.fstat(1))
    except (OSError, ValueError):
        return False


def name_of_input(path: str) -> str:
    """Return the name of an input for messages."""
    return _STANDARD_INPUT if path == STANDARD else path


@contextlib.contextmanager
def reading_from(path: str) -> Iterator[BinaryIO]:
    """Open a stream for reading, at its current position.

    Args:
      path: A path for which `is_stream` holds.

    Yields:
      A buffered binary file that cannot be rewound.

    Raises:
      FormatError: If it is standard input, and it is closed or was replaced by a stream of text.
      OSError: If it cannot be opened.
    """
    found = None if path == STANDARD else _descriptor(path)
    if path == STANDARD or (found == (0, True) and _number(sys.stdin) == 0):
        if sys.stdin is None:
            raise FormatError(_STANDARD_INPUT, "it is closed.")
        if not hasattr(sys.stdin, "buffer"):
            raise FormatError(_STANDARD_INPUT, "it gives no bytes, as the program has put text in its place.")
        yield sys.stdin.buffer  # not a new file: some bytes may be in this buffer already
        return
    with _named(path):
        file = open(os.dup(found[0]) if found is not None and found[1] else path, "rb")
    with file:
        yield file


@contextlib.contextmanager
def writing_to(path: str) -> Iterator[BinaryIO]:
    """Open a stream for writing, at its current position; nothing that was written before is lost.

    Args:
      path: A path for which `is_stream` holds.

    Yields:
      A binary file that cannot be rewound; `tell` counts its own bytes.

    Raises:
      OSError: If it cannot be opened, or written to.
    """
    with _named(path), contextlib.ExitStack() as stack:
        stream = _Output(_output(path, stack))
        yield cast(BinaryIO, stream)
        stream.flush()


def check_stream(path: str) -> None:
    """Check that a stream can be written to, without opening it: closing a pipe would signal its end to the reader.

    Args:
      path: A path for which `is_stream` holds.

    Raises:
      OSError: If it cannot be written to.
    """
    with _named(path):
        found = None if path == STANDARD else _descriptor(path)
        if path == STANDARD:
            with contextlib.ExitStack() as stack:
                _output(path, stack)
        elif found is not None and found[1]:
            import fcntl  # not on Windows, which has no such paths either

            if fcntl.fcntl(found[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "Is open for reading only")
        else:
            _refuse_others(path)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class _Output(io.RawIOBase):
    """A stream that writes all the bytes of each call, counts them, and cannot be rewound."""

    def __init__(self, raw: Any):
        self._raw, self._written = raw, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        left = memoryview(data)
        size = left.nbytes
        left = left.cast("B") if size else left
        while left.nbytes:
            written = self._raw.write(left)
            if written is None:  # another program made the stream non-blocking
                select.select([], [self._raw], [])
                continue
            self._written += written
            left = left[written:]
        return size

    def flush(self) -> None:
        if not self._raw.closed:  # Python flushes this object once more when it is deleted
            self._raw.flush()


def _output(path: str, stack: contextlib.ExitStack) -> Any:
    """Open a stream without a buffer, so that no bytes are left to write when the reader has gone."""
    if path == STANDARD:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "Standard output is closed")
        sys.stdout.flush()  # so that earlier prints come first
        number = _number(sys.stdout)
        if number is None:
            if not hasattr(sys.stdout, "buffer"):
                raise OSError(errno.EINVAL, "Standard output takes text only in this program, so name a file")
            return sys.stdout.buffer
        return stack.enter_context(open(os.dup(number), "wb", buffering=0))
    found = _descriptor(path)
    if found is None or not found[1]:
        _refuse_others(path)
        return stack.enter_context(open(path, "wb", buffering=0))
    number = found[0]
    for printed in (sys.stdout, sys.stderr):
        if _number(printed) == number:
            printed.flush()
    return stack.enter_context(open(os.dup(number), "wb", buffering=0))


def _refuse_others(path: str) -> None:
    """Raise an error for disks, sockets, and files that another process has open."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, "Is no pipe and no device that can be written to as it is")


def _descriptor(path: str) -> tuple[int, bool] | None:
    """Return the number of the open descriptor that a path names, and whether it belongs to this process."""
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(path)
        try:
            folder = os.path.realpath(folder)
            found = _DESCRIPTORS.fullmatch(folder)
            if found is not None and name.isdecimal():
                return int(name), found[1] is None or int(found[1]) == os.getpid()
            path = os.path.join(folder, os.readlink(os.path.join(folder, name)))
        except (OSError, ValueError):  # not a link
            return None
    return None


def _number(stream: Any) -> int | None:
    """Return the descriptor of one of Python's standard streams; None if it was replaced by something without one."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Put the name of the stream into errors of the system that have no name, or the number of a descriptor."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = "standard output" if path == STANDARD else path
        raise
