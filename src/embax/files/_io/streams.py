"""Standard streams, pipes and devices: what a path leads to that is no plain file.

A shell names such things in many ways: `-`, `/dev/stdout`, `/dev/fd/63` of a process substitution, a named pipe, a link
to one of these. `/dev/stdout` leads to whatever standard output is, which may be a plain file that other commands of a
script write to as well. So a path that names an open descriptor is never opened or replaced: the descriptor itself is
read or written where it stands.
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
# The folders in which a system lists the descriptors of a process, links resolved: Linux's, and that of macOS and BSD.
_DESCRIPTORS = re.compile(r"/proc/([0-9]+)(?:/task/[0-9]+)?/fd|/dev/fd")
# As many links as Linux follows.
_MOST_LINKS = 40


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path leads to something other than a plain file, a folder or nothing.

    Args:
      path: Any path.

    Returns:
      True for `-`, which is standard input or output, pipes, devices, and open descriptors such as `/dev/fd/3`.

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
    """Tell whether a path is that of a pipe in a folder."""
    try:
        return _descriptor(path) is None and stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_standard_output(path: str | os.PathLike[str]) -> bool:
    """Tell whether what is written to a path comes out on standard output.

    Args:
      path: A destination.

    Returns:
      True for `-`, `/dev/stdout`, and every other path to the stream that standard output is.

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
    """Return what messages call a stream to read."""
    return _STANDARD_INPUT if path == STANDARD else path


@contextlib.contextmanager
def reading_from(path: str) -> Iterator[BinaryIO]:
    """Open a stream to read from where it stands.

    Args:
      path: A path for which `is_stream` holds.

    Yields:
      A buffered binary file that cannot be rewound.

    Raises:
      FormatError: If it is standard input, and that is closed or gives text only.
      OSError: If it cannot be opened.
    """
    found = None if path == STANDARD else _descriptor(path)
    if path == STANDARD or (found == (0, True) and _number(sys.stdin) == 0):
        if sys.stdin is None:
            raise FormatError(_STANDARD_INPUT, "it is closed.")
        if not hasattr(sys.stdin, "buffer"):
            raise FormatError(_STANDARD_INPUT, "it gives no bytes, as the program has put text in its place.")
        yield sys.stdin.buffer  # of which Python may hold some bytes already
        return
    with _named(path):
        file = open(os.dup(found[0]) if found is not None and found[1] else path, "rb")
    with file:
        yield file


@contextlib.contextmanager
def writing_to(path: str) -> Iterator[BinaryIO]:
    """Open a stream to write to where it stands: nothing before or behind is lost.

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
    """Check that a stream can be written to, without opening it: the reader of a pipe would see it end.

    Args:
      path: A path for which `is_stream` holds.

    Raises:
      OSError: If it cannot.
    """
    with _named(path):
        found = None if path == STANDARD else _descriptor(path)
        if path == STANDARD:
            with contextlib.ExitStack() as stack:
                _output(path, stack)
        elif found is not None and found[1]:
            import fcntl  # where there are such paths, there is this module

            if fcntl.fcntl(found[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "Is open for reading only")
        else:
            _refuse_others(path)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class _Output(io.RawIOBase):
    """A stream that takes all bytes it is given, counts them, and cannot be rewound."""

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
            if written is None:  # another program has set the stream not to wait
                select.select([], [self._raw], [])
                continue
            self._written += written
            left = left[written:]
        return size

    def flush(self) -> None:
        if not self._raw.closed:  # as when this object is let go of
            self._raw.flush()


def _output(path: str, stack: contextlib.ExitStack) -> Any:
    """Open a stream without a buffer, so that nothing is left to be written where its reader has gone."""
    if path == STANDARD:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "Standard output is closed")
        sys.stdout.flush()  # what the program has printed comes before
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
    """Refuse disks, sockets, and files that another process has open, which would go on where it stands in them."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise OSError(errno.EINVAL, "Is no pipe and no device that can be written to as it is")


def _descriptor(path: str) -> tuple[int, bool] | None:
    """Return the number of the open descriptor that a path names, and whether it is this process's."""
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(path)
        try:
            folder = os.path.realpath(folder)
            found = _DESCRIPTORS.fullmatch(folder)
            if found is not None and name.isdecimal():
                return int(name), found[1] is None or int(found[1]) == os.getpid()
            path = os.path.join(folder, os.readlink(os.path.join(folder, name)))
        except (OSError, ValueError):  # it is no link
            return None
    return None


def _number(stream: Any) -> int | None:
    """Return the descriptor of one of Python's standard streams; None where a program has put another in its place."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the stream in an error of the system that names nothing, or the number of a descriptor."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str):
            error.filename = "standard output" if path == STANDARD else path
        raise
