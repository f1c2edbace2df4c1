"""One step of a transformation, run on any rows of the tables in its tree."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Shaped

from .._base.distinct import Distinct
from .._core.table import Table, with_weight, without_padding
from .._gradients.row_grad import RowGrad, is_trained, row_grad
from ._separable import Plan

# Numbers in a block of rows, so that the arrays of a step stay in a core's cache.
_BLOCK = 1 << 16

# The rows of each table, by its number, that a run is about: None for all of them.
Parts = Mapping[int, Distinct | None]


@dataclasses.dataclass(frozen=True)
class Step:
    """The arguments of an update of a mixed tree, and ways to run it in parts."""

    tx: optax.GradientTransformationExtraArgs
    plan: Plan
    structure: Any  # of the tree, with Tables for leaves
    params: Sequence[Any]  # its leaves
    gradients: Sequence[Any]  # the gradient of each leaf
    inner: Any  # the state of tx
    extra_args: Mapping[str, Any]

    def run(self, parts: Parts) -> tuple[list[Any], Any]:
        """Run the step on ordinary leaves and on some rows of some tables, as though there were no others.

        Args:
          parts: The rows. A table that is not here has none.

        Returns:
          The update of each leaf, None for a table that is not in the parts, and the new state.
        """
        updates, state = self._call(parts, self._state)
        out, numbers = [], iter(range(len(self.plan.kinds)))
        for param, gradient, update in zip(self.params, self.gradients, updates, strict=True):
            if not isinstance(param, Table):
                out.append(update)
            elif not is_trained(param):
                out.append(jax.tree.map(jnp.zeros_like, gradient))
            elif (k := next(numbers)) not in parts:
                out.append(None)
            elif (rows := parts[k]) is None:
                out.append(with_weight(param, without_padding(param, update.weight)))
            else:
                out.append(_update(param, rows.ids, update.weight.astype(gradient.dtype)))
        merged = [
            old if owner is not None and owner not in parts else self._merge(old, new, parts, owner)
            for old, new, owner in zip(self._state, state, self.plan.owners, strict=True)
        ]
        return out, jax.tree.structure(self.inner).unflatten(merged)

    def run_alone(self, number: int, rows: Distinct, inner: Any) -> tuple[Any, Any]:
        """Run the step on some rows of one table which the rest of the tree has no part in.

        On a CPU it goes block by block, through the places that are taken.

        Args:
          number: The number of the table.
          rows: The rows.
          inner: A state, of which the table's rows are those from before the step.

        Returns:
          The update of the table, and the state with its rows written.
        """
        leaves, structure = jax.tree.flatten(inner)
        owned = [i for i, owner in enumerate(self.plan.owners) if owner == number]
        at = [i for i, param in enumerate(self.params) if isinstance(param, Table) and is_trained(param)][number]
        table = self.params[at]
        scaled = self.plan.kinds[number] == "scaled"
        dtype, length = rows.values.dtype, rows.ids.shape[0]

        def run_block(
            ids: Int[Array, " block"], values: Shaped[Array, "block *dim"], of_table: Sequence[Array]
        ) -> tuple[Shaped[Array, "block *dim"], list[Array]]:
            state = list(self._state)
            for i, leaf in zip(owned, of_table, strict=True):
                state[i] = leaf
            part = {number: Distinct(ids, values, jnp.int32(0))}
            updates, new = self._call(part, state)
            return updates[at].weight.astype(dtype), [_store(table, state[i], ids, new[i]) for i in owned]

        block = _block(length, math.prod(table.dim))
        if block >= length or scaled or not table.storage.in_blocks:
            update, new = run_block(rows.ids, rows.values, [leaves[i] for i in owned])
        else:
            padded = -(-length // block) * block
            ids, values = rows.ids, rows.values
            if padded > length:
                ids = jnp.full(padded, table.rows, ids.dtype).at[:length].set(ids)
                values = jnp.zeros((padded, *table.dim), dtype).at[:length].set(values)

            # Each block of sums gives way to its update. Behind the last one there are zeros, for both.
            def body(i: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
                values, of_table = carry
                ids_here, values_here = (jax.lax.dynamic_slice_in_dim(x, i * block, block) for x in (ids, values))
                update, of_table = run_block(ids_here, values_here, of_table)
                return jax.lax.dynamic_update_slice_in_dim(values, update, i * block, 0), of_table

            blocks = (rows.number + (block - 1)) // block
            update, new = jax.lax.fori_loop(0, blocks, body, (values, [leaves[i] for i in owned]))
            update = update[:length]
        for i, leaf in zip(owned, new, strict=True):
            leaves[i] = leaf
        if scaled:  # as they came
            return row_grad(rows.ids, update, table.rows), structure.unflatten(leaves)
        return _update(table, rows.ids, update), structure.unflatten(leaves)

    def _merge(self, old: Array, new: Array, parts: Parts, owner: int | None) -> Array:
        rows = None if owner is None else parts[owner]
        return new if rows is None else _store(self._tables[owner or 0], old, rows.ids, new)

    @property
    def _tables(self) -> list[Table]:
        return [param for param in self.params if isinstance(param, Table) and is_trained(param)]

    @property
    def _state(self) -> list[Array]:
        return jax.tree.leaves(self.inner)

    def _call(self, parts: Parts, state: Sequence[Array]) -> tuple[list[Any], list[Array]]:
        """Gather the rows of the parts and call the transformation on them."""
        params, gradients, numbers = [], [], iter(range(len(self.plan.kinds)))
        for param, gradient in zip(self.params, self.gradients, strict=True):
            if not isinstance(param, Table):
                params.append(param)
                gradients.append(gradient)
            elif not is_trained(param):
                params.append(with_weight(param, None))
                gradients.append(with_weight(param, None))
            elif (rows := parts.get(k := next(numbers), _no_rows(param))) is None:
                params.append(param)
                gradients.append(with_weight(param, without_padding(param, gradient.weight)))
            else:
                # What only scales its gradient does not look at the weight.
                scaled = self.plan.kinds[k] == "scaled"
                weight = jnp.zeros_like(rows.values) if scaled else _gather(param, param.weight, rows.ids)
                params.append(with_weight(param, weight))
                gradients.append(with_weight(param, rows.values))
        small = []
        for leaf, owner in zip(state, self.plan.owners, strict=True):
            if owner is None:
                small.append(leaf)
            elif owner not in parts:
                small.append(leaf[:0])
            else:
                rows = parts[owner]
                small.append(leaf if rows is None else _gather(self._tables[owner], leaf, rows.ids))
        structure = jax.tree.structure(self.inner)
        updates, new = self.tx.update(
            self.structure.unflatten(gradients),
            structure.unflatten(small),
            self.structure.unflatten(params),
            **self.extra_args,
        )
        return self.structure.flatten_up_to(updates), structure.flatten_up_to(new)


def _block(length: int, size: int) -> int:
    """How many rows to take at a time."""
    # Elsewhere than on a CPU, a loop of unknown length waits for the host in every turn.
    return max(1, _BLOCK // max(1, size)) if jax.default_backend() == "cpu" else length


def _no_rows(table: Table) -> Distinct:
    return Distinct(jnp.zeros(0, jnp.int32), jnp.zeros((0, *table.dim), table.dtype), jnp.int32(0))


def laid_out_state(state: Any, owners: Sequence[int | None], tables: Sequence[Table]) -> Any:
    """Lay out the state of a transformation as the rows that it belongs to, and its counters on all devices.

    Args:
      state: The state; first the leaves that `owners` speaks of, then others.
      owners: For each of its leaves, the table whose rows it holds along its first axis, or None.
      tables: The tables that are trained.

    Returns:
      The same state.
    """
    leaves, structure = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        owner = owners[i] if i < len(owners) else None
        if owner is not None:
            leaves[i] = tables[owner].storage.laid_out(leaf, tables[owner].dim)
        elif jnp.ndim(leaf) == 0:
            for table in reversed(tables):  # of several meshes, that of the first table
                leaves[i] = table.storage.everywhere(leaves[i])
    return structure.unflatten(leaves)


def _update(table: Table, ids: Int[Array, " length"], values: Shaped[Array, "length *dim"]) -> RowGrad:
    return row_grad(ids, values, table.rows, at_owners=table.storage.owners_add)


def _gather(table: Table, leaf: Shaped[Array, "stored ..."], ids: Int[Array, " length"]) -> Shaped[Array, "length ..."]:
    return table.storage.gather(leaf, ids, table.dim)


def _store(
    table: Table, leaf: Shaped[Array, "stored ..."], ids: Int[Array, " length"], rows: Shaped[Array, "length ..."]
) -> Shaped[Array, "stored ..."]:
    return table.storage.store(leaf, ids, rows, table.dim)
