"""`embax map`: draw a map of some tokens."""

from typing import Annotated

import typer

from ._common import (
    Json,
    UserError,
    at_least_one,
    in_one_line,
    is_same_file,
    name_of,
    not_negative,
    note,
    option_of,
    print_json,
    short_name,
)
from ._display import waiting
from ._reading import Reading, VectorsFile, load, reads_vectors

_KINDS = ("png", "html")
_NEIGHBORS = 5


@reads_vectors
def map_(
    file: VectorsFile,
    reading: Reading,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="The picture: .png to look at, or .html, a page to explore in a browser. - is standard output.",
        ),
    ],
    to: Annotated[
        str | None,
        option_of(
            *_KINDS,
            help="What to draw: png or html. Default: by the suffix of the output; required for - and pipes.",
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="The tokens to draw, with commas between them; may be repeated."),
    ] = None,
    first: Annotated[
        int, typer.Option(callback=at_least_one, help="Draw this many tokens, the first ones of the file.")
    ] = 300,
    method: Annotated[
        str,
        option_of("pca", "umap", help='How directions become points: pca, or umap, which needs "embax[umap]".'),
    ] = "pca",
    seed: Annotated[int, typer.Option(callback=not_negative, help="The seed of umap's random numbers.")] = 0,
    json: Json = False,
) -> None:
    """Draw a map of tokens: tokens whose vectors have similar directions are near each other."""
    import numpy as np

    import embax.files
    import embax.maps

    kind = to or next((kind for kind in _KINDS if output.lower().endswith(f".{kind}")), None)
    if kind is None:
        raise UserError(f"{output}: must end in .png or .html. Rename it, or pass --to png or --to html.")
    embax.files.check_writable(output)
    if is_same_file(file, output):
        raise UserError(f"{output}: is the file to read itself. Name another file for the map.")
    vectors = load(file, reading)
    with in_one_line(), waiting("drawing"):
        directions = vectors.normalized().weight
        rows = np.arange(min(first, len(vectors))) if words is None else vectors.vocabulary.ids(_split(words))
        finite = np.isfinite(directions[rows]).all(axis=1)
        rows, left_out = rows[finite], int((~finite).sum())
        tokens = vectors.vocabulary.tokens(rows)
        points = embax.maps.project(directions[rows], method="umap" if method == "umap" else "pca", seed=seed)
        title = f"{short_name(file)}: {len(tokens):,} tokens"
        if kind == "png":
            embax.maps.draw_png(output, tokens, points, title=title, caption=_caption(method))
        else:
            nearest = vectors.most_similar_batch(tokens, k=_NEIGHBORS)
            embax.maps.draw_html(output, tokens, points, title=title, caption=_caption(method), nearest=nearest)
    if left_out:
        note(f"{left_out:,} tokens are left out, as their vectors hold NaN or infinity.")
    if json:
        places = [{"token": token, "x": float(x), "y": float(y)} for token, (x, y) in zip(tokens, points, strict=True)]
        print_json({"file": file, "output": output, "method": method, "points": places}, written=output)
        return
    typer.echo(f"embax: wrote {name_of(output, 'standard output')}: {len(tokens):,} tokens", err=True)


def _split(words: list[str]) -> list[str]:
    """Split lists of words at commas; a repeated word is drawn once."""
    return list(dict.fromkeys(word.strip() for part in words for word in part.split(",") if word.strip()))


def _caption(method: str) -> str:
    return "Principal components of the directions" if method == "pca" else "UMAP of the directions"
