"""Engine: the part of training that runs steps. Options, probabilities and first vectors that all engines share.

The loop draws batches from an engine in a thread that reads ahead, and hands them back to it one by one:

    state = engine.start(None)
    for batch in engine.batches(epoch):
        state, loss = engine.run(state, batch, rates)
    inputs, outputs = engine.finish(state)
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int64, PyTree

Model = Literal["skipgram", "cbow"]
# The input vectors of all rows and the output vectors of all words.
Learned = tuple[Float32[np.ndarray, "rows dim"], Float32[np.ndarray, "words dim"]]
# Bytes of a line of the cache.
_LINE = 64
# Rows that are drawn or copied at once.
_AT_ONCE = 1 << 10


class Options(NamedTuple):
    """The options of a run that its engine needs."""

    dim: int
    window: int
    negative: int
    model: Model
    sample: float  # infinity keeps all words
    seed: int
    threads: int = 1


class Known(NamedTuple):
    """Vectors to begin at: row `rows[k]` of a table begins at `weight[at[k]]`."""

    rows: Int64[np.ndarray, " known"]
    at: Int64[np.ndarray, " known"]
    weight: Float[np.ndarray, "vectors dim"]


@runtime_checkable
class Engine(Protocol):
    """Runs the steps of training.

    Every random number derives from the seed, the epoch and the number of a batch within it. So a run that resumes
    skips batches, and continues as it would have without the interruption.
    """

    name: str
    # The mean number of steps in a batch. A step has as many words with every engine, see `_segments.words_a_step`.
    steps_a_batch: float

    def start(self, inputs: Known | None = None, outputs: Known | None = None) -> PyTree:
        """Make the state, a pytree of arrays. Unknown inputs are random, and unknown outputs zero, as in word2vec.c."""
        ...

    def batches(self, epoch: int) -> Iterator[Any]:
        """Prepare the batches of an epoch, from 1, on the host. `batch.words` is the number of words of its text.

        Called in the main thread, where it may talk to other processes; iterated in another thread.
        """
        ...

    def run(
        self, state: PyTree, batch: Any, rates: tuple[float, float]
    ) -> tuple[PyTree, Float32[Array, "2"] | Float32[np.ndarray, "2"]]:
        """Run the steps of a batch.

        Args:
          state: The state, which is donated.
          batch: The batch.
          rates: The learning rate before the first step, and after the last one.

        Returns:
          The state; the loss summed over a sample of pairs, and the number of these pairs.
        """
        ...

    def vectors(self, state: PyTree) -> Learned:
        """Return the input vectors of all rows, a copy, and the output vectors, which may change in the next `run`."""
        ...

    def finish(self, state: PyTree) -> Learned:
        """Return the vectors, in the memory of the state where that is possible; the state must not be used again."""
        ...


def kept(counts: Int64[np.ndarray, " rows"], sample: float) -> Float64[np.ndarray, " rows"]:
    """The probability of keeping each word, by the formula of word2vec.c, which the paper simplifies."""
    relative = sample * counts.sum() / counts
    return np.minimum(1.0, np.sqrt(relative) + relative)


def noise_weights(counts: Int64[np.ndarray, " rows"]) -> Float64[np.ndarray, " rows"]:
    """The frequency of each word as noise, not normalised: the 0.75th power of its count."""
    return counts.astype(np.float64) ** 0.75


def aligned_zeros(shape: tuple[int, int]) -> Float32[np.ndarray, "rows stride"]:
    """Make a table of zeros that begins at a line of the cache; rows that were never written take no memory."""
    size = shape[0] * shape[1]
    flat = np.zeros(size + _LINE // 4, np.float32)
    first = -flat.ctypes.data % _LINE // 4
    return flat[first : first + size].reshape(shape)


def fill_inputs(inputs: Float32[np.ndarray, "rows dim"], options: Options, known: Known | None = None) -> None:
    """Fill in the first input vectors: uniform within 1 / dim, as in gensim, but for known ones.

    Args:
      inputs: The vectors, some rows at a time of which are written in place, so that no other table is needed.
      options: The options of the run.
      known: Vectors to begin at.
    """
    rng = np.random.default_rng((options.seed, 0))
    for first in range(0, len(inputs), _AT_ONCE):
        drawn = rng.random(inputs[first : first + _AT_ONCE].shape, np.float32)
        drawn -= np.float32(0.5)
        drawn *= np.float32(2 / options.dim)
        inputs[first : first + _AT_ONCE] = drawn
    fill_known(inputs, known)


def fill_known(table: Float32[np.ndarray, "rows dim"], known: Known | None) -> None:
    """Write known vectors into a table, some at a time."""
    if known is None:
        return
    for first in range(0, len(known.rows), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        table[known.rows[some]] = known.weight[known.at[some]]
