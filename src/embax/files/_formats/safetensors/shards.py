"""Models in several safetensors files (shards), with an index: a JSON file that maps each tensor to its shard."""

import contextlib
import json
import posixpath
from collections.abc import Iterator

from ..._io.error import FormatError
from ..._io.open import Source, opened
from .header import Tensor, read_header

_KEY = "weight_map"


def is_index(source: Source) -> bool:
    """Return whether a file is an index of shards."""
    return source.start[:64].lstrip().startswith(b"{") and f'"{_KEY}"'.encode() in source.start


def read_index(source: Source) -> dict[str, str]:
    """Read an index.

    Args:
      source: The file, at its beginning.

    Returns:
      For each tensor the name of its shard: a file in the folder of the index, or in a folder below it.

    Raises:
      FormatError: If it is no index.
    """
    try:
        files = json.loads(source.read_all().decode())[_KEY]
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{_KEY!r} is no object of the names of files")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise source.error(f"is no index of shards ({str(error).rstrip('.')}).") from None
    for tensor, file in files.items():
        is_below = posixpath.normpath(file) == file and not file.startswith(("/", ".."))
        if not is_below or any(sign in file for sign in "\\:\0"):
            raise source.error(f"must name files in its own folder, got {file!r:.80} for tensor {tensor!r:.80}.")
    return files


@contextlib.contextmanager
def opened_shard(index: Source, file: str, tensor: str | None = None) -> Iterator[Source]:
    """Open a shard.

    Args:
      index: The index.
      file: The name of the shard.
      tensor: The name of the tensor to read from it, for messages and for `Source.member`.

    Yields:
      The shard, at its beginning.

    Raises:
      FormatError: If the shard does not exist.
    """
    path = index.beside(file)
    if path is None:
        raise index.error(f"names the shard {file!r}, which is not in its folder. Fetch it, or the whole model again.")
    with opened(path if tensor is None else f"{path}:{tensor}") as shard:
        yield shard


def all_tensors(index: Source, files: dict[str, str]) -> dict[str, Tensor]:
    """Read the dtypes, shapes and places of all tensors from the headers of the shards.

    Args:
      index: The index.
      files: The shard of each tensor, from `read_index`.

    Returns:
      The tensors by name.

    Raises:
      FormatError: If a shard is missing or damaged, or lacks a tensor.
    """
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        with opened_shard(index, file) as shard:
            _, tensors = read_header(shard)
        wanted = [name for name, its in files.items() if its == file]
        missing = next((name for name in wanted if name not in tensors), None)
        if missing is not None:
            raise FormatError(shard.name, f"has no tensor {missing!r}, which {index.name} says it has.")
        found |= {name: tensors[name] for name in wanted}
    return found
