"""The options for reading a file of vectors, which several commands share, and loading with them.

A command that reads a file has one parameter, `reading`, and a decorator:

    @reads_vectors
    def info(file: VectorsFile, reading: Reading, json: Json = False): ...

On the command line, the options `--format`, `--limit`, `--encoding`, `--errors` and `--max-expansion` replace
`reading`. They come before the command's last option.
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
        # Some codecs, such as "rot13", do not encode text to bytes.
        return bool("a".encode(codecs.lookup(name).name))
    except (LookupError, ValueError):  # a name with a zero character is a ValueError
        return False


VectorsFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A file of vectors of any supported format, plain or compressed, or the folder of a model; - is standard "
        "input. Append a colon and a name to read a tensor, or a file in an archive.",
    ),
]
Format = Annotated[
    str | None,
    option_of_format("The format of the file. Default: recognised by its content."),
]
Limit = Annotated[int | None, typer.Option(callback=at_least_one, help="Read only this many rows, the first ones.")]
Encoding = Annotated[
    str,
    typer.Option(callback=rule(_is_encoding, "an encoding such as latin-1"), help="The encoding of the tokens."),
]
Errors = Annotated[
    str,
    option_of(
        *_ERRORS,
        help="How to treat tokens that are not of the encoding: escape keeps their bytes, replace puts U+FFFD, strict "
        "ends with an error.",
    ),
]
MaxExpansion = Annotated[
    float,
    typer.Option(callback=_above_zero, help="How many times its size a compressed file may expand to."),
]


class Reading(NamedTuple):
    """The options for reading a file: arguments of `embax.files.load`, and options of the command line."""

    format: Format = None
    limit: Limit = None
    encoding: Encoding = "utf-8"
    errors: Errors = "escape"
    max_expansion: MaxExpansion = 100.0


def reads_vectors(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameter `reading` by the options of `Reading`, before its last parameter."""
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
    """Load vectors, with a spinner if it takes a while."""
    with waiting(f"loading {short_name(file)}"):
        import embax.vectors

        with in_one_line(file):
            return embax.vectors.Vectors.load(file, **reading._asdict())
