"""Rows of vectors scaled to length 1, a block at a time."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32

# Entries of a block of rows: 4 MB in float32, 8 MB in float64.
ENTRIES = 1 << 20
# On a CPU, JAX uses NumPy memory without a copy if its address is a multiple of this.
_ALIGNMENT = 64


def unit_rows(rows: Float[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Scale rows to length 1.

    Args:
      rows: Rows of any float dtype. They are read in blocks, so they may be mapped from a file.

    Returns:
      The scaled rows. Zero rows stay zero; rows with NaN or infinity become NaN.
    """
    unit = _aligned(rows.shape[0], rows.shape[1])
    for block in blocks(rows.shape[0], rows.shape[1]):
        part = np.asarray(rows[block], np.float64)
        # Divide by the largest entry first, so that no square overflows or underflows.
        largest = np.abs(part).max(axis=1, keepdims=True, initial=0)
        largest[~np.isfinite(largest)] = np.nan
        part = part / np.where(largest == 0, 1, largest)
        length = np.sqrt(np.einsum("rd,rd->r", part, part))[:, None]
        unit[block] = part / np.where(length == 0, 1, length)
    return unit


def _aligned(rows: int, dim: int) -> Float32[np.ndarray, "rows dim"]:
    memory = np.empty(rows * dim * 4 + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + rows * dim * 4].view(np.float32).reshape(rows, dim)


def blocks(rows: int, dim: int) -> Iterator[slice]:
    """Cut rows into blocks of a few MB."""
    length = max(1, ENTRIES // max(dim, 1))
    return (slice(start, min(start + length, rows)) for start in range(0, rows, length))
