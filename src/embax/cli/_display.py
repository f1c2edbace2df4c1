"""Progress on standard error: a bar or a spinner on a terminal."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from embax.train import Progress

# Seconds between two reports of progress: on a terminal, and as lines elsewhere.
_REDRAW, _LINE = 0.2, 5.0
# Seconds before a spinner is drawn; shorter tasks show none.
_PATIENCE = 0.4


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Draw a spinner with the elapsed time, on a terminal, if the block takes a while.

    Args:
      message: A description of the task.
    """
    console = _terminal()
    if console is None:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    spinner = Progress(*columns, console=console, transient=True)
    spinner.add_task(message, total=None)
    begin = threading.Timer(_PATIENCE, spinner.start)
    begin.daemon = True
    begin.start()
    try:
        yield
    finally:
        begin.cancel()
        begin.join()  # it may be starting just now
        spinner.stop()


def _terminal() -> "Console | None":
    """The terminal to draw on, if standard error is one."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class Display:
    """Progress of training: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = _terminal()
        self._bar = None
        if console is not None:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=None)
        self._shown = -math.inf

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def reading(self, words: int) -> None:
        """Report the number of words that have been read."""
        if self._shown == -math.inf:
            self._shown = time.monotonic()  # a short text has no report
        if self._due():
            self._show(f"read {words:,} words", None)

    def training(self, progress: "Progress") -> None:
        """Report the progress of training."""
        finished = progress.words == progress.total_words
        if self._due() or finished:
            self._show(
                f"epoch {progress.epoch}/{progress.epochs}, loss {float(progress.loss):.3f}, "
                f"{progress.words_per_second:,.0f} words/s, {_duration(progress.seconds_left)} left",
                progress.words / progress.total_words,
            )

    def say(self, message: str) -> None:
        """Print a line that stays."""
        if self._bar is None:
            print(f"embax: {message}", file=sys.stderr)
        else:  # brackets in names of files are not the console's markup
            self._bar.console.print(message, markup=False)

    def _due(self) -> bool:
        return time.monotonic() - self._shown >= (_LINE if self._bar is None else _REDRAW)

    def _show(self, message: str, part: float | None) -> None:
        self._shown = time.monotonic()
        if self._bar is None:
            self.say(message if part is None else f"{part:4.0%}, {message}")
        else:
            self._bar.update(self._task, description=message, completed=part or 0, total=part and 1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
