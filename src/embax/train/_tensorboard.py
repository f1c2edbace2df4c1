"""Log training for TensorBoard: scalars, and the files of its projector."""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np

from ..files import replacing
from ..vectors import Vectors
from ..vocabulary._vocabulary import printable
from ._loop import Epoch, Progress

# Seconds between two points of a curve.
_EVERY = 0.5
# Seconds after which what was written goes to disk.
_FLUSHED = 10.0
# The version of the format of events, which begins each file.
_VERSION = "brain.Event:2"
# The most words in the projector, which a browser holds in memory and can still draw.
_PROJECTED = 10_000


class TensorBoard:
    """Writes scalars and vectors into a folder that TensorBoard shows: `tensorboard --logdir FOLDER`.

    The horizontal axis is the number of words so far. The scalars are `train/loss`, `train/learning_rate`,
    `train/words_per_second` and, after each epoch, `held_out/loss`.

    If the log cannot be written any more, such as on a full disk, it ends, and training goes on.

    Args:
      folder: The folder. Each run should have its own.
      on_error: Called with the error that ends the log. Default: warn.

    Raises:
      ImportError: If tensorboardX is not installed.
      OSError: If the folder or the file of the log cannot be made.

    Example:
      >>> import embax.train, os, tempfile
      >>> folder, text = tempfile.mkdtemp(), "the king holds the crown. the queen wears the crown. " * 20
      >>> with embax.train.TensorBoard(folder) as log:
      ...     words = embax.train.tokenize([text])
      ...     vectors = embax.train.skipgram(words, dim=8, epochs=1, progress=log.progress, after_epoch=log.after_epoch)
      ...     log.projector(vectors)
      >>> sorted(os.listdir(folder))[1:]
      ['metadata.tsv', 'projector_config.pbtxt', 'tensors.tsv']
    """

    def __init__(self, folder: str | os.PathLike[str], on_error: Callable[[OSError], object] | None = None):
        try:
            # Not its SummaryWriter: that one writes in a thread, and if the thread ends by an error, waits forever.
            from tensorboardX import RecordWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            raise ImportError(
                '`embax.train.TensorBoard(folder)` needs tensorboardX. Run pip install "embax[tensorboard]".'
            ) from None
        os.makedirs(folder, exist_ok=True)
        self._folder = os.fspath(folder)
        made: tuple[Any, Any] = event_pb2, summary_pb2  # modules whose classes are made as they are imported
        self._event, self._summary = made[0].Event, made[1].Summary
        self._on_error = _warn if on_error is None else on_error
        self._words, self._written, self._flushed = 0, -np.inf, -np.inf
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._writer: Any = RecordWriter(os.path.join(self._folder, name))
        with self._named():
            self._writer.write(self._event(wall_time=time.time(), file_version=_VERSION).SerializeToString())
            self._writer.flush()

    def progress(self, progress: Progress) -> None:
        """Write the loss, rate and speed; the `progress` of `skipgram` and `cbow`. Twice a second at most."""
        self._words = progress.words
        if time.monotonic() - self._written < _EVERY and progress.words < progress.total_words:
            return
        self._written = time.monotonic()
        self.scalar("train/loss", progress.loss)
        self.scalar("train/learning_rate", progress.learning_rate)
        self.scalar("train/words_per_second", progress.words_per_second)

    def after_epoch(self, epoch: Epoch) -> None:
        """Write the loss on held-out text, if there is one; the `after_epoch` of `skipgram` and `cbow`."""
        if epoch.held_out is not None:
            self.scalar("held_out/loss", epoch.held_out)
        self._write(flush=True)

    def scalar(self, name: str, value: float) -> None:
        """Write a point of a curve, at the words so far.

        Args:
          name: The name of the curve; those with the same text before a slash are shown together.
          value: The value.
        """
        point = self._summary.Value(tag=name, simple_value=float(value))
        self._write(self._event(wall_time=time.time(), step=self._words, summary=self._summary(value=[point])))

    def projector(self, vectors: Vectors) -> None:
        """Write the files of TensorBoard's projector, which draws vectors in three dimensions.

        Args:
          vectors: The vectors; the first 10,000 are written, with their counts.

        Raises:
          OSError: If the files cannot be written.
        """
        with self._named():
            self._project(vectors)

    def _project(self, vectors: Vectors) -> None:
        rows = vectors.weight[:_PROJECTED]
        tokens, counts = vectors.vocabulary.tokens(np.arange(len(rows))), vectors.counts[: len(rows)].tolist()
        lines = ["word\tcount", *(f"{printable(token)}\t{count}" for token, count in zip(tokens, counts, strict=True))]
        with replacing(os.path.join(self._folder, "tensors.tsv")) as file:
            np.savetxt(file, rows, fmt="%.6g", delimiter="\t")
        with replacing(os.path.join(self._folder, "metadata.tsv")) as file:
            file.write("".join(f"{line}\n" for line in lines).encode(errors="replace"))
        with replacing(os.path.join(self._folder, "projector_config.pbtxt")) as file:
            file.write(b'embeddings {\n  tensor_path: "tensors.tsv"\n  metadata_path: "metadata.tsv"\n}\n')

    def close(self) -> None:
        """Write everything to disk."""
        self._write(flush=True)
        self._end()

    def _write(self, event: Any = None, flush: bool = False) -> None:
        """Write an event, and from time to time all of them to disk; an error ends the log."""
        if self._writer is None:
            return
        try:
            with self._named():
                if event is not None:
                    self._writer.write(event.SerializeToString())
                if flush or time.monotonic() - self._flushed > _FLUSHED:
                    self._flushed = time.monotonic()
                    self._writer.flush()
        except OSError as error:
            self._end()
            self._on_error(error)

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # of what a full disk has not taken
                writer.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the folder in errors."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._folder) from None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _warn(error: OSError) -> None:
    warnings.warn(f"The log {error.filename!r} ends here: {error.strerror}.", RuntimeWarning, stacklevel=4)
