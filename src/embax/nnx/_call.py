"""Call: turn a function of NNX modules into a pure function of trees, with Tables in place of Params, for one call.

For instance, `f(model, ids)` with a model that has an Embedding "embed" and a Linear "head": the trees are
`{"embed": {"embedding": Table}, "head": {"kernel": array, "bias": array}}` and `ids`. `run` puts such trees back into
the model and calls `f`; `update` then writes everything that `f` changed into the caller's model.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._base.typing import PyTreeDef
from .._core.table import Table
from ._params import tables_of, tree_of, with_values

CONTEXT = "embax"  # the name of the `nnx.update_context` of a call


class Call:
    """One call of a function of modules.

    Args:
      f: The function; returns a pair, whose second element is passed on.
      filters: For the position of each differentiated argument, a filter for the Variables of its modules.
      args: Its positional arguments.
      kwargs: Its keyword arguments.

    Attributes:
      trees: The arguments, with a nested dict of the differentiated arrays and Tables in place of each module.
    """

    def __init__(
        self,
        f: Callable[..., PyTree],
        filters: Mapping[int, PyTree],
        args: Sequence[PyTree],
        kwargs: Mapping[str, PyTree],
    ):
        self.f = f
        self.args = [_flatten(arg) for arg in args]
        self.kwargs = {name: _flatten(arg) for name, arg in kwargs.items()}
        # Modules and Variables, by argument and by their position among its leaves.
        nodes = (
            {number: _nodes(leaves) for number, (leaves, _) in enumerate(self.args)},
            {name: _nodes(leaves) for name, (leaves, _) in self.kwargs.items()},
        )
        wanted = {number: nnx.filterlib.to_predicate(filter) for number, filter in filters.items()}

        def is_wanted(path: KeyPath, value: PyTree) -> bool:
            by_name, argument, _, *inside = path
            # A Variable that is itself an argument is differentiated, whatever the filter.
            return not by_name and argument in wanted and (not inside or wanted[argument](tuple(inside), value))

        with nnx.split_context(CONTEXT) as context:
            self.graphdef, states, self.rest = context.split(nodes, is_wanted, ...)
        self.states = states.get(0, {})
        tables = tables_of(nodes)
        self.trees = [
            structure.unflatten(
                [
                    tree_of(self._state(number, place), tables) if _is_node(leaf) else leaf
                    for place, leaf in enumerate(leaves)
                ]
            )
            for number, (leaves, structure) in enumerate(self.args)
        ]

    def run(self, *trees: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """Call the function; returns its value, and the new state of all modules, for `update`."""
        states = {
            number: {
                place: with_values(state, self._parts(number, trees[number])[place])
                for place, state in of_argument.items()
            }
            for number, of_argument in self.states.items()
        }
        with nnx.merge_context(CONTEXT, inner=True) as context:
            nodes = context.merge(self.graphdef, nnx.State({0: states}), self.rest)
        args = [
            structure.unflatten(
                [nodes[0][number].get(place, part) for place, part in enumerate(self._parts(number, tree))]
            )
            for number, ((_, structure), tree) in enumerate(zip(self.args, trees, strict=True))
        ]
        kwargs = {
            name: structure.unflatten([nodes[1][name].get(place, leaf) for place, leaf in enumerate(leaves)])
            for name, (leaves, structure) in self.kwargs.items()
        }
        value, aux = self.f(*args, **kwargs)
        leaves, self.structure = _flatten(aux)
        with nnx.split_context(CONTEXT) as context:
            self.changed, state = context.split((nodes, _nodes(leaves)))
        return value, (state, [None if _is_node(leaf) else leaf for leaf in leaves])

    def update(self, outcome: PyTree) -> PyTree:
        """Write the new state into the modules, and return the function's auxiliary output."""
        state, leaves = outcome
        with nnx.merge_context(CONTEXT, inner=False) as context:
            _, nodes = context.merge(self.changed, state)
        return self.structure.unflatten([nodes.get(place, leaf) for place, leaf in enumerate(leaves)])

    def gradient(self, number: int, tree: PyTree) -> PyTree:
        """Convert the gradient of an argument from a tree to the argument's structure, with a State for each module."""
        leaves, structure = self.args[number]
        parts = enumerate(self._parts(number, tree))
        return structure.unflatten(
            [
                with_values(self._state(number, place), part) if _is_node(leaves[place]) else part
                for place, part in parts
            ]
        )

    def _parts(self, number: int, tree: PyTree) -> list[PyTree]:
        return self.args[number][1].flatten_up_to(tree)

    def _state(self, number: int, place: int) -> PyTree:
        return self.states.get(number, {}).get(place, nnx.State({}))


def _flatten(tree: PyTree) -> tuple[list[PyTree], PyTreeDef]:
    return jax.tree.flatten(tree, is_leaf=lambda node: _is_node(node) or isinstance(node, Table))


def _is_node(leaf: PyTree) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _nodes(leaves: Sequence[PyTree]) -> dict[int, PyTree]:
    return {place: leaf for place, leaf in enumerate(leaves) if _is_node(leaf)}
