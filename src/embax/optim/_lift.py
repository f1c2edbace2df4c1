"""lift: any row-separable optax transformation as one whose cost follows the rows that were read."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._base import distinct as _dedupe
from .._core import ids as _ids
from .._core.held_rows import around
from .._core.table import Table, is_table, with_weight
from .._features.made_for import MadeFor, check_made_for, made_for
from .._gradients.apply import checked_update
from .._gradients.chosen import Chooser, checked, with_gradients, with_tables, without_tables
from .._gradients.row_grad import RowGrad, is_trained
from ._separable import plan, state_of
from ._step import Step, laid_out_state

_UPDATE = "embax.optim.lift(tx).update"


class LiftState(NamedTuple):
    """The state of a lifted transformation."""

    inner: PyTree  # of the transformation itself; where it has an entry a row, along the first axis
    slots: tuple[_dedupe.Slots, ...]  # int32 (rows,) for each table whose duplicates are summed by slots, else None
    dealt_out: jax.Array  # () int32, how often rows of a placed table crowded on one device; see `embax.shard`
    made_for: MadeFor | None = None  # the tables that it belongs to; None from a version that did not note them


def lift(tx: optax.GradientTransformation, *, tables: Chooser | None = None) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation work on the rows of tables that were read, and on nothing else of them.

    Ordinary leaves go through `tx` as they are. At a Table the gradient is a RowGrad, as `embax.value_and_grad` gives
    it: the values of duplicate ids are summed, the rows of the table and of its state in `tx` are gathered, `tx` runs
    on these, and what it makes of the state is scattered back. So time and temporary memory follow the number of ids
    where parameters and state are donated, and a row that was not read, and its state, stay bit for bit as they were.
    So do the padding row and frozen tables, weight decay included.

    That is what `tx` would do with all rows, if a row without a gradient stands still. It does under SGD, Adagrad and
    row-wise Adagrad, which give the same result as dense training. Momentum, Adam and their kin move such a row on by
    what they remember, and let that decay; here both wait until the row is read again, while bias correction and
    schedules count all steps. Weight decay shrinks a row only when it is read.

    A Table whose gradient is dense, that is, another Table, goes through `tx` whole.

    A state belongs to the tables that it was made for: their rows, their layout, which of them are trained, and their
    padding rows. `update` refuses other ones by name, and `carry_over` gives the state for them. The other rules of a
    table, such as `max_norm`, may change at any time.

    `tx` has to treat each row by itself, whatever other rows there are. Where that does not follow from its jaxpr, it
    is tried out on small arrays when the state is made. What computes with gradients goes inside, as in
    `lift(optax.chain(optax.clip(1.0), optax.adam(1e-3)))`. What only chooses may be outside or inside:
    `optax.multi_transform`, `masked`, `freeze`, `selective_transform`, `apply_if_finite` and `inject_hyperparams`, with
    labels and masks that are made from the parameters or for each table. To `tx`, a Table is a node of the tree with
    one leaf.

    Args:
      tx: The transformation.
      tables: A predicate `(path, leaf) -> bool` that chooses arrays which are tables, too, as for
        `embax.value_and_grad`.

    Returns:
      The transformation over mixed trees. Its `update` needs `params`, and returns a RowGrad of distinct ids at each
      Table, for `embax.apply_updates`.

    Raises:
      TypeError: If `tx` is not a transformation.
      ValueError: If it is `optax.MultiSteps`. When the state is made: if it does not treat rows one by one, or if
        something in it is lifted already. In `update`: without `params`, if a gradient does not fit its table, or if
        the state was made for other tables.

    Example:
      >>> import embax, jax, jax.numpy as jnp, optax
      >>> params = {"table": embax.Table.create(jax.random.key(0), rows=1_000, dim=4), "scale": jnp.ones(4)}
      >>> tx = embax.optim.lift(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> def loss(params, ids):
      ...     return (embax.lookup(params["table"], ids) * params["scale"]).sum()
      ...
      >>> gradient = jax.jit(embax.grad(loss))(params, jnp.array([3, 5, 3]))
      >>> updates, state = jax.jit(tx.update)(gradient, state, params)
      >>> updates["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> params = embax.apply_updates(params, updates)

    References:
      `torch.optim.SparseAdam` and `tfa.optimizers.LazyAdam` update the moments of touched rows only, as here.
    """
    if isinstance(tx, optax.MultiSteps):
        raise _gathers_steps("MultiSteps")
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`embax.optim.lift(tx=...)` must be an optax.GradientTransformation, got {type(tx).__name__}. "
            "Pass one, such as optax.adam(1e-3)."
        )
    tx = optax.with_extra_args_support(tx)

    tables = checked("embax.optim.lift", tables)

    def init(params: PyTree) -> PyTree:
        params = with_tables("embax.optim.lift", tables, params)
        leaves, structure = jax.tree.flatten(params, is_leaf=is_table)
        without = structure.unflatten([_untrained(leaf) for leaf in leaves])
        inner = tx.init(without)
        states = (optax.MultiStepsState, optax.ApplyEvery, optax.contrib.SAMState)
        for node in jax.tree.leaves(inner, is_leaf=lambda node: isinstance(node, (*states, LiftState))):
            if isinstance(node, states):
                raise _gathers_steps(type(node).__name__.removesuffix("State"))
            if isinstance(node, LiftState):
                raise ValueError(
                    "`embax.optim.lift(tx=...)` must act on arrays, got a transformation with a lifted one in it. Lift "
                    "it once."
                )
        trained = [leaf for leaf in leaves if is_table(leaf) and is_trained(leaf)]
        of_tx = plan(tx, without)
        kinds = of_tx.kinds
        slots = [
            None if kind == "scaled" else table.storage.scratch(table.rows)
            for table, kind in zip(trained, kinds, strict=True)
        ]
        state = LiftState(inner, tuple(slots), jnp.zeros((), jnp.int32), made_for(params))
        return laid_out_state(state, of_tx.owners, trained)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(f"`{_UPDATE}(params=...)` must be given, got None. Pass the parameters.")
        if not isinstance(state, LiftState):
            raise TypeError(
                f"`{_UPDATE}(state=...)` must be a LiftState, got {type(state).__name__}. Make it with its `init`."
            )
        given, params = params, with_tables("embax.optim.lift", tables, params)
        if tables is not None:
            updates = with_gradients(given, params, updates)
        check_made_for(_UPDATE, state.made_for, made_for(params))
        state = jax.tree.map(jnp.asarray, state)  # NumPy arrays, where it was restored from a file
        leaves, structure = jax.tree.flatten(params, is_leaf=is_table)
        as_given = structure.flatten_up_to(updates)
        _refuse_rows_of_no_table(params, as_given)
        gradients: list[PyTree] = [
            checked_update(_UPDATE, leaf, gradient) if is_table(leaf) else gradient
            for leaf, gradient in zip(leaves, as_given, strict=True)
        ]
        without = structure.unflatten([_untrained(leaf) for leaf in leaves])
        inner = _with_rules_of(tx, without, state.inner)
        step = Step.of(tx, plan(tx, without), params, gradients, inner, extra_args)
        slots, together, alone, crowded = _summed_by_row(step, state.slots)
        out, inner = step.run(together)
        for place, rows in alone.items():
            out[place], inner = step.run_alone(place, rows, inner)
        # As it came, so that a loop over steps compiles once whatever rules have changed.
        inner = jax.tree.structure(state.inner).unflatten(jax.tree.leaves(inner))
        # An update has the structure of its gradient, so that other transformations find it where they look for it.
        out = [around(*pair) for pair in zip(as_given, out, strict=True)]
        out = (
            without_tables(given, params, structure.unflatten(out)) if tables is not None else structure.unflatten(out)
        )
        return out, LiftState(inner, slots, state.dealt_out + crowded, state.made_for)

    return optax.GradientTransformationExtraArgs(init, update)


