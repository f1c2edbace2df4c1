"""The engine of the native library: one CPU takes one window after the other, in chunks of the text.

A chunk ends with a sequence where it can, so that windows are cut nowhere. Each call of the kernel has the seed of its
chunk, so with one thread the same run gives the same bytes on one instruction set.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Float64, Int32, UInt32

from ..._kernels import words as _kernel
from .._input.corpus import BREAK, Corpus
from .._subwords import Pieces
from .engine import Known, Learned, Options, aligned_zeros, fill_inputs, fill_known, kept, noise_weights
from .segments import words_a_step

# Ids in a chunk: some 0.05 seconds of work.
_CHUNK = 1 << 17
# Rows that are moved together.
_AT_ONCE = 1 << 10


class Batch(NamedTuple):
    """A chunk of text."""

    words: int
    ids: Int32[np.ndarray, " ids"]
    seed: UInt32[np.ndarray, "2"]


class Native:
    """Trains by the native library, on one CPU.

    Args:
      corpus: The text.
      options: The options of the run.
      pieces: The sub-words, or None.
    """

    name = "native"

    def __init__(self, corpus: Corpus, options: Options, pieces: Pieces | None = None):
        self._corpus, self._options, self._pieces = corpus, options, pieces
        self._rows = len(corpus.counts)
        likely = kept(corpus.counts, options.sample)
        words = float(corpus.counts @ likely)
        batches = -(-corpus.length // _CHUNK)
        self.steps_a_batch = words / words_a_step(words) / max(batches, 1)
        none = np.zeros(0, np.int32)
        of_words = (none, none) if pieces is None else (pieces.starts.astype(np.int32), pieces.ids)
        self._words = _kernel.Words(_threshold(likely), *alias_tables(noise_weights(corpus.counts)), *of_words)

    def start(self, inputs: Known | None = None, outputs: Known | None = None) -> _kernel.Tables:
        """Make both tables, with zeros behind each vector."""
        dim, rows = self._options.dim, self._rows if self._pieces is None else self._pieces.rows
        stride = -(-dim // _kernel.LINE) * _kernel.LINE
        tables = _kernel.Tables(aligned_zeros((rows, stride)), aligned_zeros((self._rows, stride)))
        fill_inputs(tables.inputs[:, :dim], self._options, inputs)
        fill_known(tables.outputs[:, :dim], outputs)
        return tables

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Cut the text into chunks."""
        first, number = 0, 0
        while first < self._corpus.length:
            ids = next(self._corpus.blocks(_CHUNK, first))
            ends = np.flatnonzero(ids == BREAK)
            if first + len(ids) < self._corpus.length and len(ends):
                ids = ids[: ends[-1] + 1]
            seed = np.random.SeedSequence((self._options.seed, epoch, number)).generate_state(2)
            yield Batch(int(np.count_nonzero(ids != BREAK)), ids, seed)
            first, number = first + len(ids), number + 1

    def run(
        self, state: _kernel.Tables, batch: Batch, rates: tuple[float, float]
    ) -> tuple[_kernel.Tables, Float32[np.ndarray, "2"]]:
        """Learn from a chunk, in place."""
        options = self._options
        loss = _kernel.train_words(
            state,
            self._words,
            batch.ids,
            rates,
            batch.seed,
            window=options.window,
            negative=options.negative,
            model=options.model,
            threads=options.threads,
        )
        return state, loss

    def vectors(self, state: _kernel.Tables) -> Learned:
        """Return the vectors without the padding of their rows. Only the inputs are copied, to save memory."""
        inputs, outputs = (table[:, : self._options.dim] for table in state)
        return inputs.copy(), outputs

    def finish(self, state: _kernel.Tables) -> Learned:
        """Return the vectors; in the memory of the inputs, rows move together over the padding."""
        rows, dim = len(state.inputs), self._options.dim
        flat = state.inputs.reshape(-1)
        for first in range(0, rows, _AT_ONCE):  # forwards: a row moves to where no later one is
            some = state.inputs[first : first + _AT_ONCE, :dim]
            flat[first * dim : first * dim + some.size] = some.reshape(-1)
        return flat[: rows * dim].reshape(rows, dim), state.outputs[:, :dim]


def lacking(mesh: Mesh | None) -> str | None:
    """Return why the native engine cannot run here, as a sentence; None if it can."""
    if mesh is not None or jax.process_count() > 1:
        return "it trains on one CPU, not on a mesh and not in several processes"
    if not _kernel.available():
        return "it needs embax-kernels, which are not installed or switched off; see `python -m embax.kernels`"
    return None


def is_best(mesh: Mesh | None) -> bool:
    """Return whether the native engine can run here, and the default device has nothing faster."""
    (device,) = jax.device_put(np.zeros(())).devices()  # which compiles nothing
    return device.platform == "cpu" and lacking(mesh) is None


def alias_tables(
    weights: Float64[np.ndarray, " rows"],
) -> tuple[UInt32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]:
    """Make Walker's tables: row `k` of `rows` equally likely ones stands for itself, or else for its alias.

    With the weights 1, 1 and 4, the mean is 2. Rows 0 and 1 lack 1 each, and row 2 has 2 more than it needs: so rows 0
    and 1 stand for themselves half of the time, else for row 2, and row 2 always for itself. If a row that has too much
    gives away more than that, the next one of its kind makes up for it.

    Args:
      weights: The weights, not normalised.

    Returns:
      A row stands for itself if 32 random bits are at most the first number, else for its alias.

    References:
      Walker, An efficient method for generating discrete random variables with general distributions, 1977,
      https://doi.org/10.1145/355744.355749.
    """
    shares = weights / weights.mean()
    cut, alias = np.ones_like(shares), np.arange(len(shares), dtype=np.int32)
    small, large = np.flatnonzero(shares < 1), np.flatnonzero(shares >= 1)
    # Small rows are filled up one after the other, each by the first large row with a rest, up to rounding.
    lacking_before = np.concatenate([[0.0], np.cumsum(1 - shares[small])])
    spare = np.cumsum(shares[large] - 1)
    served_by = np.searchsorted(spare, lacking_before[:-1], side="right")
    cut[small], alias[small] = shares[small], large[np.minimum(served_by, len(large) - 1)]
    # Filling up its last small row may leave a large row with less than its share; then the next large row fills it up.
    served = np.searchsorted(lacking_before[:-1], spare[:-1], side="left")
    cut[large[:-1]], alias[large[:-1]] = np.clip(1 + spare[:-1] - lacking_before[served], 0, 1), large[1:]
    return _threshold(cut), alias


def _threshold(probabilities: Float64[np.ndarray, " rows"]) -> UInt32[np.ndarray, " rows"]:
    """The largest of 2**32 equally likely numbers that count, for each probability."""
    return (np.clip(np.round(probabilities * 2.0**32), 1, 2**32) - 1).astype(np.uint32)
