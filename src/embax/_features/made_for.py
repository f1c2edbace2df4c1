"""MadeFor: a record of the tables that an optimizer's state was made for, and the check that they are the same."""

import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from .._core.containers import flax_state as _flax
from .._core.storage import Storage
from .._core.table import Table
from .._gradients.row_grad import RowGrad, is_trained
from .collection import Collection


class TableOf(NamedTuple):
    """The properties of a trained table that a state depends on."""

    path: str  # in the tree of parameters; for a table in a Collection, with its name
    rows: int
    dim: tuple[int, ...]
    padding_idx: int | tuple[int, ...] | None
    layout: str | None  # the layout on a mesh; None without a mesh
    stored: tuple[int, int] | None  # for a table in a Collection: its stack, and its first row there


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeFor:
    """The tables that the state of an optimizer was made for.

    A pytree without leaves, compared by value. It stays with a state through `jit`, `jax.tree.map`, pickle and
    checkpoints; a state made for other tables compiles another program. It does not hold the mesh, which cannot be
    pickled.
    """

    tables: tuple[TableOf, ...]

    def __repr__(self) -> str:
        return f"MadeFor({', '.join(f'{_named(table)}: {table.rows} rows' for table in self.tables)})"

    def to_json(self) -> str:
        """Write the record as JSON, without layouts: checkpoints have rows in row order."""
        return json.dumps([[x.path, x.rows, x.dim, x.padding_idx] for x in self.tables])

    @classmethod
    def from_json(cls, text: str, like: "MadeFor | None") -> "MadeFor":
        """Read a record from JSON.

        Args:
          text: JSON from `to_json`.
          like: The record of the state that the saved one is restored into; layouts are taken from it.

        Returns:
          The tables of the saved state, with the layouts of `like`.
        """
        where = {} if like is None else {x.path: (x.layout, x.stored) for x in like.tables}
        return cls(
            tuple(
                TableOf(
                    path,
                    rows,
                    tuple(dim),
                    tuple(padding) if isinstance(padding, list) else padding,
                    *where.get(path, (None, None)),
                )
                for path, rows, dim, padding in json.loads(text)
            )
        )

    def placed(self, place: Callable[[tuple[int, ...]], Storage]) -> "MadeFor":
        """The same tables, with the layouts that `place` returns for the shapes of their weights."""
        return MadeFor(tuple(x._replace(layout=place((x.rows, *x.dim)).noted) for x in self.tables))


_flax.register(MadeFor, MadeFor.to_json, lambda like, text: MadeFor.from_json(text, like))


def made_for(params: PyTree) -> MadeFor:
    """Describe the trained tables of a tree.

    Args:
      params: A tree of parameters with Tables and Collections; or of gradients, where a RowGrad tells only the rows and
        the shape of its table.

    Returns:
      The description.
    """
    tables = []
    nodes, _ = jax.tree.flatten_with_path(params, is_leaf=is_node)
    for path, node in nodes:
        name = jax.tree_util.keystr(path)
        if isinstance(node, Collection):
            for member in node._members:
                stack = node.stacks[member.stack]
                if _is_described(stack):
                    where = member.rows, stack.dim, member.padding_idx, _layout(stack)
                    tables.append(TableOf(f"{name}[{member.name!r}]", *where, (member.stack, member.start)))
        elif _is_described(node):
            rules = getattr(node, "padding_idx", None), _layout(node)
            tables.append(TableOf(name, node.rows, node.dim, *rules, None))
    return MadeFor(tuple(tables))


def check_made_for(call: str, tables: object, now: MadeFor, *, of_gradients: bool = False) -> None:
    """Refuse a state that was made for other tables.

    Args:
      call: The call, for error messages.
      tables: The MadeFor of the state, or None.
      now: The MadeFor of the parameters it is used with.
      of_gradients: Whether `now` describes gradients, which tell only the rows and the shape of tables.

    Raises:
      ValueError: If they differ.
    """
    if not isinstance(tables, MadeFor):
        raise ValueError(
            f"`{call}(state=...)` must say which tables it was made for, got a state that does not, such as one from "
            "an older checkpoint. If it was made for the tables of `params`, carry it over: "
            "state = embax.optim.carry_over(state, params, params, tx)."
        )
    if tables == now:
        return
    found = differences(tables, now, of_gradients)
    if found:
        seen = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        raise ValueError(
            f"`{call}(state=...)` must belong to the tables that it is used with, got one made for other ones: {seen}. "
            "Carry it over: state = embax.optim.carry_over(state, old_params, params, tx), or, of the optimizers of "
            "embax.nnx and embax.brainstate, optimizer.carry_over."
        )


def is_node(node: object) -> bool:
    """Whether a node of a tree is a Table, a Collection or a RowGrad."""
    return isinstance(node, Table | Collection | RowGrad)


def _is_described(node: object) -> bool:
    return isinstance(node, RowGrad) or (isinstance(node, Table) and is_trained(node))


def _layout(node: object) -> str | None:
    """The layout of a table, None without a mesh and for a RowGrad, which does not tell."""
    return node.storage.noted if isinstance(node, Table) else None


def differences(then: MadeFor, now: MadeFor, of_gradients: bool = False) -> list[str]:
    """Describe the differences between a state's tables and the current ones in words, one entry for each table."""
    old, new = ({table.path: table for table in tables.tables} for tables in (then, now))
    found = []
    for path in {**old, **new}:
        before, after = old.get(path), new.get(path)
        if before is not None and after is not None:
            found += _of_table(before, after, of_gradients)
        elif not of_gradients and before is None:
            found.append(f"{_named(new[path])} is trained now, and was not then")
        elif not of_gradients:
            found.append(f"{_named(old[path])} was trained then, and is not now")
    return found


def _of_table(before: TableOf, after: TableOf, of_gradients: bool) -> list[str]:
    name = _named(after)
    if before.rows != after.rows:
        return [f"{name} had {before.rows} rows, and has {after.rows} now"]
    if before.dim != after.dim:
        return [f"{name} had rows of the shape {before.dim}, and has {after.dim} now"]
    if before.stored != after.stored:
        return [f"{name} was stored {_where(before)}, and is {_where(after)} now"]
    if of_gradients:
        return []
    if before.layout != after.layout:
        layouts = [layout or "no mesh" for layout in (before.layout, after.layout)]
        return [f"{name} was laid out as {layouts[0]}, and is {layouts[1]} now"]
    if before.padding_idx != after.padding_idx:
        return [f"{name} had padding_idx={before.padding_idx}, and has {after.padding_idx} now"]
    return []


def _named(table: TableOf) -> str:
    return f"params{table.path}"


def _where(table: TableOf) -> str:
    return "by itself" if table.stored is None else "in stack {} of a Collection from row {} on".format(*table.stored)
