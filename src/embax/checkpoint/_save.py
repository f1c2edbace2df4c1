"""save: write a tree as an Orbax checkpoint; each device writes a block of rows in row order."""

import dataclasses
import math
import os

import jax
import numpy as np
from jaxtyping import PyTree

from .._base import check as _check
from .._core.scratch import without_scratch
from .._mesh import relayout as _moves
from .._mesh.placement import Placement
from ._entries import Entry, by_blocks, described, descriptions_of, entries_of, is_empty, is_key
from ._orbax import ABOUT, ARRAYS, FORMAT, manager_of, nested, ocp, path_of

# Rows are written in pieces of about 32 MB, so that a device that restores other rows does not read much more.
_PIECE = 32 << 20


def save(path: str | os.PathLike[str], tree: PyTree, *, step: int | None = None, keep: int | None = 1) -> None:
    """Write a tree to a directory: parameters, an optimizer's state, everything that training needs to continue.

    A checkpoint has the rows of each table in row order and under the table's own name, whatever its layout on a mesh
    and whatever Collection stores it. So it can be restored to any other layout. Each device writes a block of rows,
    which it gets from the owners; no device holds a whole table. Counters, schedules, random keys and the record of the
    tables that a state was made for are saved; the scratch memory of `embax.optim.lift` is not.

    A checkpoint is written beside the earlier ones, and renamed when it is complete: if a process is killed, the last
    complete one remains. With several processes, all of them must call this, with a path that all of them can access.

    An array with an entry for each row of a table is recognised by the Table node that holds it, as in the states of
    optax and of `embax.optim`. Other arrays are written unchanged.

    Args:
      path: The directory; created if it does not exist.
      tree: A pytree of Tables, Collections, arrays, random keys and numbers.
      step: The number of the checkpoint, above the last one's. Default: the next number, beginning with 0.
      keep: The number of checkpoints to keep, this one included. None: all.

    Raises:
      TypeError: If a leaf of the tree is of another type, or of a dtype that the files cannot hold.
      ValueError: If two leaves have the same name, the step is not above the last one, a number is outside its range,
        or the path is a file.

    Example:
      >>> import embax, jax.numpy as jnp, optax, tempfile
      >>> params = {"film": embax.Table(jnp.ones((10, 2)))}
      >>> state = embax.optim.lift(optax.adam(1e-3)).init(params)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     embax.checkpoint.save(path, {"params": params, "state": state})
      ...     embax.checkpoint.restore(path, {"params": params}, partial=True)
      {'params': {'film': Table(float32[10,2])}}
    """
    call = "embax.checkpoint.save"
    if keep is not None and (keep := _check.integer(f"{call}(keep=...)", keep)) < 1:
        raise ValueError(f"`{call}(keep=...)` must be at least 1, or None for all, got {keep}. Keep one.")
    step = None if step is None else _check.size(f"{call}(step=...)", step)
    entries = entries_of(call, without_scratch(tree))
    for name, value, *_ in entries:
        if isinstance(value, jax.ShapeDtypeStruct):
            raise TypeError(f"`{call}` must have values to write, got the shape {value} for {name!r}. Pass an array.")
    if path_of(path).exists() and not path_of(path).is_dir():
        raise ValueError(f"`{call}(path=...)` must be a directory, got {os.fspath(path)!r}, a file. Name another one.")
    with manager_of(path, keep, writes=True) as manager:
        last = max(manager.all_steps(), default=-1)
        step = last + 1 if step is None else step
        if step <= last:
            raise ValueError(
                f"`{call}(step=...)` must be above {last}, the last one in {os.fspath(path)!r}, got {step}. Count on, "
                "or name another directory."
            )
        items: dict[str, PyTree] = {
            ABOUT: ocp.args.JsonSave(
                {
                    "format": FORMAT,
                    "arrays": {x.name: _about(x) for x in entries},
                    "made_for": {name: tables.to_json() for name, tables in descriptions_of(tree).items()},
                }
            )
        }
        written = [entry for entry in entries if not is_empty(entry)]
        if written:
            items[ARRAYS] = ocp.args.PyTreeSave(
                nested({entry.name: _to_be_written(entry) for entry in written}),
                nested({entry.name: ocp.SaveArgs(chunk_byte_size=_piece(entry)) for entry in written}),
            )
        manager.save(step, args=ocp.args.Composite(**items), force=True)
        manager.wait_until_finished()


def _about(entry: Entry) -> dict[str, PyTree]:
    of_table = {"table": True} if entry.rows is not None else {}  # its file may end with padding
    of_key = {"impl": str(jax.random.key_impl(entry.value))} if is_key(entry.value) else {}
    return described(entry) | of_table | of_key


def _to_be_written(entry: Entry) -> PyTree:
    value = entry.value
    if entry.placement is not None:
        blocks = _blocks(entry, entry.placement)
        if entry.start or blocks != entry.placement:
            value = _moves.moved(entry.placement, value, blocks, entry.start)
    if is_key(value):
        value = jax.random.key_data(value)
    # With several processes, only one of them writes an array that each has.
    alone = isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1
    return np.asarray(value) if alone or not isinstance(value, jax.Array) else value


def _blocks(entry: Entry, placement: Placement) -> Placement:
    """Blocks of rows, padded so that each divides into pieces of equal size."""
    blocks = by_blocks(placement, entry.rows or 0)
    piece = max(1, _PIECE // _row_bytes(entry.value))
    rows = -(-blocks.block // piece) * piece * blocks.shards
    return blocks if blocks.block <= piece or rows > np.iinfo(np.int32).max else dataclasses.replace(blocks, rows=rows)


def _piece(entry: Entry) -> int | None:
    """The bytes that Orbax writes at a time: a block, or an even part of one."""
    value = entry.value
    alone = isinstance(value, np.ndarray) or (isinstance(value, jax.Array) and len(value.sharding.device_set) == 1)
    if is_key(value) or np.ndim(value) == 0 or (entry.placement is None and not alone):
        return None
    rows = value.shape[0] if entry.placement is None else _blocks(entry, entry.placement).block
    fewest = -(-rows * _row_bytes(value) // _PIECE)
    pieces = next((n for n in range(max(fewest, 1), 8 * fewest) if rows % n == 0), 1)
    return None if pieces == 1 else rows // pieces * _row_bytes(value)


def _row_bytes(value: PyTree) -> int:
    return math.prod(value.shape[1:]) * value.dtype.itemsize
