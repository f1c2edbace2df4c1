"""MadeFor: which tables the state of an optimizer belongs to, and the check that they are still those."""

import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from .._core import flax_state as _flax
from .._core.storage import Storage
from .._core.table import Table
from .._gradients.row_grad import RowGrad, is_trained
from .collection import Collection


class TableOf(NamedTuple):
    """What a state depends on of one table that is trained."""

    path: str  # in the tree of parameters; of a Collection's table, with its name
    rows: int
    dim: tuple[int, ...]
    padding_idx: int | tuple[int, ...] | None
    layout: str | None  # how the rows are laid out on a mesh; None where they are on none
    stored: tuple[int, int] | None  # of a Collection's table: in which stack, and from which row on


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeFor:
    """The tables that the state of an optimizer was made for.

    A pytree without leaves, compared by value: it goes with a state through `jit`, `jax.tree.map`, pickle and
    checkpoints, and a state made for other tables compiles anew. It does not hold the mesh, which cannot be pickled.
    """

    tables: tuple[TableOf, ...]

    def __repr__(self) -> str:
        return f"MadeFor({', '.join(f'{_named(table)}: {table.rows} rows' for table in self.tables)})"

    def to_json(self) -> str:
        """Write what does not depend on where the rows are stored, since rows are saved in the order of their ids."""
        return json.dumps([[x.path, x.rows, x.dim, x.padding_idx] for x in self.tables])

    @classmethod
    def from_json(cls, text: str, like: "MadeFor | None") -> "MadeFor":
        """Read it again.

        Args:
          text: What `to_json` gave.
          like: That of the state which the saved one was read into, and which says where the rows are stored now.

        Returns:
          The tables of the saved state, stored as in `like`.
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
        """The same tables, laid out as a function of the shape of their weight says."""
        return MadeFor(tuple(x._replace(layout=place((x.rows, *x.dim)).noted) for x in self.tables))


_flax.register(MadeFor, MadeFor.to_json, lambda like, text: MadeFor.from_json(text, like))


def made_for(params: PyTree) -> MadeFor:
    """Describe the tables of a tree that are trained.

    Args:
      params: A tree of parameters, Tables and Collections among them; or of their gradients, in which a RowGrad stands
        for a Table and says less of it.

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
      call: The call for the message.
      tables: The MadeFor of the state; None where it has none.
      now: That of the parameters which it is used with.
      of_gradients: Whether that is of their gradients, which tell the number of rows and the size of a row only.

    Raises:
      ValueError: If they differ.
    """
    if not isinstance(tables, MadeFor):
        raise ValueError(
            f"`{call}(state=...)` must say which tables it was made for, got a state that does not, as one from an "
            "older checkpoint. If they are those of `params`, carry it over: "
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
    """Whether a node of a tree is a table, a Collection of some, or the gradient of a table."""
    return isinstance(node, Table | Collection | RowGrad)


def _is_described(node: object) -> bool:
    return isinstance(node, RowGrad) or (isinstance(node, Table) and is_trained(node))


def _layout(node: object) -> str | None:
    """How a table is stored, None where it is not on a mesh; of the gradient of one, nothing is known."""
    return node.storage.noted if isinstance(node, Table) else None


def differences(then: MadeFor, now: MadeFor, of_gradients: bool = False) -> list[str]:
    """Say in words what differs between the tables of a state and those of now, one entry a table."""
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
        return [f"{name} was laid out as {layouts[0]}, and is as {layouts[1]} now"]
    if before.padding_idx != after.padding_idx:
        return [f"{name} had padding_idx={before.padding_idx}, and has {after.padding_idx} now"]
    return []


def _named(table: TableOf) -> str:
    return f"params{table.path}"


def _where(table: TableOf) -> str:
    return "by itself" if table.stored is None else "in stack {} of a Collection from row {} on".format(*table.stored)
