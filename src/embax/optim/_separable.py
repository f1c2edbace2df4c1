"""RowPlan: which arrays of a transformation's state belong to rows, and whether it treats rows independently.

An example: `optax.adam` for one table of 1,000 rows. Its state has the leaves count `()`, mu `(1000, 4)` and nu
`(1000, 4)`. For a table of 1,001 rows, mu and nu have one row more, so the owners are `(None, 0, 0)`: both moments
belong to table 0. Its jaxpr has only elementwise operations on rows, so the kind of the table is "rowwise".

If the jaxpr does not prove this, the transformation is run on 128 random rows: alone, in another order, and among
further rows with zero gradients. If the results differ, it mixes rows and is refused.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .._base.distinct import accumulator
from .._base.typing import PyTreeDef
from .._core.table import Table, has_weight, is_table, with_weight
from ._structure import Kind, follows, is_rowwise, is_scaled, step_jaxpr

# Rows of the small tables that a transformation is tried on. Adafactor factors only axes of 128 or more.
_ROWS = 128
# The largest difference allowed, relative to the largest update: float32 sums in another order differ a little.
_TOLERANCE = 1e-3
# The number of rows of an abstract table: a prime that no other axis is likely to have.
_PRIME = 1_000_003

# Functions of a transformation. For caching, parameters are given as a structure and shapes, which can be hashed.
Init: TypeAlias = Callable[[PyTree], PyTree]
Update: TypeAlias = Callable[..., tuple[PyTree, PyTree]]
Leaves: TypeAlias = tuple[jax.ShapeDtypeStruct, ...]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Choose: TypeAlias = Callable[[np.ndarray], np.ndarray]  # selects rows


class RowPlan(NamedTuple):
    """Where the state of a transformation has rows, and how the transformation treats each table."""

    owners: tuple[int | None, ...]  # for each leaf of the state, the table whose rows are its first axis
    kinds: tuple[Kind, ...]  # one for each table


def plan(tx: optax.GradientTransformationExtraArgs, params: PyTree) -> RowPlan:
    """Analyse a transformation for `lift`.

    Args:
      tx: The transformation.
      params: The parameters; Tables that are not trained have no weight, and are not counted.

    Returns:
      The plan.

    Raises:
      ValueError: If rows mix, or the state depends on the number of rows in another way than by a first axis.
    """
    return _plan(tx.init, tx.update, *_abstract(params))


def state_of(tx: optax.GradientTransformationExtraArgs, params: PyTree) -> tuple[PyTreeDef, Shapes]:
    """Return the structure of a transformation's state for some parameters, and the shapes of its leaves."""
    return _state_of(tx.init, *_abstract(params))


@functools.lru_cache(maxsize=256)
def _state_of(init: Init, structure: PyTreeDef, leaves: Leaves) -> tuple[PyTreeDef, Shapes]:
    state, of_state = jax.tree.flatten(jax.eval_shape(init, structure.unflatten(leaves)))
    return of_state, tuple(leaf.shape for leaf in state)


@functools.lru_cache(maxsize=256)
def _plan(init: Init, update: Update, structure: PyTreeDef, leaves: Leaves) -> RowPlan:
    owners = _owners(init, structure, leaves)
    params = structure.unflatten(leaves)
    kinds: tuple[Kind, ...] = tuple(_kind(init, update, params, k, owners) for k in range(len(_tables(params))))
    if "joint" in kinds:
        off = _difference(init, update, *_abstract(_with_rows(params, 2 * _ROWS)), owners)
        if not off < _TOLERANCE:
            raise _mixes(f"an update that is off by {off:.2g} of its size when rows without a gradient are added")
    return RowPlan(owners, kinds)


def _owners(init: Init, structure: PyTreeDef, leaves: Leaves) -> tuple[int | None, ...]:
    """Find the leaves of the state with an entry for each row of a table: they grow if the table gets one row more."""
    params = structure.unflatten(leaves)
    before_structure, before = _state_of(init, structure, leaves)
    owners: list[int | None] = [None] * len(before)
    for k, table in enumerate(_tables(params)):
        rows = table.weight.shape[0]  # stored rows
        longer = jax.ShapeDtypeStruct((rows + 1, *table.dim), table.dtype)
        after, after_structure = jax.tree.flatten(jax.eval_shape(init, _with_weights(params, {k: longer})))
        if before_structure != after_structure:
            raise _mixes(f"a state of {after_structure} for one row more instead of {before_structure}")
        for i, (few, many) in enumerate(zip(before, after, strict=True)):
            if few == many.shape:
                continue
            if (few[:1], many.shape) != ((rows,), (rows + 1, *few[1:])) or owners[i] is not None:
                raise _mixes(f"a state of shape {many.shape} for one row more instead of {few}")
            owners[i] = k
    return tuple(owners)


