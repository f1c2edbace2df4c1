"""`embax train`: a text to vectors."""

from typing import Annotated

import typer

from ._common import Json, UserError, at_least_one, is_same_file, not_negative, print_json, printable, rule
from ._display import Display

_share = rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")
_rate = rule(lambda value: 0 < value <= 1, "above 0 and at most 1")


def train(
    text: Annotated[str, typer.Argument(help="UTF-8 text, plain or compressed with gzip or xz; - is standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The file of vectors to write.")],
    dim: Annotated[int, typer.Option(callback=at_least_one, help="The size of a vector.")] = 100,
    window: Annotated[
        int, typer.Option(callback=at_least_one, help="The most words on either side that are context.")
    ] = 5,
    negative: Annotated[int, typer.Option(callback=at_least_one, help="Noise words for each centre.")] = 5,
    epochs: Annotated[int, typer.Option(callback=at_least_one, help="Passes over the text.")] = 5,
    min_count: Annotated[int, typer.Option(callback=at_least_one, help="Leave out words that occur less often.")] = 5,
    sample: Annotated[
        float,
        typer.Option(callback=_share, help="Words of a greater share in the text are thinned out; 0: none."),
    ] = 1e-3,
    learning_rate: Annotated[
        float,
        typer.Option(
            callback=_rate,
            help="The size of the first step, as word2vec counts it; it falls linearly to nearly 0. Larger values suit "
            "short texts. 0.01 to 0.1 is sensible.",
        ),
    ] = 0.025,
    seed: Annotated[
        int, typer.Option(callback=not_negative, help="The same seed gives the same file on the same machine.")
    ] = 0,
    json: Json = False,
) -> None:
    """Learn word vectors from a text, by skip-gram with negative sampling (Mikolov et al., 2013).

    Words are lower-cased; a blank line ends the context of a word.
    """
    import embax.files
    import embax.train

    embax.files.check_writable(output)
    name = "standard input" if text == "-" else text
    if text != "-" and is_same_file(text, output):
        raise UserError(f"{output}: is the text itself. Name another file for the vectors.")
    with Display() as display:
        try:
            vectors = embax.train.skipgram(
                display.reading(embax.train.tokenize(embax.files.read_text(text))),
                dim=dim,
                window=window,
                negative=negative,
                epochs=epochs,
                min_count=min_count,
                sample=sample,
                learning_rate=learning_rate,
                seed=seed,
                progress=display.training,
            )
        except embax.train.CorpusError as error:
            raise UserError(f"{name}: {error.reason}") from None
        except (MemoryError, RuntimeError) as error:  # JAX's own error of a lack of memory is a RuntimeError
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError("not enough memory. Lower --dim or --window, or raise --min-count.") from None
        vectors.save(output)
        display.say(f"wrote {printable(output)}: {len(vectors):,} words, {dim} dimensions")
    if json:
        print_json(
            {
                "output": output,
                "words": len(vectors),
                "dim": dim,
                "occurrences": int(vectors.counts.sum()),
                "seed": seed,
            }
        )
