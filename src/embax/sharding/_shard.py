"""shard and unshard: tables onto a mesh and back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from .._core import ids as _ids
from .._core.dense import DENSE
from .._core.held import held, table_of
from .._core.held_rows import HeldRows
from .._core.layout import Layout, Split
from .._core.modules import is_module, with_tables
from .._core.stored_rows import StoredRows
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

    A table that is placed is used as any other, in an ordinary `jax.jit` over the same mesh, whose axes may be explicit
    or not: `lookup`, `embedding_bag`, `Collection`, `attend`, the cross-entropies, `value_and_grad`, the optimizers and
    `apply_updates` give what they give for the table as it was. The state that an optimizer makes for it is split
    as the table is.

    A lookup splits its ids over all devices. Each device asks the owners for the distinct rows that it needs, by an
    all-to-all in which it can ask each of them for `skew` times the mean number. Where ids crowd on one owner there are
    further rounds until all is answered; `embax.sharding.rounds` says how many. Gradients take the way back, and are
    summed where the row is stored; where too many crowd there, the rows of that step are dealt out to all devices, and
    `LiftState.dealt_out` counts these steps. So traffic and temporary memory follow the number of ids, divided by that
    of the devices, and no id is lost.

    - `"rows"`: device `k` has the `k`-th block of rows.
    - `"rows-cyclic"`: row `r` is on device `r mod n`, which balances ids of which the small ones are frequent.
    - `"columns"`: each device has a part of every row.
    - `"replicated"`: each device has all rows; an update is sent to all.

    Over the axes of the mesh that are not named, rows are replicated.

    A model of Flax NNX or brainstate is copied, and its Embeddings hold sharded tables then; the model that is given
    stays as it is. Make its optimizer afterwards, or carry its state over.

    Args:
      tree: A pytree with Tables, such as parameters, a Collection, an optimizer's state, or models of Equinox, Flax NNX
        and brainstate, whose other leaves stay as they are; a NumPy array or memory map, or what has one for its
        `weight`, such as Vectors. From it, each device gets its own rows and no others.
      mesh: The mesh.
      axis: The mesh axis, or axes, over which rows are split; of `"columns"`, the columns.
      layout: How rows are split: `"rows"`, `"rows-cyclic"`, `"columns"` or `"replicated"`.
      columns: With a layout of rows: the mesh axis over which the columns are split, too.
      skew: How many times the mean a device may ask another one for in a round, at least 1, dimensionless.
      pool_at_owners: Whether the owners of rows sum, or average, those of a bag, and send a partial sum for each bag
        instead of its rows. They do so for bags of one length wherever less is sent that way: where bags are longer, by
        and large, than there are devices for rows. A bag is then summed in another order, owner by owner, so that it is
        that of the table off the mesh to rounding, and not bit for bit. Gradients go the same way as without.
      **rules: Of an array: the rules of the Table that is made of it.

    Returns:
      The same tree, the tables with a `placement`; of an array, a Table.

    Raises:
      TypeError: If the mesh is none, a table is traced, or there is an optimizer of a model in the tree.
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
        if isinstance(node, MadeFor):  # of an optimizer's state, whose tables are on the mesh then
            return node.placed(storage_of)
        if is_module(node):
            return with_tables("embax.shard", node, on_mesh)
        if isinstance(node, StoredRows):
            return held(on_mesh(table_of(node)))
        if not isinstance(node, Table):
            return node
        if isinstance(node.weight, HeldRows):  # of a gradient, which are where its ids are
            return with_weight(node, node.weight, storage=storage_of((node.rows, *node.dim)))
        if not has_weight(node):
            return node
        if isinstance(node.weight, Tracer):
            raise TypeError(
                f"`embax.shard(tree=...)` must be called outside of `jit`, got the traced {node!r}. Shard what goes in."
            )
        storage = storage_of((node.rows, *node.dim))
        return with_weight(node, storage.moved(node.storage, node.weight), storage=storage)

    return jax.tree.map(on_mesh, tree, is_leaf=_is_node)


def unshard(tree: Any) -> Any:
    """Take the tables of a tree off the mesh.

    Each of them becomes one array on one device, of every process. That is a whole copy: `embax.checkpoint` writes
    tables that are too large for one.

    Args:
      tree: A pytree with Tables, placed or not, or with models that have some.

    Returns:
      The same tree, without placements; a model is a copy.

    Raises:
      TypeError: If there is an optimizer of a model in the tree.

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
    """Say in how many rounds a lookup in a placed table is answered: 1 where the capacity suffices.

    Args:
      table: A table with a placement.
      ids: The ids of the lookup.

    Returns:
      A number, to be logged or averaged: with more than 1 as a rule, give `embax.shard` a greater `skew`.

    Raises:
      TypeError: If the ids are not of an integer dtype.
      ValueError: If the table has no placement.
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
