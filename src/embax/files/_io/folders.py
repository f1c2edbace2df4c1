"""The other files in the folder of a file, and the file to read in the folder of a model."""

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from .streams import is_named_pipe, is_stream

# In the folder of a model, the first of these that exists is read.
_MODELS = ("model.safetensors", "model.safetensors.index.json", "0_StaticEmbedding/model.safetensors")


class Folder(NamedTuple):
    """A folder on disk or in an archive."""

    names: Callable[[], list[str]]
    path: Callable[[str], str | None]  # from a name to the path for `opened`; None if there is no such file


def folders_of(path: str) -> tuple[Folder, ...]:
    """Return the folder of a file or named pipe. Standard input, descriptors and devices have none."""
    if is_stream(path) and not is_named_pipe(path):
        return ()
    folder = os.path.dirname(path)

    def names() -> list[str]:
        return sorted(entry.name for entry in os.scandir(folder or ".") if entry.is_file())

    def found(name: str) -> str | None:
        return other if os.path.isfile(other := os.path.join(folder, name)) else None

    return (Folder(names, found),)


def model_in(folder: str) -> str:
    """Return the file with the vectors in the folder of a model.

    Raises:
      IsADirectoryError: If there is none, or several fit.
    """
    for name in _MODELS:
        if os.path.isfile(path := os.path.join(folder, name)):
            return path
    names = os.listdir(folder)
    for ending in (".safetensors.index.json", ".safetensors"):
        fitting = [name for name in names if name.endswith(ending)]
        if len(fitting) == 1:
            return os.path.join(folder, fitting[0])
    raise IsADirectoryError(errno.EISDIR, f"Is a directory without {' or '.join(_MODELS[:2])}", folder)
