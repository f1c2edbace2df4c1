"""Stacks: tables that differ in nothing but their rows, stored as one."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _ids, _moves
from ._placement import Placement
from ._rows import RowGrad, row_grad
from ._table import Table, with_weight

# So that rows are numbered in 32 bits.
_MOST_ROWS = np.iinfo(np.int32).max


class Member(NamedTuple):
    """Where a table is stored."""

    name: str
    stack: int  # in which of the stacks
    start: int  # from which of its rows on
    rows: int
    padding_idx: int | tuple[int, ...] | None  # among its own rows


def members_of(tables: Mapping[str, Table]) -> tuple[Member, ...]:
    """Decide which tables are stored together: those that differ in nothing but their rows and their padding."""
    stacks: dict[Any, tuple[int, int]] = {}  # the number of each stack, and its rows so far
    members, number = [], itertools.count()
    for name, table in tables.items():
        rules = dataclasses.replace(table, padding_idx=None)
        kind = table.dim, table.dtype, jax.tree.structure(rules)
        stack, rows = stacks.get(kind, (None, 0))
        if stack is None or rows + table.rows > _MOST_ROWS:
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
        if weights[0] is None:
            stacks.append(with_weight(like[of_stack[0].stack], None))
            continue
        if like and (placement := like[of_stack[0].stack].placement) is not None:
            weight = _put_together(placement, parts, of_stack)
            stacks.append(
                with_weight(parts[0], weight, placement=placement, padding_idx=like[of_stack[0].stack].padding_idx)
            )
            continue
        weight = weights[0] if len(weights) == 1 else jnp.concatenate(weights)
        stacks.append(dataclasses.replace(parts[0], weight=weight, padding_idx=tuple(padding)))
    return stacks


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
        return row_grad(ids, stack.values, member.rows)
    if not isinstance(stack, Table):
        return None if stack is None else stack[member.start : end]
    if stack.weight is None:
        return stack
    if stack.placement is not None:
        placement = dataclasses.replace(stack.placement, rows=member.rows)
        weight = _moves.moved(stack.placement, stack.weight, placement, member.start)
        return with_weight(stack, weight, placement=placement, padding_idx=member.padding_idx)
    whole = stack.rows == member.rows
    weight = stack.weight if whole else stack.weight[member.start : end]
    return dataclasses.replace(stack, weight=weight, padding_idx=member.padding_idx)
