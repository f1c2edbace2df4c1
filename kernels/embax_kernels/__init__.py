"""The native CPU kernels of embax: one shared library, which embax loads. It imports neither JAX nor embax."""

import sys
from pathlib import Path

from ._version import __version__ as __version__

__all__ = ["__version__", "library_path"]


def library_path() -> Path:
    """Return where the shared library is.

    Returns:
      Its path.

    Example:
      >>> import ctypes, embax_kernels
      >>> library = ctypes.CDLL(str(embax_kernels.library_path()))
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return Path(__file__).parent / f"libembax_kernels.{suffix}"
