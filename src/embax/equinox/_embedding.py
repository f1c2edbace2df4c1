"""Embedding: an Equinox module that holds a Table, read by `embax.lookup`."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Key, Shaped
from numpy.typing import ArrayLike

from .._base import check as _check
from .._core.containers.held import held
from .._core.lookup import lookup, renormalize
from .._core.resize import resize
from .._core.table import Initializer, Table, rules_of, with_zero_padding
from .._layers.layer import TableLayer


class Embedding(eqx.Module, TableLayer):
    """A lookup table of vectors, with the interface of `equinox.nn.Embedding` and the rules of `embax.Table`.

    `embedding(ids)` reads one row of `table` for each id, of any shape, by the rules of `embax.lookup`. With
    `max_norm`, rows are clipped when they are read; `embedding.renormalized(ids)` returns a module that stores these
    rows clipped.

    `embax.value_and_grad` finds the table in any module and gives it a RowGrad; `equinox.filter_grad` gives it a dense
    gradient.

    Args:
      num_embeddings: The number of rows, 0 or more; required without a weight.
      embedding_size: The size of a row, or the sizes of its axes; required without a weight.
      weight: The weight, `(num_embeddings, *embedding_size)`, padding row included.
      dtype: The dtype of a new weight. Default: float32, or float64 if JAX is in 64-bit mode.
      key: A JAX random key; required without a weight.
      init: Called as `init(key, shape, dtype)`. Default: the standard normal distribution, as in Equinox. A new padding
        row is zero.
      **rules: The rules of `embax.Table`, by name.

    Raises:
      TypeError: As `embax.Table`.
      ValueError: As `embax.Table`; for a weight of another shape; without a weight, if a size or the key is missing.

    Example:
      >>> import embax.equinox, equinox as eqx, jax
      >>> embedding = embax.equinox.Embedding(10, 3, key=jax.random.key(0), padding_idx=0)
      >>> embedding([[1, 2], [-1, 0]]).shape
      (2, 2, 3)
      >>> eqx.filter_grad(lambda embedding: embedding([0, 1]).sum())(embedding).weight[:2]
      Array([[0., 0., 0.],
             [1., 1., 1.]], dtype=float32)
    """

    __module__ = "embax.equinox"

    table: Table

    def __init__(
        self,
        num_embeddings: int | None = None,
        embedding_size: int | Sequence[int] | None = None,
        weight: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: Key[Array, ""] | None = None,
        init: Initializer = jax.nn.initializers.normal(1.0),  # noqa: B008 (it has no state)
        **rules: Any,
    ):
        call = f"embax.equinox.{type(self).__name__}"
        shape = None
        if num_embeddings is not None and embedding_size is not None:
            sizes = embedding_size if isinstance(embedding_size, Iterable) else (embedding_size,)
            rows = _check.size(f"{call}(num_embeddings=...)", num_embeddings)
            shape = (rows, *(_check.size(f"{call}(embedding_size=...)", size) for size in sizes))
        if weight is not None:
            self.table = Table(weight, **rules)
            if shape not in (None, self.table.weight.shape):
                raise ValueError(
                    f"`{call}(weight=...)` must be of the shape {shape}, got {self.table.weight.shape}. "
                    "Leave the sizes out."
                )
        elif shape is None or key is None:
            raise ValueError(
                f"`{call}` must be given num_embeddings, embedding_size and key where it has no weight, got "
                f"{num_embeddings}, {embedding_size} and {key}. Pass all three, or a weight."
            )
        else:  # `float` is float64 in JAX's 64-bit mode
            self.table = with_zero_padding(Table(init(key, shape, float if dtype is None else dtype), **rules))

    @classmethod
    def from_table(cls, table: Table, **options: Any) -> Self:
        return cls(weight=table.weight, storage=table.storage, **{**rules_of(table), **options})

    @property
    def weight(self) -> Any:
        """The weight of the table, `(num_embeddings, *embedding_size)`; a `StoredRows` if the table is sharded."""
        return held(self.table)

    @property
    def num_embeddings(self) -> int:
        """The number of rows."""
        return self.table.rows

    @property
    def embedding_size(self) -> int | tuple[int, ...]:
        """The size of a row, or the sizes of its axes."""
        return self.table.dim[0] if len(self.table.dim) == 1 else self.table.dim

    def __call__(
        self, x: ArrayLike, *, dtype: DTypeLike | None = None, key: Key[Array, ""] | None = None
    ) -> Shaped[Array, "*batch_dim"]:
        """Read one row for each id.

        Args:
          x: Ids in `[-num_embeddings, num_embeddings)` of any integer dtype and any shape, or a nested list.
          dtype: The dtype of the output; the rows are cast, never the table. Default: the weight's.
          key: Ignored, as in Equinox's layers.

        Returns:
          The rows, `(*x.shape, *embedding_size)`.

        Raises:
          TypeError: If the ids are not of an integer dtype.
          IndexError: If a concrete id has no row and `out_of_range` is `"error"`.
        """
        return lookup(self.table, x, dtype)

    def renormalized(self, ids: ArrayLike) -> Self:
        """Return a module that stores the rows of these ids clipped to `max_norm`, see `embax.renormalize`.

        Args:
          ids: Row numbers, as in a call.

        Returns:
          A new module; this one is not changed.

        Raises:
          TypeError: If the ids are not of an integer dtype.
          IndexError: If a concrete id has no row and `out_of_range` is `"error"`.

        Example:
          >>> import embax.equinox, numpy as np
          >>> embedding = embax.equinox.Embedding(weight=np.array([[3.0, 4.0]], np.float32), max_norm=1.0)
          >>> embedding.renormalized([0]).weight
          Array([[0.6, 0.8]], dtype=float32)
        """
        return eqx.tree_at(lambda module: module.table, self, renormalize(self.table, ids))

    def resized(self, rows: int, key: Key[Array, ""] | None = None, *, init: Initializer | None = None) -> Self:
        """Return a module with another number of rows, see `embax.resize`; rows keep their ids.

        Args:
          rows: The new number of rows, 0 or more.
          key: A JAX random key for the fresh rows. Required if the table grows.
          init: The initialiser of fresh rows, as in `embax.Table.create`.

        Returns:
          A new module; this one is not changed. Convert an optimizer's state by `embax.optim.carry_over`.

        Raises:
          TypeError: As `embax.resize`.
          ValueError: As `embax.resize`.

        Example:
          >>> import embax.equinox, jax
          >>> embedding = embax.equinox.Embedding(10, 3, key=jax.random.key(0))
          >>> embedding.resized(12, jax.random.key(1)).num_embeddings
          12
        """
        return eqx.tree_at(lambda module: module.table, self, resize(self.table, rows, key, init=init))
