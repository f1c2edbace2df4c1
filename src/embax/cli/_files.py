"""`embax info` and `embax convert`: describe a file of vectors, and write it in another format."""

import os
import warnings
from typing import Annotated, Any

import typer

from ._common import (
    Json,
    To,
    UserError,
    bytes_in_words,
    in_one_line,
    is_same_file,
    name_of,
    note,
    print_json,
    print_table,
    rule,
    short_name,
)
from ._display import waiting
from ._reading import Reading, VectorsFile, reads_vectors

_DTYPES = ("float16", "bfloat16", "float32", "float64")


@reads_vectors
def info(
    file: VectorsFile,
    reading: Reading,
    json: Json = False,
) -> None:
    """Describe a file of vectors: its format, size, norms, first tokens and irregularities."""
    import embax.files

    from ._describe import as_table, described

    with (
        waiting(f"loading {short_name(file)}"),
        in_one_line(file),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", embax.files.DuplicateTokensWarning)
        warnings.simplefilter("always", embax.files.UndecodedTokensWarning)
        identity, contents = embax.files.load_identified(
            file,
            **reading._asdict(),
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


@reads_vectors
def convert(
    file: VectorsFile,
    reading: Reading,
    output: Annotated[
        str,
        typer.Argument(metavar="OUTPUT", help="The file to write; its suffix tells the format. - is standard output."),
    ],
    to: To = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            callback=rule(lambda value: value in _DTYPES, f"one of {', '.join(_DTYPES)}"),
            autocompletion=lambda: list(_DTYPES),
            help="Convert the numbers to float16, bfloat16, float32 or float64. Default: no conversion.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write the vectors of a file in another format."""
    import embax.files
    from embax.files._formats.registry import WITH_SUBWORDS

    with in_one_line(output):
        target = embax.files.format_to_write(output, to)
    embax.files.check_writable(output)
    with in_one_line(file), waiting(f"loading {short_name(file)}"):
        if is_same_file(file, output):
            raise UserError(f"{output}: is the file to read itself. Name another file to write.")
        identity, contents = embax.files.load_identified(
            file,
            dtype=_dtype(dtype),
            **reading._asdict(),
        )
    if contents.subwords is not None and target not in WITH_SUBWORDS:
        note(f"the sub-words are left out, as only {' and '.join(WITH_SUBWORDS)} keep them; {target} has the rows.")
        contents = contents._replace(subwords=None)
    with in_one_line(output), waiting(f"writing {name_of(os.path.basename(output), 'standard output')}"):
        embax.files.save(output, contents, format=target)
    rows, dim = contents.weight.shape
    size = None if embax.files.is_stream(output) else os.path.getsize(output)
    if json:
        source = {"path": file, "format": identity.format, "bytes": identity.size}
        written = {"path": output, "format": target, "bytes": size}
        found = {"input": source, "output": written, "rows": rows, "dim": dim, "dtype": str(contents.weight.dtype)}
        print_json(found, written=output)
        return
    as_target = f"as {target}" if size is None else f"{bytes_in_words(size)} as {target}"
    typer.echo(
        f"embax: wrote {name_of(output, 'standard output')}: {rows:,} rows of {dim:,}, {as_target}, from "
        f"{bytes_in_words(identity.size or 0)} as {identity.format}",
        err=True,
    )


def _dtype(name: str | None) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes

    return ml_dtypes.bfloat16
