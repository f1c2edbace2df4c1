"""The native library: found, checked and made known to XLA, once a process and not before it is needed.

The distribution `embax-kernels` (the folder `kernels` of the repository) holds one shared library. Where it is not
installed, everything is done by XLA. `EMBAX_KERNELS=0` says so for a process in which it is.
"""

import ctypes
import functools
import importlib
import os
import threading
from typing import NamedTuple

import jax

import embax

# The handlers that a library may have, by the primitive that calls them.
HANDLERS = {
    "take": "EmbaxTake",
    "put": "EmbaxPut",
    "combine": "EmbaxCombine",
    "pool": "EmbaxPool",
    "step_sgd": "EmbaxStepSgd",
    "step_adagrad": "EmbaxStepAdagrad",
    "step_rowwise_adagrad": "EmbaxStepRowwiseAdagrad",
    "step_adam": "EmbaxStepAdam",
    "step_rowwise_adam": "EmbaxStepRowwiseAdam",
}


class Library(NamedTuple):
    """A library that is in use."""

    native: ctypes.CDLL
    version: str
    instruction_set: str  # for which its code was chosen on this machine
    primitives: tuple[str, ...]


def library() -> Library | None:
    """Return the native library; None where it is not installed, or switched off.

    Raises:
      ImportError: If it is of another version than embax, or cannot be loaded.
      ValueError: If `EMBAX_KERNELS` is neither 0 nor 1.
    """
    with _LOCK:  # XLA takes each handler once
        return _library()


def has(primitive: str) -> bool:
    """Say whether a primitive has a kernel in this process."""
    found = library()
    return found is not None and primitive in found.primitives


def target(primitive: str) -> str:
    """The name by which XLA calls the kernel of a primitive."""
    return f"embax_{primitive}"


_LOCK = threading.Lock()


@functools.cache
def _library() -> Library | None:
    switch = os.environ.get("EMBAX_KERNELS", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"`EMBAX_KERNELS` must be 0 or 1, got {switch!r}. Unset it to use the kernels if installed.")
    if switch == "0":
        return None
    try:
        package = importlib.import_module("embax_kernels")
    except ModuleNotFoundError as error:
        if error.name != "embax_kernels":
            raise
        return None
    path = package.library_path()
    try:
        native = ctypes.CDLL(str(path))
        for question in (native.embax_kernels_version, native.embax_kernels_isa):
            question.restype = ctypes.c_char_p
        version = native.embax_kernels_version().decode()
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"The library of embax-kernels must load, got: {error}. Install it anew, or set EMBAX_KERNELS=0."
        ) from error
    if version != embax.__version__:
        raise ImportError(
            f"embax-kernels must be of version {embax.__version__}, as embax is, got {version}. Install the one of "
            "this version, as by `pip install ./kernels` in the repository, or set EMBAX_KERNELS=0."
        )
    primitives = tuple(name for name, handler in HANDLERS.items() if hasattr(native, handler))
    for name in primitives:
        capsule = jax.ffi.pycapsule(getattr(native, HANDLERS[name]))
        jax.ffi.register_ffi_target(target(name), capsule, platform="cpu")
    return Library(native, version, native.embax_kernels_isa().decode(), primitives)
