"""Find the native library, check it and register it with XLA, once in a process, when it is first needed.

The distribution `embax-kernels` (the folder `kernels` of the repository) has one shared library. If it is not
installed, XLA does all the work. `EMBAX_KERNELS=0` switches it off for a process.
"""

import ctypes
import functools
import importlib
import os
import threading
from typing import NamedTuple

import jax

import embax

# The handler of XLA's calls in the library for each primitive. A library may lack some of them.
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
# Functions that Python calls without XLA.
FUNCTIONS = {"train_words": "embax_kernels_train_words"}


class Library(NamedTuple):
    """The loaded library."""

    native: ctypes.CDLL
    version: str
    instruction_set: str  # the instruction set of the code that is used on this machine
    primitives: tuple[str, ...]


def library() -> Library | None:
    """Return the native library; None if it is not installed, or switched off.

    Raises:
      ImportError: If its version differs from embax's, or it cannot be loaded.
      ValueError: If `EMBAX_KERNELS` is neither 0 nor 1.
    """
    with _LOCK:  # a handler can be registered only once
        return _library()


def has(primitive: str) -> bool:
    """Return whether there is a kernel for a primitive in this process."""
    found = library()
    return found is not None and primitive in found.primitives


def target(primitive: str) -> str:
    """Return the name by which XLA calls the kernel of a primitive."""
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
    primitives = tuple(name for name, symbol in (HANDLERS | FUNCTIONS).items() if hasattr(native, symbol))
    for name in HANDLERS.keys() & set(primitives):
        capsule = jax.ffi.pycapsule(getattr(native, HANDLERS[name]))
        jax.ffi.register_ffi_target(target(name), capsule, platform="cpu")
    return Library(native, version, native.embax_kernels_isa().decode(), primitives)
