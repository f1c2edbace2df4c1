"""Checkpoints of training: resume an interrupted run, with the same result as without the interruption."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree, UInt32

from ._corpus import Corpus
from ._parts import Parts


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
      every: The number of calls of the compiled program between checkpoints.
      of_run: The run's `fingerprint`.
      parts: The parts of the corpus.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, of_run: UInt32[np.ndarray, " words"], parts: Parts):
        # Imported here, since it needs Orbax, which training without checkpoints does not.
        from .. import checkpoint

        os.makedirs(path, exist_ok=True)
        self._orbax, self._path, self._every, self._of_run, self._parts = checkpoint, path, every, of_run, parts

    def restore(self, state: PyTree) -> tuple[PyTree, int]:
        """Read the last checkpoint, if there is one.

        Args:
          state: The initial state of training.

        Returns:
          The state, and the number of calls that were made until it.

        Raises:
          CheckpointError: If the checkpoint is damaged, or of another run, or processes find different ones.
        """
        nothing = {"run": self._of_run, "calls": 0}
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
        if not np.array_equal(about["run"], self._of_run):
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
        calls = about["calls"]
        if calls:
            state = self._orbax.restore(self._path, {"state": state}, step=calls, partial=True)["state"]
        return state, calls

    def save(self, state: PyTree, calls: int) -> None:
        """Write a checkpoint, if one is due after this number of calls."""
        if calls % self._every == 0:
            self._orbax.save(self._path, {"state": state, "run": self._of_run, "calls": calls}, step=calls)


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
