"""Tensors to write into a safetensors file."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .header import BITS


class Written(NamedTuple):
    """A tensor to write."""

    dtype: str  # as safetensors names it, such as "F32"
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]  # its numbers, one block after the other

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> "Written":
        """An array as one block."""
        return cls(dtype, array.shape, (array,))

    @property
    def size(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8
