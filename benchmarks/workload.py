"""The ids and gradients of the benchmarks, the same for every library. NumPy only: some environments have no JAX."""

import functools
from typing import NamedTuple

import numpy as np

ROWS, DIM, IDS = 1_000_000, 64, 16_384
LEARNING_RATE = 0.1
# The same ids as bags: as many, and as long.
BAGS, LENGTH = 1_024, 16
# Different batches in turn, so that the rows of the last one are not still in the cache because they are the same.
BATCHES = 8


class Case(NamedTuple):
    """The size of a table, and the ids of a step."""

    rows: int = ROWS
    dim: int = DIM
    ids: int = IDS
    law: str = "Zipf"  # or "uniform"

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.dim}, {self.ids:,} ids, {self.law}"


@functools.lru_cache(2)
def batches_of(case: Case) -> np.ndarray:
    """Return `(batches, ids)`: eight batches, or more where they are small, as those would stay in a cache."""
    shape = max(BATCHES, BATCHES * IDS // case.ids), case.ids
    if case.law == "uniform":
        return np.random.default_rng(0).integers(0, case.rows, shape, dtype=np.int32)
    return zipf(case.rows, shape)


def gradient_of(case: Case, length: int = 1) -> np.ndarray:
    """Return the gradient that comes back to the rows, or to bags of a length, `(ids / length, dim)` float32."""
    return np.random.default_rng(2).normal(size=(case.ids // length, case.dim)).astype(np.float32)


def zipf(rows: int, shape: tuple[int, ...], exponent: float = 1.05, seed: int = 0) -> np.ndarray:
    """Draw ids by Zipf's law, as words, films and users occur; which rows are the frequent ones is random."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative, rng.random(shape) * cumulative[-1])
    return np.random.default_rng(1).permutation(rows)[ranks].astype(np.int32)


class Tables(NamedTuple):
    """Many tables, each of which one feature reads, in bags of one id."""

    tables: int = 100
    rows: int = 100_000
    dim: int = 16
    bags: int = 4_096

    def __str__(self) -> str:
        return f"{self.tables} tables of {self.rows:,} x {self.dim}, {self.bags:,} bags each"


def batches_of_tables(case: Tables, batches: int = 4) -> np.ndarray:
    """Return `(batches, tables, bags)` uniform ids."""
    return np.random.default_rng(0).integers(0, case.rows, (batches, case.tables, case.bags), dtype=np.int32)


def gradient_of_tables(case: Tables) -> np.ndarray:
    """Return the gradient of each bag, `(tables, bags, dim)` float32."""
    return np.random.default_rng(2).normal(size=(case.tables, case.bags, case.dim)).astype(np.float32)
