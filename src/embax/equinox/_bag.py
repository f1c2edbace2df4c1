"""EmbeddingBag: an Embedding that pools the rows of each bag of ids."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, DTypeLike, Key, Shaped
from numpy.typing import ArrayLike

from .._bags.pool import Mode
from .._bags.ragged import Ragged
from .._layers.bag import PoolsBags
from ._embedding import Embedding


class EmbeddingBag(PoolsBags, Embedding):
    """A lookup table that returns one vector for each bag of ids, by the rules of `embax.embedding_bag`.

    Padding does not count, and an empty bag is zero. Everything else is as in `Embedding`.

    Args:
      num_embeddings: As in `Embedding`.
      embedding_size: As in `Embedding`.
      mode: `"mean"`, the default, `"sum"`, `"sqrtn"` or `"max"`.
      include_last_offset: Whether offsets have one more entry, the end of the last bag.
      **options: Keyword arguments of `Embedding`.

    Raises:
      TypeError: As `Embedding`.
      ValueError: As `Embedding`, and for an unknown mode.

    Example:
      >>> import embax.equinox, jax
      >>> bag = embax.equinox.EmbeddingBag(10, 3, mode="sum", key=jax.random.key(0), padding_idx=0)
      >>> bag([[1, 2, 4], [5, 0, 0]]).shape
      (2, 3)
    """

    __module__ = "embax.equinox"
    _CALL: ClassVar[str] = "embax.equinox.EmbeddingBag"

    mode: Mode = eqx.field(static=True)
    include_last_offset: bool = eqx.field(static=True)

    def __init__(
        self,
        num_embeddings: int | None = None,
        embedding_size: int | Sequence[int] | None = None,
        *,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        **options: Any,
    ):
        super().__init__(num_embeddings, embedding_size, **options)
        self._set_pooling(mode, include_last_offset)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: ArrayLike | Ragged,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
        *,
        dtype: DTypeLike | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Shaped[Array, "*bags_dim"]:
        """Read bags of ids and pool their rows.

        Args:
          input: Ids of the shape `(*bags, length)`, or a Ragged; with offsets, `(ids,)`.
          offsets: Where each bag starts, `(bags,)`, or one more with `include_last_offset`.
          per_sample_weights: A factor for each id, of the shape of the input; not with `"max"`.
          dtype: The dtype of the output. Default: the weight's.
          key: Ignored, as in Equinox's layers.

        Returns:
          One vector for each bag, `(*bags, *embedding_size)`.

        Raises:
          TypeError: As `embax.embedding_bag`, and for a Ragged with offsets.
          ValueError: As `embax.embedding_bag` and `embax.Ragged`.
          IndexError: As `embax.embedding_bag`.
        """
        return self._read_bags(self.table, input, offsets, per_sample_weights, dtype).pooled
