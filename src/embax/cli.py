"""The command line: `embax train` and `embax neighbors`."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Annotated, Any, NoReturn

import jax
import typer

import embax
import embax.files
import embax.train
import embax.vectors

# Seconds between two reports of progress: drawn on a terminal, or printed as lines elsewhere.
_REDRAW, _LINE = 0.2, 5.0
# What a shell reports for a program that an interrupt ended: 128 and the signal's number.
_INTERRUPTED = 130

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _UserError(Exception):
    """What the user can mend, in one line."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: status 0, or 2 and one line on standard error for what the user can mend.

    Args:
      arguments: What follows the program's name. Default: the process's own.

    Raises:
      SystemExit: Always.
    """
    try:
        # Typer itself exits, without a word and with status 1, where the output is a pipe that was closed.
        status = app(arguments, prog_name="embax", standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except typer.TyperException as error:
        status = _complain(f"{error.format_message().rstrip('.')}. See embax --help.")
    except (_UserError, embax.files.FormatError) as error:
        status = _complain(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        status = _complain(f"{reason}." if error.filename is None else f"{error.filename or repr('')}: {reason}.")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        status = _complain("not enough memory. Lower --dim or --window, or raise --min-count.")
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _embax(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Word vectors: learn them from text, and ask for neighbours."""
    if version:
        typer.echo(f"embax {embax.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _rule(fits: Callable[[float], bool], rule: str) -> Callable[[Any], Any]:
    """Check an option's value, in words of our own: Typer's do not name the value."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise typer.BadParameter(f"must be {rule}, got {value}")
        return value

    return check


_at_least_one = _rule(lambda value: 1 <= value < 2**31, "at least 1 and below 2**31")
_not_negative = _rule(lambda value: value >= 0, "0 or more")
_share = _rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")
_rate = _rule(lambda value: 0 < value <= 1, "above 0 and at most 1")


@app.command()
def train(
    text: Annotated[str, typer.Argument(help="UTF-8 text, plain or compressed with gzip or xz; - is standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The file of vectors to write.")],
    dim: Annotated[int, typer.Option(callback=_at_least_one, help="The size of a vector.")] = 100,
    window: Annotated[
        int, typer.Option(callback=_at_least_one, help="The most words on either side that are context.")
    ] = 5,
    negative: Annotated[int, typer.Option(callback=_at_least_one, help="Noise words for each centre.")] = 5,
    epochs: Annotated[int, typer.Option(callback=_at_least_one, help="Passes over the text.")] = 5,
    min_count: Annotated[int, typer.Option(callback=_at_least_one, help="Leave out words that occur less often.")] = 5,
    sample: Annotated[
        float,
        typer.Option(callback=_share, help="Words of a greater share in the text are thinned out; 0: none."),
    ] = 1e-3,
    learning_rate: Annotated[
        float,
        typer.Option(
            callback=_rate,
            help="The size of the first step, as word2vec counts it; it falls linearly to nearly 0. Larger values suit "
            "short texts. 0.01 to 0.1 is sensible.",
        ),
    ] = 0.025,
    seed: Annotated[
        int, typer.Option(callback=_not_negative, help="The same seed gives the same file on the same machine.")
    ] = 0,
) -> None:
    """Learn word vectors from a text, by skip-gram with negative sampling (Mikolov et al., 2013).

    Words are lower-cased; a blank line ends the context of a word.
    """
    embax.files.check_writable(output)
    name = "standard input" if text == "-" else text
    if text != "-" and os.path.exists(text) and os.path.exists(output) and os.path.samefile(text, output):
        raise _UserError(f"{output}: is the text itself. Name another file for the vectors.")
    with _Display() as display:
        try:
            vectors = embax.train.skipgram(
                display.reading(embax.train.tokenize(embax.files.read_text(text))),
                dim=dim,
                window=window,
                negative=negative,
                epochs=epochs,
                min_count=min_count,
                sample=sample,
                learning_rate=learning_rate,
                seed=seed,
                progress=display.training,
            )
        except embax.train.CorpusError as error:
            raise _UserError(f"{name}: {error.reason}") from None
        vectors.save(output)
        display.say(f"wrote {output}: {len(vectors):,} words, {dim} dimensions")


@app.command()
def neighbors(
    vectors: Annotated[str, typer.Argument(help="A file of vectors that embax train wrote.")],
    words: Annotated[list[str], typer.Argument(help="The words whose neighbours to find.")],
    number: Annotated[int, typer.Option("-k", callback=_at_least_one, help="How many neighbours to print.")] = 10,
) -> None:
    """Print the words whose vectors are nearest in direction, with their cosines."""
    known = embax.vectors.Vectors.load(vectors)
    try:
        nearest = {word: known.most_similar(word, k=number) for word in words}
    except embax.vectors.UnknownTokenError as error:
        raise _UserError(str(error)) from None
    typer.echo(_side_by_side(nearest), nl=False)


def _side_by_side(nearest: dict[str, list[tuple[str, float]]]) -> str:
    """Lay out one table a word, as many beside each other as the terminal is wide."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    tables = []
    for word, found in nearest.items():
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(Text(_printable(word)), min_width=14, overflow="fold")
        table.add_column("cosine", justify="right")
        for neighbor, cosine in found:
            table.add_row(Text(_printable(neighbor)), f"{cosine:.3f}")
        tables.append(table)
    console = Console()
    with console.capture() as capture:
        console.print(Columns(tables, padding=(1, 4)))
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _printable(token: str) -> str:
    """Spell out control characters, with which a file could rule the terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in token)


def _complain(message: str) -> int:
    print(f"embax: error: {_printable(message)}", file=sys.stderr)
    return 2


class _Display:
    """Progress on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=None)
        self._shown = -math.inf

    def __enter__(self) -> "_Display":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def reading(self, sequences: Iterable[list[str]]) -> Iterator[list[str]]:
        """Pass the sequences on, and tell how many words have passed."""
        words, self._shown = 0, time.monotonic()
        for sequence in sequences:
            yield sequence
            words += len(sequence)
            if self._due():
                self._show(f"read {words:,} words", None)

    def training(self, progress: embax.train.Progress) -> None:
        """Tell how far training has come."""
        finished = progress.words == progress.total_words
        if self._due() or finished:
            self._show(
                f"epoch {progress.epoch}/{progress.epochs}, loss {float(progress.loss):.3f}, "
                f"{progress.words_per_second:,.0f} words/s, {_duration(progress.seconds_left)} left",
                progress.words / progress.total_words,
            )

    def say(self, message: str) -> None:
        """Print a line that stays."""
        print(f"embax: {message}", file=sys.stderr) if self._bar is None else self._bar.console.print(message)

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


if __name__ == "__main__":
    main()