def _summed_by_row(
    step: Step, slots: Sequence[_dedupe.Slots]
) -> tuple[tuple[_dedupe.Slots, ...], dict[int, _dedupe.Distinct | None], dict[int, _dedupe.Distinct], Array | int]:
    """Sum the gradient of each table by row.

    Args:
      step: The step.
      slots: The scratch of each trained table.

    Returns:
      The slots; the rows of the tables, by number, that the transformation has to see at once, None for all rows of a
      dense gradient; the rows of the others by their place among the leaves; and how many rows crowded.
    """
    slots, crowded = list(slots), 0
    together: dict[int, _dedupe.Distinct | None] = {}
    alone: dict[int, _dedupe.Distinct] = {}
    for place, leaf in enumerate(step.leaves):
        if leaf.number is None:
            continue
        if isinstance(leaf.gradient, Table):
            together[leaf.number] = None
            continue
        table = leaf.param
        ids, values = _ids.trained(leaf.gradient.ids, table), leaf.gradient.values
        if leaf.kind == "scaled":  # the sum of the updates is the update of the sum
            alone[place] = _dedupe.Distinct(ids, values, jnp.int32(ids.shape[0]))
            continue
        of_table = slots[leaf.number]
        slots[leaf.number], rows, more = table.storage.combine(of_table, ids, values, table.rows, table.dim)
        crowded += more
        if leaf.kind == "joint":
            together[leaf.number] = rows
        else:
            alone[place] = rows
    return tuple(slots), together, alone, crowded


