"""save and restore: tables and the state of their training as Orbax checkpoints that know nothing of devices."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from . import _check, _placed
from ._collection import Collection, restack, unstack
from ._placement import Placement
from ._table import Table, with_weight
from .optim import LiftState

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError('embax.checkpoint needs Orbax. Install it: pip install "embax[checkpoint]"') from error


class _Entry(NamedTuple):
    """One array of a tree."""

    name: str  # the names of the nodes above it, joined by "/"
    value: Any
    placement: Placement | None  # of the table whose rows it has


def save(path: str | os.PathLike[str], tree: Any, *, step: int | None = None, keep: int | None = 1) -> None:
    """Write a tree to a directory: parameters, an optimizer's state, whatever training goes on from.

    A checkpoint holds the rows of a table in their order and under the table's own name, however they are laid out on a
    mesh and in whichever Collection they are stored, so that it can be restored in any other way. Each device writes
    what it holds. Counters, schedules and random keys are part of the tree; what `embax.optim.lift` keeps as scratch is
    left out.

    It is written beside the ones before it and renamed when it is whole: a process that is killed leaves the last whole
    one. Of several processes, all must call this, with one path that all of them see.

    Args:
      path: The directory; made if need be.
      tree: A pytree of Tables, Collections, arrays, random keys and numbers.
      step: The number of the checkpoint, 0 or more. Default: one more than that of the last one.
      keep: How many checkpoints are kept, this one included. None: all.

    Raises:
      TypeError: If a leaf of the tree is something else.
      ValueError: If two leaves have one name, there is such a step already, or a number is outside of its range.

    Example:
      >>> import embax, jax.numpy as jnp, optax, tempfile
      >>> params = {"film": embax.Table(jnp.ones((10, 2)))}
      >>> state = embax.optim.lift(optax.adam(1e-3)).init(params)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     embax.checkpoint.save(path, {"params": params, "state": state})
      ...     embax.checkpoint.restore(path, {"params": params})
      {'params': {'film': Table(float32[10,2])}}
    """
    call = "embax.checkpoint.save"
    if keep is not None and (keep := _check.integer(f"{call}(keep=...)", keep)) < 1:
        raise ValueError(f"`{call}(keep=...)` must be at least 1, or None for all, got {keep}. Keep one.")
    step = None if step is None else _check.size(f"{call}(step=...)", step)
    nested: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for name, value, placement in _entries(call, unstack(_without_scratch(tree))):
        about[name] = _describe(value, placement)
        *nodes, last = name.split("/")
        inner = nested
        for node in nodes:
            inner = inner.setdefault(node, {})
        inner[last] = _to_be_written(value, placement)
    with _manager(path, keep) as manager:
        steps = manager.all_steps()
        step = max(steps, default=-1) + 1 if step is None else step
        if step in steps:
            raise ValueError(
                f"`{call}(step=...)` must be new in {os.fspath(path)!r}, got {step}. There are {sorted(steps)}."
            )
        manager.save(
            step, args=ocp.args.Composite(tree=ocp.args.PyTreeSave(nested), about=ocp.args.JsonSave(about)), force=True
        )
        manager.wait_until_finished()


def restore(path: str | os.PathLike[str], like: Any, *, step: int | None = None) -> Any:
    """Read a tree that `save` has written, laid out as another one is.

    Each device reads its own rows and no others. So a table may come back on another number of devices, in another
    layout, in another Collection, or on no mesh at all.

    Args:
      path: The directory.
      like: A pytree of the structure, shapes and dtypes that is wanted: what training began with, or with
        `jax.ShapeDtypeStruct` for its arrays. The placements of its tables, and the shardings of its arrays, say where
        everything goes. What it does not have is not read.
      step: Which checkpoint. Default: the last one.

    Returns:
      The tree, with the values of the checkpoint.

    Raises:
      FileNotFoundError: If there is no such directory, or no whole checkpoint in it.
      ValueError: If the checkpoint lacks an array, or has one of another shape or dtype.

    Example:
      >>> import embax, jax, jax.numpy as jnp, tempfile
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.Table(jnp.ones((10, 2)))
      >>> with tempfile.TemporaryDirectory() as path:
      ...     embax.checkpoint.save(path, table)
      ...     embax.checkpoint.restore(path, embax.shard(table, mesh, "x"))  # doctest: +ELLIPSIS
      Table(float32[10,2], placement=Placement('rows' over ...))
    """
    call = "embax.checkpoint.restore"
    if not Path(path).is_dir():
        raise FileNotFoundError(f"`{call}(path=...)` must be a directory with checkpoints, got {os.fspath(path)!r}.")
    bare = _without_scratch(like)
    # Not the tables of a Collection, but what they would be.
    by_name = jax.tree.map(
        lambda node: jax.eval_shape(lambda c: c.tables, node) if _is_collection(node) else node,
        bare,
        is_leaf=_is_collection,
    )
    entries = _entries(call, by_name)
    with _manager(path, None) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a whole checkpoint" if step is None else f"a whole checkpoint of step {step}"
            raise FileNotFoundError(
                f"`{call}(path=...)` must have {wanted}, got {os.fspath(path)!r} with the steps {sorted(steps)}."
            )
        step = max(steps) if step is None else step
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        _check_fits(call, entries, about)
        wanted, arguments = _wanted(entries)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(tree=ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)),
        )["tree"]
    values = iter([_as_wanted(_find(restored, entry.name), entry) for entry in entries])
    filled = jax.tree.map(
        lambda node: (
            node if node is None else with_weight(node, next(values)) if isinstance(node, Table) else next(values)
        ),
        by_name,
        is_leaf=lambda node: isinstance(node, Table),
    )
    return _with_scratch(restack(filled, bare), like)


def _manager(path: str | os.PathLike[str], keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=keep is not None
    )
    return ocp.CheckpointManager(Path(path).absolute(), options=options)


def _is_collection(node: Any) -> bool:
    return isinstance(node, Collection)


def _is_lifted(node: Any) -> bool:
    return isinstance(node, LiftState)


def _without_scratch(tree: Any) -> Any:
    return jax.tree.map(lambda node: node._replace(slots=()) if _is_lifted(node) else node, tree, is_leaf=_is_lifted)


def _with_scratch(tree: Any, like: Any) -> Any:
    def put_back(node: Any, of_like: Any) -> Any:
        if not _is_lifted(node):
            return node
        return node._replace(slots=tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for x in of_like.slots))

    return jax.tree.map(put_back, tree, like, is_leaf=_is_lifted)


def _entries(call: str, tree: Any) -> list[_Entry]:
    """List the arrays of a tree by name, those of a Table with where its rows are."""
    nodes, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Table))
    entries = []
    for path, node in nodes:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "table"
        if isinstance(node, Table):
            entries += [_Entry(name, node.weight, node.placement)] * (node.weight is not None)
            continue
        if not (hasattr(node, "shape") and hasattr(node, "dtype")) and not isinstance(
            node, bool | int | float | complex
        ):
            raise TypeError(
                f"`{call}` must have a tree of arrays, random keys and numbers, got {type(node).__name__} for "
                f"{name!r}. Leave it out."
            )
        entries.append(_Entry(name, node, None))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1 or any(other.startswith(f"{name}/") for other in names):
            raise ValueError(f"`{call}` must have a name of its own for each leaf, got {name!r} twice. Rename a node.")
    return entries


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _describe(value: Any, placement: Placement | None) -> dict[str, Any]:
    """What a checkpoint says of an array besides its numbers, and what it has to fit."""
    shape = list(np.shape(value))
    if placement is not None:
        shape[0] = placement.rows
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return {"shape": shape, "dtype": str(dtype)}


def _to_be_written(value: Any, placement: Placement | None) -> Any:
    if placement is not None and placement.cyclic:  # by blocks, rows are in their order
        value = _placed.moved(placement, value, _by_blocks(placement))
    if _is_key(value):
        value = jax.random.key_data(value)
    # Of several processes, one writes what each of them has.
    alone = isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1
    return np.asarray(value) if alone or not isinstance(value, jax.Array) else value


def _by_blocks(placement: Placement) -> Placement:
    return dataclasses.replace(placement, cyclic=False)


def _check_fits(call: str, entries: Sequence[_Entry], about: dict[str, Any]) -> None:
    missing = [entry.name for entry in entries if entry.name not in about]
    if missing:
        raise ValueError(
            f"`{call}(like=...)` must have what is in the checkpoint, got {', '.join(map(repr, missing))}, which it "
            f"lacks. It has {', '.join(map(repr, about)) or 'nothing'}."
        )
    for entry in entries:
        wanted, found = _describe(entry.value, entry.placement), about[entry.name]
        if wanted != found:
            raise ValueError(
                f"`{call}(like=...)` must have the shapes and dtypes of the checkpoint, got {wanted['dtype']}"
                f"{wanted['shape']} for {entry.name!r}, which is {found['dtype']}{found['shape']}. "
                "Restore it as it was."
            )


def _wanted(entries: Sequence[_Entry]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Say to Orbax which arrays are wanted, and where."""
    items: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for name, value, placement in entries:
        array = jax.eval_shape(jax.random.key_data, value) if _is_key(value) else value
        shape, dtype = np.shape(array), getattr(array, "dtype", None)
        sharding = getattr(value, "sharding", None) if placement is None else placement.sharding(shape, shape[1:])
        if isinstance(sharding, NamedSharding) and not _is_key(value):
            # Behind the last row of a table, there may be more or fewer than when it was written.
            restore_args = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype, strict=False)
        else:  # not bound to a device, so that it goes with others wherever they are
            restore_args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        *nodes, last = name.split("/")
        inner, of_inner = items, arguments
        for node in nodes:
            inner, of_inner = inner.setdefault(node, {}), of_inner.setdefault(node, {})
        inner[last] = jax.ShapeDtypeStruct(shape, dtype or np.asarray(value).dtype)
        of_inner[last] = restore_args
    return items, arguments


def _find(tree: Any, name: str) -> Any:
    for node in name.split("/"):
        tree = tree[node]
    return tree


def _as_wanted(value: Any, entry: _Entry) -> Any:
    """Give what was read the layout and the kind of what was asked for."""
    if entry.placement is not None and entry.placement.cyclic:
        return _placed.moved(_by_blocks(entry.placement), value, entry.placement)
    if _is_key(entry.value):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=str(jax.random.key_impl(entry.value)))
    if isinstance(entry.value, jax.Array | jax.ShapeDtypeStruct):
        # A table saved on a mesh has rows behind its last one.
        return (
            value
            if isinstance(value, jax.Array)
            else jnp.asarray(value[: entry.value.shape[0]] if value.ndim else value)
        )
    return type(entry.value)(value) if isinstance(entry.value, bool | int | float | complex) else np.asarray(value)
