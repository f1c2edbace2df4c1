"""The ids of the benchmarks, the same for us and for the peers. NumPy only: the peers' environment has no JAX."""

import numpy as np

ROWS, DIM, IDS = 1_000_000, 64, 16_384
LEARNING_RATE = 0.1
# The same ids as bags: as many, and as long.
BAGS, LENGTH = 1_024, 16
# Different batches in turn, so that the rows of the last one are not still in the cache because they are the same.
BATCHES = 8


def zipf(rows: int, shape: tuple[int, ...], exponent: float = 1.05, seed: int = 0) -> np.ndarray:
    """Draw ids by Zipf's law, as words, films and users occur; which rows are the frequent ones is random."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return np.random.default_rng(1).permutation(rows)[ranks].astype(np.int32)


def batches(rows: int) -> np.ndarray:
    """Return `(BATCHES, IDS)` ids."""
    return zipf(rows, (BATCHES, IDS))


def cotangent(number: int = IDS) -> np.ndarray:
    """Return the gradient that comes back to the rows, or the bags, `(number, DIM)` float32."""
    return np.random.default_rng(2).normal(size=(number, DIM)).astype(np.float32)
