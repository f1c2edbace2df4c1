"""How the commands read a file of vectors: the options that they share, and loading with them.

A command that reads a file takes one parameter, `reading`, and is decorated:

    @reads_vectors
    def info(file: VectorsFile, reading: Reading, json: Json = False): ...

On the command line it has `--format`, `--limit`, `--encoding`, `--errors` and `--max-expansion` instead, before its
last option.
"""

import codecs
import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ._common import at_least_one, in_one_line, option_of, option_of_format, rule, short_name
from ._display import waiting

if TYPE_CHECKING:
    from embax.vectors import Vectors

_ERRORS = ("strict", "replace", "escape")
_above_zero = rule(lambda value: 0 < value < math.inf, "a number above 0")


def _is_encoding(name: str) -> bool:
    try:
        # Some, such as "rot13", are no encodings of text.
        return bool("a".encode(codecs.lookup(name).name))
    except (LookupError, ValueError):  # a name with a zero character is a ValueError
        return False


VectorsFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A file of vectors of any format embax knows, plain or compressed, or the folder of a model; - is "
        "standard input. A tensor, or a file in an archive, is named after a colon.",
    ),
]
Format = Annotated[
    str | None,
    option_of_format("The format of the file. Default: that of its content."),
]
Limit = Annotated[int | None, typer.Option(callback=at_least_one, help="Read the first rows only, as many.")]
Encoding = Annotated[
    str,
    typer.Option(callback=rule(_is_encoding, "an encoding such as latin-1"), help="Of the tokens in the file."),
]
Errors = Annotated[
    str,
    option_of(
        *_ERRORS,
        help="What becomes of tokens that are not of the encoding: escape keeps their bytes, replace puts U+FFFD, "
        "strict ends with an error.",
    ),
]
MaxExpansion = Annotated[
    float,
    typer.Option(callback=_above_zero, help="How many times its size a compressed file may grow to."),
]


class Reading(NamedTuple):
    """How a file is read: arguments of `embax.files.load` by their names, and options of the command line."""

    format: Format = None
    limit: Limit = None
    encoding: Encoding = "utf-8"
    errors: Errors = "escape"
    max_expansion: MaxExpansion = 100.0


def reads_vectors(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Reading` in place of its parameter `reading`, before its last parameter."""
    signature = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=Reading._field_defaults[name], annotation=annotation)
        for name, annotation in Reading.__annotations__.items()
    ]
    own = [p.replace(kind=keyword) for p in signature.parameters.values() if p.name != "reading"]
    parameters = [*own[:-1], *options, own[-1]]

    @functools.wraps(command)
    def run(**arguments: object) -> None:
        reading = Reading(**{name: arguments.pop(name) for name in Reading._fields})  # pyright: ignore
        command(**arguments, reading=reading)

    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def load(file: str, reading: Reading) -> "Vectors":
    """Load vectors, with a spinner where that takes a while."""
    with waiting(f"loading {short_name(file)}"):
        import embax.vectors

        with in_one_line(file):
            return embax.vectors.Vectors.load(file, **reading._asdict())
