"""Helpers of all commands: options, checks of their values, errors, tables and JSON."""

import contextlib
import json
import math
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

# The exit status of an interrupted program in a shell: 128 plus the signal's number.
INTERRUPTED = 130


class UserError(Exception):
    """An error that the user can fix, printed in one line."""


def rule(fits: Callable[[Any], bool], text: str | Callable[[], str]) -> Callable[[Any], Any]:
    """Make a callback that checks an option's value; its message names the value, which Typer's own do not."""

    def check(value: Any) -> Any:
        if value is not None and not fits(value):
            shown = repr(value) if isinstance(value, str) else value
            raise typer.BadParameter(f"must be {text if isinstance(text, str) else text()}, got {shown}")
        return value

    return check


at_least_one = rule(lambda value: 1 <= value < 2**31, "at least 1 and below 2**31")
not_negative = rule(lambda value: value >= 0, "0 or more")
one_of_formats = rule(lambda value: value in formats(), lambda: f"one of {', '.join(formats())}")


def formats() -> tuple[str, ...]:
    """The names of file formats; imported only when needed, since it takes a moment."""
    import embax.files

    return embax.files.FORMATS


def option_of_format(help: str) -> Any:
    """Make an option that is the name of a format of files."""
    return typer.Option(callback=one_of_formats, autocompletion=lambda: list(formats()), help=help)


def option_of(*names: str, help: str) -> Any:
    """Make an option that is one of some names."""
    text = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
    return typer.Option(
        callback=rule(lambda value: value in names, text), autocompletion=lambda: list(names), help=help
    )


To = Annotated[
    str | None,
    option_of_format("The format to write. Default: by the suffix of the output; required for - and pipes."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Number = Annotated[int, typer.Option("-k", callback=at_least_one, help="How many to print.")]


@contextlib.contextmanager
def in_one_line(name: str | None = None) -> Iterator[None]:
    """Turn the library's errors about bad values into errors of one line, and print its warnings as notes.

    Args:
      name: The start of the message, such as a file.
    """
    import embax.files
    from embax.vocabulary import UnknownTokenError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", embax.files.DuplicateTokensWarning)
        warnings.simplefilter("always", embax.files.UndecodedTokensWarning)
        if "embax.vectors" in sys.modules:
            from embax.vectors import NotFiniteWarning

            warnings.simplefilter("always", NotFiniteWarning)
        try:
            yield
        except embax.files.FormatError:
            raise
        except UnknownTokenError as error:
            raise UserError(str(error)) from None
        except (ValueError, ImportError) as error:
            # Remove the name of the Python call.
            message = re.sub(r"^`embax\.[^`]*` ", "", str(error))
            raise UserError(message if name is None else f"{name}: {message}") from None
    for warning in caught:
        if warning.category.__module__.startswith("embax."):
            note(str(warning.message))


def note(message: str) -> None:
    """Print a note to standard error."""
    print(f"embax: note: {printable(message)}", file=sys.stderr)


def printable(token: str) -> str:
    """Escape control characters, since a terminal would obey them."""
    if token.isprintable():  # avoids the import below
        return token
    from embax.vocabulary._vocabulary import printable

    return printable(token)


def print_json(document: dict[str, Any], written: str | None = None) -> None:
    r"""Print a JSON document; NaN and infinity become null, and a byte of a token that is not UTF-8 becomes `\xNN`.

    Args:
      document: The document.
      written: The file that the command has written. If it is standard output, the document goes to standard error.
    """
    typer.echo(json.dumps(_finite(document), allow_nan=False, indent=2), err=written is not None and _carries(written))


def _carries(path: str) -> bool:
    import embax.files

    return embax.files.is_standard_output(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, str) and not value.isascii():
        from embax._base.text.escapes import spelled_out

        return spelled_out(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table(*columns: str | tuple[str, bool]) -> "Table":
    """Make a table without lines; a column may be a pair of its name and whether it holds numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        name, is_number = (column, False) if isinstance(column, str) else column
        table.add_column(Text(printable(name)), justify="right" if is_number else "left", overflow="fold")
    return table


def print_table(renderable: Any) -> None:
    """Print a table, without spaces at the ends of lines."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(renderable)
    # Typer reports a closed pipe to `main`; rich would end the program itself.
    typer.echo("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()), nl=False)


def name_of(path: str, stream: str = "standard input") -> str:
    """The name of a file for messages; `-` is a standard stream."""
    return stream if path == "-" else printable(path)


def short_name(path: str) -> str:
    """The name of a file for messages, without its folder."""
    return name_of(os.path.basename(path) or path)


def bytes_in_words(size: float) -> str:
    """Format a size, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def is_same_file(read: str, written: str) -> bool:
    """Whether a path to read and a path to write are the same plain file."""
    other = _status(written, 1)
    # The path may end at any colon: a name inside of the file may follow.
    paths = [read, *(read[: colon.start()] for colon in re.finditer(":", read))]
    found = [one for one in (_status(path, 0) for path in paths) if one is not None and stat.S_ISREG(one.st_mode)]
    return other is not None and any(os.path.samestat(one, other) for one in found)


def _status(path: str, standard: int) -> os.stat_result | None:
    """The `stat` of a path, None if there is no such file; `-` is the given standard descriptor."""
    try:
        return os.fstat(standard) if path == "-" else os.stat(path)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return None
