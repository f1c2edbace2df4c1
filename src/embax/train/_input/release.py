"""Give memory that is free in this process back to the system.

Counting words takes some memory, and is over before the tables are made. The C library keeps what was freed for later;
without giving it back, the process holds both at its peak.
"""

import ctypes
import sys


def release_memory() -> None:
    """Give back what the C library and, if it was used, pyarrow have kept; where there is no such call, do nothing."""
    if (pyarrow := sys.modules.get("pyarrow")) is not None:
        pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))
