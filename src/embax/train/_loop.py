"""The loop of training: epochs, learning rates, progress and checkpoints, whichever engine runs the steps."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ..vectors import Vectors
from ._engines.engine import Engine, Known, Learned
from ._input.ahead import Ahead
from ._resume import Checkpoints, Position

# The learning rate falls to this fraction of itself, as in word2vec.c.
_LAST_RATE = 1e-4


class Progress(NamedTuple):
    """The progress of training."""

    epoch: int  # the current epoch, from 1
    epochs: int  # the number of all epochs
    words: int  # words so far in all epochs, before subsampling
    total_words: int  # words of all epochs
    sampled_loss: Any  # (2,) float32: the loss summed over some pairs, and the number of these pairs
    seconds: float  # since the first step began
    words_before: int = 0  # words of the earlier run that this one resumes
    engine: str = "xla"  # or "native"
    waited: float = 0.0  # for how many of these seconds the engine waited for its input
    learning_rate: float = 0.0  # after the last step

    @property
    def loss(self) -> float:
        """The mean loss of the last pairs, in nats for each pair; reading it waits for the device."""
        total, pairs = np.asarray(self.sampled_loss, np.float64)
        return float(total / max(pairs, 1e-9))

    @property
    def words_per_second(self) -> float:
        """The mean speed so far, in words a second."""
        return (self.words - self.words_before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """The remaining time, at the mean speed so far."""
        return (self.total_words - self.words) / max(self.words_per_second, 1e-9)


class Epoch(NamedTuple):
    """The end of an epoch."""

    epoch: int  # from 1
    epochs: int  # the number of all epochs
    vectors: Vectors  # the vectors at its end
    held_out: float | None  # the loss on text that is held out, in nats for each prediction, or None


class Run(NamedTuple):
    """The options of the loop."""

    epochs: int
    words: int  # words of an epoch, before subsampling
    learning_rate: float
    progress: Callable[[Progress], object] | None = None
    after_epoch: Callable[[int, Learned], object] | None = None  # gets the number of the epoch, and the vectors


def train(
    engine: Engine,
    run: Run,
    known: tuple[Known | None, Known | None] = (None, None),
    saved: Checkpoints | None = None,
) -> Learned:
    """Train, from the last checkpoint on if there is one, until the end or a callback returns True.

    Args:
      engine: Runs the steps.
      run: The epochs and rates.
      known: Input and output vectors to begin at; None: only fresh ones.
      saved: The checkpoints, or None.

    Returns:
      The input and output vectors.
    """
    state, at, total = engine.start(*known), Position(), run.epochs * run.words
    if saved is not None:
        state, at = saved.restore(state)
    began, waited, words_before, loss_before, ends = time.monotonic(), 0.0, at.words, None, False
    for epoch in range(at.epochs, run.epochs):
        with Ahead(itertools.islice(engine.batches(epoch + 1), at.batches, None)) as batches:
            for batch in batches:
                after = at.words + batch.words
                first, last = (run.learning_rate * max(_LAST_RATE, 1 - words / total) for words in (at.words, after))
                state, loss = engine.run(state, batch, (first, last))
                at = Position(epoch, at.batches + 1, at.calls + 1, after)
                # At most one call is queued behind the running one: more would pile up in memory.
                jax.block_until_ready(loss_before)
                loss_before = loss
                if saved is not None:
                    saved.save(state, at)
                if run.progress is not None:
                    so_far = time.monotonic() - began, words_before, engine.name, waited + batches.waited, last
                    ends = run.progress(Progress(epoch + 1, run.epochs, after, total, loss, *so_far)) is True
                if ends:
                    if saved is not None:
                        saved.save_last(state, at)
                    return engine.finish(state)
            waited += batches.waited
        at = at._replace(epochs=epoch + 1, batches=0)
        if run.after_epoch is not None:
            paused = time.monotonic()
            is_last = epoch + 1 == run.epochs
            learned = engine.finish(state) if is_last else engine.vectors(state)
            if run.after_epoch(epoch + 1, learned) is True or is_last:
                return learned
            began += time.monotonic() - paused
    return engine.finish(state)
