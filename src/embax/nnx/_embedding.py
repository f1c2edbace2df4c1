"""Embedding: an NNX layer whose Param is read by `embax.lookup`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Key, Shaped
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.axes import laid_out
from .._core import ids as _ids
from .._core.containers.held import held, table_of
from .._core.containers.write_back import clipped_table
from .._core.lookup import read
from .._core.resize import resize
from .._core.table import RULES, Initializer, OutOfRange, PaddingRows, Table, rules_of, with_weight, with_zero_padding
from .._heads.attend import attend
from .._layers.layer import TableLayer

OutSharding = PartitionSpec | NamedSharding | None
# The initialiser of `nnx.Embed`, so that equal seeds give equal weights.
_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)


class Embedding(nnx.Module, TableLayer):
    """A lookup table of vectors, with the interface of `flax.nnx.Embed` and the rules of `embax.Table`.

    `embedding(ids)` reads one row of the Param `embedding` for each id, by the rules of `embax.lookup`. The rules are
    attributes, which may be changed between calls. If the table is sharded, the value of the Param is a `StoredRows`:
    the stored rows together with their layout.

    With `max_norm`, a call also stores the clipped rows in the Param, both eagerly and under NNX's transformations. In
    a raw JAX transformation, NNX does not allow to write Variables, and an `nnx.scan` with a broadcast module drops the
    changes; there, only the output is clipped.

    Args:
      num_embeddings: The number of rows, 0 or more.
      features: The size of a row, or the sizes of its axes.
      dtype: The dtype of the output; the rows are cast, never the table. Default: the weight's.
      param_dtype: The dtype of the weight.
      embedding_init: Called as `init(key, (num_embeddings, *features), param_dtype)`; may be wrapped by
        `nnx.with_partitioning`. Default: the initialiser of `nnx.Embed`.
      promote_dtype: As in `nnx.Embed`; only asked for the dtype of the output, with an empty array. Default: `dtype`.
      rngs: The random keys; the stream `params` is used.
      embedding_metadata: Metadata of the Param, such as `{"out_sharding": ("model", None)}`.
      padding_idx: As in `embax.Table`. The row starts at zero.
      max_norm: As in `embax.Table`.
      norm_type: As in `embax.Table`.
      scale_grad_by_freq: As in `embax.Table`.
      freeze: As in `embax.Table`.
      out_of_range: As in `embax.Table`.
      write_back: With `max_norm`, whether a call stores the rows that it clips.

    Raises:
      TypeError: As `embax.Table`.
      ValueError: As `embax.Table`.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> embedding = embax.nnx.Embedding(10, 3, padding_idx=0, rngs=nnx.Rngs(0))
      >>> embedding([[1, 2], [-1, 0]]).shape
      (2, 2, 3)
      >>> nnx.state(embedding)["embedding"].shape
      (10, 3)
    """

    __module__ = "embax.nnx"

    def __init__(
        self,
        num_embeddings: int,
        features: int | Sequence[int],
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Callable[..., Array] = _INIT,
        promote_dtype: Callable[..., tuple[Array, ...]] | None = None,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] | None = None,
        padding_idx: PaddingRows = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        freeze: bool = False,
        out_of_range: OutOfRange = "error",
        write_back: bool = True,
    ):
        call = f"embax.nnx.{type(self).__name__}"
        self.num_embeddings = _check.size(f"{call}(num_embeddings=...)", num_embeddings)
        sizes = tuple(features) if isinstance(features, Iterable) else (features,)
        sizes = tuple(_check.size(f"{call}(features=...)", size) for size in sizes)
        self.features = sizes[0] if len(sizes) == 1 else sizes
        weight = embedding_init(rngs.params(), (self.num_embeddings, *sizes), param_dtype)
        self.embedding = nnx.Param(weight, **(embedding_metadata or {}))
        self.dtype, self.param_dtype = None if dtype is None else jnp.dtype(dtype), jnp.dtype(param_dtype)
        self.promote_dtype = promote_dtype
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, max_norm, norm_type
        self.scale_grad_by_freq, self.freeze, self.out_of_range = scale_grad_by_freq, freeze, out_of_range
        self.write_back = write_back
        self.embedding.set_value(held(with_zero_padding(self.table)))

    @classmethod
    def from_table(cls, table: Table, **options: Any) -> Self:
        options = {"rngs": nnx.Rngs(0), "param_dtype": table.dtype, **rules_of(table), **options}
        value = held(dataclasses.replace(table, weight=table.weight.astype(options["param_dtype"])))
        layer = cls(table.rows, table.dim, embedding_init=lambda *_: value, **options)
        layer.embedding.set_value(value)  # restores the padding row, which the constructor zeroed
        return layer

    @property
    def table(self) -> Table:
        """The weight and the rules by which it is read."""
        return table_of(self.embedding.get_value(), **{name: getattr(self, name) for name in RULES})

    def __call__(self, inputs: ArrayLike, out_sharding: OutSharding = None) -> Shaped[Array, "*batch_dim"]:
        """Read one row for each id.

        Args:
          inputs: Ids in `[-num_embeddings, num_embeddings)` of any integer dtype and any shape, or a nested list.
          out_sharding: The sharding of the rows on a mesh with explicit axes. Default: like the ids.

        Returns:
          The rows, `(*inputs.shape, *features)`.

        Raises:
          TypeError: If the ids are not of an integer dtype.
          IndexError: If a concrete id has no row and `out_of_range` is `"error"`.
        """
        table = self.table
        ids = _ids.prepare("embax.nnx.Embedding(inputs=...)", inputs, table)
        rows = read(table, ids, self._output_dtype(table))
        self._store(table, ids)
        return rows if out_sharding is None else laid_out(rows, out_sharding)

    def attend(  # pyright: ignore[reportIncompatibleMethodOverride] (NNX's names)
        self, query: ArrayLike, out_sharding: OutSharding = None, *, mask_padding: bool = False
    ) -> Float[Array, "*batch rows"]:
        """Multiply vectors by every row: the logits of a head tied to this layer, see `embax.attend`.

        Args:
          query: Vectors `(*batch, *features)`.
          out_sharding: The sharding of the logits on a mesh. Default: XLA chooses.
          mask_padding: Whether the logits of padding rows are minus infinity.

        Returns:
          One logit for each row, `(*batch, num_embeddings)`, in the dtype of the layer's output.

        Raises:
          TypeError: As `embax.attend`.
          ValueError: As `embax.attend`.
        """
        table = self.table
        dtype = self._output_dtype(table) or table.dtype
        logits = attend(table, query, mask_padding=mask_padding, dtype=dtype)
        return logits if out_sharding is None else laid_out(logits, out_sharding)

    def resize(self, rows: int, key: Key[Array, ""] | None = None, *, init: Initializer | None = None) -> None:
        """Change the number of rows, like `embax.resize`; rows keep their ids.

        For a vocabulary that grows in mid-training. Call it outside of NNX's transformations, then convert the
        optimizer's state by `optimizer.carry_over(model)`.

        Args:
          rows: The new number of rows, 0 or more.
          key: A JAX random key for the fresh rows. Required if the table grows.
          init: The initialiser of fresh rows, as in `embax.Table.create`.

        Raises:
          TypeError: As `embax.resize`.
          ValueError: As `embax.resize`.

        Example:
          >>> import embax.nnx, jax
          >>> from flax import nnx
          >>> embedding = embax.nnx.Embedding(10, 3, rngs=nnx.Rngs(0))
          >>> embedding.resize(12, jax.random.key(1))
          >>> embedding(11).shape
          (3,)
        """
        table = resize(self.table, rows, key, init=init)
        self.embedding.set_value(held(table))
        # The table counts padding from the start; an attribute of -1 would now name another row.
        self.num_embeddings, self.padding_idx = table.rows, table.padding_idx

    def _output_dtype(self, table: Table) -> np.dtype | None:
        if self.promote_dtype is None:
            return self.dtype
        (none,) = self.promote_dtype((jnp.zeros(0, table.dtype),), dtype=self.dtype, inexact=False)
        return none.dtype

    def _store(self, table: Table, ids: _ids.Ids) -> None:
        if not self.write_back or table.max_norm is None or table.freeze:
            return
        try:
            self.embedding.set_value(held(with_weight(table, clipped_table(table, ids))))
        except TraceContextError:  # in a raw JAX transformation
            pass
