"""Outputs: every writer's way to a file, a stream or a device.

A plain file is written beside its destination and renamed, so that a crash leaves the old file whole. What is no plain
file, such as a pipe or standard output, cannot be replaced: it is written to as it is.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO

from .streams import check_stream, is_stream, writing_to


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes when it fails.

    A stream keeps its place, and gets the bytes as they are written: standard output, which `-` names, a pipe, a
    device, an open descriptor such as `/dev/fd/3`, and a link to one of these. It cannot be rewound.

    Args:
      path: The destination. Through a symbolic link, the file that it points to.

    Yields:
      A binary file, open for writing: one in the same directory, or the stream.

    Raises:
      OSError: If the destination is a directory, or its directory does not exist or cannot be written to, or the stream
        cannot be written to.

    Example:
      >>> import embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "greeting.txt")
      >>> with embax.files.replacing(path) as file:
      ...     size = file.write(b"hello")
      >>> path.read_text()
      'hello'
    """
    if is_stream(path):
        with writing_to(os.fspath(path)) as file:
            yield file
        return
    destination, beside = _prepare(path)
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, destination)
    except BaseException as error:  # an interrupt, too, must not leave half a file behind
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(error, OSError) and error.filename in (None, beside):
            error.filename = os.fspath(path)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that `replacing(path)` will work, before the work whose result it shall hold.

    A file is made beside the destination and removed: permission bits say too little for root and for file systems
    that are mounted read-only. A stream is not opened.

    Args:
      path: The destination.

    Raises:
      OSError: As `replacing`.

    Example:
      >>> import embax.files
      >>> embax.files.check_writable("no/such/directory/vectors.safetensors")
      Traceback (most recent call last):
      ...
      FileNotFoundError: [Errno 2] No such directory: 'no/such/directory'
    """
    if is_stream(path):
        check_stream(os.fspath(path))
        return
    _, beside = _prepare(path)
    try:
        with open(beside, "xb"):
            pass
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    os.unlink(beside)


def _prepare(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return where the path leads to, and a fresh name beside it."""
    path = os.fspath(path)
    destination = os.path.realpath(path)
    if os.path.isdir(destination) or path.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "Is a directory, not a file to write", path)
    if os.path.islink(destination):
        raise OSError(errno.ELOOP, "Is a symbolic link that leads to itself", path)
    directory, name = os.path.split(destination)
    if not os.path.exists(directory):
        raise FileNotFoundError(errno.ENOENT, "No such directory", os.path.dirname(path))
    # Cut so that a name of the greatest length that the file system allows still has room for the rest.
    return destination, os.path.join(directory, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
