"""model2vec's tables: rows may be small integers, tokens may share rows, and each token may have a factor.

The vector of token `t` is `embeddings[mapping[t]] * weights[t]`. `mapping` and `weights` may be missing. With
`mapping = [0, 1, 0]` and `weights = [1, 1, 0.5]`, the third token has half the vector of the first.
A file with `embeddings` in int8 has no scale for them. Like model2vec, this module uses the integers themselves: the
directions of the vectors are right, but their lengths are in units of one integer step.

References:
  MinishLab, model2vec, https://github.com/MinishLab/model2vec.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from ..._io.contents import Options
from ..._io.open import Source
from ..array import table_of
from .header import FLOATS, INTEGERS, Tensor, numpy_dtype

# The name of the table in model2vec's own files, and in those of sentence-transformers.
_TABLES = ("embeddings", "embedding.weight")
_MAPPING, _WEIGHTS = "mapping", "weights"
_SMALL = "I8"
_BLOCK = 1 << 20  # numbers that are computed at once


class Parts(NamedTuple):
    """The tensors of a table."""

    embeddings: Tensor
    mapping: Tensor | None
    weights: Tensor | None

    @property
    def rows(self) -> int:
        """The number of tokens."""
        return (self.embeddings if self.mapping is None else self.mapping).shape[0]


def parts_of(source: Source, tensors: dict[str, Tensor]) -> Parts | None:
    """Find the tensors of a model2vec table.

    Args:
      source: The file; if the caller names a tensor, only that one can be the table.
      tensors: The tensors of the file.

    Returns:
      The tensors; None if there is no such table, or it is a plain table without `mapping` and `weights`.

    Raises:
      FormatError: If their dtypes or shapes do not fit together.
    """
    name = next((name for name in _TABLES if name in tensors and source.member in (None, name)), None)
    if name is None:
        return None
    table, mapping, weights = tensors[name], tensors.get(_MAPPING), tensors.get(_WEIGHTS)
    if len(table.shape) != 2 or table.dtype not in (*FLOATS, _SMALL):
        return None
    # Ignored if they have other shapes: files of other kinds may use these names for matrices.
    mapping = mapping if mapping is not None and len(mapping.shape) == 1 else None
    weights = weights if weights is not None and weights.shape[1:] in ((), (1,)) else None
    rows = (table if mapping is None else mapping).shape[0]
    if mapping is not None and mapping.dtype not in INTEGERS:
        raise source.error(f"`{_MAPPING}` must be {', '.join(INTEGERS)}, got {mapping.dtype}.")
    if weights is not None and (weights.dtype not in FLOATS or weights.shape[:1] != (rows,)):
        raise source.error(
            f"`{_WEIGHTS}` must be {', '.join(FLOATS)} with one for each of {rows:,} tokens, got {weights.dtype} "
            f"{weights.shape}."
        )
    if table.dtype in FLOATS and mapping is None and weights is None:
        return None
    return Parts(table, mapping, weights)


def read(
    source: Source, options: Options, parts: Parts, ids: Int64[np.ndarray, " tokens"]
) -> Float[np.ndarray, "tokens dim"]:
    """Read the rows of tokens.

    Args:
      source: The file, after its header.
      options: The options of the caller.
      parts: The tensors.
      ids: The numbers of the tokens, rising.

    Returns:
      Their rows, in the dtype that the caller asks for, or else in that of the table. Integers, and products with fewer
      than 32 bits, become float32.

    Raises:
      FormatError: If the mapping has numbers that are no rows, or the caller asks to map the rows into memory.
    """
    if options.mmap:
        raise source.error("the table cannot be mapped into memory, as its rows are computed. Leave mmap=True out.")
    table, kept = np.zeros((0, 0)), {}
    for part in sorted(filter(None, parts), key=lambda tensor: tensor.begin):  # the order in which a stream has them
        if part is parts.embeddings:
            shape = (part.shape[0], part.shape[1])
            table = table_of(source, Options(), numpy_dtype(part.dtype), shape, part.begin)
        else:
            source.skip_to(part.begin)
            data = source.read_exactly(part.end - part.begin, "a tensor")
            kept[part] = np.frombuffer(data, numpy_dtype(part.dtype))
    rows, factors = ids, None
    if parts.mapping is not None:
        rows = kept[parts.mapping][ids].astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(table):
            raise source.error(
                f"`{_MAPPING}` must be rows in [0, {len(table):,}), got {rows.min():,} to {rows.max():,}."
            )
    if parts.weights is not None:
        factors = kept[parts.weights][ids]
    is_product = factors is not None or parts.embeddings.dtype == _SMALL
    dtype = options.dtype or (np.result_type(np.float32, _wide(table.dtype)) if is_product else table.dtype)
    weight = np.empty((len(ids), table.shape[1]), dtype)
    step = max(1, _BLOCK // max(1, table.shape[1]))
    for start in range(0, len(ids), step):
        block = table[rows[start : start + step]]
        if factors is not None:
            block = block.astype(np.float64) * factors[start : start + step, None].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            weight[start : start + step] = block
    return weight


def _wide(dtype: np.dtype) -> np.dtype:
    """Return float64 for float64, and float32 for all other dtypes."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
