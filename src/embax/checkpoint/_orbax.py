"""Access to Orbax: the directory of a checkpoint, and its steps."""

import os

from jaxtyping import PyTree

try:
    import orbax.checkpoint as ocp
    from etils import epath
except ImportError as error:
    raise ImportError(
        'embax.checkpoint needs Orbax, which is not installed: pip install "embax[checkpoint]"'
    ) from error

# The items of a step: the arrays, and a JSON description of them.
ARRAYS, ABOUT = "arrays", "embax"
FORMAT = 1


def path_of(path: str | os.PathLike[str]) -> epath.Path:
    """A path for Orbax: absolute, or the URL of a bucket."""
    return epath.Path(path) if "://" in os.fspath(path) else epath.Path(path).absolute()


def manager_of(path: str | os.PathLike[str], keep: int | None, *, writes: bool) -> ocp.CheckpointManager:
    """Open a directory.

    Args:
      path: The directory.
      keep: The number of steps to keep when another one is written; None for all.
      writes: Whether to write. If so, the directory is made, and remains of killed processes are removed.

    Returns:
      The manager, a context manager.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, create=writes, cleanup_tmp_directories=writes
    )
    return ocp.CheckpointManager(path_of(path), options=options)


def nested(values: dict[str, PyTree]) -> dict[str, PyTree]:
    """Turn names joined by "/" into a tree of dicts, whose names Orbax keeps."""
    tree: dict[str, PyTree] = {}
    for name, value in values.items():
        *nodes, last = name.split("/")
        inner = tree
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[last] = value
    return tree


def taken(tree: dict[str, PyTree], name: str) -> PyTree:
    """Take a value out of a tree of `nested`, by its name."""
    *nodes, last = name.split("/")
    for node in nodes:
        tree = tree[node]
    return tree.pop(last)
