"""EmbeddingBag: an Embedding that pools the rows of each bag of indices."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import brainstate
import brainunit
from jaxtyping import Array, DTypeLike, PyTree, Shaped
from numpy.typing import ArrayLike

from .._bags.pool import Mode
from .._bags.ragged import Ragged
from .._core.table import OutOfRange
from .._layers.bag import PoolsBags, stored_rows_of
from ._embedding import Embedding
from ._weight import Init, split_unit, with_unit


class EmbeddingBag(PoolsBags, Embedding):
    """A lookup table that returns one vector for each bag of indices, with the arguments of `torch.nn.EmbeddingBag`.

    Bags are pooled by the rules of `embax.embedding_bag`: padding does not count, and an empty bag is zero. Everything
    else is as in `Embedding`, write-back included.

    Args:
      num_embeddings: The number of rows, 0 or more.
      embedding_dim: The size of a row, or the sizes of its axes.
      max_norm: As in `Embedding`.
      norm_type: As in `Embedding`.
      scale_grad_by_freq: As in `Embedding`.
      mode: `"mean"`, the default, `"sum"`, `"sqrtn"` or `"max"`.
      include_last_offset: Whether offsets have one more entry, the end of the last bag.
      padding_idx: As in `Embedding`.
      embedding_init: As in `Embedding`.
      freeze: As in `Embedding`.
      name: As in `Embedding`.
      param_type: As in `Embedding`.
      out_of_range: As in `Embedding`.
      dtype: As in `Embedding`.
      write_back: As in `Embedding`.

    Raises:
      TypeError: As `Embedding`.
      ValueError: As `Embedding`, and for an unknown mode.

    Example:
      >>> import embax, jax.numpy as jnp
      >>> bag = embax.EmbeddingBag(10, 3, mode="sum", padding_idx=0)
      >>> bag([[1, 2, 4], [5, 0, 0]]).shape
      (2, 3)
      >>> bag([1, 2, 4, 5, 4, 3, 2, 9], offsets=[0, 4]).shape
      (2, 3)
      >>> embax.brainstate.jit(bag)(embax.Ragged.from_lists([[1, 2], []]))[1]
      Array([0., 0., 0.], dtype=float32)
    """

    __module__ = "embax.brainstate"
    _CALL = "embax.EmbeddingBag"
    _SIZE = "embedding_dim"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | Sequence[int],
        max_norm: float | brainunit.Quantity | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        *,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        embedding_init: Init = brainstate.nn.init.LecunUniform(),  # noqa: B008 (it has no state)
        freeze: bool = False,
        name: str | None = None,
        param_type: Callable[[PyTree], brainstate.State] = brainstate.ParamState,
        out_of_range: OutOfRange = "error",
        dtype: DTypeLike | None = None,
        write_back: bool = True,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            embedding_init,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            freeze,
            name,
            param_type,
            out_of_range=out_of_range,
            dtype=dtype,
            write_back=write_back,
        )
        self._set_pooling(mode, include_last_offset)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's order)
        cls,
        embeddings: PyTree,
        freeze: bool = True,
        max_norm: float | brainunit.Quantity | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        **options: Any,
    ) -> Self:
        """Make a layer from existing vectors, frozen by default.

        Args:
          embeddings: The weight, `(rows, *dim)`, as in `Embedding.from_pretrained`.
          freeze: As in the constructor.
          max_norm: As in the constructor.
          norm_type: As in the constructor.
          scale_grad_by_freq: As in the constructor.
          mode: As in the constructor.
          **options: Further keyword arguments of the constructor.

        Returns:
          The layer. Its padding row keeps its values.

        Raises:
          TypeError: As the constructor, and for an unknown option.
          ValueError: As the constructor, and for fewer than 2 axes.

        Example:
          >>> import embax, numpy as np
          >>> embax.EmbeddingBag.from_pretrained(np.eye(3), mode="sum")([[0, 2]])
          Array([[1., 0., 1.]], dtype=float32)
        """
        rules = {"freeze": freeze, "max_norm": max_norm, "norm_type": norm_type, "mode": mode}
        return cls._of_weight(embeddings, scale_grad_by_freq=scale_grad_by_freq, **rules, **options)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: ArrayLike | Ragged, offsets: ArrayLike | None = None, per_sample_weights: ArrayLike | None = None
    ) -> Shaped[Array, "*bags_dim"] | brainunit.Quantity:
        """Read bags of indices and pool their rows; calling the layer does the same.

        Args:
          input: Indices of the shape `(*bags, length)`, or a Ragged; with offsets, `(indices,)`.
          offsets: Where each bag starts, `(bags,)`, or one more with `include_last_offset`.
          per_sample_weights: A factor for each index, of the shape of the input; not with `"max"`.

        Returns:
          One vector for each bag, `(*bags, *embedding_dim)`, in the unit of the table.

        Raises:
          TypeError: As `embax.embedding_bag`, and for a Ragged with offsets.
          ValueError: As `embax.embedding_bag` and `embax.Ragged`.
          IndexError: As `embax.embedding_bag`.
        """
        weight, unit = split_unit(self.weight.value)
        table = self._table(weight, unit)
        call = "embax.EmbeddingBag.update"
        read = self._read_bags(table, input, offsets, per_sample_weights, self.dtype, call)
        if self.write_back and table.max_norm is not None:
            to_store, ids = stored_rows_of(table, read)
            if self._may_store(table, ids):
                self._store(to_store, ids, unit)
        return with_unit(read.pooled, unit)
