"""`embax neighbors` and `embax analogy`: print the nearest words."""

from typing import Annotated, Any

import typer

from ._common import (
    Json,
    Number,
    UserError,
    in_one_line,
    option_of,
    plain_table,
    print_json,
    print_table,
    printable,
)
from ._display import waiting
from ._reading import Reading, VectorsFile, load, reads_vectors


@reads_vectors
def neighbors(
    file: VectorsFile,
    reading: Reading,
    words: Annotated[list[str], typer.Argument(metavar="WORD", help="The words whose neighbours to find.")],
    number: Number = 10,
    approx: Annotated[
        bool,
        typer.Option(
            "--approx",
            help="Search an index, which may miss a few words: FILE.usearch if it exists, else one made for this call. "
            'Needs "embax[approximate]".',
        ),
    ] = False,
    save_index: Annotated[
        bool,
        typer.Option("--save-index", help="With --approx, save the index as FILE.usearch, for later calls."),
    ] = False,
    json: Json = False,
) -> None:
    """Print the words whose vectors are nearest in direction, with their cosines."""
    if save_index and not approx:
        raise UserError("--save-index needs --approx, which asks an index.")
    vectors = load(file, reading)
    if save_index:
        with waiting("making the index"), in_one_line(file):
            vectors.save_index()
    with waiting("looking for neighbours"), in_one_line():
        found = vectors.most_similar_batch(words, k=number, approx=approx)
    if json:
        print_json(
            {
                "file": file,
                "neighbors": [
                    {"word": word, "nearest": [{"token": token, "cosine": cosine} for token, cosine in nearest]}
                    for word, nearest in zip(words, found, strict=True)
                ],
            }
        )
        return
    print_table(_side_by_side(dict(zip(words, found, strict=True))))


@reads_vectors
def analogy(
    file: VectorsFile,
    reading: Reading,
    a: Annotated[str, typer.Argument(metavar="A", help="A word, such as man.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The word that A is to, such as king.")],
    c: Annotated[str, typer.Argument(metavar="C", help="The word that is to the answer as A is to B, such as woman.")],
    number: Number = 10,
    method: Annotated[
        str,
        option_of("add", "mul", help="add: the cosine to the sum of directions. mul: the product of cosines, 3CosMul."),
    ] = "add",
    json: Json = False,
) -> None:
    """Answer "A is to B as C is to what?": `embax analogy FILE man king woman` finds queen."""
    vectors = load(file, reading)
    with waiting("looking for the answer"), in_one_line():
        found = vectors.analogy(a, b, c, k=number, method="mul" if method == "mul" else "add")
    if json:
        candidates = [{"token": token, "score": score} for token, score in found]
        print_json({"file": file, "a": a, "b": b, "c": c, "method": method, "candidates": candidates})
        return
    print_table(_column(f"{a} : {b} = {c} : ?", found, "cosine" if method == "add" else "3CosMul"))


def _side_by_side(nearest: dict[str, list[tuple[str, float]]]) -> Any:
    """Lay out one table for each word, side by side as far as the terminal is wide."""
    from rich.columns import Columns

    return Columns([_column(word, found, "cosine") for word, found in nearest.items()], padding=(1, 4))


def _column(title: str, found: list[tuple[str, float]], score: str) -> Any:
    from rich.text import Text

    table = plain_table(title, (score, True))
    table.columns[0].min_width = 14
    for token, value in found:
        table.add_row(Text(printable(token)), f"{value:.3f}")
    return table
