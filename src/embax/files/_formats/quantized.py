"""fastText's quantised matrices: one byte stands for a piece of a row, and rows are decoded when they are used.

Each row is cut into pieces, by default of 2 numbers. For each piece the file has 256 centroids, and a row stores the
number of the nearest one. A row of 4 numbers with the codes [7, 9] is the centroids `centroids[0, 7]` and
`centroids[1, 9]`, one after the other, times the norm of the row if the file has norms.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from .._io.open import Source

# The number of centroids for each piece: the values of a byte.
_CENTROIDS = 256
# Longer pieces are refused, so that no small file takes much memory.
_LONGEST = 32


class Quantized(NamedTuple):
    """A quantised matrix."""

    shape: tuple[int, int]
    codes: UInt8[np.ndarray, "rows pieces"]
    centroids: Float32[np.ndarray, "pieces 256 size"]  # the last piece may be shorter, and ends with zeros
    norms: Float32[np.ndarray, " rows"] | None  # rows are multiplied by them

    def take(self, indices: Any, axis: int = 0) -> Float32[np.ndarray, "some dim"]:
        """Return rows, decoded."""
        rows: Int64[np.ndarray, " some"] = np.asarray(indices)
        pieces = self.centroids[np.arange(self.codes.shape[1]), self.codes.take(rows, axis=axis)]
        values = pieces.reshape(rows.size, pieces.shape[1] * pieces.shape[2])[:, : self.shape[1]]
        return values if self.norms is None else values * self.norms[rows, None]


def read_quantized(source: Source, what: str) -> Quantized:
    """Read a matrix.

    Args:
      source: The file, at the beginning of the matrix.
      what: The name of the matrix, for messages.

    Returns:
      The matrix.

    Raises:
      FormatError: If the file ends within it, or its sizes contradict each other.
    """
    has_norms, rows, dim, size = struct.unpack("<Bqqi", source.read_exactly(21, what))
    if has_norms > 1 or rows < 0 or dim < 1 or size < 0:
        raise source.error(
            f"{what} must be quantised with sizes of at least 0, got {rows} rows, {dim} columns and {size} codes."
        )
    codes = np.frombuffer(source.read_exactly(size, what), np.uint8)
    centroids = _read_centroids(source, what, dim)
    if rows * len(centroids) != size:
        raise source.error(f"{what} must have {rows * len(centroids)} codes for {rows} rows, got {size}.")
    norms = None
    if has_norms:
        norm_codes = np.frombuffer(source.read_exactly(rows, what), np.uint8)
        norms = _read_centroids(source, what, 1)[0, :, 0][norm_codes]
    return Quantized((rows, dim), codes.reshape(rows, -1) if rows else codes[:0, None], centroids, norms)


def _read_centroids(source: Source, what: str, dim: int) -> Float32[np.ndarray, "pieces 256 size"]:
    columns, pieces, size, last = struct.unpack("<iiii", source.read_exactly(16, what))
    if columns != dim or not 1 <= size <= _LONGEST or pieces != -(-dim // size) or last != dim - (pieces - 1) * size:
        raise source.error(
            f"{what} must be quantised in pieces of 1 to {_LONGEST} numbers that make {dim} columns, got {pieces} "
            f"pieces of {size}, the last of {last}, for {columns}."
        )
    values = np.frombuffer(source.read_exactly(4 * _CENTROIDS * dim, what), "<f4")
    centroids = np.zeros((pieces, _CENTROIDS, size), np.float32)
    whole = (pieces - 1) * _CENTROIDS * size
    centroids[:-1] = values[:whole].reshape(pieces - 1, _CENTROIDS, size)
    centroids[-1, :, :last] = values[whole:].reshape(_CENTROIDS, last)
    return centroids
