"""Stacks: tables that differ only in their rows and padding, stored as one table.

For instance, tables "film" of 100 rows and "genre" of 20 rows, with padding row 0: one stack of 120 rows, in which
"genre" starts at row 100 and row 100 is padding.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._core import ids as _ids
from .._core.table import PaddingRows, Table, has_weight, with_weight
from .._gradients.row_grad import RowGrad, row_grad

# A stack is no larger, so that its rows are numbered in 32 bits.
_MOST_ROWS = np.iinfo(np.int32).max


class Member(NamedTuple):
    """Where a table is stored."""

    name: str
    stack: int  # the number of its stack
    start: int  # its first row in the stack
    rows: int
    padding_idx: int | tuple[int, ...] | None  # counted among its own rows


def members_of(call: str, tables: Mapping[str, Table]) -> tuple[Member, ...]:
    """Decide which tables are stored together: tables that differ only in their rows and padding.

    Args:
      call: The call, for the error message.
      tables: The tables by name.

    Returns:
      Where each table is stored, in the order of the tables.

    Raises:
      ValueError: If two tables have different layouts, one on a mesh and the other not included.
    """
    _check_laid_out_alike(call, tables)
    stacks: dict[Hashable, tuple[int, int]] = {}  # the number of each stack, and its rows so far
    members, number = [], itertools.count()
    for name, table in tables.items():
        rules = with_weight(table, table.weight, padding_idx=None, storage=table.storage.with_rows(0))
        kind = table.dim, table.dtype, jax.tree.structure(rules)
        stack, rows = stacks.get(kind, (None, 0))
        if stack is None or table.storage.stored_rows(rows + table.rows) > _MOST_ROWS:
            stack, rows = next(number), 0
        members.append(Member(name, stack, rows, table.rows, table.padding_idx))
        stacks[kind] = stack, rows + table.rows
    return tuple(members)


def stacks_of(tables: Mapping[str, PyTree], members: Sequence[Member], like: Sequence[PyTree] = ()) -> list[PyTree]:
    """Concatenate tables, or other arrays with their rows along the first axis, to stacks."""
    stacks = []
    for _, group in itertools.groupby(sorted(members, key=lambda member: member.stack), lambda member: member.stack):
        of_stack = list(group)
        parts = [tables[member.name] for member in of_stack]
        if not isinstance(parts[0], Table):
            stacks.append(None if parts[0] is None else jnp.concatenate(parts))
            continue
        padding = [member.start + row for member in of_stack for row in _ids.padding_rows(member.padding_idx)]
        if not has_weight(parts[0]):
            stacks.append(with_weight(like[of_stack[0].stack], parts[0].weight))
            continue
        storage = parts[0].storage.with_rows(sum(part.rows for part in parts))
        padding_idx: PaddingRows = tuple(padding)
        if like:
            storage, padding_idx = like[of_stack[0].stack].storage, like[of_stack[0].stack].padding_idx
        weight = storage.put_together([(part.storage, part.weight) for part in parts])
        stacks.append(dataclasses.replace(parts[0], weight=weight, storage=storage, padding_idx=padding_idx))
    return stacks


def _check_laid_out_alike(call: str, tables: Mapping[str, Table]) -> None:
    """Refuse tables with different layouts."""
    first = next(iter(tables), None)
    for name, table in tables.items():
        pair = tables[first].storage, table.storage  # pyright: ignore[reportArgumentType]
        if pair[0].layout != pair[1].layout:
            one, other = _told_apart(*(storage.descriptions for storage in pair))
            raise ValueError(
                f"`{call}` must be laid out alike, got {first!r} on {one} and {name!r} on {other}. Lay all of them out "
                "in one way with embax.shard, or take them off the mesh with embax.unshard."
            )


def _told_apart(one: Sequence[str], other: Sequence[str]) -> tuple[str, str]:
    """Describe two storages, just precisely enough to tell them apart."""
    pairs = zip(one, other, strict=False)
    return next((pair for pair in pairs if pair[0] != pair[1]), (one[-1], other[-1]))


def cut_out(stack: PyTree, member: Member) -> PyTree:
    """Cut a table out of a stack, or out of the stack's gradient or optimizer state."""
    end = member.start + member.rows
    if isinstance(stack, RowGrad):
        ids = jnp.where((stack.ids >= member.start) & (stack.ids < end), stack.ids - member.start, member.rows)
        rows = row_grad(ids, stack.held, member.rows)
        if not isinstance(stack, Table):
            return rows
        storage = stack.storage.with_rows(member.rows)
        return with_weight(stack, rows, storage=storage, padding_idx=member.padding_idx)
    if not isinstance(stack, Table):
        return None if stack is None else stack[member.start : end]
    if not has_weight(stack):
        return stack
    weight, storage = stack.storage.part(stack.weight, member.start, member.rows)
    return dataclasses.replace(stack, weight=weight, storage=storage, padding_idx=member.padding_idx)