def _with_rules_of(tx: optax.GradientTransformationExtraArgs, params: PyTree, inner: PyTree) -> PyTree:
    """Give the Tables in a state the rules that those of the parameters have now, as `tx` compares them."""
    structure, expected = state_of(tx, params)
    leaves, given = jax.tree.flatten_with_path(inner)
    if len(leaves) != len(expected):
        raise _of_another(f"{len(leaves)} arrays ({given}) instead of {len(expected)} ({structure})")
    for (path, leaf), shape in zip(leaves, expected, strict=True):
        if leaf.shape != shape:
            raise _of_another(f"the shape {leaf.shape} instead of {shape} for `inner{jax.tree_util.keystr(path)}`")
    return structure.unflatten([leaf for _, leaf in leaves])


def _refuse_rows_of_no_table(params: PyTree, gradients: Sequence[PyTree]) -> None:
    """Raise a ValueError for a RowGrad where the parameters have no table."""
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=is_table)
    for (path, leaf), gradient in zip(leaves, gradients, strict=True):
        if not is_table(leaf) and isinstance(gradient, RowGrad):
            raise ValueError(
                f"`{_UPDATE}(updates=...)` must have a RowGrad only for tables, got one at "
                f"params{jax.tree_util.keystr(path)}, which is none. Choose it by lift(tx, tables=...), as for "
                "embax.value_and_grad."
            )


def _of_another(seen: str) -> ValueError:
    return ValueError(
        f"`{_UPDATE}(state=...)` must be what its `init` gives for the parameters, got {seen}. If an ordinary "
        "parameter has changed its shape, make the state anew."
    )


def _untrained(leaf: PyTree) -> PyTree:
    """Take away the weight of a table that is not trained, so that `tx` has nothing to do with it."""
    return leaf if not is_table(leaf) or is_trained(leaf) else with_weight(leaf, None)


def _gathers_steps(name: str) -> ValueError:
    return ValueError(
        f"`embax.optim.lift(tx=...)` must act on the rows of each step, got optax.{name}, which gathers several steps "
        "and would forget rows that the last of them did not read. Add up the gradients instead: g1 + g2, or "
        "gradients.sum(axis=0) of what jax.lax.scan stacks."
    )
