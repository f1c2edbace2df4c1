"""Operations on the rows of a sharded table, as functions of whole arrays.

Each function makes the batch divisible by the devices, and runs `exchange` on each device by `shard_map`. For instance,
`take` of 6 ids from a table of 10 rows on four devices: the ids are padded to 8 by the sentinel 10, each device fetches
the rows of two ids from their owners, and the last two results are cut off.

If rows are split by columns, a *group* is the devices that have parts of the same rows. Each device of a group asks for
the ids of the whole group, and the devices then swap parts, so that each has the whole rows of its own ids.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Int, Int32, PyTree, Shaped

from .._base import distinct as _dedupe
from .._base.axes import is_explicit, laid_out_as, on_every_device, resharded
from .._base.distinct import Distinct
from .._core.storage import WriteMode
from . import exchange as _exchange
from .placement import Placement

T = TypeVar("T")


def take(
    placement: Placement, leaf: Shaped[Array, "stored *dim"], ids: Int[Array, "*batch"], fill_value: float
) -> Shaped[Array, "*batch_dim"]:
    """Read a row for each id. The ids are split over all devices, and traffic follows their number.

    Args:
      placement: Where the rows are.
      leaf: The rows.
      ids: Row numbers in `[0, rows)`; any other number stands for no row.
      fill_value: The value for an id without a row.

    Returns:
      The rows, laid out as the ids.
    """
    dim = leaf.shape[1:]
    if placement.rows == 0 or ids.size == 0 or math.prod(dim) == 0:
        exists = jnp.zeros((*ids.shape, *[1] * len(dim)), bool)
        return jnp.where(exists, jnp.zeros((), leaf.dtype), jnp.full((*ids.shape, *dim), fill_value, leaf.dtype))
    placement = _of_leaf(placement, dim)
    split, shape = _split(placement, ids)

    def local(leaf: Array, ids: Array) -> Array:
        positions = placement.positions(jnp.ravel(ids))
        rows = _exchange.fetch(placement, leaf, group_of(placement, positions), expected=True)
        rows = whole_rows(placement, rows)
        exists = jnp.expand_dims(positions < placement.stored_rows, tuple(range(1, rows.ndim)))
        rows = jnp.where(exists, rows, jnp.asarray(fill_value, rows.dtype))
        return jnp.reshape(rows, (*ids.shape, *dim))

    in_specs = placement.spec(leaf.shape, dim), placement.batch_spec
    rows = on_devices(placement, local, in_specs, placement.batch_spec)(leaf, split)
    return _joined_back(placement, ids, rows, shape)


def put(
    placement: Placement,
    leaf: Shaped[Array, "stored *dim"],
    ids: Int[Array, " length"],
    values: Shaped[Array, "length *dim"],
    mode: WriteMode,
) -> Shaped[Array, "stored *dim"]:
    """Set rows, or add to rows. The ids are split over all devices.

    Args:
      placement: Where the rows are.
      leaf: The rows.
      ids: Row numbers; a number outside of `[0, rows)` stands for no row. To set, values of equal ids must be equal.
      values: A row for each id.
      mode: Whether to set rows or to add to them.

    Returns:
      The new rows, laid out as the old ones.
    """
    dim = leaf.shape[1:]
    if placement.rows == 0 or ids.size == 0 or math.prod(dim) == 0:
        return leaf
    placement = _of_leaf(placement, dim)
    ids, values = _spread(placement, ids, values)

    def local(leaf: Array, ids: Array, values: Array) -> Array:
        positions = placement.positions(ids)
        if mode == "add":
            _, (positions, values, _) = _dedupe.combine(None, positions, values, placement.stored_rows)
        positions, values = group_of(placement, positions), _own_columns(placement, values)
        return _exchange.deliver(placement, leaf, positions, values, mode, expected=True, copies=placement.copy_axes)

    spec = placement.spec(leaf.shape, dim)
    return on_devices(placement, local, (spec, placement.batch_spec, placement.batch_spec), spec)(leaf, ids, values)


def combine(
    placement: Placement,
    ids: Int[Array, " length"],
    values: Shaped[Array, "length *dim"],
    dim: tuple[int, ...],
    dtype: DTypeLike | None = None,
) -> tuple[Distinct, Int32[Array, ""]]:
    """Sum the values of equal ids at the owner of their row. The ids are split over all devices.

    Args:
      placement: Where the rows are.
      ids: Row numbers; a number outside of `[0, rows)` stands for no row.
      values: A row for each id.
      dim: The shape of a row.
      dtype: The dtype of the sums. Default: the dtype of the values, in which parts of rows are sent.

    Returns:
      The distinct rows on their owners; and 1 if an owner was overloaded, so that rows were dealt out, else 0.
    """
    ids, values = _spread(placement, ids, values)

    def local(ids: Array, values: Array) -> tuple[Array, Array, Array]:
        positions, values = group_of(placement, placement.positions(ids)), _own_columns(placement, values)
        values = values if dtype is None else values.astype(dtype)
        held, sums, crowded = _exchange.summed_at_owners(placement, positions, values, placement.copy_axes)
        return placement.ids(held), sums, crowded.astype(jnp.int32)

    out = placement.owner_spec, placement.spec((0, *dim), dim), PartitionSpec()
    ids, sums, crowded = on_devices(placement, local, (placement.batch_spec, placement.batch_spec), out)(ids, values)
    return Distinct(ids, sums, jnp.zeros((), jnp.int32)), crowded


def gather_at_owners(
    placement: Placement, leaf: Shaped[Array, "stored ..."], ids: Int[Array, " held"], dim: tuple[int, ...]
) -> Shaped[Array, "held ..."]:
    """Read rows for ids from `combine`, on the devices where these are; zero for the sentinel."""

    def local(leaf: Array, ids: Array) -> Array:
        positions = placement.positions(ids)
        rows = _exchange.fetch(placement, leaf, positions, expected=False)
        exists = jnp.expand_dims(positions < placement.stored_rows, tuple(range(1, rows.ndim)))
        return jnp.where(exists, rows, jnp.zeros((), rows.dtype))

    spec = placement.spec(leaf.shape, dim)
    return on_devices(placement, local, (spec, placement.owner_spec), spec)(leaf, ids)


def store_at_owners(
    placement: Placement,
    leaf: Shaped[Array, "stored ..."],
    ids: Int[Array, " held"],
    values: Shaped[Array, "held ..."],
    dim: tuple[int, ...],
    mode: WriteMode = "set",
) -> Shaped[Array, "stored ..."]:
    """Set rows, or add to rows, for distinct ids from `combine`, given on the devices where these are."""

    def local(leaf: Array, ids: Array, values: Array) -> Array:
        return _exchange.deliver(placement, leaf, placement.positions(ids), values, mode, expected=False)

    spec = placement.spec(leaf.shape, dim)
    return on_devices(placement, local, (spec, placement.owner_spec, spec), spec)(leaf, ids, values)


def summed_by(
    placement: Placement, bags: Int[Array, " length"], terms: Shaped[Array, "length *dim"], number: int
) -> Shaped[Array, "bags *dim"]:
    """Sum terms by bag. Terms and bags are split over all devices.

    The sums are treated as the rows of a sharded table of bags, to which `put` adds the terms.

    Args:
      placement: The placement of the table that the terms come from.
      bags: The bag of each term, in `[0, number)`.
      terms: The terms.
      number: The number of bags.

    Returns:
      One sum for each bag.
    """
    axes = tuple(placement.mesh.axis_names)
    of_bags = dataclasses.replace(placement, axes=axes, columns=None, cyclic=False, rows=number)
    zeros = jnp.zeros((of_bags.stored_rows, *terms.shape[1:]), terms.dtype)
    sums = put(of_bags, zeros, bags, terms, "add")
    return first_of(placement, sums, number)


def rounds(placement: Placement, ids: Int[Array, "*batch"]) -> Int32[Array, ""]:
    """The number of rounds in which `take` reads some ids."""
    split, _ = _split(placement, ids)

    def local(ids: Array) -> Array:
        positions = group_of(placement, placement.positions(jnp.ravel(ids)))
        return _exchange.rounds_of(placement, positions)

    return on_devices(placement, local, (placement.batch_spec,), PartitionSpec())(split)


def joined(
    placement: Placement | None, arrays: Sequence[Shaped[Array, "_ ..."]], fill_value: float
) -> Shaped[Array, "total ..."]:
    """Concatenate arrays; on a mesh, each device concatenates its own shards.

    Args:
      placement: The placement of a table, or None.
      arrays: The arrays; on a mesh, each is padded so that it divides evenly.
      fill_value: The value of the padding.

    Returns:
      One array. On a mesh, it has the parts of the first device first: of all arrays, padding included.
    """
    if placement is None:
        return jnp.concatenate(arrays)
    filled = [padded(placement, x, fill_value) for x in arrays]
    if len(filled) == 1:
        return filled[0]
    spec = placement.batch_spec
    return on_devices(placement, lambda *parts: jnp.concatenate(parts), (spec,) * len(filled), spec)(*filled)


def parted(
    placement: Placement | None, array: Shaped[Array, "total ..."], lengths: Sequence[int]
) -> list[Shaped[Array, "length ..."]]:
    """Undo `joined`, for an array with an entry for each entry of its result.

    Args:
      placement: As in `joined`.
      array: The joined array.
      lengths: The lengths of the arrays, without padding.

    Returns:
      The arrays.
    """
    # One split: its transpose is one concatenation. The transpose of slices would be a sum of padded arrays.
    if placement is None:
        return list(jax.lax.split(array, lengths))
    sizes = [-(-length // placement.devices) for length in lengths]
    spec = placement.batch_spec
    parts = on_devices(placement, lambda x: tuple(jax.lax.split(x, sizes)), (spec,), (spec,) * len(sizes))(array)
    return [first_of(placement, x, length) for x, length in zip(parts, lengths, strict=True)]


def first_of(placement: Placement, array: Shaped[Array, "more ..."], length: int) -> Shaped[Array, "length ..."]:
    """Cut off the padding of an array."""
    if array.shape[0] == length:
        return array
    return resharded(array, placement.mesh, PartitionSpec())[:length]


def on_devices(
    placement: Placement, function: Callable[..., T], in_specs: PyTree, out_specs: PyTree
) -> Callable[..., T]:
    """Run a function on each device of a mesh by `shard_map`; on explicit axes, its arguments are resharded first.

    Args:
      placement: A placement on the mesh.
      function: Called with each device's parts.
      in_specs: The layout of each argument.
      out_specs: The layout of its result.

    Returns:
      A function of whole arrays.
    """
    mesh = placement.mesh
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if not is_explicit(mesh):
        return mapped
    return lambda *args: mapped(*(resharded(x, mesh, spec) for x, spec in zip(args, in_specs, strict=True)))


def _of_leaf(placement: Placement, dim: tuple[int, ...]) -> Placement:
    """The placement of an array with one number for each row: it cannot be split by columns."""
    return placement if dim else dataclasses.replace(placement, columns=None)


def _split(placement: Placement, ids: Int[Array, "*batch"]) -> tuple[Int[Array, "..."], tuple[int, ...]]:
    """Make ids divisible by the devices: flatten and pad them, unless their first axis already is."""
    if ids.ndim and ids.shape[0] % placement.devices == 0:
        return ids, ids.shape
    return padded(placement, jnp.reshape(on_every_device(ids), (ids.size,)), placement.rows), (ids.size,)


def _joined_back(
    placement: Placement, ids: Int[Array, "*batch"], rows: Shaped[Array, "..."], shape: tuple[int, ...]
) -> Shaped[Array, "*batch_dim"]:
    if rows.shape[: len(shape)] != ids.shape:
        rows = resharded(first_of(placement, rows, ids.size), placement.mesh, PartitionSpec())
        rows = jnp.reshape(rows, (*ids.shape, *rows.shape[1:]))
    return laid_out_as(ids, rows, ids.ndim, placement.mesh)


def padded(placement: Placement, array: Shaped[Array, "length ..."], fill_value: float) -> Shaped[Array, "more ..."]:
    """Pad an array so that its first axis divides by the number of devices."""
    missing = -array.shape[0] % placement.devices
    if not missing:
        return array
    return jnp.pad(on_every_device(array), [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=fill_value)


def _spread(
    placement: Placement, ids: Int[Array, " length"], values: Shaped[Array, "length *dim"]
) -> tuple[Int[Array, " more"], Shaped[Array, "more *dim"]]:
    return padded(placement, ids, placement.rows), padded(placement, values, 0)


def group_of(placement: Placement, array: Shaped[Array, "ids ..."]) -> Shaped[Array, "more ..."]:
    """Gather an array over this device's group: the devices that have parts of the same rows."""
    return array if placement.columns is None else jax.lax.all_gather(array, placement.columns, tiled=True)


def whole_rows(placement: Placement, rows: Shaped[Array, "group *part"]) -> Shaped[Array, "ids *dim"]:
    """Swap parts within the group, so that each device has the whole rows of its own ids."""
    return rows if placement.columns is None else jax.lax.all_to_all(rows, placement.columns, 0, 1, tiled=True)


def _own_columns(placement: Placement, values: Shaped[Array, "ids *dim"]) -> Shaped[Array, "group *part"]:
    """Swap values within the group, so that each device has its columns of the whole group's values."""
    return values if placement.columns is None else jax.lax.all_to_all(values, placement.columns, 1, 0, tiled=True)
