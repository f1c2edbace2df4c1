"""Helpers of the frameworks' optimizers: prepare gradients for a transformation, and check that it takes tables."""

import jax
import optax
from jaxtyping import PyTree

from .._core.containers.held import as_table
from .._core.containers.held_rows import bare
from .._core.table import Table, is_table, with_weight
from .._gradients.chosen import tables_at
from .._gradients.row_grad import RowGrad, is_trained, no_rows
from ._lift import LiftState


def prepared_gradient(call: str, name: object, param: PyTree, gradient: PyTree) -> PyTree:
    """Convert the gradient of a parameter to the form that transformations take.

    Args:
      call: The call, for error messages.
      name: The path of the parameter, for error messages.
      param: The parameter, a Table if a layer holds it.
      gradient: For a table a RowGrad, a Table, an array of all rows, or a StoredRows; any gradient for other leaves.

    Returns:
      For a table, a Table with a RowGrad or a dense weight, of length 0 if the table is not trained; for any other
      parameter, the gradient unchanged.

    Raises:
      ValueError: If a parameter that is no table has a RowGrad, or a dense gradient has another layout than its table.
    """
    gradient = bare(gradient)
    if not isinstance(param, Table):
        if isinstance(gradient, RowGrad):
            raise ValueError(
                f"`{call}(grads=...)` must have a RowGrad for tables only, got one for {name}, which was none when the "
                "optimizer was made. Choose it by embax.optim.lift(tx, tables=...), as for the gradient; for the "
                "weight of an Embedding, make the optimizer anew."
            )
        return gradient
    if not is_trained(param):  # its gradient is ignored
        return with_weight(param, no_rows(param))
    if isinstance(gradient, Table | RowGrad):
        return gradient if isinstance(gradient, Table) else with_weight(param, gradient)
    of_gradient = as_table(param, gradient)
    if of_gradient.storage != param.storage:
        raise ValueError(
            f"`{call}(grads=...)` must have gradients of all rows laid out as the table, got "
            f"{of_gradient.storage.descriptions[0]} for {name}, which is laid out as {param.storage.descriptions[0]}. "
            "Differentiate for the model as it is."
        )
    return of_gradient


def with_chosen(tx: optax.GradientTransformation, params: PyTree) -> tuple[PyTree, frozenset[str]]:
    """Wrap each array in a Table that a transformation chooses as one, by its `tables=`.

    So labels and masks in the transformation see the same tree in `init` and in each step.

    Args:
      tx: The transformation.
      params: The parameters, with Tables for those of layers.

    Returns:
      The parameters, and the paths of the chosen arrays, written by `keystr`.
    """
    chosen = chosen_at_start(jax.eval_shape(tx.init, params), params)
    return tables_at(chosen, params), chosen


def chosen_at_start(opt_state: PyTree, params: PyTree) -> frozenset[str]:
    """Find the arrays that a transformation chose as tables, by the state that it made.

    Args:
      opt_state: The state.
      params: The parameters, with Tables for those of layers.

    Returns:
      The paths of the chosen arrays in the parameters, written by `keystr`.
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LiftState))
    of_tables = [x.made_for.tables for x in states if isinstance(x, LiftState) and x.made_for is not None]
    nodes, _ = jax.tree.flatten_with_path(params, is_leaf=is_table)
    arrays = {jax.tree_util.keystr(path) for path, node in nodes if not isinstance(node, Table)}
    return frozenset(arrays).intersection(table.path for tables in of_tables for table in tables)


def check_takes_tables(call: str, tx: optax.GradientTransformation, opt_state: PyTree, params: PyTree) -> None:
    """Trace a transformation with RowGrads, so that one that is not lifted is refused with a clear message.

    Args:
      call: The call, for error messages.
      tx: The transformation.
      opt_state: Its state.
      params: A tree of parameters, some of them Tables.

    Raises:
      TypeError: If it does not take the RowGrads of the tables.
    """
    nodes, structure = jax.tree.flatten_with_path(params, is_leaf=is_table)
    names = [jax.tree_util.keystr(path) for path, param in nodes if isinstance(param, Table)]
    if not names:
        return
    gradients = structure.unflatten(
        [with_weight(param, no_rows(param)) if isinstance(param, Table) else param for _, param in nodes]
    )
    try:
        updates, _ = jax.eval_shape(tx.update, gradients, opt_state, params)
        pairs = zip(nodes, structure.flatten_up_to(updates), strict=True)
    except (TypeError, ValueError) as error:
        raise _takes_no_tables(call, names, str(error).partition("\n")[0]) from error
    if not all(isinstance(update, RowGrad | Table) for (_, param), update in pairs if isinstance(param, Table)):
        raise _takes_no_tables(call, names, "updates of another kind")


def _takes_no_tables(call: str, names: list[str], seen: str) -> TypeError:
    return TypeError(
        f"`{call}(tx=...)` must take the RowGrads of the Embeddings' weights {', '.join(names)}, got one that does not "
        f"({seen}). Lift it: embax.optim.lift(tx)."
    )
