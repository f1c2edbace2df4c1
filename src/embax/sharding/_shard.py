"""shard and unshard: tables onto a mesh and back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from .._base.axes import laid_out
from .._core import ids as _ids
from .._core.held_rows import HeldRows
from .._core.placement import Layout, Placement, placement_of
from .._core.table import Table, has_weight, with_weight
from .._features.made_for import MadeFor
from .._mesh import relayout as _moves
from .._mesh import sharded as _placed

# Reads rows `first, first + step, ...` below `end`, and of these some columns.
_Reader = Callable[[slice, tuple[slice, ...]], np.ndarray]


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

    Args:
      tree: A pytree with Tables, such as parameters, a Collection or an optimizer's state, whose other leaves stay as
        they are; a NumPy array or memory map, or what has one for its `weight`, such as Vectors. From it, each device
        gets its own rows and no others.
      mesh: The mesh.
      axis: The mesh axis, or axes, over which rows are split; of `"columns"`, the columns.
      layout: How.
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
      TypeError: If the mesh is none, or a table is traced.
      ValueError: If the axes or the layout do not fit, or the columns cannot be divided.

    Example:
      >>> import embax, jax, numpy as np
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> table = embax.shard(np.eye(10, 3, dtype=np.float32), mesh, "x", "rows-cyclic", padding_idx=9)
      >>> embax.lookup(table, [1, 9])
      Array([[0., 1., 0.],
             [0., 0., 0.]], dtype=float32)
    """
    place = functools.partial(placement_of, "embax.shard", mesh, axis, layout, columns, skew, pool_at_owners)
    rows = getattr(tree, "weight", tree)
    if isinstance(rows, np.ndarray) and not isinstance(tree, Table):
        placement = place(rows.shape)
        dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
        return Table(_laid_out(placement, _of_array(rows), rows.shape, dtype), placement=placement, **rules)
    if rules:
        raise TypeError(
            f"`embax.shard(**rules)` must be for an array, got {sorted(rules)} for {type(tree).__name__}, whose tables "
            "have their own. Leave them out."
        )

    def on_mesh(node: Any) -> Any:
        if isinstance(node, MadeFor):  # of an optimizer's state, whose tables are on the mesh then
            return node.placed(place)
        if not isinstance(node, Table):
            return node
        if isinstance(node.weight, HeldRows):  # of a gradient, which are where its ids are
            return with_weight(node, node.weight, placement=place((node.rows, *node.dim)))
        if not has_weight(node):
            return node
        if isinstance(node.weight, Tracer):
            raise TypeError(
                f"`embax.shard(tree=...)` must be called outside of `jit`, got the traced {node!r}. Shard what goes in."
            )
        return placed(node, place((node.rows, *node.dim)))

    return jax.tree.map(on_mesh, tree, is_leaf=_is_node)


def placed(table: Table, placement: Placement) -> Table:
    """Lay a table out on a mesh, wherever its rows are, each device getting its own."""
    if table.placement is not None and table.placement.mesh == placement.mesh:
        weight = _moves.moved(table.placement, table.weight, placement)
        weight = laid_out(weight, placement.sharding(weight.shape, table.dim))
    else:
        reader = _of_array(table.weight) if table.placement is None else _of_placed(table)
        weight = _laid_out(placement, reader, (table.rows, *table.dim), table.dtype)
    return with_weight(table, weight, placement=placement)


def unshard(tree: Any) -> Any:
    """Take the tables of a tree off the mesh.

    Each of them becomes one array on one device, of every process. That is a whole copy: `embax.checkpoint` writes
    tables that are too large for one.

    Args:
      tree: A pytree with Tables, placed or not.

    Returns:
      The same tree, without placements.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> embax.unshard(embax.shard({"t": embax.Table(jnp.ones((10, 2)))}, mesh, "x"))
      {'t': Table(float32[10,2])}
    """

    def off_mesh(node: Any) -> Any:
        if isinstance(node, MadeFor):
            return node.placed(lambda _: None)
        if not isinstance(node, Table) or node.placement is None:
            return node
        weight = node.weight
        if isinstance(weight, Tracer):
            ids = jnp.arange(node.rows, dtype=_ids.index_dtype(node.rows))
            weight = _placed.take(node.placement, weight, ids, 0)
        elif isinstance(weight, jax.Array) and weight.is_fully_addressable:
            weight = jnp.asarray(_of_placed(node)(slice(0, node.rows, 1), (slice(None),) * (weight.ndim - 1)))
        elif isinstance(weight, jax.Array):
            everywhere = Placement(node.placement.mesh, (), None, False, node.rows)
            weight = _moves.moved(node.placement, weight, everywhere).addressable_data(0)
        return with_weight(node, weight, placement=None)

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
    return isinstance(node, Table | MadeFor)


def _laid_out(placement: Placement, read: _Reader, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Make the stored array of a placement, each shard from the rows that it holds."""
    stored = (placement.stored_rows, *shape[1:])

    def part(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(stored[0])
        step = placement.shards if placement.cyclic else 1
        start = first // placement.block if placement.cyclic and last > first else first
        own = read(slice(start, min(start + (last - first) * step, placement.rows), step), index[1:])
        missing = last - first - own.shape[0]
        own = np.pad(own, [(0, missing), *[(0, 0)] * (own.ndim - 1)]) if missing else own
        return np.asarray(own, dtype)

    return jax.make_array_from_callback(stored, placement.sharding(stored, stored[1:]), part, dtype=dtype)


def _of_array(rows: Any) -> _Reader:
    if isinstance(rows, jax.Array) and not rows.is_fully_addressable:
        raise ValueError(
            f"`embax.shard(tree=...)` must have arrays of this process, or tables on the same mesh, got "
            f"{rows.sharding}. Make the table on the mesh, with Table.create(mesh=...) or from a file."
        )
    if isinstance(rows, jax.Array) and [device.platform for device in rows.devices()] == ["cpu"]:
        rows = np.asarray(rows)  # the same memory, of which NumPy takes parts without compiling
    # Of an array on a device, too, no more than the part is copied.
    return lambda some, columns: np.asarray(rows[(slice(some.start, max(some.stop, some.start), some.step), *columns)])


def _of_placed(table: Table) -> _Reader:
    """Read from the shards of another mesh that this process has."""
    placement: Any = table.placement
    shards = {tuple((s.start, s.stop) for s in x.index): x for x in table.weight.addressable_shards}

    def read(some: slice, columns: tuple[slice, ...]) -> np.ndarray:
        ids = np.arange(some.start, max(some.stop, some.start), some.step)
        places = placement.positions(ids)
        out = np.zeros((len(ids), *table.weight.shape[1:]), table.dtype)
        for shard in shards.values():
            first, last, _ = shard.index[0].indices(placement.stored_rows)
            here = np.flatnonzero((places >= first) & (places < last))
            out[(here, *shard.index[1:])] = np.asarray(shard.data)[places[here] - first]
        return out[(slice(None), *columns)]

    return read
