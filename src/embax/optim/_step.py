"""One step of a lifted transformation: gather the rows that were read, run the transformation, scatter the state.

An example: Adam on a table of 1,000 rows, with a gradient for the ids 3, 5 and 3.

    combine      distinct ids [5, 3, 1000] and the sum of each; 1000 is the sentinel, in an unused place
    gather       these rows of the weight, of mu and of nu: arrays of 3 rows instead of 1,000
    tx.update    Adam sees a table of 3 rows
    scatter      the new rows of mu and nu are written back to rows 3 and 5
    update       RowGrad([5, 3, 1000], ...)

A table of kind "rowwise" or "scaled" runs alone (`run_alone`), on a CPU in blocks of rows. Ordinary leaves and tables
of kind "joint", whose rows must be seen together, run in one call of the transformation (`run`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree, Shaped

from .._base.distinct import Distinct
from .._base.typing import PyTreeDef
from .._core.table import Table, is_table, with_weight, without_padding
from .._gradients.row_grad import RowGrad, is_trained, row_grad
from ._separable import RowPlan
from ._structure import Kind

# Entries of a block of rows, so that the arrays of a step stay in a core's cache.
_BLOCK = 1 << 16

# The rows of a run, by the number of their trained table; None for all rows of a table.
Parts = Mapping[int, Distinct | None]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter and its gradient."""

    param: PyTree  # an array or a Table
    gradient: PyTree
    number: int | None  # the number of a trained table among the trained tables; None for any other leaf
    kind: Kind | None  # how the transformation treats the rows of a trained table

    def seen(self, parts: Parts) -> tuple[PyTree, PyTree]:
        """The parameter and the gradient that the transformation gets in a run."""
        table = self.param
        if not isinstance(table, Table):
            return table, self.gradient
        if self.number is None:
            return with_weight(table, None), with_weight(table, None)
        rows = parts.get(self.number, _no_rows(table))
        if rows is None:
            return table, with_weight(table, without_padding(table, self.gradient.weight))
        # A transformation that only scales its gradient does not read the weight.
        scaled = self.kind == "scaled"
        weight = jnp.zeros_like(rows.values) if scaled else _gather(table, table.weight, rows.ids)
        return with_weight(table, weight), with_weight(table, rows.values)

    def updated(self, update: PyTree, parts: Parts) -> PyTree:
        """Convert the transformation's update to one of the whole parameter; None for a table without rows in a run."""
        table = self.param
        if not isinstance(table, Table):
            return update
        if self.number is None:
            return jax.tree.map(jnp.zeros_like, self.gradient)
        if self.number not in parts:
            return None
        rows = parts[self.number]
        if rows is None:
            return with_weight(table, without_padding(table, update.weight))
        return _update(table, rows.ids, update.weight.astype(self.gradient.dtype))


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """An array of the state, and the trained table whose rows are its first axis, if any."""

    value: Array
    number: int | None
    table: Table | None

    def seen(self, parts: Parts) -> Array:
        """The array that the transformation gets in a run."""
        if self.table is None or self.number is None:
            return self.value
        if self.number not in parts:
            return self.value[:0]
        rows = parts[self.number]
        return self.value if rows is None else _gather(self.table, self.value, rows.ids)

    def written(self, new: Array, parts: Parts) -> Array:
        """The whole array after a run that returned `new` for the rows it got."""
        if self.table is None or self.number is None:
            return new
        if self.number not in parts:
            return self.value
        rows = parts[self.number]
        return new if rows is None else _store(self.table, self.value, rows.ids, new)


