"""Convert states of NNX modules to trees with Tables for the Params of Embeddings, and back."""

from collections.abc import Callable, Mapping

from flax import nnx
from jaxtyping import PyTree

from .._core.containers import modules as _modules
from .._core.containers.held import as_table, held
from .._core.containers.modules import OfTable, copied
from .._core.table import Table, shared_rules
from .._gradients.row_grad import RowGrad
from ._embedding import Embedding


def tables_of(nodes: PyTree) -> dict[int, Table]:
    """Find the Params that Embeddings hold.

    Args:
      nodes: Modules, or a tree of them.

    Returns:
      For the id() of each Param, a Table of its value, with the rules that all layers holding it share.
    """
    found: dict[int, list[Table]] = {}
    for _, node in nnx.iter_graph(nodes):
        if isinstance(node, Embedding):
            found.setdefault(id(node.embedding), []).append(node.table)
    return {param: shared_rules(tables) for param, tables in found.items()}


def tree_of(state: PyTree, tables: Mapping[int, Table]) -> PyTree:
    """Take the values out of a state, as Tables for Params of Embeddings.

    Args:
      state: A state that holds the modules' own Variables.
      tables: The result of `tables_of`.

    Returns:
      A nested dict of arrays and Tables.
    """

    def value(variable: PyTree) -> PyTree:
        if not isinstance(variable, nnx.Variable):
            return variable
        raw = variable.get_raw_value()
        value = raw if isinstance(raw, RowGrad) else variable.get_value()  # which copies it by its leaves, too
        return as_table(tables[id(variable)], value) if id(variable) in tables else value  # may be a Table itself

    return _mapped(state, value)


def with_values(state: PyTree, tree: PyTree) -> PyTree:
    """Copy a state with new values; for a Table of a layer, with its weight."""

    def replaced(variable: PyTree, value: PyTree) -> PyTree:
        if not isinstance(variable, nnx.Variable):
            return value
        of_layer = isinstance(value, Table) and not isinstance(variable.get_value(), Table)
        value = held(value) if of_layer else value
        if isinstance(value, RowGrad):  # `replace` would copy it by its leaves, and so expand the gradients of bags
            return type(variable).from_metadata(value, variable.get_metadata())
        return variable.replace(value)

    mapped = _mapped(state, replaced, tree)
    return nnx.State(mapped) if isinstance(state, Mapping) else mapped


def _mapped(state: PyTree, function: Callable[..., PyTree], *trees: PyTree) -> PyTree:
    if not isinstance(state, Mapping):
        return function(state, *trees)
    return {key: _mapped(child, function, *(tree[key] for tree in trees)) for key, child in state.items()}


def with_tables(call: str, module: nnx.Module, function: OfTable) -> nnx.Module:
    """Copy a module, and apply a function to the tables of its Embeddings and to Tables that are Params."""
    module = nnx.clone(module)
    tables = tables_of(module)
    for _, variable in nnx.iter_graph(module):
        if not isinstance(variable, nnx.Variable):
            continue
        value = variable.get_value()
        if id(variable) in tables:
            new = held(function(tables[id(variable)]))
        else:
            new = function(value) if isinstance(value, Table) else value
        variable.set_value(copied(new, value))
    return module


_modules.register(nnx.Module, with_tables)
