"""`embax info` and `embax convert`: what a file holds, and the same in another format."""

import os
import warnings
from typing import Annotated, Any, cast

import typer

from ._common import (
    Encoding,
    Errors,
    Format,
    Json,
    Limit,
    MaxExpansion,
    UserError,
    VectorsFile,
    bytes_in_words,
    formats,
    in_one_line,
    is_same_file,
    note,
    one_of_formats,
    print_json,
    print_table,
    printable,
    rule,
)
from ._display import waiting

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def info(
    file: VectorsFile,
    format: Format = None,
    limit: Limit = None,
    encoding: Encoding = "utf-8",
    errors: Errors = "escape",
    max_expansion: MaxExpansion = 100.0,
    json: Json = False,
) -> None:
    """Print what a file of vectors holds: its format, size, norms, tokens and what is odd about it."""
    import embax.files

    from ._describe import as_table, described

    with (
        waiting(f"loading {printable(os.path.basename(file))}"),
        in_one_line(file),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", embax.files.DuplicateTokensWarning)
        warnings.simplefilter("always", embax.files.UndecodedTokensWarning)
        identity = embax.files.identify(file, format=format, max_expansion=max_expansion)
        contents = embax.files.load(
            file,
            format=format,
            limit=limit,
            encoding=encoding,
            errors=cast(Any, errors),
            max_expansion=max_expansion,
        )
    duplicates = 0
    for warning in caught:
        if isinstance(warning.message, embax.files.DuplicateTokensWarning):
            duplicates += warning.message.number
        elif isinstance(warning.message, embax.files.UndecodedTokensWarning):
            note(str(warning.message))
    with waiting("measuring"):
        found = described(file, identity, contents, duplicates)
    if json:
        print_json(found)
    else:
        print_table(as_table(found))


def convert(
    file: VectorsFile,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The file to write; its suffix tells the format.")],
    to: Annotated[
        str | None,
        typer.Option(
            callback=one_of_formats,
            autocompletion=lambda: list(formats()),
            help="The format to write. Default: by the suffix of OUTPUT.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=rule(lambda value: value in _DTYPES, f"one of {', '.join(_DTYPES)}"),
            autocompletion=lambda: list(_DTYPES),
            help="Convert the numbers to float16, bfloat16, float32 or float64. Default: as they are.",
        ),
    ] = None,
    format: Format = None,
    limit: Limit = None,
    encoding: Encoding = "utf-8",
    errors: Errors = "escape",
    max_expansion: MaxExpansion = 100.0,
    json: Json = False,
) -> None:
    """Write the vectors of a file in another format."""
    import embax.files

    with in_one_line(output):
        target = embax.files.format_to_write(output, to)
    embax.files.check_writable(output)
    with in_one_line(file), waiting(f"loading {printable(os.path.basename(file))}"):
        identity = embax.files.identify(file, format=format, max_expansion=max_expansion)
        if is_same_file(identity.path, output):
            raise UserError(f"{output}: is the file to read itself. Name another file to write.")
        contents = embax.files.load(
            file,
            format=format,
            limit=limit,
            dtype=_dtype(dtype),
            encoding=encoding,
            errors=cast(Any, errors),
            max_expansion=max_expansion,
        )
    if contents.subwords is not None and target != "fasttext":
        note(f"the sub-words are left out, as only the format fasttext keeps them; {target} has the rows.")
        contents = contents._replace(subwords=None)
    with in_one_line(output), waiting(f"writing {printable(os.path.basename(output))}"):
        embax.files.save(output, contents, format=target)
    rows, dim = contents.weight.shape
    size = os.path.getsize(output)
    if json:
        source = {"path": file, "format": identity.format, "bytes": identity.size}
        written = {"path": output, "format": target, "bytes": size}
        print_json({"input": source, "output": written, "rows": rows, "dim": dim, "dtype": str(contents.weight.dtype)})
        return
    typer.echo(
        f"embax: wrote {printable(output)}: {rows:,} rows of {dim:,}, {bytes_in_words(size)} as {target}, from "
        f"{bytes_in_words(identity.size)} as {identity.format}",
        err=True,
    )


def _dtype(name: str | None) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16
