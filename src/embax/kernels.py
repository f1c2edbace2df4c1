"""The native kernels of this process: `python -m embax.kernels` prints whether they are used, and which."""

import os
import sys
from typing import NamedTuple

from ._kernels.library import library


class Kernels(NamedTuple):
    """What runs lookups, bags and updates on the CPU."""

    in_use: bool
    version: str  # of the library; empty where there is none
    instruction_set: str  # for which its code was chosen on this machine
    threads: int  # at most, those of JAX's own pool
    primitives: tuple[str, ...]

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
    """Say which native kernels this process uses on a CPU.

    Returns:
      Whether there are any, and what they are. Its text is what `python -m embax.kernels` prints.

    Raises:
      ImportError: If the kernels that are installed cannot be used, such as those of another version.
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
