"""Outputs: written beside their destination and renamed, so that a crash leaves the old file whole."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes when it fails.

    Args:
      path: The destination. Through a symbolic link, the file that it points to.

    Yields:
      A binary file in the same directory, open for writing.

    Raises:
      OSError: If the destination's directory does not exist or cannot be written to, or the destination is not a
        regular file.

    Example:
      >>> import embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "greeting.txt")
      >>> with embax.files.replacing(path) as file:
      ...     size = file.write(b"hello")
      >>> path.read_text()
      'hello'
    """
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
    that are mounted read-only.

    Args:
      path: The destination.

    Raises:
      OSError: If the destination's directory does not exist or cannot be written to, or the destination is not a
        regular file.

    Example:
      >>> import embax.files
      >>> embax.files.check_writable("no/such/directory/vectors.safetensors")
      Traceback (most recent call last):
      ...
      FileNotFoundError: [Errno 2] No such directory: 'no/such/directory'
    """
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
    # A rename onto a device such as /dev/null would replace the device.
    if os.path.exists(destination) and not os.path.isfile(destination):
        raise OSError(errno.EINVAL, "Is not a regular file, so it cannot be replaced", path)
    if os.path.islink(destination):
        raise OSError(errno.ELOOP, "Is a symbolic link that leads to itself", path)
    directory, name = os.path.split(destination)
    if not os.path.exists(directory):
        raise FileNotFoundError(errno.ENOENT, "No such directory", os.path.dirname(path))
    # Cut so that a name of the greatest length that the file system allows still has room for the rest.
    return destination, os.path.join(directory, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