def _kind(init: Init, update: Update, params: PyTree, number: int, owners: tuple[int | None, ...]) -> Kind:
    """Derive from the jaxpr of a step how the transformation treats the rows of one table."""
    table = _tables(params)[number]
    params = _with_weights(params, {number: jax.ShapeDtypeStruct((_PRIME, *table.dim), table.dtype)})
    state, state_structure = jax.tree.flatten(jax.eval_shape(init, params))

    def step(weight: Array, gradient: Array, rest: PyTree, state: list[Array]) -> tuple[Array, PyTree, list[Array]]:
        updates, new = update(
            _with_weights(rest, {number: gradient}),
            state_structure.unflatten(state),
            _with_weights(rest, {number: weight}),
            value=jnp.ones(()),  # the loss, which some transformations require
        )
        of_table = _tables(updates)[number].weight
        return of_table, _with_weights(updates, {number: None}), state_structure.flatten_up_to(new)

    weight = _tables(params)[number].weight
    jaxpr = step_jaxpr(step, weight, weight, params, state)
    owned = [i for i, owner in enumerate(owners) if owner == number]
    if not owned and accumulator(table.dtype) == table.dtype and is_scaled(jaxpr, gradient=1, update=0, weight=0):
        return "scaled"
    inputs = [0, 1, *(len(jaxpr.invars) - len(state) + i for i in owned)]
    outputs = [0, *(len(jaxpr.outvars) - len(state) + i for i in owned)]
    if is_rowwise(jaxpr, inputs, outputs, _PRIME):
        return "rowwise"
    # A norm of gradients is the same without rows that were not read. A norm of weights, or of a row's state, is not.
    own = follows(jaxpr, [i in inputs and i != 1 for i in range(len(jaxpr.invars))])
    if any(own[len(own) - len(state) + i] for i, owner in enumerate(owners) if owner is None):
        raise _mixes("a state shared by all rows that depends on their weights or their state")
    return "joint"


@functools.lru_cache(maxsize=256)
def _difference(
    init: Init, update: Update, structure: PyTreeDef, leaves: Leaves, owners: tuple[int | None, ...]
) -> float:
    """Compare the update of some rows alone and among others; returns the difference relative to the largest update.

    The update of a row must not depend on further rows with zero gradients, on the order of the rows, or on zeros in
    unused places, whatever its state and however large its gradient.
    """

    def step(gradients: PyTree, state: PyTree, params: PyTree, value: Array) -> tuple[PyTree, PyTree]:
        return update(gradients, state, params, value=value)

    params = structure.unflatten(leaves)
    # Evaluated at once, even if `init` is called while another function is traced.
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        # Only these two are compiled, the step for two numbers of rows; NumPy does the rest.
        compiled = jax.jit(init), jax.jit(step)
        # The second case is late in training, with large gradients: a warm-up or a threshold must not hide anything.
        return float(np.max([_case(*compiled, params, owners, *case) for case in [(1.0, None), (1e4, 10_000)]]))


def _case(
    init: Init, step: Update, params: PyTree, owners: tuple[int | None, ...], scale: float, count: int | None
) -> float:
    tables, value = _tables(params), np.ones((), np.float32)
    rng = np.random.default_rng(0)

    def tree(rows: list[np.ndarray]) -> PyTree:
        rest = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5).astype(leaf.dtype), params)
        return _with_weights(rest, dict(enumerate(rows)))

    def draw(scale: float = 1.0) -> list[np.ndarray]:
        dtypes = [jnp.promote_types(table.dtype, jnp.float32) for table in tables]
        return [
            (scale * rng.standard_normal((2 * _ROWS, *table.dim))).astype(dtype)
            for table, dtype in zip(tables, dtypes, strict=True)
        ]

    weights = draw()
    state = init(tree(weights))
    for _ in range(2):
        _, state = step(tree(draw(scale)), state, tree(weights), value)
    state, state_structure = jax.tree.flatten(state)
    if count is not None:
        late = np.array(count)
        state = [late.astype(x.dtype) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer) else x for x in state]
    gradients = [np.concatenate([np.zeros_like(g[:_ROWS]), g[_ROWS:]]) for g in draw(scale)]

    def step_with(
        choose: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]
    ) -> list[np.ndarray]:
        chosen = [x if owner is None else choose(np.asarray(x)) for x, owner in zip(state, owners, strict=True)]
        updates, new = step(
            tree([choose(g) for g in gradients]),
            state_structure.unflatten(chosen),
            tree([choose(w) for w in weights]),
            value,
        )
        new = state_structure.flatten_up_to(new)
        rows = [x for x, owner in zip(new, owners, strict=True) if owner is not None]
        return [back(np.asarray(x)) for x in [table.weight for table in _tables(updates)] + rows]

    among = step_with(lambda x: x, lambda x: x[_ROWS:])
    alone = step_with(lambda x: x[_ROWS:][::-1], lambda x: x[::-1])
    filled = step_with(lambda x: np.concatenate([x[_ROWS:], np.zeros_like(x[_ROWS:])]), lambda x: x[:_ROWS])
    off = [
        np.max(np.abs(x - y), initial=0) / np.maximum(np.max(np.abs(x), initial=0), jnp.finfo(x.dtype).tiny)
        for other in (alone, filled)
        for x, y in zip(among, other, strict=True)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return float(np.max(off))


def _abstract(params: PyTree) -> tuple[PyTreeDef, Leaves]:
    """The structure and the shapes of parameters, which can be hashed."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _tables(params: PyTree) -> list[Table]:
    leaves = jax.tree.leaves(params, is_leaf=is_table)
    return [leaf for leaf in leaves if isinstance(leaf, Table) and has_weight(leaf)]


def _with_weights(params: PyTree, weights: Mapping[int, PyTree]) -> PyTree:
    """Replace the weights of some tables, given by their number."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_table)
    number = -1
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Table) and has_weight(leaf):
            number += 1
            leaves[i] = with_weight(leaf, weights.get(number, leaf.weight))
    return structure.unflatten(leaves)


def _with_rows(params: PyTree, rows: int) -> PyTree:
    """Give all tables `rows` rows, as shapes."""
    shapes = [jax.ShapeDtypeStruct((rows, *table.dim), table.dtype) for table in _tables(params)]
    return _with_weights(params, dict(enumerate(shapes)))


def _mixes(seen: str) -> ValueError:
    return ValueError(
        "`embax.optim.lift(tx=...)` must treat each row of a table by itself, as SGD, Adagrad and Adam do, got "
        f"{seen}. Adafactor, LAMB, LARS, clipping by a block's norm, and noise cannot be lifted: train such a table "
        "with jax.grad, or choose another transformation."
    )
