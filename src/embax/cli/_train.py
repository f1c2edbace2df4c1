"""`embax train`: learn word vectors from a text."""

import contextlib
import logging
import re
from typing import Annotated, Any

import typer

from .._base.limits import MAX_VOCABULARY
from ._common import (
    INTERRUPTED,
    Json,
    To,
    UserError,
    at_least_one,
    in_one_line,
    is_same_file,
    name_of,
    not_negative,
    option_of,
    print_json,
    rule,
)
from ._display import Display
from ._following import Following, refuse_standard_input_twice
from ._processes import address, together

_share = rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")
_rate = rule(lambda value: 0 < value <= 1, "above 0 and at most 1")
_host_and_port = rule(
    lambda value: re.fullmatch(r"\S+:\d{1,5}", value) is not None, "a host and a port such as 10.0.0.1:1234"
)


def train(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES...",
            help="UTF-8 text, plain or compressed with gzip or xz, or parquet and Arrow files; - is standard input. A "
            'pattern in quotes, such as "texts/**/*.gz", stands for all files that match.',
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="The file of vectors to write; its suffix tells the format. - is standard output."
        ),
    ],
    to: To = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How text is cut: words (lower-cased), whitespace (split only), or a JSON file of the library "
            "tokenizers.",
        ),
    ] = "words",
    lines: Annotated[
        bool, typer.Option("--lines", help="A line ends the context of a word. Default: a blank line.")
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(
            help="The column of parquet or Arrow files to read: of strings, or of lists of tokens or ids. Default: the "
            "only one of these, or the one named text, tokens, words, ids or input_ids."
        ),
    ] = None,
    model: Annotated[
        str,
        option_of("skipgram", "cbow", help="skipgram, or cbow: faster with the native engine, but it learns less."),
    ] = "skipgram",
    subwords: Annotated[
        bool,
        typer.Option(
            "--subwords",
            help="Learn vectors of n-grams of characters, too, so that unknown words get vectors. A .bin is then a "
            "model of fastText.",
        ),
    ] = False,
    min_ngram: Annotated[
        int, typer.Option(callback=at_least_one, help="With --subwords, the characters of the shortest n-grams.")
    ] = 3,
    max_ngram: Annotated[
        int, typer.Option(callback=at_least_one, help="With --subwords, the characters of the longest n-grams.")
    ] = 6,
    buckets: Annotated[
        int,
        typer.Option(callback=at_least_one, help="With --subwords, the rows for n-grams, all of which a .bin has."),
    ] = 2_000_000,
    max_vocabulary: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            help="The most words to keep, and to count at a time, 150 bytes each; the least frequent are left out.",
        ),
    ] = MAX_VOCABULARY,
    dim: Annotated[
        int | None, typer.Option(callback=at_least_one, help="The size of a vector. Default: 100, or that of --from.")
    ] = None,
    window: Annotated[
        int, typer.Option(callback=at_least_one, help="The most words on either side that are context.")
    ] = 5,
    negative: Annotated[int, typer.Option(callback=at_least_one, help="Noise words for each centre.")] = 5,
    epochs: Annotated[int, typer.Option(callback=at_least_one, help="Passes over the text.")] = 5,
    min_count: Annotated[int, typer.Option(callback=at_least_one, help="Leave out words that occur less often.")] = 5,
    sample: Annotated[
        float,
        typer.Option(callback=_share, help="Words with a larger share of the text are dropped at random; 0: none."),
    ] = 1e-3,
    learning_rate: Annotated[
        float,
        typer.Option(
            callback=_rate,
            help="The initial learning rate, as in word2vec; it falls linearly to nearly 0. From 0.01 to 0.1; larger "
            "values suit short texts.",
        ),
    ] = 0.025,
    seed: Annotated[
        int, typer.Option(callback=not_negative, help="The same seed gives the same file on the same machine.")
    ] = 0,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Vectors to continue from, of any format: known words begin at their vectors, and words that the text "
            "lacks keep theirs.",
        ),
    ] = None,
    start_second: Annotated[
        str | None,
        typer.Option("--from-second", metavar="FILE", help="With --from, the second table that --second has written."),
    ] = None,
    second: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Also write the second table, which the vectors are multiplied with in training, to continue from it.",
        ),
    ] = None,
    engine: Annotated[
        str,
        option_of(
            "auto",
            "native",
            "xla",
            help="native, the kernel of embax-kernels for one process on a CPU; xla, for every platform; or auto.",
        ),
    ] = "auto",
    threads: Annotated[
        int,
        typer.Option(
            callback=at_least_one,
            help="Threads of the native engine. With more than one, the file differs from run to run.",
        ),
    ] = 1,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="A directory in which training is saved at intervals, and from which the same command resumes it. All "
            "processes must have access to it.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(callback=at_least_one, help="The number of steps between checkpoints.")
    ] = 10_000,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Evaluate after each epoch by a file of analogies or of word pairs, as embax evaluate does; may be "
            "repeated.",
        ),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", help="Print the loss on every 20th paragraph after each epoch, and do not train on it."
        ),
    ] = False,
    log_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Write curves, and in the end the vectors for the projector, for TensorBoard."
        ),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Train together with other processes that run the same command, started by Slurm, MPI or Kubernetes. "
            "Each learns from its part of the text; the first one prints and writes. If one is lost, the others end "
            "within 30 seconds.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            callback=_host_and_port,
            metavar="HOST:PORT",
            help="With --distributed, the address where the first process listens. Default: detected from the cluster.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(callback=at_least_one, help="With --coordinator, the number of processes.")
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(callback=not_negative, help="With --coordinator, the number of this process, from 0."),
    ] = None,
    json: Json = False,
) -> None:
    """Learn word vectors from a text, by skip-gram or CBOW with negative sampling (Mikolov et al., 2013).

    Words are lower-cased, unless there is a --tokenizer; a blank line, or the end of a row or file, ends the context of
    a word.
    """
    if start_second is not None and start is None:
        raise UserError("--from-second needs --from, the vectors of the same run.")
    if second is not None and second == output:
        raise UserError(f"{second}: must not be the file of the vectors. Name another file for --second.")
    where = address(distributed, coordinator, num_processes, process_id)
    if checkpoint is None:
        lost = "Start all of them again; with --checkpoint they would go on where they were."
    else:
        lost = "Start again with the same --checkpoint to go on."
    options = {
        "dim": dim,
        "window": window,
        "negative": negative,
        "epochs": epochs,
        "min_count": min_count,
        "sample": sample,
        "learning_rate": learning_rate,
        "seed": seed,
        "engine": engine,
        "threads": threads,
        "max_vocabulary": max_vocabulary,
    }
    if subwords:
        options |= {"subwords": True, "ngram_lengths": (min_ngram, max_ngram), "buckets": buckets}
        to = to or ("fasttext" if output.endswith(".bin") else None)
    if held_out:
        options["held_out"] = True
    if checkpoint is not None:
        options |= {"checkpoint": checkpoint, "checkpoint_every": checkpoint_every}
        with in_one_line():
            import embax.checkpoint  # noqa: F401, its logger must be there
        # Orbax logs errors with tracebacks, and raises them, too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    with together(where, lost) as is_first:
        if where is not None:
            import jax

            options["mesh"] = jax.make_mesh((jax.device_count(),), ("devices",))
        reading = {"tokenizer": tokenizer, "lines": lines, "column": column}
        vectors, following = _train(
            files,
            reading,
            (output, second),
            to,
            model,
            (start, start_second),
            options,
            is_first,
            (evaluate or [], log_dir),
        )
    if following is None:
        return
    if json:
        print_json(
            {
                "output": output,
                "words": len(vectors),
                "dim": vectors.weight.shape[1],
                "occurrences": int(vectors.counts.sum()),
                "seed": seed,
                **vectors.metadata,
                **following.summary(),
            },
            written=output,
        )
    if following.interrupted:
        raise typer.Exit(INTERRUPTED)


