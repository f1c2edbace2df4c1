"""`embax evaluate`: evaluate vectors by analogies, and by human judgement of word pairs."""

import importlib.util
import os
from typing import Annotated, Any

import typer

from ._common import (
    Json,
    UserError,
    at_least_one,
    in_one_line,
    note,
    plain_table,
    print_json,
    print_table,
    printable,
    short_name,
)
from ._display import waiting
from ._reading import Reading, VectorsFile, load, reads_vectors

_ANALOGIES = "questions-words.txt"
_WORD_PAIRS = ("wordsim353.tsv", "simlex999.txt")


@reads_vectors
def evaluate(
    file: VectorsFile,
    reading: Reading,
    analogies: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A file of analogies: four words a line, in sections that begin with a colon."
        ),
    ] = None,
    word_pairs: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A file with two words and their similarity a line; may be repeated."),
    ] = None,
    restrict: Annotated[
        int, typer.Option(callback=at_least_one, help="Use only this many tokens, the first ones.")
    ] = 300_000,
    json: Json = False,
) -> None:
    """Print how well vectors solve analogies, and how well their cosines agree with human judgement.

    Default: Google's analogies, WordSim-353 and SimLex-999, from the package gensim, if it is installed.
    """
    are_chosen = analogies is not None or bool(word_pairs)
    if not are_chosen:
        analogies, word_pairs = _of_gensim()
    _check_readable([*([] if analogies is None else [analogies]), *(word_pairs or [])], file)
    vectors = load(file, reading)
    import embax.evaluate

    solved, agreed = None, {}
    if analogies is not None:
        with in_one_line(analogies), waiting(f"solving {short_name(analogies)}"):
            solved = embax.evaluate.analogies(vectors, analogies, restrict=restrict)
    for path in word_pairs or []:
        try:
            with in_one_line(path), waiting(f"comparing {short_name(path)}"):
                agreed[path] = embax.evaluate.word_pairs(vectors, path, restrict=restrict)
        except UserError as error:
            if are_chosen:
                raise
            # Vectors may lack the words of one of gensim's files; go on with the others.
            note(str(error))
    found = {
        "file": file,
        "restrict": restrict,
        "analogies": _counts(analogies, solved),
        "word_pairs": _figures(agreed),
    }
    if json:
        print_json(found)
        return
    tables = [
        table for table in (_of_sections(found["analogies"]), _of_pairs(found["word_pairs"])) if table is not None
    ]
    for place, table in enumerate(tables):
        if place:
            typer.echo()
        print_table(table)


def _check_readable(paths: list[str], file: str) -> None:
    """Check that word files can be read before vectors are loaded. A pipe is not opened: it can be read only once."""
    import embax.files

    for path in paths:
        if not embax.files.is_stream(path):
            open(path, "rb").close()
    if [*paths, file.partition(":")[0]].count("-") > 1:
        raise UserError("-: standard input can be read only once. Name a file for the others.")


def _of_gensim() -> tuple[str, list[str]]:
    """Find the word files in the package gensim, without importing it."""
    found = importlib.util.find_spec("gensim")
    if found is not None and found.submodule_search_locations:
        folder = os.path.join(next(iter(found.submodule_search_locations)), "test", "test_data")
        paths = [os.path.join(folder, name) for name in (_ANALOGIES, *_WORD_PAIRS)]
        if all(map(os.path.isfile, paths)):
            return paths[0], paths[1:]
    raise UserError(
        f"there are no words to evaluate with. Pass --analogies with the path of {_ANALOGIES}, or --word-pairs with "
        "the path of a file of pairs, or pip install gensim, which has some."
    )


def _counts(path: str | None, report: Any) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "path": path,
        "accuracy": report.accuracy,
        "correct": report.correct,
        "total": report.total,
        "skipped": report.skipped,
        "sections": [
            {"name": section.name, "correct": section.correct, "total": section.total} for section in report.sections
        ],
    }


def _figures(reports: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "spearman": report.spearman,
            "pearson": report.pearson,
            "pairs": report.pairs,
            "missing": report.missing,
        }
        for path, report in reports.items()
    ]


def _of_sections(found: dict[str, Any] | None) -> Any:
    if found is None:
        return None
    from rich.text import Text

    table = plain_table(short_name(found["path"]), ("correct", True), ("of", True), ("accuracy", True))
    for section in found["sections"]:
        correct, total = section["correct"], section["total"]
        table.add_row(Text(printable(section["name"])), f"{correct:,}", f"{total:,}", _percent(correct, total))
    correct, total = found["correct"], found["total"]
    table.add_row("all", f"{correct:,}", f"{total:,}", _percent(correct, total), style="bold")
    if found["skipped"]:
        table.add_row("skipped, of unknown words", "", f"{found['skipped']:,}", "")
    return table


def _of_pairs(found: list[dict[str, Any]]) -> Any:
    if not found:
        return None
    from rich.text import Text

    table = plain_table("word pairs", ("Spearman", True), ("Pearson", True), ("pairs", True), ("missing", True))
    for report in found:
        table.add_row(
            Text(short_name(report["path"])),
            f"{report['spearman']:.4f}",
            f"{report['pearson']:.4f}",
            f"{report['pairs']:,}",
            f"{report['missing']:,}",
        )
    return table


def _percent(correct: int, total: int) -> str:
    return f"{correct / total:.2%}" if total else "-"
