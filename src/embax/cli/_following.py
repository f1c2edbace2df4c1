"""Follow training: show progress, evaluate and log after each epoch, and end at an interrupt."""

import math
import signal
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._common import UserError, in_one_line, short_name
from ._display import Display

if TYPE_CHECKING:
    from embax.evaluate import AnalogyReport, PairReport
    from embax.train import Epoch, Progress
    from embax.vectors import Vectors


class Following:
    """Follows a run of `embax train`, which calls its methods.

    The first interrupt while the run trains makes the callbacks return True, which ends the run after the current call,
    so that its vectors can be written. The second one raises KeyboardInterrupt, as without this.

    Args:
      display: Shows progress.
      questions: Files to evaluate by, after each epoch.
      log: The folder of a log for TensorBoard, or None.
      may_end_early: Whether an interrupt may end the run. A process among others ends at once: they would wait for it.

    Raises:
      UserError: If the library for the log is missing.
      FormatError: If a file to evaluate by cannot be read.
    """

    def __init__(self, display: Display, questions: list[str], log: str | None, may_end_early: bool):
        import embax.evaluate
        import embax.train

        self._display, self._may_end_early = display, may_end_early
        self.say = display.say
        self._questions = [embax.evaluate.Questions(path) for path in questions]
        self.interrupted = False
        self._on_interrupt: Any = None
        self._last: Progress | None = None
        self._epochs: list[dict[str, Any]] = []
        with in_one_line():
            self._log = None if log is None else embax.train.TensorBoard(log, on_error=self._log_ends)

    def __enter__(self) -> "Following":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._on_interrupt is not None:
            signal.signal(signal.SIGINT, self._on_interrupt)
        if self._log is not None:
            self._log.close()

    def progress(self, progress: "Progress") -> bool:
        """Show progress; returns whether to end."""
        self._catch()
        self._last = progress
        self._display.training(progress)
        if self._log is not None:
            self._log.progress(progress)
        return self.interrupted

    def after_epoch(self, epoch: "Epoch") -> bool:
        """Evaluate the vectors of the moment; returns whether to end."""
        found: dict[str, Any] = {"epoch": epoch.epoch}
        shown = []
        if epoch.held_out is not None:
            found["held_out"] = epoch.held_out
            shown.append(f"held-out loss {epoch.held_out:.4f}")
        for questions in self._questions:
            report, name = questions(epoch.vectors), short_name(questions.path)
            found.setdefault("evaluations", []).append({"path": questions.path, **_figures(report)})
            shown.append(f"{name} {_in_words(report)}")
            if self._log is not None:
                self._log.scalar(f"evaluate/{name}", _figure(report))
        if self._log is not None:
            self._log.after_epoch(epoch)
        if shown:
            self._epochs.append(found)
            self.say(f"epoch {epoch.epoch}/{epoch.epochs}: {', '.join(shown)}")
        return self.interrupted

    def finish(self, vectors: "Vectors") -> None:
        """Write the vectors to the log, and say where an interrupt has ended the run."""
        if self._log is not None:
            try:
                self._log.projector(vectors)
            except OSError as error:  # the vectors are written, so the run has succeeded
                self._log_ends(error)
        if self.interrupted and self._last is not None:
            share = self._last.words / self._last.total_words
            self.say(f"interrupted in epoch {self._last.epoch}/{self._last.epochs}, after {share:.0%}")

    @property
    def words_per_second(self) -> float:
        """The mean speed of training."""
        return 0.0 if self._last is None else self._last.words_per_second

    @property
    def waited(self) -> float:
        """The share of the time of training in which the engine waited for its input."""
        return 0.0 if self._last is None else self._last.waited / max(self._last.seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """Speed and evaluations, for the JSON document."""
        found = {"words_per_second": round(self.words_per_second), "waited": round(self.waited, 4)}
        return found | {"interrupted": self.interrupted} | ({"epochs": self._epochs} if self._epochs else {})

    def _log_ends(self, error: OSError) -> None:
        self.say(f"note: the log ends here: {error.filename}: {error.strerror}")

    def _catch(self) -> None:
        """Catch interrupts, from the first call on: before it, there are no vectors worth writing."""
        is_main = threading.current_thread() is threading.main_thread()
        if self._on_interrupt is not None or not self._may_end_early or not is_main:
            return
        found = signal.getsignal(signal.SIGINT)
        if found is signal.default_int_handler:  # not where interrupts are ignored, as in a background job
            self._on_interrupt = found
            signal.signal(signal.SIGINT, self._end)

    def _end(self, *_: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._on_interrupt)


def _figures(report: "AnalogyReport | PairReport") -> dict[str, Any]:
    if hasattr(report, "sections"):
        return {name: getattr(report, name) for name in ("accuracy", "correct", "total", "skipped")}
    return {name: getattr(report, name) for name in ("spearman", "pearson", "pairs", "missing")}


def _figure(report: Any) -> float:
    return report.accuracy if hasattr(report, "sections") else report.spearman


def _in_words(report: Any) -> str:
    if hasattr(report, "sections"):
        return "has no known words" if not report.total else f"{report.accuracy:.2%} of {report.total:,}"
    if math.isnan(report.spearman):
        return f"has no correlation ({report.pairs:,} pairs)"
    return f"Spearman {report.spearman:.4f} of {report.pairs:,} pairs"


def refuse_standard_input_twice(files: list[str], questions: list[str]) -> None:
    """Check that no stream is read twice.

    Raises:
      UserError: If it is.
    """
    if [*files, *questions].count("-") > 1:
        raise UserError("-: standard input can be read only once. Name a file for the others.")
