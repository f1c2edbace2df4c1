"""TableLayer: a mixin for the layers of all frameworks, which differ only in the object that holds the weight."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Array, Float, Shaped
from numpy.typing import ArrayLike

from .._base.arrays import as_jax
from .._core.table import Table
from .._heads.attend import attend
from ..vectors._fill import Missing, warn_of_missing
from .state_dict import from_state_dict, to_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..vectors import Vectors
    from ..vocabulary import Vocabulary


class TableLayer:
    """A mixin for layers with a table, as their attribute or property `table`."""

    table: Any

    @classmethod
    def from_table(cls, table: Table, **options: Any) -> Self:
        """Make a layer from a table, with its rules and its unchanged weight, padding row included.

        To move a layer to another framework, pass its `table`. A layer of brainstate takes one padding row; layers of
        NNX and Equinox also take a tuple. A sharded table stays sharded.

        Args:
          table: The table.
          **options: Further keyword arguments of the constructor; a rule replaces the table's.

        Returns:
          The layer.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, weight: ArrayLike, freeze: bool = True, **options: Any) -> Self:
        """Make a layer from existing vectors, frozen by default.

        Args:
          weight: `(rows, *dim)`: an array, NumPy array or nested list. Its dtype and its padding row are kept.
          freeze: Whether the weight gets no gradient.
          **options: Further keyword arguments of the constructor.

        Returns:
          The layer.

        Raises:
          TypeError: As the constructor.
          ValueError: As the constructor, and for fewer than 2 axes.
        """
        weight = as_jax(weight)
        if weight.ndim < 2:
            raise ValueError(
                f"`{_name(cls)}.from_pretrained(weight=...)` must have 2 axes or more, (rows, *dim), got shape "
                f"{weight.shape}. Reshape it."
            )
        return cls.from_table(Table(weight), freeze=freeze, **options)

    @classmethod
    def from_vectors(
        cls,
        vectors: "Vectors",
        tokens: "Vocabulary | Iterable[str] | None" = None,
        missing: Missing = "mean",
        *,
        seed: int = 0,
        return_report: bool = False,
        **options: Any,
    ) -> Any:
        """Make a layer from word vectors, for a model's own vocabulary.

        Args:
          vectors: An `embax.Vectors`.
          tokens: The model's vocabulary: an `embax.Vocabulary`, or one token for each row. Its padding token, if it has
            one, becomes the padding row. Default: the vocabulary of the vectors.
          missing: The row of a token without a vector: `"mean"`, `"random"`, `"zero"` or `"error"`, as in
            `embax.Vectors.fill`.
          seed: The seed of the random numbers.
          return_report: Whether to return a report of the missing tokens, instead of a warning with their number.
          **options: As in `from_pretrained`; frozen by default.

        Returns:
          The layer; with `return_report`, the layer and an `embax.vectors.Filled`, whose `missing` names the tokens
          without a vector, and whose `found` counts the others.

        Raises:
          UnknownTokenError: If a token is missing, with `missing="error"`; a KeyError.
          TypeError: As `from_pretrained`.
          ValueError: As `from_pretrained` and `embax.Vectors.fill`.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["king", "queen"], [[1.0, 0.0], [0.0, 1.0]])
          >>> embedding, report = embax.Embedding.from_vectors(vectors, ["queen", "sword"], return_report=True)
          >>> embedding([0, 1])
          Array([[0. , 1. ],
                 [0.5, 0.5]], dtype=float32)
          >>> report.missing
          ('sword',)
        """
        filled = vectors.fill(vectors.vocabulary if tokens is None else tokens, missing, seed=seed)
        special = getattr(vectors.vocabulary if tokens is None else tokens, "special", {})
        layer = cls.from_pretrained(filled.weight, **{"padding_idx": special.get("padding"), **options})
        if return_report:
            return layer, filled
        warn_of_missing(f"{_name(cls)}.from_vectors", filled)
        return layer

    @classmethod
    def from_state_dict(cls, state: Mapping[str, ArrayLike], name: str | None = None, **options: Any) -> Self:
        """Make a layer from a weight in a state dict of torch, see `embax.from_state_dict`.

        Args:
          state: Arrays by name.
          name: The name of the weight or of its module. Default: the only token embedding in the state dict.
          **options: Further keyword arguments of the constructor. Trained unless `freeze=True`.

        Returns:
          The layer. Its padding row keeps its values.

        Raises:
          KeyError: As `embax.from_state_dict`.
          TypeError: As the constructor.
          ValueError: As the constructor.

        Example:
          >>> import embax, numpy as np
          >>> state = {"model.embed_tokens.weight": np.eye(3, dtype=np.float32)}
          >>> embax.Embedding.from_state_dict(state)([2])
          Array([[0., 0., 1.]], dtype=float32)
        """
        return cls.from_table(from_state_dict(state, name), **options)

    def to_state_dict(self, prefix: str = "") -> dict[str, Shaped[np.ndarray, "rows *dim"]]:
        """Return the weight under torch's name, `<prefix>weight`, see `embax.to_state_dict`.

        Args:
          prefix: The start of the name, such as `"encoder.tokens."`.

        Returns:
          A dict of one array.
        """
        return to_state_dict(self.table, prefix)

    def attend(self, x: ArrayLike, *, mask_padding: bool = False) -> Float[Array, "*batch rows"]:
        """Multiply vectors by every row: the logits of a head tied to this layer, see `embax.attend`.

        Args:
          x: Vectors `(*batch, *dim)`.
          mask_padding: Whether the logits of padding rows are minus infinity.

        Returns:
          One logit for each row, `(*batch, rows)`.

        Raises:
          TypeError: As `embax.attend`.
          ValueError: As `embax.attend`.

        Example:
          >>> import embax, numpy as np
          >>> embax.Embedding.from_pretrained(np.eye(3, dtype=np.float32)).attend([[1.0, 2.0, 3.0]])
          Array([[1., 2., 3.]], dtype=float32)
        """
        return attend(self.table, x, mask_padding=mask_padding)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
