"""Numbers kept in memory up to a bound, and beyond it in an unnamed temporary file."""

import contextlib
import errno
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

# Bytes that are kept in memory, which suffice for a million words.
IN_MEMORY = 1 << 22


class Spool:
    """A list of int32 numbers, four bytes each. Several threads may read it at once.

    The temporary file has no name where the system allows that, and is removed when the spool, or the process, ends.

    Args:
      in_memory: The most bytes that are kept in memory.
    """

    def __init__(self, in_memory: int = IN_MEMORY):
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory)
        weakref.finalize(self, _close, self._file)
        self._lock = threading.Lock()
        self.length = 0

    def append(self, numbers: Int32[np.ndarray, " length"]) -> None:
        """Put numbers at the end."""
        self.write(self.length, numbers)

    def read(self, start: int, size: int) -> Int32[np.ndarray, " length"]:
        """Read `size` numbers from number `start`, fewer at the end; the array is read-only."""
        with self._lock:
            self._file.seek(4 * start)
            return np.frombuffer(self._file.read(4 * max(0, min(size, self.length - start))), np.int32)

    def write(self, start: int, numbers: Int32[np.ndarray, " length"]) -> None:
        """Overwrite numbers from number `start` on, perhaps beyond the end.

        Raises:
          OSError: If the disk is full; the error names the folder.
        """
        with self._lock, _named():
            self._file.seek(4 * start)
            self._file.write(np.ascontiguousarray(numbers).data)
            self._file.flush()  # or a full disk would be noticed only later
            self.length = max(self.length, start + len(numbers))

    def cut(self, length: int) -> None:
        """Keep the first `length` numbers."""
        with self._lock:
            self._file.truncate(4 * length)
            self.length = length


def _close(file: Any) -> None:
    with contextlib.suppress(OSError):  # with a full disk, for which there was an error before
        file.close()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        reason = f"{error.strerror}, for the numbered words. Set TMPDIR to a folder with more space"
        raise OSError(error.errno, reason, tempfile.gettempdir()) from None


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full. That of TensorStore, by which Orbax writes, is a ValueError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" in str(error)
