"""EmbeddingBag: an Embedding that pools the rows of each bag of ids."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Shaped
from numpy.typing import ArrayLike

from .._bags.pool import Mode
from .._bags.ragged import Ragged
from .._layers.bag import PoolsBags, stored_rows_of
from ._embedding import Embedding


class EmbeddingBag(PoolsBags, Embedding):
    """A lookup table that returns one vector for each bag of ids, by the rules of `embax.embedding_bag`.

    Padding does not count, and an empty bag is zero. Everything else is as in `Embedding`, write-back included.

    Args:
      num_embeddings: The number of rows, 0 or more.
      features: The size of a row, or the sizes of its axes.
      mode: `"mean"`, the default, `"sum"`, `"sqrtn"` or `"max"`.
      include_last_offset: Whether offsets have one more entry, the end of the last bag.
      **options: Keyword arguments of `Embedding`; `rngs` is required.

    Raises:
      TypeError: As `Embedding`.
      ValueError: As `Embedding`, and for an unknown mode.

    Example:
      >>> import embax.nnx
      >>> from flax import nnx
      >>> bag = embax.nnx.EmbeddingBag(10, 3, mode="sum", padding_idx=0, rngs=nnx.Rngs(0))
      >>> bag([[1, 2, 4], [5, 0, 0]]).shape
      (2, 3)
      >>> bag([1, 2, 4, 5, 4, 3, 2, 9], offsets=[0, 4]).shape
      (2, 3)
    """

    __module__ = "embax.nnx"
    _CALL = "embax.nnx.EmbeddingBag"

    def __init__(
        self,
        num_embeddings: int,
        features: int | Sequence[int],
        *,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ):
        super().__init__(num_embeddings, features, **options)
        self._set_pooling(mode, include_last_offset)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: ArrayLike | Ragged, offsets: ArrayLike | None = None, per_sample_weights: ArrayLike | None = None
    ) -> Shaped[Array, "*bags_dim"]:
        """Read bags of ids and pool their rows.

        Args:
          input: Ids of the shape `(*bags, length)`, or a Ragged; with offsets, `(ids,)`.
          offsets: Where each bag starts, `(bags,)`, or one more with `include_last_offset`.
          per_sample_weights: A factor for each id, of the shape of the input; not with `"max"`.

        Returns:
          One vector for each bag, `(*bags, *features)`.

        Raises:
          TypeError: As `embax.embedding_bag`, and for a Ragged with offsets.
          ValueError: As `embax.embedding_bag` and `embax.Ragged`.
          IndexError: As `embax.embedding_bag`.
        """
        table = self.table
        read = self._read_bags(table, input, offsets, per_sample_weights, self._output_dtype(table))
        self._store(*stored_rows_of(table, read))
        return read.pooled
