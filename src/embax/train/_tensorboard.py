"""Log training for TensorBoard: scalars, and the files of its projector."""

import os
import time
from types import TracebackType

import numpy as np

from ..files import replacing
from ..vectors import Vectors
from ..vocabulary._vocabulary import printable
from ._loop import Epoch, Progress

# Seconds between two points of a curve.
_EVERY = 0.5
# The most words in the projector, which a browser holds in memory and can still draw.
_PROJECTED = 10_000


class TensorBoard:
    """Writes scalars and vectors into a folder that TensorBoard shows: `tensorboard --logdir FOLDER`.

    The horizontal axis is the number of words so far. The scalars are `train/loss`, `train/learning_rate`,
    `train/words_per_second` and, after each epoch, `held_out/loss`.

    Args:
      folder: The folder. Each run should have its own.

    Raises:
      ImportError: If tensorboardX is not installed.
      OSError: If the folder cannot be made.

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

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                '`embax.train.TensorBoard(folder)` needs tensorboardX. Run pip install "embax[tensorboard]".'
            ) from None
        os.makedirs(folder, exist_ok=True)
        self._folder = os.fspath(folder)
        self._writer = SummaryWriter(self._folder)
        self._words, self._written = 0, -np.inf

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

    def scalar(self, name: str, value: float) -> None:
        """Write a point of a curve, at the words so far.

        Args:
          name: The name of the curve; those with the same text before a slash are shown together.
          value: The value.
        """
        self._writer.add_scalar(name, float(value), self._words)

    def projector(self, vectors: Vectors) -> None:
        """Write the files of TensorBoard's projector, which draws vectors in three dimensions.

        Args:
          vectors: The vectors; the first 10,000 are written, with their counts.

        Raises:
          OSError: If the files cannot be written.
        """
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
        self._writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
