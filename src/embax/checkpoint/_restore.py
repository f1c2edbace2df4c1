"""restore: each device reads a block of rows, then devices exchange rows, so that each has its own."""

import functools
import math
import os
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from .._base import check as _check
from .._base.arrays import as_jax
from .._base.axes import laid_out
from .._core.containers.held import held, table_of
from .._core.containers.stored_rows import StoredRows
from .._core.scratch import Scratch, with_scratch, without_scratch
from .._core.table import Table, has_weight, with_weight
from .._features.collection import Collection, restack
from .._mesh import relayout as _moves
from .._mesh.storage import Sharded
from ._entries import Entry, by_blocks, described, entries_of, is_key, is_node, with_descriptions
from ._orbax import ABOUT, ARRAYS, FORMAT, manager_of, nested, ocp, path_of, taken

# The errors of Orbax and TensorStore about truncated, missing or altered files.
_OF_DAMAGE = (KeyError, TypeError, ValueError, OSError)


def restore(path: str | os.PathLike[str], like: PyTree, *, step: int | None = None, partial: bool = False) -> PyTree:
    """Read a tree that `save` wrote, into the layout of another tree.

    A table may be restored to another number of devices, another layout, another Collection, or without a mesh. Each
    device reads a block of rows, then devices exchange rows; no device holds a whole table.

    The state of an optimizer remembers the tables that it was made for. If their padding rows, or the set of trained
    tables, differ now, the optimizer refuses the state; `embax.optim.carry_over` converts it. To change the number of
    rows, restore the saved shapes first, then call `embax.resize` and `carry_over`.

    Args:
      path: The directory.
      like: A pytree with the structure, shapes and dtypes of the saved tree: its arrays, or `jax.ShapeDtypeStruct` in
        their place. The placements of its tables and the shardings of its arrays determine the layout.
      step: The number of the checkpoint. Default: the last one.
      partial: Whether `like` may leave out parts of the checkpoint, which are then not read.

    Returns:
      The tree, with the values of the checkpoint.

    Raises:
      FileNotFoundError: If the directory does not exist, or has no complete checkpoint.
      TypeError: If a leaf of `like` is not an array, random key or number.
      ValueError: If an array is missing, unexpected, or of another shape or dtype; if the checkpoint is damaged, or was
        not written by `save`.

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
    partial = _check.flag(f"{call}(partial=...)", partial)
    step = None if step is None else _check.size(f"{call}(step=...)", step)
    if not path_of(path).is_dir():
        raise FileNotFoundError(
            f"`{call}(path=...)` must be a directory with checkpoints, got {os.fspath(path)!r}. Save one first."
        )
    bare = without_scratch(like)
    wanted, structure = jax.tree.flatten(bare, is_leaf=is_node)
    # The shapes of a Collection's tables, without cutting them out of their stacks.
    nodes = [jax.eval_shape(lambda c: c.tables, node) if isinstance(node, Collection) else node for node in wanted]
    entries = entries_of(call, structure.unflatten(nodes))
    with manager_of(path, None, writes=False) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            missing = "a whole checkpoint" if step is None else f"a whole checkpoint of step {step}"
            raise FileNotFoundError(
                f"`{call}(path=...)` must have {missing}, got {os.fspath(path)!r} with the steps {steps}. Name another."
            )
        values, made_for = _read(call, manager, path, steps[-1] if step is None else step, entries, partial)
    left = iter(entries)

    def filled(in_collection: bool, node: PyTree) -> PyTree:
        if isinstance(node, Table) and not has_weight(node):
            return node
        if isinstance(node, Scratch):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), node)
        entry = next(left)
        value = values.pop(entry.name)
        if isinstance(node, StoredRows):
            return held(filled_table(False, table_of(node), entry, value))
        return filled_table(in_collection, node, entry, value) if isinstance(node, Table) else value

    def filled_table(in_collection: bool, table: Table, entry: Entry, value: PyTree) -> Table:
        placement, storage = table.placement, table.storage
        if placement is None:  # the value is in row order, which a dense storage keeps
            return with_weight(table, value if storage.held(value) is value else storage.from_rows(value))
        if entry.placement is None:
            return with_weight(table, value)
        blocks = by_blocks(placement, table.rows)
        if in_collection:  # `restack` brings the rows into the layout of their stack
            return with_weight(table, value, storage=Sharded(blocks))
        if blocks != placement:
            value = _moves.moved(blocks, value, placement)
        return with_weight(table, laid_out(value, placement.sharding(value.shape, table.dim)))

    out = [
        jax.tree.map(functools.partial(filled, isinstance(of_like, Collection)), node, is_leaf=is_node)
        for node, of_like in zip(nodes, wanted, strict=True)
    ]
    return with_descriptions(with_scratch(restack(structure.unflatten(out), bare), like), made_for)


def _read(
    call: str,
    manager: ocp.CheckpointManager,
    path: str | os.PathLike[str],
    step: int,
    entries: Sequence[Entry],
    partial: bool,
) -> tuple[dict[str, PyTree], dict[str, str]]:
    """Read the value of each entry, for a sharded table in blocks of rows; and the MadeFor records of states."""
    if not (path_of(path) / str(step) / ABOUT).exists():
        raise ValueError(
            f"`{call}(path=...)` must be of embax.checkpoint.save, got {os.fspath(path)!r}, whose step {step} is not. "
            "Read it with the program that wrote it."
        )
    try:
        about = manager.restore(step, args=ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()}))[ABOUT]
        known, found = about["format"] == FORMAT, about["arrays"]
    except _OF_DAMAGE as error:
        raise _damaged(call, path, step, error) from error
    if not known:
        raise ValueError(
            f"`{call}(path=...)` must be of the format {FORMAT}, got {about['format']} in {os.fspath(path)!r}. "
            "Read it with a newer embax."
        )
    _check_fits(call, entries, found, partial)
    targets = {entry.name: _target(entry) for entry in entries}
    read = {name: target for name, target in targets.items() if math.prod(target.shape)}
    try:
        of_rows = {entry.name for entry in entries if _is_table(entry, found)}
        tree = _arrays(manager, step, read, of_rows)
        values = {name: taken(tree, name) for name in read}
    except _OF_DAMAGE as error:
        raise _damaged(call, path, step, error) from error
    for entry in entries:
        target = targets[entry.name]
        value = values.get(entry.name, np.zeros(target.shape, target.dtype))
        values[entry.name] = _as_wanted(value, entry, target, found[entry.name])
    return values, about.get("made_for", {})


def _arrays(
    manager: ocp.CheckpointManager, step: int, targets: dict[str, PyTree], of_rows: set[str]
) -> dict[str, PyTree]:
    if not targets:
        return {}

    def arguments(name: str, target: PyTree) -> PyTree:
        if isinstance(target.sharding, NamedSharding):
            # A table may need more or less padding than when it was written.
            return ocp.ArrayRestoreArgs(
                sharding=target.sharding, global_shape=target.shape, dtype=target.dtype, strict=name not in of_rows
            )
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)

    wanted = ocp.args.PyTreeRestore(
        nested(targets), nested({name: arguments(name, x) for name, x in targets.items()}), partial_restore=True
    )
    return manager.restore(step, args=ocp.args.Composite(**{ARRAYS: wanted}))[ARRAYS]


def _target(entry: Entry) -> jax.ShapeDtypeStruct:
    """The array to be read for an entry."""
    value = entry.value
    if entry.placement is not None:
        blocks = by_blocks(entry.placement, entry.rows or 0)
        shape = (blocks.stored_rows, *value.shape[1:])
        return jax.ShapeDtypeStruct(shape, value.dtype, sharding=blocks.sharding(shape, shape[1:]))
    if is_key(value):
        data = jax.eval_shape(jax.random.key_data, value)
        return jax.ShapeDtypeStruct(data.shape, data.dtype)
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    sharding = _sharding(value)
    return jax.ShapeDtypeStruct(np.shape(value), dtype, sharding=sharding)


def _sharding(value: object) -> jax.sharding.Sharding | None:
    """The sharding of an array; None if it is not committed to devices, so that it combines with any other array."""
    sharding = getattr(value, "sharding", None)
    loose = isinstance(value, jax.Array) and not value.committed
    abstract = isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, Mesh)
    return None if loose or abstract else sharding


def _check_fits(call: str, entries: Sequence[Entry], found: dict[str, PyTree], partial: bool) -> None:
    missing = [entry.name for entry in entries if entry.name not in found]
    if missing:
        raise ValueError(
            f"`{call}(like=...)` must have arrays of the checkpoint, got {_listed(missing)}, which it lacks. It has "
            f"{_listed(found) or 'nothing'}. Leave them out."
        )
    more = sorted(set(found) - {entry.name for entry in entries})
    if more and not partial:
        raise ValueError(
            f"`{call}(like=...)` must have all arrays of the checkpoint, got nothing for {_listed(more)}. Add them, or "
            "pass partial=True."
        )
    for entry in entries:
        wanted, saved = described(entry), found[entry.name]
        if any(wanted[name] != saved[name] for name in wanted):
            raise ValueError(
                f"`{call}(like=...)` must have the shapes and dtypes of the checkpoint, got {wanted['dtype']}"
                f"{wanted['shape']} for {entry.name!r}, which is {saved['dtype']}{saved['shape']}. Restore this "
                "shape; to change its rows afterwards, use embax.resize and embax.optim.carry_over."
            )


def _is_table(entry: Entry, found: dict[str, PyTree]) -> bool:
    """Whether an entry is a table now, or was when it was saved: `like` may have a plain array in its place."""
    return entry.rows is not None or found[entry.name].get("table", False)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _damaged(call: str, path: str | os.PathLike[str], step: int, error: Exception) -> ValueError:
    said = str(error).strip().partition("\n")[0]
    return ValueError(
        f"`{call}(path=...)` must have whole files, got {os.fspath(path)!r}, of which the step {step} cannot be read: "
        f"{type(error).__name__}: {said}. Name an older step."
    )


def _as_wanted(value: PyTree, entry: Entry, target: jax.ShapeDtypeStruct, found: dict[str, PyTree]) -> PyTree:
    """Convert a value to the type of the leaf in `like`, and put it on its devices."""
    like = entry.value
    if isinstance(value, jax.Array):  # already on its devices
        return value
    if _is_table(entry, {entry.name: found}) and entry.placement is None:
        value = value[: target.shape[0]]  # cut off the padding of a table that was saved on a mesh
    if is_key(like):  # with several processes, only jit can make keys on all of them
        impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else None
        impl = impl if str(impl) == found["impl"] else found["impl"]  # the ids of a RowGrad have no name for it
        return jax.jit(functools.partial(jax.random.wrap_key_data, impl=impl), out_shardings=_sharding(like))(value)
    if isinstance(like, np.generic):
        return like.dtype.type(value)
    if isinstance(like, bool | int | float | complex):
        return type(like)(value.item())
    if isinstance(like, np.ndarray) and entry.placement is None:
        return value
    return as_jax(value) if target.sharding is None else jax.device_put(value, target.sharding)