@dataclasses.dataclass(frozen=True)
class Step:
    """The arguments of an update, and ways to run it in parts."""

    tx: optax.GradientTransformationExtraArgs
    leaves: Sequence[Leaf]
    structure: PyTreeDef  # of the parameters, with Tables as leaves
    state: Sequence[StateLeaf]
    state_structure: PyTreeDef
    extra_args: Mapping[str, object]

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformationExtraArgs,
        plan: RowPlan,
        params: PyTree,
        gradients: Sequence[PyTree],
        inner: PyTree,
        extra_args: Mapping[str, object],
    ) -> "Step":
        """Pair each parameter with its gradient, and each array of the state with its table.

        Args:
          tx: The transformation.
          plan: The plan of the transformation.
          params: The parameters.
          gradients: One gradient for each leaf; a Table counts as a leaf.
          inner: The state of the transformation.
          extra_args: Further arguments of its `update`.

        Returns:
          The step.
        """
        params, structure = jax.tree.flatten(params, is_leaf=is_table)
        leaves: list[Leaf] = []
        tables: list[Table] = []
        for param, gradient in zip(params, gradients, strict=True):
            if isinstance(param, Table) and is_trained(param):
                leaves.append(Leaf(param, gradient, len(tables), plan.kinds[len(tables)]))
                tables.append(param)
            else:
                leaves.append(Leaf(param, gradient, None, None))
        arrays, state_structure = jax.tree.flatten(inner)
        state = [
            StateLeaf(array, owner, None if owner is None else tables[owner])
            for array, owner in zip(arrays, plan.owners, strict=True)
        ]
        return cls(tx, leaves, structure, state, state_structure, extra_args)

    def run(self, parts: Parts) -> tuple[list[PyTree], PyTree]:
        """Run the step on ordinary leaves and on some rows of some tables; other rows do not take part.

        Args:
          parts: The rows of each table; a table that is missing here has none.

        Returns:
          The update of each leaf, None for a table that is not in `parts`, and the new state.
        """
        updates, new = self._call(parts, self.state)
        out = [leaf.updated(update, parts) for leaf, update in zip(self.leaves, updates, strict=True)]
        written = [leaf.written(array, parts) for leaf, array in zip(self.state, new, strict=True)]
        return out, self.state_structure.unflatten(written)

    def run_alone(self, at: int, rows: Distinct, inner: PyTree) -> tuple[RowGrad, PyTree]:
        """Run the step on some rows of one table that the rest of the tree does not influence.

        On a CPU, a loop takes block after block of the used places.

        Args:
          at: The position of the table among the leaves.
          rows: The rows.
          inner: A state in which the table's rows are not updated yet.

        Returns:
          The update of the table, and the state with the table's rows updated.
        """
        leaf = self.leaves[at]
        table, number, scaled = leaf.param, leaf.number, leaf.kind == "scaled"
        assert number is not None
        dtype, length = rows.values.dtype, rows.ids.shape[0]
        arrays = self.state_structure.flatten_up_to(inner)
        owned = [i for i, of_state in enumerate(self.state) if of_state.number == number]

        def run_block(
            ids: Int[Array, " block"], values: Shaped[Array, "block *dim"], of_table: Sequence[Array]
        ) -> tuple[Shaped[Array, "block *dim"], list[Array]]:
            state = list(self.state)
            for i, array in zip(owned, of_table, strict=True):
                state[i] = dataclasses.replace(state[i], value=array)
            part = {number: Distinct(ids, values, jnp.int32(0))}
            updates, new = self._call(part, state)
            return updates[at].weight.astype(dtype), [state[i].written(new[i], part) for i in owned]

        block = _block(length, math.prod(table.dim))
        of_table = [arrays[i] for i in owned]
        if block >= length or scaled or not table.storage.in_blocks:
            update, new = run_block(rows.ids, rows.values, of_table)
        else:
            padded = -(-length // block) * block
            ids, values = rows.ids, rows.values
            if padded > length:
                ids = jnp.full(padded, table.rows, ids.dtype).at[:length].set(ids)
                values = jnp.zeros((padded, *table.dim), dtype).at[:length].set(values)

            # The update of a block overwrites its sums. Unused places hold zeros before and after.
            def body(i: Array, carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
                values, of_table = carry
                ids_here, values_here = (jax.lax.dynamic_slice_in_dim(x, i * block, block) for x in (ids, values))
                update, of_table = run_block(ids_here, values_here, of_table)
                return jax.lax.dynamic_update_slice_in_dim(values, update, i * block, 0), of_table

            blocks = (rows.number + (block - 1)) // block
            update, new = jax.lax.fori_loop(0, blocks, body, (values, of_table))
            update = update[:length]
        for i, array in zip(owned, new, strict=True):
            arrays[i] = array
        written = self.state_structure.unflatten(arrays)
        if scaled:  # the ids are not combined, so they are not at their owners
            return row_grad(rows.ids, update, table.rows), written
        return _update(table, rows.ids, update), written

    def _call(self, parts: Parts, state: Sequence[StateLeaf]) -> tuple[list[PyTree], list[Array]]:
        """Gather the rows and call the transformation on them."""
        pairs = [leaf.seen(parts) for leaf in self.leaves]
        updates, new = self.tx.update(
            self.structure.unflatten([gradient for _, gradient in pairs]),
            self.state_structure.unflatten([leaf.seen(parts) for leaf in state]),
            self.structure.unflatten([param for param, _ in pairs]),
            **self.extra_args,
        )
        return self.structure.flatten_up_to(updates), self.state_structure.flatten_up_to(new)


def _block(length: int, size: int) -> int:
    """The number of rows of a block."""
    # On other devices than a CPU, a loop of unknown length waits for the host in each iteration.
    return max(1, _BLOCK // max(1, size)) if jax.default_backend() == "cpu" else length


def _no_rows(table: Table) -> Distinct:
    return Distinct(jnp.zeros(0, jnp.int32), jnp.zeros((0, *table.dim), table.dtype), jnp.int32(0))


def laid_out_state(state: PyTree, owners: Sequence[int | None], tables: Sequence[Table]) -> PyTree:
    """Shard the state of a transformation like its tables, and replicate its counters.

    Args:
      state: The state. Its first leaves are described by `owners`.
      owners: For each of these leaves, the table whose rows are its first axis, or None.
      tables: The trained tables.

    Returns:
      The same state, laid out.
    """
    leaves, structure = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        owner = owners[i] if i < len(owners) else None
        if owner is not None:
            leaves[i] = tables[owner].storage.laid_out(leaf, tables[owner].dim)
        elif jnp.ndim(leaf) == 0:
            for table in reversed(tables):  # with several meshes, the first table's wins
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
