"""The program: its commands, and its exit status after errors."""

import os
import sys
from typing import Annotated, NoReturn

import typer

import embax

from ._common import INTERRUPTED, UserError, printable
from ._evaluate import evaluate
from ._files import convert, info
from ._map import map_
from ._queries import analogy, neighbors
from ._train import train

# If this environment variable is set, Typer prints completions instead of running a command.
_COMPLETE = "_EMBAX_COMPLETE"
_SHELLS = ("bash", "zsh", "fish", "powershell")

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
# Short enough for one line in the list of commands.
for _name, _command, _help in (
    ("train", train, "Learn word vectors from a text."),
    ("info", info, "Print what a file of vectors holds."),
    ("convert", convert, "Write vectors in another format."),
    ("neighbors", neighbors, "Print the words nearest to others."),
    ("analogy", analogy, "Answer: A is to B as C is to what?"),
    ("evaluate", evaluate, "Print how good vectors are."),
    ("map", map_, "Draw a map of words."),
):
    app.command(_name, short_help=_help)(_command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: with status 0, or 2 and one line on standard error if the user can fix it.

    Args:
      arguments: The arguments after the program's name. Default: the process's own.

    Raises:
      SystemExit: Always.
    """
    _choose_shell(sys.argv[1:] if arguments is None else arguments)
    try:
        # If the output is a closed pipe, Typer itself exits, silently and with status 1.
        status = app(arguments, prog_name="embax", standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except typer.TyperException as error:
        status = _complain(f"{error.format_message().rstrip('.')}. See embax --help.")
    except UserError as error:
        status = _complain(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        status = _complain(f"{reason}." if error.filename is None else f"{error.filename or repr('')}: {reason}.")
    except MemoryError:
        status = _complain("not enough memory. Pass --limit to read fewer rows.")
    except ValueError as error:
        import embax.files

        if not isinstance(error, embax.files.FormatError):
            raise
        # Some messages have several lines, about how to convert a file.
        status = _complain(*str(error).splitlines())
    finally:
        os.environ.pop(_COMPLETE, None)
    sys.exit(status)


def _choose_shell(arguments: list[str]) -> None:
    """Let `--show-completion` take the name of a shell; without it, Typer detects the shell that started it."""
    if len(arguments) == 2 and arguments[0] == "--show-completion":
        if arguments[1] not in _SHELLS:
            sys.exit(_complain(f"--show-completion must be one of {', '.join(_SHELLS)}, got {arguments[1]!r}."))
        os.environ[_COMPLETE] = f"source_{arguments[1]}"


def _complain(*lines: str) -> int:
    print("embax: error: " + "\n".join(map(printable, lines)), file=sys.stderr)
    return 2


@app.callback(invoke_without_command=True)
def _embax(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """Word vectors: learn them from text, read and convert files of them, ask for neighbours, draw a map."""
    if version:
        typer.echo(f"embax {embax.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
