"""StoredRows: a weight that is not in row order, where no Table is around it, as in a Param or a State."""

import dataclasses
import math
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import PyTree

from . import flax_state as _flax


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredRows:
    """The stored rows of a table and its storage, which says which row is where: they are never apart.

    Layers of Flax NNX and brainstate hold one in the place of the weight of a sharded table. So whatever copies, saves
    or assigns the value of their Param or State takes the layout along, and a plain array that is assigned is taken for
    what it is. A pytree whose one leaf is `weight`; `numpy.asarray` gives the rows in the order of their ids.

    Args:
      weight: The stored rows, `(stored, *dim)`.
      storage: How they are stored, as in a Table.

    Example:
      >>> import embax.nnx, jax, jax.numpy as jnp
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
      >>> layer = embax.nnx.Embedding.from_table(embax.shard(embax.Table(jnp.ones((10, 2))), mesh, "x"))
      >>> stored = layer.embedding.get_value()
      >>> isinstance(stored, embax.sharding.StoredRows), stored.shape
      (True, (10, 2))
    """

    weight: PyTree
    storage: Any

    @property
    def rows(self) -> int:
        """Number of rows, without the padding that sharding adds."""
        return self.storage.rows_of(self.weight.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows in the order of their ids, `(rows, *dim)`."""
        return (self.rows, *self.weight.shape[1:])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.weight.ndim

    @property
    def size(self) -> int:
        """How many numbers the rows have."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> PyTree:
        """The dtype of the weight."""
        return self.weight.dtype

    def __getitem__(self, index: Any) -> Self:
        if index is Ellipsis:  # as Flax reads a Variable
            return self
        raise TypeError(
            f"`embax.sharding.StoredRows[...]` must have no index, as its rows are in stored order, got {index!r}. "
            "Read rows by the layer or embax.lookup, or all of them by numpy.asarray."
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.storage.to_rows(self.weight), dtype)

    def __repr__(self) -> str:
        if not hasattr(self.weight, "shape"):
            return f"StoredRows({self.weight}, {self.storage.name}={self.storage!r})"
        return f"StoredRows({self.dtype}[{','.join(map(str, self.shape))}], {self.storage.name}={self.storage!r})"


jax.tree_util.register_dataclass(StoredRows, data_fields=["weight"], meta_fields=["storage"])


def _to_state(stored: StoredRows) -> PyTree:
    """The rows in the order of their ids, as if they were a plain array."""
    return _flax.to_state(stored.storage.to_rows(stored.weight))


def _from_state(like: StoredRows, state: PyTree) -> StoredRows:
    """Rows in the order of their ids, stored as others are."""
    if np.shape(state) != like.shape:
        raise ValueError(
            f"`flax.serialization.from_state_dict(target=...)` must have tables of the shapes that were saved, got "
            f"{like!r} for one of {np.shape(state)}. Make the target so; embax.resize and embax.optim.carry_over bring "
            "it to other rows."
        )
    return StoredRows(like.storage.from_rows(np.asarray(state)), like.storage)


_flax.register(StoredRows, _to_state, _from_state)
