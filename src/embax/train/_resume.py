"""Checkpoints of training: to go on where a run was ended, as though it had not been."""

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
    """A directory of checkpoints that a run cannot go on from.

    Args:
      path: The directory.
      reason: What is wrong with it, as a sentence about "it".
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = os.fspath(path), reason
        super().__init__(f"`embax.train.skipgram(checkpoint=...)` must fit the run, got {self.path!r}: {reason}")


class Checkpoints:
    """Where a run is saved now and then, and may go on from.

    Args:
      path: A directory that all processes see.
      every: How many calls of the compiled program there are from one checkpoint to the next.
      of_run: What tells this run from others, as `fingerprint` gives it.
      parts: The parts of the corpus.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, of_run: UInt32[np.ndarray, " words"], parts: Parts):
        # Here, as it needs Orbax, which training without checkpoints does not.
        from .. import checkpoint

        os.makedirs(path, exist_ok=True)
        self._orbax, self._path, self._every, self._of_run, self._parts = checkpoint, path, every, of_run, parts

    def restore(self, state: PyTree) -> tuple[PyTree, int]:
        """Read the last checkpoint, if there is one.

        Args:
          state: What training begins with.

        Returns:
          The state, and how many calls have led to it.

        Raises:
          CheckpointError: If it is damaged or of another run, or not all processes find the same one.
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
                f"what is saved there is damaged or of something else ({_rule_of(error)}). Name a new directory.",
            ) from error
        if not np.array_equal(about["run"], self._of_run):
            raise CheckpointError(
                self._path,
                "it is of another text, other options or another number of devices. Name a new directory, or run with "
                "what it was made with.",
            )
        found = {int(calls) for calls in self._parts.gather(str(about["calls"]).encode())}
        if len(found) > 1:
            raise CheckpointError(self._path, "not all processes see the same one. Name one on a shared file system.")
        calls = about["calls"]
        if calls:
            state = self._orbax.restore(self._path, {"state": state}, step=calls, partial=True)["state"]
        return state, calls

    def save(self, state: PyTree, calls: int) -> None:
        """Write a checkpoint, if it is time to."""
        if calls % self._every == 0:
            self._orbax.save(self._path, {"state": state, "run": self._of_run, "calls": calls}, step=calls)


def _rule_of(error: ValueError) -> str:
    """What an error of `embax.checkpoint` says, without the call, which the user has not made."""
    return re.sub(r"^`embax\.[^`]*` ", "", str(error)).rstrip(".")


def fingerprint(corpora: Sequence[Corpus], parts: Parts, options: Mapping[str, object]) -> UInt32[np.ndarray, " words"]:
    """Sum up a corpus and the options of a run in a few numbers, which are other ones for another run."""
    digests = np.zeros((parts.number, 4), np.int64)
    for number, corpus in zip(parts.own, corpora, strict=True):
        digests[number] = np.frombuffer(hashlib.sha256(corpus.ids.tobytes()).digest(), np.int64)
    digests = parts.total(digests)
    words = json.dumps([corpora[0].tokens, corpora[0].counts.tolist(), sorted(options.items()), digests.tolist()])
    return np.frombuffer(hashlib.sha256(words.encode()).digest(), np.uint32)
