"""lift: any row-separable optax transformation as one whose cost follows the rows that were read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Shaped

from .. import _dedupe
from .._rows import checked_update, is_trained, row_grad, trained_ids, without_padding
from .._table import Table, with_weight
from ._separable import check_separable, is_proportional, rows_of_state


class LiftState(NamedTuple):
    """The state of a lifted transformation."""

    inner: Any  # of the transformation itself; where it has an entry a row, along the first axis
    slots: tuple[_dedupe.Slots, ...]  # int32 (rows,) for each table whose duplicates are summed by slots, else None


class _Touched(NamedTuple):
    """The rows of a table that a step reads and writes."""

    ids: Int[Array, " length"]  # distinct, `rows` where there is none
    gradient: Shaped[Array, "length *dim"]


def lift(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
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

    `tx` has to treat each row by itself, whatever other rows there are. That is tried out on small arrays when the
    state is made. Combinators go inside, as in `lift(optax.chain(...))`; `optax.multi_transform` and
    `optax.apply_if_finite` work outside, too. To `tx`, a Table is a node of the tree with one leaf.

    Args:
      tx: The transformation.

    Returns:
      The transformation over mixed trees. Its `update` needs `params`, and returns a RowGrad of distinct ids at each
      Table, for `embax.apply_updates`.

    Raises:
      TypeError: If `tx` is not a transformation.
      ValueError: If it is `optax.MultiSteps`. When the state is made: if it does not treat rows one by one. In
        `update`: without `params`, or if a gradient does not fit its table.

    Example:
      >>> import embax, jax, jax.numpy as jnp, optax
      >>> params = {"table": embax.Table.create(jax.random.key(0), rows=1_000, dim=4), "scale": jnp.ones(4)}
      >>> tx = embax.optim.lift(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> def loss(params, ids):
      ...     return (embax.lookup(params["table"], ids) * params["scale"]).sum()
      >>> gradient = embax.grad(loss)(params, [3, 5, 3])
      >>> updates, state = tx.update(gradient, state, params)
      >>> updates["table"]
      RowGrad(3 ids of 1000 rows, float32[3,4])
      >>> params = embax.apply_updates(params, updates)

    References:
      Lazy Adam is the default of `torch.optim.SparseAdam` and of
      `tf.keras.optimizers.legacy.Adam` for sparse gradients, which describe the same difference.
    """
    if isinstance(tx, optax.MultiSteps):
        raise _gathers_steps("MultiSteps")
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`embax.optim.lift(tx=...)` must be an optax.GradientTransformation, got {type(tx).__name__}. "
            "Pass one, such as optax.adam(1e-3)."
        )
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> LiftState:
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_table)
        without = structure.unflatten([_untrained(leaf) for leaf in leaves])
        inner = tx.init(without)
        states = (optax.MultiStepsState, optax.ApplyEvery)
        for node in jax.tree.leaves(inner, is_leaf=lambda node: isinstance(node, states)):
            if isinstance(node, states):
                raise _gathers_steps(type(node).__name__.removesuffix("State"))
        trained = [leaf for leaf in leaves if _is_table(leaf) and is_trained(leaf)]
        if not trained:
            return LiftState(inner, ())
        check_separable(tx, without)
        slots = [None if is_proportional(tx, without, k) else _dedupe.scratch(t.rows) for k, t in enumerate(trained)]
        return LiftState(inner, tuple(slots))

    def update(updates: Any, state: LiftState, params: Any = None, **extra_args: Any) -> tuple[Any, LiftState]:
        if params is None:
            raise ValueError("`embax.optim.lift(tx).update(params=...)` must be given, got None. Pass the parameters.")
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_table)
        gradients = structure.flatten_up_to(updates)
        without = structure.unflatten([_untrained(leaf) for leaf in leaves])
        slots, touched, small_params, small_gradients = list(state.slots), [], [], []
        for param, gradient in zip(leaves, gradients, strict=True):
            if not _is_table(param):
                small_params.append(param)
                small_gradients.append(gradient)
                continue
            gradient = checked_update("embax.optim.lift(tx).update", param, gradient)
            if not is_trained(param):
                small_params.append(_untrained(param))
                small_gradients.append(_untrained(param))
                continue
            k = len(touched)
            if isinstance(gradient, Table):
                touched.append(None)
                small_params.append(param)
                small_gradients.append(dataclasses.replace(param, weight=without_padding(param, gradient.weight)))
                continue
            ids, values = trained_ids(param, gradient.ids), gradient.values
            if not is_proportional(tx, without, k):
                slots[k], ids, values = _dedupe.combine(slots[k], ids, values, param.rows)
            touched.append(_Touched(ids, values))
            small_params.append(with_weight(param, _rows(param.weight, ids)))
            small_gradients.append(with_weight(param, values))

        owners = rows_of_state(tx, without)
        whole, state_structure = jax.tree.flatten(state.inner)
        small = [
            leaf if owner is None or touched[owner] is None else _rows(leaf, touched[owner].ids)
            for leaf, owner in zip(whole, owners, strict=True)
        ]
        small_updates, small_state = tx.update(
            structure.unflatten(small_gradients),
            state_structure.unflatten(small),
            structure.unflatten(small_params),
            **extra_args,
        )
        new = [
            new if owner is None or touched[owner] is None else _store(leaf, touched[owner].ids, new)
            for leaf, new, owner in zip(whole, state_structure.flatten_up_to(small_state), owners, strict=True)
        ]
        out = _expand(leaves, gradients, structure.flatten_up_to(small_updates), touched)
        return structure.unflatten(out), LiftState(state_structure.unflatten(new), tuple(slots))

    return optax.GradientTransformationExtraArgs(init, update)


def _expand(
    params: Sequence[Any], gradients: Sequence[Any], updates: Sequence[Any], touched: Sequence[_Touched | None]
) -> list[Any]:
    """Turn what `tx` returned for each leaf into an update of the whole leaf."""
    out, tables = [], iter(touched)
    for param, gradient, update in zip(params, gradients, updates, strict=True):
        if not _is_table(param):
            out.append(update)
        elif not is_trained(param):
            out.append(jax.tree.map(jnp.zeros_like, gradient))
        elif (rows := next(tables)) is None:
            out.append(dataclasses.replace(update, weight=without_padding(param, update.weight)))
        else:
            out.append(row_grad(rows.ids, update.weight, param.rows))
    return out


def _is_table(node: Any) -> bool:
    return isinstance(node, Table)


def _untrained(leaf: Any) -> Any:
    """Take away the weight of a table that is not trained, so that `tx` has nothing to do with it."""
    return leaf if not _is_table(leaf) or is_trained(leaf) else with_weight(leaf, None)


def _rows(leaf: Shaped[Array, "rows ..."], ids: Int[Array, " length"]) -> Shaped[Array, "length ..."]:
    return leaf.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _store(
    leaf: Shaped[Array, "rows ..."], ids: Int[Array, " length"], rows: Shaped[Array, "length ..."]
) -> Shaped[Array, "rows ..."]:
    # Places without a row lie outside and are dropped. They are equal, though, so that the ids are not called unique.
    return leaf.at[ids].set(rows.astype(leaf.dtype), mode="drop", wrap_negative_indices=False)


def _gathers_steps(name: str) -> ValueError:
    return ValueError(
        f"`embax.optim.lift(tx=...)` must act on the rows of each step, got optax.{name}, which gathers several steps "
        "and would forget rows that the last of them did not read. Add up the gradients instead: g1 + g2."
    )

