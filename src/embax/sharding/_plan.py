"""plan: the traffic, memory and balance of sharded tables, computed before anything is allocated."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from .._base import check as _check
from .._core.layout import Layout, Split
from .._core.table import Table, with_weight
from .._gradients.row_grad import is_trained
from .._mesh.storage import storage_of
from ._frequencies import CALL, Frequencies, law_of
from ._results import Optimizer, Plan
from ._traffic import TableStep


def plan(
    tables: Mapping[str, Table | jax.ShapeDtypeStruct],
    mesh: Mapping[str, int] | Mesh | AbstractMesh,
    ids: int | Mapping[str, int | Sequence[int]],
    axis: str | Sequence[str],
    layout: Layout = "rows",
    *,
    columns: str | None = None,
    skew: float = 2.0,
    pool_at_owners: bool = False,
    bag_length: int | Mapping[str, int | None] | None = None,
    frequencies: Frequencies | Mapping[str, Frequencies] = "uniform",
    optimizer: Optimizer = "rowwise_adagrad",
) -> Plan:
    """Compute the traffic, the memory and the balance of tables on a mesh, before anything is allocated.

    No device is needed: the mesh may be far larger than this machine, and tables may be shapes. The bytes sent follow
    from shapes alone, exactly: the compiled program sends as much for any ids, unless some owner is overloaded. The
    useful part of these bytes, and the probability of an overload, follow from how often each row is read.

    The plan is for a step that looks ids up, split evenly over all devices, takes `embax.value_and_grad`, and applies a
    lifted optimizer, which runs on the owners and sends only a few flags. Not included: the model, the counts of
    `scale_grad_by_freq`, and bringing ids and rows from or to another layout.

    Args:
      tables: Tables by name, or their shapes, `jax.ShapeDtypeStruct((rows, *dim), dtype)`. A table that is frozen or of
        integers has no gradient and no state.
      mesh: The sizes of the mesh's axes by name, the major one first; or a mesh.
      ids: The number of ids that a step looks up in a table, on all devices together: one number for all tables, or a
        number by table, or several numbers for several lookups in one table.
      axis: The mesh axis, or axes, over which rows are split; for the layout `"columns"`, the axis for columns.
      layout: How rows are split: `"rows"`, `"rows-cyclic"`, `"columns"` or `"replicated"`; see `embax.shard`.
      columns: With a layout of rows, a mesh axis over which columns are split as well.
      skew: The room for rows in one round, as a multiple of the mean number for an owner; 1 or more, dimensionless.
      pool_at_owners: Whether owners may sum the rows of a bag and send the sum instead of rows, if that is less.
      bag_length: The number of ids of a bag, if `embax.embedding_bag` reads the table in bags of one length, summed or
        averaged without weights; by table, or one for all. Default: none, ids are looked up.
      frequencies: How often each row is read. `"uniform"`; the exponent `s` of Zipf's law, where row `r` is read in
        proportion to `1 / (r + 1)**s`, as in a vocabulary sorted by frequency; or one count or probability for each
        row. By table, or one for all. Ids are assumed to be drawn independently.
      optimizer: The optimizer whose state is counted: `"sgd"`, `"adagrad"`, `"rowwise_adagrad"`, `"adam"` or
        `"rowwise_adam"`.

    Returns:
      The plan of each table, and sums. Bytes are for one device and one step; all devices are alike.

    Raises:
      TypeError: If a table, the mesh or a number is of the wrong type.
      ValueError: If a number is out of its range, a table has no entry, or the layout does not fit mesh and table.

    Example:
      >>> import embax, jax
      >>> tables = {"items": jax.ShapeDtypeStruct((1_000_000_000, 128), "float32")}
      >>> plan = embax.sharding.plan(tables, {"x": 256}, 1_048_576, "x", "rows-cyclic", frequencies=1.05)
      >>> plan.sent("forward"), round(plan.tables["items"].rows_balance, 2)
      (5263200, 1.05)
    """
    sizes = _axis_sizes(mesh)
    split = Split(AbstractMesh(tuple(sizes.values()), tuple(sizes)), axis, layout, columns, skew, pool_at_owners)
    if not isinstance(tables, Mapping) or not all(isinstance(x, Table | jax.ShapeDtypeStruct) for x in tables.values()):
        raise TypeError(
            f"`{CALL}(tables=...)` must be Tables or jax.ShapeDtypeStructs by name, got {tables!r}. Pass "
            "{'items': jax.ShapeDtypeStruct((rows, dim), 'float32')}, say."
        )
    optimizer = _check.choice(f"{CALL}(optimizer=...)", optimizer, Optimizer)
    plans = {}
    for name, table in tables.items():
        shape, dtype, trained = _shape(name, table)
        storage = storage_of(CALL, split, shape)
        numbers = _of_table("ids", ids, name)
        numbers = numbers if isinstance(numbers, Sequence) and not isinstance(numbers, str) else (numbers,)
        lookups = tuple(_check.size(f"{CALL}(ids=...)", number) for number in numbers)
        law = law_of(storage.placement, name, _of_table("frequencies", frequencies, name))
        of_bag = _bag_length(_of_table("bag_length", bag_length, name), lookups, name, dtype)
        rules = table if isinstance(table, Table) else Table(jnp.zeros(0))
        placed = with_weight(rules, jax.ShapeDtypeStruct(shape, dtype), storage=storage)
        plans[name] = TableStep(placed, law, lookups, of_bag, optimizer if trained else None).planned(name)
    return Plan(plans)


def _axis_sizes(mesh: Any) -> dict[str, int]:
    if isinstance(mesh, Mesh | AbstractMesh):
        return dict(mesh.shape)
    if not isinstance(mesh, Mapping) or not mesh:
        raise TypeError(
            f"`{CALL}(mesh=...)` must be a mesh, or the sizes of its axes by name, got {mesh!r}. Pass {{'x': 256}}."
        )
    sizes = {name: _check.size(f"{CALL}(mesh=...)", number) for name, number in mesh.items()}
    if 0 in sizes.values():
        raise ValueError(f"`{CALL}(mesh=...)` must have axes of 1 device or more, got {sizes}. Leave out such an axis.")
    return sizes


def _shape(name: str, table: Table | jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype, bool]:
    """The logical shape of a table, its dtype, and whether it is trained."""
    if isinstance(table, Table):
        return (table.rows, *table.dim), np.dtype(table.dtype), bool(is_trained(table))
    if not table.shape:
        raise ValueError(f"`{CALL}(tables=...)` must have an axis of rows, got () for {name!r}. Pass (rows, *dim).")
    return tuple(table.shape), np.dtype(table.dtype), bool(jnp.issubdtype(table.dtype, jnp.inexact))


def _bag_length(length: Any, lookups: Sequence[int], name: str, dtype: np.dtype) -> int | None:
    if length is None:
        return None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"`{CALL}(bag_length=...)` must be None for {name!r}, which is of {dtype}, got {length!r}. Bags are of "
            "floats: leave it out, or cast the table."
        )
    length = _check.size(f"{CALL}(bag_length=...)", length)
    if length == 0 or any(ids % length for ids in lookups):
        raise ValueError(
            f"`{CALL}(bag_length=...)` must be 1 or more and divide the ids of {name!r}, {tuple(lookups)}, got "
            f"{length}. Count the ids of whole bags."
        )
    return length


def _of_table(argument: str, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"`{CALL}({argument}=...)` must have an entry for each table, got none for {name!r}. Add it, or pass one "
            "value for all tables."
        )
    return value[name]
