"""The dtype of row numbers."""

import jax
import numpy as np


def index_dtype(rows: int) -> np.dtype:
    """The dtype of row numbers; a ValueError if JAX allows none that is wide enough."""
    if rows <= np.iinfo(np.int32).max:
        return np.dtype(np.int32)
    if jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
        raise ValueError(
            f"A table of more than {np.iinfo(np.int32).max} rows must be read with 64-bit ids, got {rows} rows while "
            "jax_enable_x64 is off. Switch it on, or split the table."
        )
    return np.dtype(np.int64)
