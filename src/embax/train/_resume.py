"""Checkpoints of training: resume an interrupted run, with the same result as without the interruption."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree, UInt32

from ._input.corpus import Corpus
from ._input.spool import is_full
from ._parts import Parts

# The names of engines, as checkpoints number them.
ENGINES = "native", "xla"


class Position(NamedTuple):
    """How far a run has come."""

    epochs: int = 0  # complete ones
    batches: int = 0  # of the epoch that is not complete
    calls: int = 0  # batches of all epochs
    words: int = 0  # of all epochs, before subsampling


class CheckpointError(ValueError):
    """A run cannot be resumed from a directory of checkpoints.

    Args:
      path: The directory.
      reason: A sentence about "it", the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(f"`embax.train.skipgram(checkpoint=...)` must fit the run, got {self.path!r}: {reason}")


class Checkpoints:
    """Saves a run at intervals, and resumes it.

    Args:
      path: A directory that all processes can access.
      every: The number of calls of the engine between checkpoints.
      of_run: The run's `fingerprint`.
      engine: The name of the run's engine.
      parts: The parts of the corpus.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int,
        of_run: UInt32[np.ndarray, " words"],
        engine: str,
        parts: Parts,
    ):
        # Imported here, since it needs Orbax, which training without checkpoints does not.
        from .. import checkpoint

        os.makedirs(path, exist_ok=True)
        self._orbax, self._path, self._every, self._parts = checkpoint, path, every, parts
        self._about = {"run": of_run, "engine": ENGINES.index(engine)}

    def restore(self, state: PyTree) -> tuple[PyTree, Position]:
        """Read the last checkpoint, if there is one.

        Args:
          state: The initial state of training.

        Returns:
          The state, and how far the run had come.

        Raises:
          CheckpointError: If the checkpoint is damaged, or of another run or engine, or processes find different ones.
        """
        nothing = self._about | _stored(Position())
        about: dict[str, Any]
        try:
            about = self._orbax.restore(self._path, nothing, partial=True)
        except FileNotFoundError:
            about = nothing
        except ValueError as error:
            raise CheckpointError(
                self._path,
                f"it is damaged, or not a checkpoint of training ({_rule_of(error)}). Name a new directory.",
            ) from error
        if about["engine"] != self._about["engine"]:
            engines = [ENGINES[int(number)] for number in (about["engine"], self._about["engine"])]
            raise CheckpointError(
                self._path,
                "it is of the engine {0!r}, and this run is of {1!r}. Choose the engine {0!r}, or name a new "
                "directory.".format(*engines),
            )
        if not np.array_equal(about["run"], self._about["run"]):
            raise CheckpointError(
                self._path,
                "it is of another text, other options or another number of devices. Name a new directory, or run with "
                "the same ones.",
            )
        found = {int(calls) for calls in self._parts.gather(str(about["calls"]).encode())}
        if len(found) > 1:
            raise CheckpointError(
                self._path, "not all processes find the same one. Name a directory on a shared file system."
            )
        at = _position(about)
        if at.calls:
            state = self._orbax.restore(self._path, {"state": state}, step=at.calls, partial=True)["state"]
        return state, at

    def save(self, state: PyTree, at: Position) -> None:
        """Write a checkpoint, if one is due after this number of calls."""
        if at.calls % self._every == 0:
            self._write(state, at)

    def save_last(self, state: PyTree, at: Position) -> None:
        """Write a checkpoint of a run that ends early, unless `save` has written it."""
        if at.calls % self._every:
            self._write(state, at)

    def _write(self, state: PyTree, at: Position) -> None:
        try:
            self._orbax.save(self._path, {"state": state} | self._about | _stored(at), step=at.calls)
        except (OSError, ValueError) as error:
            if not is_full(error):
                raise
            reason = "No space left on device for a checkpoint. Make space, and resume from the last one"
            raise OSError(errno.ENOSPC, reason, os.fspath(self._path)) from None


def _stored(at: Position) -> dict[str, int]:
    """A position as numbers below 2**31, since JAX may narrow wider ones."""
    numbers = at._asdict()
    return numbers | {"words": at.words % 2**30, "words_in_2_to_30": at.words // 2**30}


def _position(about: Mapping[str, Any]) -> Position:
    words = int(about["words"]) + int(about["words_in_2_to_30"]) * 2**30
    return Position(int(about["epochs"]), int(about["batches"]), int(about["calls"]), words)


def _rule_of(error: ValueError) -> str:
    """The message of an error of `embax.checkpoint`, without the call, which the user did not make."""
    return re.sub(r"^`embax\.[^`]*` ", "", str(error)).rstrip(".")


def fingerprint(corpora: Sequence[Corpus], parts: Parts, options: Mapping[str, object]) -> UInt32[np.ndarray, " words"]:
    """A hash of a corpus and the options of a run, to tell runs apart."""
    digests = np.zeros((parts.number, 4), np.int64)
    for number, corpus in zip(parts.own, corpora, strict=True):
        of_ids = hashlib.sha256()
        for block in corpus.blocks(1 << 16):
            of_ids.update(block.tobytes())
        digests[number] = np.frombuffer(of_ids.digest(), np.int64)
    digests = parts.total(digests)
    words = json.dumps([corpora[0].tokens, corpora[0].counts.tolist(), sorted(options.items()), digests.tolist()])
    return np.frombuffer(hashlib.sha256(words.encode()).digest(), np.uint32)
