"""Open files, streams and devices for writing. All writers use this module.

A plain file is written under another name in the same folder and then renamed, so that a crash leaves the old file
whole. Pipes, devices and standard output cannot be replaced and are written to directly.
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
    """Open a file that replaces `path` when the block ends, and is removed if the block fails.

    Streams are not replaced but written to directly: standard output (`-`), a pipe, a device, an open descriptor such
    as `/dev/fd/3`, or a link to one of these. A stream cannot be rewound.

    Args:
      path: The destination. For a symbolic link, the file that it points to is replaced.

    Yields:
      A binary file that is open for writing, either a temporary file in the same directory or the stream.

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
    """Check that `replacing(path)` will work, so that an error comes before long work and not after it.

    A file is created beside the destination and removed again, because permission bits are not enough: root may ignore
    them, and a file system may be mounted read-only. A stream is not opened.

    Args:
      path: The destination.

    Raises:
      OSError: If `replacing` would raise it.

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
    """Return the path with links resolved, and an unused name in the same folder."""
    path = os.fspath(path)
    destination = os.path.realpath(path)
    if os.path.isdir(destination) or path.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "Is a directory, not a file to write", path)
    if os.path.islink(destination):
        raise OSError(errno.ELOOP, "Is a symbolic link that leads to itself", path)
    directory, name = os.path.split(destination)
    if not os.path.exists(directory):
        raise FileNotFoundError(errno.ENOENT, "No such directory", os.path.dirname(path))
    # The name is cut, so that the temporary name is not longer than file systems allow.
    return destination, os.path.join(directory, f".{name[:40]}.{secrets.token_hex(8)}.tmp")
