"""StoredRows: a weight together with its storage, for places that hold no Table, such as an NNX Param."""

import dataclasses
import math
from typing import Any, Self

import jax
import numpy as np
from jaxtyping import PyTree

from . import flax_state as _flax


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StoredRows:
    """The stored rows of a table together with their storage.

    Layers of Flax NNX and brainstate hold one as the value of their Param or State if the table is sharded. So code
    that copies, saves or assigns this value keeps the layout; a plain array may be assigned, too, and is in row order.
    A pytree whose one leaf is `weight`; `numpy.asarray` gives the rows in the order of their ids.

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
        """The number of entries of all rows."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> PyTree:
        """The dtype of the weight."""
        return self.weight.dtype

    def __getitem__(self, index: Any) -> Self:
        if index is Ellipsis:  # Flax reads the value of a Variable by `variable[...]`
            return self
        raise TypeError(
            f"`embax.sharding.StoredRows[...]` must have no index, as its rows are not in row order, got {index!r}. "
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
    """The rows in row order, so that the state equals that of a dense table."""
    return _flax.to_state(stored.storage.to_rows(stored.weight))


def _from_state(like: StoredRows, state: PyTree) -> StoredRows:
    """Store rows given in row order, as `like` stores its own."""
    if np.shape(state) != like.shape:
        raise ValueError(
            f"`flax.serialization.from_state_dict(target=...)` must have tables of the shapes that were saved, got "
            f"{like!r} for one of {np.shape(state)}. Make the target of that shape; to change its rows afterwards, use "
            "embax.resize and embax.optim.carry_over."
        )
    return StoredRows(like.storage.from_rows(np.asarray(state)), like.storage)


_flax.register(StoredRows, _to_state, _from_state)
