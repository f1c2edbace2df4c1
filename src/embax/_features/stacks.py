"""Stacks: tables that differ in nothing but their rows, stored as one."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._core import ids as _ids
from .._core.placement import Placement
from .._core.table import Table, has_weight, with_weight
from .._gradients.row_grad import RowGrad, row_grad
from .._mesh import relayout as _moves

# So that rows are numbered in 32 bits.
_MOST_ROWS = np.iinfo(np.int32).max


class Member(NamedTuple):
    """Where a table is stored."""

    name: str
    stack: int  # in which of the stacks
    start: int  # from which of its rows on
    rows: int
    padding_idx: int | tuple[int, ...] | None  # among its own rows


def members_of(call: str, tables: Mapping[str, Table]) -> tuple[Member, ...]:
    """Decide which tables are stored together: those that differ in nothing but their rows and their padding.

    Args:
      call: The call for the message.
      tables: The tables by name.

    Returns:
      Where each table is stored, in the order of the tables.

    Raises:
      ValueError: If two tables are laid out in different ways, or one is on a mesh and another one is not.
    """
    _check_laid_out_alike(call, tables)
    stacks: dict[Any, tuple[int, int]] = {}  # the number of each stack, and its rows so far
    members, number = [], itertools.count()
    for name, table in tables.items():
        placement = None if table.placement is None else dataclasses.replace(table.placement, rows=0)
        rules = with_weight(table, table.weight, padding_idx=None, placement=placement)
        kind = table.dim, table.dtype, jax.tree.structure(rules)
        stack, rows = stacks.get(kind, (None, 0))
        if stack is None or _stored(placement, rows + table.rows) > _MOST_ROWS:
            stack, rows = next(number), 0
        members.append(Member(name, stack, rows, table.rows, table.padding_idx))
        stacks[kind] = stack, rows + table.rows
    return tuple(members)


def stacks_of(tables: Mapping[str, Any], members: Sequence[Member], like: Sequence[Any] = ()) -> list[Any]:
    """Put tables, or what else has their rows along the first axis, together."""
    stacks = []
    for _, group in itertools.groupby(sorted(members, key=lambda member: member.stack), lambda member: member.stack):
        of_stack = list(group)
        parts = [tables[member.name] for member in of_stack]
        if not isinstance(parts[0], Table):
            stacks.append(None if parts[0] is None else jnp.concatenate(parts))
            continue
        padding = [member.start + row for member in of_stack for row in _ids.padding_rows(member.padding_idx)]
        weights = [part.weight for part in parts]
        if not has_weight(parts[0]):
            stacks.append(with_weight(like[of_stack[0].stack], weights[0]))
            continue
        if like and (placement := like[of_stack[0].stack].placement) is not None:
            weight = _put_together(placement, parts, of_stack)
            stacks.append(
                with_weight(parts[0], weight, placement=placement, padding_idx=like[of_stack[0].stack].padding_idx)
            )
            continue
        placement = parts[0].placement
        if len(parts) == 1:
            weight = weights[0]
        elif placement is None:
            weight = jnp.concatenate(weights)
        else:
            placement = dataclasses.replace(placement, rows=sum(part.rows for part in parts))
            weight = _put_together(placement, parts, of_stack)
        stacks.append(dataclasses.replace(parts[0], weight=weight, placement=placement, padding_idx=tuple(padding)))
    return stacks


def _stored(placement: Placement | None, rows: int) -> int:
    """The number of rows that are stored for some, with the padding that sharding adds."""
    return rows if placement is None else dataclasses.replace(placement, rows=rows).stored_rows


def _check_laid_out_alike(call: str, tables: Mapping[str, Table]) -> None:
    """Refuse tables of which two are laid out in different ways."""
    first = next(iter(tables), None)
    for name, table in tables.items():
        pair = tables[first].placement, table.placement  # pyright: ignore[reportArgumentType]
        if _layout(pair[0]) != _layout(pair[1]):
            one, other = _described(*pair)
            raise ValueError(
                f"`{call}` must be laid out alike, got {first!r} on {one} and {name!r} on {other}. Lay all of them out "
                "in one way with embax.shard, or take them off the mesh with embax.unshard."
            )


def _layout(placement: Placement | None) -> Any:
    """How a table is laid out, whatever its rows are and however they are exchanged."""
    return None if placement is None else (placement.mesh, placement.axes, placement.columns, placement.cyclic)


def _described(*placements: Placement | None) -> list[str]:
    """Say in words how two tables are laid out, with as much of the mesh as it takes to tell them apart."""
    words = ["no mesh" if x is None else repr(x) for x in placements]
    if words[0] == words[1]:
        words = [f"{word} of {x.mesh!r}" for word, x in zip(words, placements, strict=True) if x is not None]
    if words[0] == words[1]:
        devices = [[device.id for device in x.mesh.devices.flat] for x in placements if x is not None]
        words = [f"{word} with the devices {ids}" for word, ids in zip(words, devices, strict=True)]
    return words


def _put_together(placement: Placement, tables: Sequence[Table], members: Sequence[Member]) -> jax.Array:
    """Lay tables on a mesh out as one."""
    shape, dim = (placement.stored_rows, *tables[0].weight.shape[1:]), tables[0].weight.shape[1:]
    weight = jnp.zeros(shape, tables[0].dtype, device=placement.sharding(shape, dim))
    for table, member in zip(tables, members, strict=True):
        weight = _moves.moved_into(placement, weight, member.start, table.placement, table.weight)
    return weight


def cut_out(stack: Any, member: Member) -> Any:
    """The part of a stack, or of its gradient or state, that belongs to a table."""
    end = member.start + member.rows
    if isinstance(stack, RowGrad):
        ids = jnp.where((stack.ids >= member.start) & (stack.ids < end), stack.ids - member.start, member.rows)
        rows = row_grad(ids, stack.values, member.rows)
        return with_weight(stack, rows, **_own_rules(stack, member)) if isinstance(stack, Table) else rows
    if not isinstance(stack, Table):
        return None if stack is None else stack[member.start : end]
    if not has_weight(stack):
        return stack
    if stack.placement is not None:
        rules = _own_rules(stack, member)
        return with_weight(
            stack, _moves.moved(stack.placement, stack.weight, rules["placement"], member.start), **rules
        )
    whole = stack.rows == member.rows
    weight = stack.weight if whole else stack.weight[member.start : end]
    return dataclasses.replace(stack, weight=weight, padding_idx=member.padding_idx)


def _own_rules(stack: Table, member: Member) -> dict[str, Any]:
    """The rules of a table that are not those of its stack."""
    placement = None if stack.placement is None else dataclasses.replace(stack.placement, rows=member.rows)
    return {"padding_idx": member.padding_idx, "placement": placement}
