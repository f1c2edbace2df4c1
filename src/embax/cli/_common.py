"""What the commands share: options, checks of their values, errors, tables and JSON."""

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


class UserError(Exception):
    """What the user can mend, in one line."""


def rule(fits: Callable[[Any], bool], text: str | Callable[[], str]) -> Callable[[Any], Any]:
    """Check an option's value, in words of our own: Typer's do not name the value."""

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
    """The names of the formats of files; looked up when they are asked for, as that takes a moment."""
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
    option_of_format("The format to write. Default: by the suffix of the output; for - and pipes it has to be given."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Number = Annotated[int, typer.Option("-k", callback=at_least_one, help="How many to print.")]


@contextlib.contextmanager
def in_one_line(name: str | None = None) -> Iterator[None]:
    """Turn what the library raises for bad values into errors of one line, and tell of its warnings.

    Args:
      name: What the message begins with, such as a file.
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
            # What the call is named in Python is of no use here.
            message = re.sub(r"^`embax\.[^`]*` ", "", str(error))
            raise UserError(message if name is None else f"{name}: {message}") from None
    for warning in caught:
        if warning.category.__module__.startswith("embax."):
            note(str(warning.message))


def note(message: str) -> None:
    """Tell of something that is no error."""
    print(f"embax: note: {printable(message)}", file=sys.stderr)


def printable(token: str) -> str:
    """Spell out control characters, with which a file could rule the terminal."""
    if token.isprintable():  # without what the rest has to load
        return token
    from embax.vocabulary._vocabulary import printable

    return printable(token)


def print_json(document: dict[str, Any], written: str | None = None) -> None:
    r"""Print a document; what is no finite number is null, and a byte of a token that is not UTF-8 is `\xNN`.

    Args:
      document: What to print.
      written: The file that the command has written. Where that is standard output, the document goes to standard
        error.
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
        from embax._base.escapes import spelled_out

        return spelled_out(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table(*columns: str | tuple[str, bool]) -> "Table":
    """Begin a table without lines; a pair's second says whether numbers stand in the column."""
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
    # A terminal that was closed is told to by a short count; rich would end the program by itself.
    typer.echo("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()), nl=False)


def name_of(path: str, stream: str = "standard input") -> str:
    """What people call a file: - is a standard stream."""
    return stream if path == "-" else printable(path)


def short_name(path: str) -> str:
    """The same without the folder."""
    return name_of(os.path.basename(path) or path)


def bytes_in_words(size: float) -> str:
    """Write a size for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def is_same_file(read: str, written: str) -> bool:
    """Tell whether a path to read and one to write lead to the same plain file."""
    other = _status(written, 1)
    # What follows a colon may not be part of the path.
    paths = [read, *(read[: colon.start()] for colon in re.finditer(":", read))]
    found = [one for one in (_status(path, 0) for path in paths) if one is not None and stat.S_ISREG(one.st_mode)]
    return other is not None and any(os.path.samestat(one, other) for one in found)


def _status(path: str, standard: int) -> os.stat_result | None:
    """The status of what a path leads to, if there is anything; of -, that of a standard descriptor."""
    try:
        return os.fstat(standard) if path == "-" else os.stat(path)
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return None
