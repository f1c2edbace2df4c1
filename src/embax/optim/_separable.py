"""What lift has to know of a transformation: whether rows mix, where the state holds rows, whether it only scales."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._dedupe import accumulator
from .._table import Table, with_weight

# Rows of the small tables that a transformation is tried on. Adafactor factors only axes of 128 and more.
_ROWS = 128
# How far an update may be off, as a part of the largest: float32 sums in another order.
_TOLERANCE = 1e-3


def rows_of_state(tx: optax.GradientTransformation, params: Any) -> list[int | None]:
    """Find the leaves of the state that have an entry for each row of a table.

    Args:
      tx: The transformation.
      params: What its state is made for; Tables that are not trained have no weight.

    Returns:
      For each leaf of the state, the number of the table among those with a weight, or None.

    Raises:
      ValueError: If the state follows the rows of a table otherwise than along the first axis of a leaf.
    """
    return list(_rows_of_state(tx.init, *_abstract(params)))


@functools.lru_cache(maxsize=256)
def _rows_of_state(init: Callable[..., Any], structure: Any, leaves: tuple[Any, ...]) -> tuple[int | None, ...]:
    params = structure.unflatten(leaves)
    before, before_structure = jax.tree.flatten(jax.eval_shape(init, params))
    owners: list[int | None] = [None] * len(before)
    for k, table in enumerate(_tables(params)):
        longer = jax.ShapeDtypeStruct((table.rows + 1, *table.dim), table.dtype)
        after, after_structure = jax.tree.flatten(jax.eval_shape(init, _with_weights(params, {k: longer})))
        if before_structure != after_structure:
            raise _mixes(f"a state of {after_structure} for one row more instead of {before_structure}")
        for i, (few, many) in enumerate(zip(before, after, strict=True)):
            if few.shape == many.shape:
                continue
            if (few.shape[:1], many.shape) != ((table.rows,), (table.rows + 1, *few.shape[1:])) or owners[i] is not None:
                raise _mixes(f"a state of shape {many.shape} for one row more instead of {few.shape}")
            owners[i] = k
    return tuple(owners)


def check_separable(tx: optax.GradientTransformationExtraArgs, params: Any) -> None:
    """Try on small tables whether a transformation treats rows one by one.

    Neither further rows whose gradient is zero, nor the order of the rows, nor the zeros that stand in unused places
    may change what it does to a row, whatever its state and however large the gradient.

    Args:
      tx: The transformation.
      params: What its state is made for; Tables that are not trained have no weight.

    Raises:
      ValueError: If rows mix.
    """
    off = _difference(tx.init, tx.update, *_abstract(params))
    if not off < _TOLERANCE:
        raise _mixes(f"an update that is off by {off:.2g} of its size when rows without a gradient are added")


@functools.lru_cache(maxsize=256)
def _difference(init: Callable[..., Any], update: Callable[..., Any], structure: Any, leaves: tuple[Any, ...]) -> float:
    """Compare what a transformation does to some rows alone and among others, as a part of the largest."""
    with jax.ensure_compile_time_eval():
        # Late in training and with large gradients, too, so that neither a warm-up nor a threshold hides anything.
        cases = [(1.0, None), (1e4, 10_000)]
        run = jax.jit(lambda: jnp.max(jnp.stack([_case(init, update, structure, leaves, *case) for case in cases])))
        return float(run())


def _case(init: Any, update: Any, structure: Any, leaves: tuple[Any, ...], scale: float, step: int | None) -> Array:
    params = structure.unflatten(leaves)
    tables = _tables(params)
    keys = iter(jax.random.split(jax.random.key(0), 4 * len(tables)))
    owners = list(_rows_of_state(init, structure, leaves))

    def tree(rows: list[Array]) -> Any:
        rest = structure.unflatten([jnp.full(leaf.shape, 0.5).astype(leaf.dtype) for leaf in leaves])
        return _with_weights(rest, dict(enumerate(rows)))

    def draw() -> list[Array]:
        dtypes = [jnp.promote_types(table.dtype, jnp.float32) for table in tables]
        return [
            jax.random.normal(next(keys), (2 * _ROWS, *table.dim), dtype)
            for table, dtype in zip(tables, dtypes, strict=True)
        ]

    weights = draw()
    state = init(tree(weights))
    for _ in range(2):
        _, state = update(tree([scale * g for g in draw()]), state, tree(weights))
    state, state_structure = jax.tree.flatten(state)
    if step is not None:
        state = [
            jnp.full_like(x, step) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) else x for x in state
        ]
    with_gradient = jnp.arange(2 * _ROWS) >= _ROWS
    gradients = [jnp.where(jnp.expand_dims(with_gradient, range(1, g.ndim)), scale * g, 0) for g in draw()]

    def step_with(choose: Callable[[Array], Array], back: Callable[[Array], Array]) -> list[Array]:
        chosen = [x if owner is None else choose(x) for x, owner in zip(state, owners, strict=True)]
        updates, new = update(
            tree([choose(g) for g in gradients]), state_structure.unflatten(chosen), tree([choose(w) for w in weights])
        )
        new = state_structure.flatten_up_to(new)
        rows = [x for x, owner in zip(new, owners, strict=True) if owner is not None]
        return [back(x) for x in [table.weight for table in _tables(updates)] + rows]

    among = step_with(lambda x: x, lambda x: x[_ROWS:])
    alone = step_with(lambda x: x[_ROWS:][::-1], lambda x: x[::-1])
    filled = step_with(lambda x: jnp.zeros_like(x).at[:_ROWS].set(x[_ROWS:]), lambda x: x[:_ROWS])
    off = [
        jnp.max(jnp.abs(x - y), initial=0) / jnp.maximum(jnp.max(jnp.abs(x), initial=0), jnp.finfo(x.dtype).tiny)
        for other in (alone, filled)
        for x, y in zip(among, other, strict=True)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return jnp.max(jnp.stack([x.astype(jnp.float32) for x in off]))


def is_proportional(tx: optax.GradientTransformationExtraArgs, params: Any, number: int) -> bool:
    """Say whether a transformation does nothing to the rows of a table but scale their gradient.

    Then duplicates need not be summed before it: the sum of the updates is the update of the sum. True of plain SGD,
    with a schedule, too. Read from the jaxpr of the update, and so true for every step.

    Args:
      tx: The transformation.
      params: What its state is made for; Tables that are not trained have no weight.
      number: The number of the table among those with a weight.

    Returns:
      Whether it is so. False also for tables whose duplicates have to be summed in a wider dtype.
    """
    return _is_proportional(tx.init, tx.update, *_abstract(params), number)


@functools.lru_cache(maxsize=256)
def _is_proportional(init: Any, update: Any, structure: Any, leaves: tuple[Any, ...], number: int) -> bool:
    params = structure.unflatten(leaves)
    table = _tables(params)[number]
    if accumulator(table.dtype) != table.dtype or number in _rows_of_state(init, structure, leaves):
        return False

    def of_table(weight: Array, gradient: Array, rest: Any, state: Any) -> Any:
        updates, state = update(
            _with_weights(rest, {number: gradient}), state, _with_weights(rest, {number: weight})
        )
        return _tables(updates)[number].weight, (updates, state)

    jaxpr = jax.make_jaxpr(of_table)(table.weight, table.weight, params, jax.eval_shape(init, params)).jaxpr
    weight, gradient = jaxpr.invars[:2]
    scaled = {id(gradient)}
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [id(x) in scaled for x in eqn.invars]
        if any(x is weight for x in eqn.invars):
            return False
        if any(inputs):
            if not (name == "neg" or name in ("mul", "div") and inputs == [True, False] or (name, inputs) == ("mul", [False, True])):
                return False
            scaled.add(id(eqn.outvars[0]))
    # The update of the table is there twice: by itself, and among all updates.
    depends = [id(x) in scaled for x in jaxpr.outvars]
    return depends[0] and sum(depends) == 2


def _abstract(params: Any) -> tuple[Any, tuple[Any, ...]]:
    """What the shapes of parameters are, in a form that can be hashed."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _tables(params: Any) -> list[Table]:
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Table))
    return [leaf for leaf in leaves if isinstance(leaf, Table) and leaf.weight is not None]


def _with_weights(params: Any, weights: dict[int, Any]) -> Any:
    """Give other weights to some of the tables, by their number."""
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda node: isinstance(node, Table))
    number = -1
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Table) and leaf.weight is not None:
            number += 1
            leaves[i] = with_weight(leaf, weights.get(number, leaf.weight))
    return structure.unflatten(leaves)


def _mixes(seen: str) -> ValueError:
    return ValueError(
        "`embax.optim.lift(tx=...)` must treat each row of a table by itself, as SGD, Adagrad, Adam and RMSProp do, got "
        f"{seen}. Adafactor, LAMB, LARS, clipping by a block's norm, and noise cannot be lifted: train such a table "
        "with jax.grad, or choose another transformation."
    )
