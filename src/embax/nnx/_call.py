"""Call: one call of a function of NNX modules, as a pure function of trees in which Tables stand for Params."""

from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._base.typing import PyTreeDef
from .._core.table import Table
from ._params import tables_of, tree_of, with_values

CONTEXT = "embax"  # of `nnx.update_context`, in which a call is made


class Call:
    """One call of a function, whose modules are taken apart for it and put together again.

    Args:
      f: The function; it returns a pair, of which the second is passed on.
      filters: By the positions of the arguments to differentiate for: which Variables of their modules.
      args: Its arguments.
      kwargs: Its arguments by name.

    Attributes:
      trees: The arguments, in which a nested dict stands for each module: of what is differentiated, arrays and Tables.
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
        # Modules and Variables by argument and by their place among its leaves.
        nodes = (
            {number: _nodes(leaves) for number, (leaves, _) in enumerate(self.args)},
            {name: _nodes(leaves) for name, (leaves, _) in self.kwargs.items()},
        )
        wanted = {number: nnx.filterlib.to_predicate(filter) for number, filter in filters.items()}

        def is_wanted(path: KeyPath, value: PyTree) -> bool:
            by_name, argument, _, *inside = path
            # A Variable that is an argument by itself is wanted whatever it is.
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
        """Call the function; return its value, and the state of everything afterwards, for `update`."""
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
        """Give the modules what the function has left in them, and return its auxiliary output."""
        state, leaves = outcome
        with nnx.merge_context(CONTEXT, inner=False) as context:
            _, nodes = context.merge(self.changed, state)
        return self.structure.unflatten([nodes.get(place, leaf) for place, leaf in enumerate(leaves)])

    def gradient(self, number: int, tree: PyTree) -> PyTree:
        """Give the gradient of an argument the form of the argument, with a State for each module."""
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
