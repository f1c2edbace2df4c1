"""lift: turn an optax transformation into one whose cost follows the rows that were read.

`init` finds out by `_separable` which arrays of the state have an entry for each row, and whether the transformation
treats rows independently. `update` sums the gradients by row and runs the transformation on these rows (`_step`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._base import distinct as _dedupe
from .._core import ids as _ids
from .._core.containers.held_rows import around
from .._core.scratch import has_slots
from .._core.table import Table, is_table, with_weight
from .._features.made_for import MadeFor, check_made_for, made_for
from .._gradients.apply import checked_update
from .._gradients.chosen import Chooser, checked, with_gradients, with_tables, without_tables
from .._gradients.row_grad import RowGrad, is_trained
from ._separable import plan, state_of
from ._step import Step, laid_out_state

_UPDATE = "embax.optim.lift(tx).update"


@has_slots
class LiftState(NamedTuple):
    """The state of a lifted transformation."""

    inner: PyTree  # the transformation's own state; entries for rows are along the first axis
    slots: tuple[_dedupe.Slots, ...]  # int32 (rows,) for each table whose duplicates are summed by slots, else None
    dealt_out: jax.Array  # () int32, how often an owner of a sharded table was overloaded; see `embax.shard`
    made_for: MadeFor | None = None  # the tables of the state; None in checkpoints of older versions


def lift(tx: optax.GradientTransformation, *, tables: Chooser | None = None) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation work on only those rows of tables that were read.

    Ordinary leaves go through `tx` unchanged. The gradient of a Table is a RowGrad, from `embax.value_and_grad`: `lift`
    sums the values of duplicate ids, gathers these rows of the table and of its state, runs `tx` on them, and scatters
    the new state back. If parameters and state are donated, time and temporary memory follow the number of ids. Rows
    that were not read, and their state, do not change by a bit, nor do padding rows and frozen tables, even under
    weight decay.

    The result equals dense training if `tx` leaves a row without a gradient unchanged, as SGD, Adagrad and row-wise
    Adagrad do. Momentum, Adam and similar transformations go on moving such a row, by moments that decay. Here row and
    moments wait until the row is read again, while bias correction and schedules count all steps. Weight decay shrinks
    a row only when it is read.

    A Table with a dense gradient, which is another Table, goes through `tx` as a whole.

    A state belongs to the tables that it was made for: their rows, layout and padding rows, and which of them are
    trained. `update` refuses other tables by name; `carry_over` converts the state. Other rules of a table, such as
    `max_norm`, may change at any time.

    `tx` must treat each row independently of the others. If this does not follow from its jaxpr, `init` tries it on
    small arrays. Transformations that compute with gradients go inside, as in
    `lift(optax.chain(optax.clip(1.0), optax.adam(1e-3)))`. Those that only select may be outside or inside:
    `optax.multi_transform`, `masked`, `freeze`, `selective_transform`, `apply_if_finite` and `inject_hyperparams`, with
    labels and masks made from the parameters or for each table. To `tx`, a Table is a tree node with one leaf.

    Args:
      tx: The transformation.
      tables: A predicate `(path, leaf) -> bool` that chooses plain arrays as tables, as for `embax.value_and_grad`.

    Returns:
      The transformation over trees with Tables. Its `update` requires `params`, and returns for each Table a RowGrad of
      distinct ids, for `embax.apply_updates`.

    Raises:
      TypeError: If `tx` is not a transformation.
      ValueError: If it is `optax.MultiSteps`. In `init`: if it mixes rows, or contains a lifted transformation. In
        `update`: without `params`, if a gradient does not fit its table, or if the state was made for other tables.

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
        state = jax.tree.map(jnp.asarray, state)  # NumPy arrays if it was restored from a file
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
        # Keep the structure of the given state, so that a change of rules does not compile a loop over steps again.
        inner = jax.tree.structure(state.inner).unflatten(jax.tree.leaves(inner))
        # Give updates the structure of the gradients, which transformations after this one expect.
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
      slots: The scratch memory of each trained table.

    Returns:
      The slots; the rows of tables that the transformation must see together, by table number (None: all rows, for a
      dense gradient); the rows of the other tables, by their position among the leaves; and the number of tables with
      an overloaded owner.
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
        ids = _ids.trained(leaf.gradient.ids, table)
        if leaf.kind == "scaled":  # the sum of the updates is the update of the sum
            alone[place] = _dedupe.Distinct(ids, leaf.gradient.values, jnp.int32(ids.shape[0]))
            continue
        of_table, held = slots[leaf.number], leaf.gradient.held
        slots[leaf.number], rows, more = table.storage.combine(of_table, ids, held, table.rows, table.dim)
        crowded += more
        if leaf.kind == "joint":
            together[leaf.number] = rows
        else:
            alone[place] = rows
    return tuple(slots), together, alone, crowded


def _with_rules_of(tx: optax.GradientTransformationExtraArgs, params: PyTree, inner: PyTree) -> PyTree:
    """Give the Tables in a state the current rules of the parameters' Tables, since `tx` maps over both."""
    structure, expected = state_of(tx, params)
    leaves, given = jax.tree.flatten_with_path(inner)
    if len(leaves) != len(expected):
        raise _of_another(f"{len(leaves)} arrays ({given}) instead of {len(expected)} ({structure})")
    for (path, leaf), shape in zip(leaves, expected, strict=True):
        if leaf.shape != shape:
            raise _of_another(f"the shape {leaf.shape} instead of {shape} for `inner{jax.tree_util.keystr(path)}`")
    return structure.unflatten([leaf for _, leaf in leaves])


def _refuse_rows_of_no_table(params: PyTree, gradients: Sequence[PyTree]) -> None:
    """Raise a ValueError for a RowGrad whose parameter is not a table."""
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
        f"`{_UPDATE}(state=...)` must fit what its `init` returns for the parameters, got {seen}. If an ordinary "
        "parameter has changed its shape, make the state anew."
    )


def _untrained(leaf: PyTree) -> PyTree:
    """Replace the weight of a table that is not trained by None, so that `tx` skips it."""
    return leaf if not is_table(leaf) or is_trained(leaf) else with_weight(leaf, None)


def _gathers_steps(name: str) -> ValueError:
    return ValueError(
        f"`embax.optim.lift(tx=...)` must act on the rows of each step, got optax.{name}, which gathers several steps "
        "and would forget rows that the last of them did not read. Add up the gradients instead: g1 + g2, or "
        "gradients.sum(axis=0) of what jax.lax.scan stacks."
    )