def _train(
    files: list[str],
    reading: dict[str, Any],
    written: tuple[str, str | None],
    to: str | None,
    model: str,
    starts: tuple[str | None, str | None],
    options: dict[str, Any],
    is_first: bool,
    measured: tuple[list[str], str | None],
) -> tuple[Any, Following | None]:
    """Train; the first process also follows the run and writes the vectors."""
    import embax.files
    import embax.train
    from embax.files._formats.registry import WITH_SUBWORDS
    from embax.train._input.sources import expanded

    (output, second), start = written, starts[0]
    with in_one_line(output):
        format = embax.files.format_to_write(output, to)
    with in_one_line(second):
        format_of_second = None if second is None else embax.files.format_to_write(second)
    if "subwords" in options and format not in WITH_SUBWORDS:
        raise UserError(
            f"{output}: must be of {' or '.join(WITH_SUBWORDS)} with --subwords, which {format} does not keep. Name a "
            "file .safetensors or .bin."
        )
    if is_first:
        for path in filter(None, written):
            embax.files.check_writable(path)
    questions, log_dir = measured
    refuse_standard_input_twice(files, questions)
    with in_one_line():
        paths = expanded(files)
    name = name_of(paths[0]) if len(paths) == 1 else f"{len(paths):,} files"
    for path in paths:
        for result in filter(None, written):
            if is_same_file(path, result):
                raise UserError(f"{result}: is the text itself. Name another file for the vectors.")
    for argument, path in zip(("initial", "initial_second"), starts, strict=True):
        if path is not None:
            with in_one_line(path):
                options |= {argument: embax.Vectors.load(path)}
    seconds: list[embax.Vectors] = []
    if second is not None:
        options |= {"keep_second": seconds.append}
    with contextlib.ExitStack() as stack:
        with in_one_line():
            sequences = embax.train.read_sequences(paths, **reading)
        following = None
        if is_first:
            display = Display()
            following = stack.enter_context(Following(display, questions, log_dir, may_end_early="mesh" not in options))
            stack.enter_context(display)
            options |= {"progress": following.progress}
            sequences.report = display.reading
        if "held_out" in options or questions:  # all processes bring the vectors together
            options |= {"after_epoch": following.after_epoch if following is not None else lambda epoch: None}
        try:
            learn = embax.train.cbow if model == "cbow" else embax.train.skipgram
            vectors = learn(sequences, **options)
        except embax.train.CorpusError as error:
            raise UserError(f"{name}: {error.reason}") from None
        except embax.train.CheckpointError as error:
            raise UserError(f"{error.path}: {error.reason}") from None
        except ImportError as error:
            raise UserError(str(error)) from None
        except ValueError:
            with in_one_line(start):
                raise
        except (MemoryError, RuntimeError) as error:  # JAX's own error of a lack of memory is a RuntimeError
            if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError("not enough memory. Lower --dim or --window, or raise --min-count.") from None
        if following is not None:
            with in_one_line(output):
                vectors.save(output, format=format)
            if second is not None:
                with in_one_line(second):
                    seconds[0].save(second, format=format_of_second)
            following.finish(vectors)
            following.say(
                f"wrote {name_of(output, 'standard output')}: {len(vectors):,} words, {vectors.weight.shape[1]} "
                f"dimensions, trained by {vectors.metadata['engine']} at {following.words_per_second:,.0f} words/s "
                f"({following.waited:.0%} of the time waiting for text)"
            )
    return vectors, following
