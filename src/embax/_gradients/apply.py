"""apply_updates and global_norm: optax's functions for trees that hold Tables and RowGrads besides arrays.

For instance, the update `RowGrad([4, 1, 4], values)` of a table of a million rows adds to rows 1 and 4, and to row 4
twice. No other row is read or written.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PyTree

from .._base import distinct as _dedupe
from .._core import ids as _ids
from .._core.containers.held_rows import bare
from .._core.table import Table, has_weight, without_padding
from .row_grad import RowGrad, is_trained


def global_norm(tree: PyTree) -> Float32[Array, ""]:
    """Return the Euclidean norm of all gradients in a tree; a RowGrad counts as its dense gradient would.

    Args:
      tree: A pytree of arrays, Tables and RowGrads.

    Returns:
      A scalar, in float32 or wider.

    Example:
      >>> import embax, jax, jax.numpy as jnp
      >>> g = embax.RowGrad([4, 4], jnp.ones((2, 2)), rows=1_000)
      >>> jax.jit(embax.global_norm)({"table": g, "bias": jnp.ones(1)})
      Array(3., dtype=float32)
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, RowGrad))
    return norm_of_distinct([leaf.deduplicated().values if isinstance(leaf, RowGrad) else leaf for leaf in leaves])


@functools.partial(jax.jit, inline=True)  # one program for an eager call
def norm_of_distinct(leaves: list[PyTree]) -> Float32[Array, ""]:
    """The Euclidean norm of arrays; the values of RowGrads must be deduplicated."""
    squares = [jnp.square(jnp.abs(leaf.astype(_dedupe.accumulator(leaf.dtype)))).sum() for leaf in leaves]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Add updates to parameters; in a table, only the rows with an update are touched.

    Like `optax.apply_updates`, for trees that may hold Tables. If the parameters are donated, the work follows the
    number of ids, not of rows. Padding rows and frozen tables are not changed.

    Args:
      params: A pytree of arrays and Tables.
      updates: The same pytree, with a RowGrad for each Table, or a Table whose weight is a dense update. None leaves a
        parameter unchanged. Duplicate ids of a RowGrad add up, in float32 or wider. An array may get a RowGrad, too.

    Returns:
      The new parameters, in their own dtypes.

    Raises:
      TypeError: If the update of a Table is neither a RowGrad nor a Table.
      ValueError: If the structures differ, or a RowGrad does not fit its table.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> params = {"table": embax.Table(jnp.zeros((3, 2)))}
      >>> embax.apply_updates(params, {"table": embax.RowGrad([1], jnp.ones((1, 2)), rows=3)})["table"].weight
      Array([[0., 0.],
             [1., 1.],
             [0., 0.]], dtype=float32)
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda node: node is None or isinstance(node, Table))
    return structure.unflatten(map(_apply, leaves, structure.flatten_up_to(updates)))


def _apply(param: PyTree, update: PyTree) -> PyTree:
    if param is None or update is None:
        return param
    if not isinstance(param, Table):
        if isinstance(update, RowGrad):  # a gradient of an array chosen by `tables=`
            return _apply(Table(param), update).weight
        return jnp.asarray(param + update).astype(jnp.asarray(param).dtype)
    update = checked_update("embax.apply_updates", param, update)
    if not is_trained(param):
        return param
    if isinstance(update, Table):
        # Padding rows are restored by selection: adding 0 would turn -0.0 into 0.0.
        weight = without_padding(param, _apply(param.weight, update.weight), instead=param.weight)
        return dataclasses.replace(param, weight=weight)
    ids, values = _ids.trained(update.ids, param), update.values
    weight = param.storage.add(param.weight, ids, values, update.at_owners)
    return dataclasses.replace(param, weight=weight)


def checked_update(call: str, table: Table, update: PyTree) -> "RowGrad | Table":
    """Check that a gradient or update fits its table.

    Args:
      call: The call, for error messages.
      table: The table.
      update: The caller's update for this table.

    Returns:
      A bare RowGrad, without the Table around it, or a Table with a dense weight.

    Raises:
      TypeError: If the update is neither a RowGrad nor a Table.
      ValueError: If its shape is not the table's.
    """
    update = bare(update)
    if not isinstance(update, RowGrad | Table):
        raise TypeError(
            f"`{call}(updates=...)` must have a RowGrad or a Table where the parameters have a Table, got "
            f"{type(update).__name__}. Differentiate with embax.value_and_grad or embax.grad."
        )
    if not has_weight(table):  # Equinox's partition removed it
        return update
    if isinstance(update, RowGrad):
        refuse_lanes(call, update)
        fits = (update.rows, update.dim) == (table.rows, table.dim)
    else:
        fits = not has_weight(update) or update.weight.shape == table.weight.shape
    if not fits:
        raise ValueError(f"`{call}(updates=...)` must fit the table {table!r}, got {update!r}. Pass its own gradient.")
    return update


def refuse_lanes(call: str, gradient: RowGrad) -> None:
    """Raise a ValueError for a gradient with lanes: a table has no lanes to apply them to."""
    if gradient.lanes:
        raise ValueError(
            f"`{call}(updates=...)` must have a gradient without lanes for a table, got the lanes {gradient.lanes} of "
            "jax.vmap or jax.lax.scan. Sum them: gradient.sum(axis=0)."
        )
