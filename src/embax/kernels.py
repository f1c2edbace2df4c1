"""The native kernels of this process: `python -m embax.kernels` prints whether they are used, and which."""

import os
import sys
from typing import NamedTuple

from ._kernels.library import library


class Kernels(NamedTuple):
    """The native kernels that run lookups, bags and updates on the CPU."""

    in_use: bool  # whether the library is installed and not switched off
    version: str  # the version of the library; empty if there is none
    instruction_set: str  # the instruction set of the code that is used on this machine
    threads: int  # the largest number of threads, from JAX's own pool
    primitives: tuple[str, ...]  # the operations that have a kernel

    def __str__(self) -> str:
        if not self.in_use:
            off = os.environ.get("EMBAX_KERNELS") == "0"
            why = "switched off by EMBAX_KERNELS=0" if off else "not installed, see `pip install ./kernels`"
            return f"Native kernels: {why}. XLA does all the work."
        return (
            f"Native kernels {self.version} for the CPU: {', '.join(self.primitives)}.\n"
            f"Instruction set: {self.instruction_set}. Threads: up to {self.threads}."
        )


def report() -> Kernels:
    """Return which native kernels this process uses on a CPU.

    Returns:
      The kernels, or `in_use=False`. `python -m embax.kernels` prints its text.

    Raises:
      ImportError: If the installed kernels cannot be used, for example because they are of another version.
      ValueError: If `EMBAX_KERNELS` is neither 0 nor 1.

    Example:
      >>> import embax
      >>> embax.kernels.report().in_use in (True, False)
      True
    """
    found = library()
    if found is None:
        return Kernels(False, "", "", 0, ())
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Kernels(True, found.version, found.instruction_set, available, found.primitives)


if __name__ == "__main__":
    used = report()
    print(used)
    sys.exit(0 if used.in_use else 1)
