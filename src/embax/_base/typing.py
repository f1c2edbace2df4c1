"""Names for annotations that JAX defines at run time only."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from jaxtyping import PyTree

if TYPE_CHECKING:

    class PyTreeDef(Protocol):
        """The structure of a tree: `jax.tree_util.PyTreeDef`, for which jaxlib has no stub."""

        num_leaves: int

        def unflatten(self, leaves: Iterable[PyTree], /) -> PyTree:
            """Put leaves into the structure."""
            ...

        def flatten_up_to(self, tree: PyTree, /) -> list[PyTree]:
            """The nodes of a tree at the positions of this structure's leaves."""
            ...

else:
    from jax.tree_util import PyTreeDef as PyTreeDef
