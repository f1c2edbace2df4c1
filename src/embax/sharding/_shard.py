"""shard and unshard: bring tables onto a mesh, and back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from .._core import ids as _ids
from .._core.containers.held import held, table_of
from .._core.containers.held_rows import HeldRows
from .._core.containers.modules import is_module, with_tables
from .._core.containers.stored_rows import StoredRows
from .._core.dense import DENSE
from .._core.layout import Layout, Split
from .._core.table import Table, has_weight, with_weight
from .._features.made_for import MadeFor
from .._mesh import sharded as _placed
from .._mesh.storage import storage_of as storage_on_mesh


def shard(
    tree: Any,
    mesh: Mesh,
    axis: str | Sequence[str],
    layout: Layout = "rows",
    *,
    columns: str | None = None,
    skew: float = 2.0,
    pool_at_owners: bool = False,
    **rules: Any,
) -> Any:
    """Split the tables of a tree over the devices of a mesh.

    A sharded table is used like any other, in an ordinary `jax.jit` over the same mesh, with explicit axes or without:
    `lookup`, `embedding_bag`, `Collection`, `attend`, the cross-entropies, `value_and_grad`, the optimizers and
    `apply_updates` return the same results as for the dense table. Optimizers split their state like the table.

    A lookup splits its ids over all devices. Each device asks the owners for the distinct rows that it needs, by an
    all-to-all with room for `skew` times the mean number of rows for each owner. If more ids fall on one owner, further
    rounds follow until all are answered; `embax.sharding.rounds` counts them. Gradients are sent the other way, and
    summed by the owner of their row. If an owner is overloaded, the rows of that step are dealt out to all devices;
    `LiftState.dealt_out` counts such steps. So traffic and temporary memory of a device follow the number of ids
    divided by the number of devices, and no id is lost.

    - `"rows"`: device `k` has the `k`-th block of rows.
    - `"rows-cyclic"`: row `r` is on device `r mod n`, which balances the load if low ids are frequent.
    - `"columns"`: each device has a part of every row.
    - `"replicated"`: each device has all rows; an update is sent to all.

    Rows are replicated over mesh axes that are not named.

    A model of Flax NNX or brainstate is copied, and the Embeddings of the copy hold sharded tables. Make its optimizer
    afterwards, or carry the state over.

    Args:
      tree: A pytree with Tables: parameters, a Collection, an optimizer's state, or a model of Equinox, Flax NNX or
        brainstate; other leaves are unchanged. Or a NumPy array, a memory map, or an object whose `weight` is one, such
        as Vectors; each device reads only its own rows.
      mesh: The mesh.
      axis: The mesh axis, or axes, over which rows are split; for `"columns"`, the axis that splits columns.
      layout: How rows are split: `"rows"`, `"rows-cyclic"`, `"columns"` or `"replicated"`, see above.
      columns: With a layout of rows, a mesh axis over which columns are split as well.
      skew: The room for rows in one round, as a multiple of the mean number for an owner; 1 or more, dimensionless.
      pool_at_owners: Whether owners may sum or average the rows of a bag, and send one partial sum for each bag instead
        of rows. They do so for bags of one length if that sends less, roughly if bags are longer than the number of
        owners. Each owner then sums its part of a bag first, so results equal those of the dense table up to rounding,
        not bit for bit. Gradients are not affected.
      **rules: For an array, the rules of the new Table.

    Returns:
      The same tree, whose tables have a `placement`; for an array, a Table.

    Raises:
      TypeError: If `mesh` is not a mesh, a table is traced, or the tree has an optimizer of a model.
      ValueError: If the axes or the layout do not fit, or the columns cannot be divided.

    Example:
      >>> import embax, jax, numpy as np
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.shard(np.eye(10, 3, dtype=np.float32), mesh, "x", "rows-cyclic", padding_idx=9)
      >>> embax.lookup(table, [1, 9])
      Array([[0., 1., 0.],
             [0., 0., 0.]], dtype=float32)
    """
    split = Split(mesh, axis, layout, columns, skew, pool_at_owners)
    storage_of = functools.partial(storage_on_mesh, "embax.shard", split)

    rows = getattr(tree, "weight", tree)
    if isinstance(rows, np.ndarray) and not isinstance(tree, Table):
        storage = storage_of(rows.shape)
        return Table(storage.from_rows(rows), storage=storage, **rules)
    if rules:
        raise TypeError(
            f"`embax.shard(**rules)` must be for an array, got {sorted(rules)} for {type(tree).__name__}, whose tables "
            "have their own. Leave them out."
        )

    def on_mesh(node: Any) -> Any:
        if isinstance(node, MadeFor):  # part of an optimizer's state
            return node.placed(storage_of)
        if is_module(node):
            return with_tables("embax.shard", node, on_mesh)
        if isinstance(node, StoredRows):
            return held(on_mesh(table_of(node)))
        if not isinstance(node, Table):
            return node
        if isinstance(node.weight, HeldRows):  # a gradient: its rows stay with their ids
            return with_weight(node, node.weight, storage=storage_of((node.rows, *node.dim)))
        if not has_weight(node):
            return node
        if isinstance(node.weight, Tracer):
            raise TypeError(
                f"`embax.shard(tree=...)` must be called outside of `jit`, got the traced {node!r}. Shard it before."
            )
        storage = storage_of((node.rows, *node.dim))
        return with_weight(node, storage.moved(node.storage, node.weight), storage=storage)

    return jax.tree.map(on_mesh, tree, is_leaf=_is_node)


def unshard(tree: Any) -> Any:
    """Take the tables of a tree off the mesh.

    Each table becomes a whole array on one device of each process. To save a table that is too large for one device,
    use `embax.checkpoint`.

    Args:
      tree: A pytree with Tables, sharded or not, or with models that have some.

    Returns:
      The same tree, without placements; models are copied.

    Raises:
      TypeError: If the tree has an optimizer of a model.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> embax.unshard(embax.shard({"t": embax.Table(jnp.ones((10, 2)))}, mesh, "x"))
      {'t': Table(float32[10,2])}
    """

    def off_mesh(node: Any) -> Any:
        if isinstance(node, MadeFor):
            return node.placed(lambda _: DENSE)
        if is_module(node):
            return with_tables("embax.unshard", node, off_mesh)
        if isinstance(node, StoredRows):
            return held(off_mesh(table_of(node)))
        if not isinstance(node, Table) or node.placement is None:
            return node
        return with_weight(node, node.storage.to_rows(node.weight), storage=DENSE)

    return jax.tree.map(off_mesh, tree, is_leaf=_is_node)


def rounds(table: Table, ids: Any) -> Int32[Array, ""]:
    """Count the rounds of a lookup in a sharded table: 1 if no owner is overloaded.

    Args:
      table: A sharded table.
      ids: The ids of the lookup.

    Returns:
      The number of rounds, to be logged or averaged. If it is often above 1, pass a larger `skew` to `embax.shard`.

    Raises:
      TypeError: If the ids are not of an integer dtype.
      ValueError: If the table is not sharded.
      IndexError: As `lookup`.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.shard(embax.Table(jnp.ones((64, 2))), mesh, "x")
      >>> embax.sharding.rounds(table, jnp.arange(64))
      Array(1, dtype=int32)
    """
    if table.placement is None:
        raise ValueError(f"`embax.sharding.rounds(table=...)` must be on a mesh, got {table!r}. Shard it first.")
    ids = _ids.prepare("embax.sharding.rounds(ids=...)", ids, table)
    ids = _ids.resolve(ids, table.rows, table.out_of_range)
    return _rounds(table.placement, ids)


_rounds = jax.jit(_placed.rounds, static_argnums=0)


def _is_node(node: Any) -> bool:
    return isinstance(node, Table | MadeFor | StoredRows) or is_module(node)
