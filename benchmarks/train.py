"""Training of word vectors beside gensim: speed, CPU seconds, memory, and how good the vectors are.

All ways of a work take turns in one run, each in a process of its own; imports do not count for seconds, but for CPU
seconds. The text has one paragraph a line, its words separated by spaces, so that all read the same. Every 20th
paragraph is held out.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measured
import numpy as np
import quality
from rich.console import Console
from rich.table import Table

import embax

ROOT = Path(__file__).parents[1]
SEEDS, EPOCHS, LONG, HELD = (1, 2, 3), 5, 30, 20
SKIPGRAM = "native", "native, 2 threads", "XLA", "gensim", "gensim, by file"
CBOW = "native CBOW", "XLA CBOW", "gensim CBOW", "gensim CBOW, by file"
SUBWORDS = "native sub-words", "XLA sub-words", "gensim FastText", "gensim FastText, by file"


class Line(NamedTuple):
    """A measure of one way, and what it is meant to be."""

    work: str
    way: str
    value: float  # the mean or median of the seeds
    spread: tuple[float, float]  # the least and the greatest
    other: float  # gensim's
    limit: float | None = None
    is_most: bool = True  # whether the limit is the most that `value` is meant to be, or the least

    @property
    def falls_short(self) -> bool:
        """Whether it is not what it is meant to be."""
        return self.limit is not None and (self.value > self.limit if self.is_most else self.value < self.limit)


class Text(NamedTuple):
    """A text in a file, and as lists of words."""

    path: Path
    lines: list[list[str]]
    held: list[list[str]]


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    parser.add_argument("--only", choices=GROUPS, nargs="*", default=list(GROUPS))
    options = parser.parse_args()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as name:
        for group in options.only:
            lines += (found := GROUPS[group](Path(name)))
            _print(group, found)
    about = {key: value for key, value in measured.machine({}).items() if key not in ("third cache", "large pages")}
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"machine": about, "training": [line._asdict() for line in lines]}
    (options.output / "train.json").write_text(json.dumps(found, indent=1) + "\n")


def shakespeare(folder: Path) -> Text:
    """The works of Shakespeare."""
    pieces = embax.files.read_text(ROOT / "examples" / "data" / "shakespeare.txt.xz")
    paragraphs = list(embax.train.tokenize(pieces))
    lines = [line for number, line in enumerate(paragraphs) if number % HELD != HELD - 1]
    path = folder / "shakespeare.txt"
    path.write_text("".join(" ".join(line) + "\n" for line in lines))
    return Text(path, lines, paragraphs[HELD - 1 :: HELD])


def skipgram(folder: Path) -> list[Line]:
    """Skip-gram: speed, CPU seconds, held-out loss and neighbours."""
    text = shakespeare(folder)
    runs = _runs(folder, SKIPGRAM, text.path, keep=True)
    counts = quality.counted(text.lines)
    for seed in (101, 102):
        run_once("gensim", text.path, seed, folder / f"long {seed}", epochs=LONG)
    long = [quality.Learned.read(folder / f"long {seed}") for seed in (101, 102)]
    held_out = quality.HeldOut(counts, text.held)
    lines = _speeds("skip-gram", runs, {"native": (3.5, 0.25), "native, 2 threads": (None, None), "XLA": (1.6, 0.5)})
    for measure, slack, is_most in (
        ("held-out loss", 0.0014, True),
        ("neighbour overlap", -0.002, False),
    ):
        values: dict[str, list[float]] = {way: [] for way in ("gensim", "native", "native, 2 threads", "XLA")}
        for way in values:
            for seed in SEEDS:
                learned = quality.Learned.read(folder / f"{way} {seed}")
                is_loss = measure == "held-out loss"
                values[way].append(held_out.loss(learned) if is_loss else quality.overlap(learned, long, counts))
        lines += _beside(measure, values, slack, is_most)
    return lines


def cbow(folder: Path) -> list[Line]:
    """CBOW: speed and CPU seconds."""
    runs = _runs(folder, CBOW, shakespeare(folder).path)
    return _speeds("CBOW", runs, {"native CBOW": (2.2, None), "XLA CBOW": (None, None)})


def subwords(folder: Path) -> list[Line]:
    """Sub-words: speed, and similarity of pairs with a word that is not in the text."""
    text = shakespeare(folder)
    counts = quality.counted(text.lines)
    pairs = [pair for pair in word_pairs() if not (pair[0] in counts and pair[1] in counts)]
    words = sorted({word for *both, _ in pairs for word in both})
    (ask := folder / "words.json").write_text(json.dumps(words))
    runs = _runs(folder, SUBWORDS, text.path, keep=True, ask=ask)
    lines = _speeds("sub-words", runs, {"native sub-words": (2.0, None), "XLA sub-words": (None, None)})
    values: dict[str, list[float]] = {}
    for way in ("gensim FastText", "native sub-words", "XLA sub-words"):
        for seed in SEEDS:
            rows = quality.Learned.read(folder / f"{way} {seed}").asked
            score = quality.similarity(dict(zip(words, rows, strict=True)), pairs)
            values.setdefault(way, []).append(score)
    return lines + _beside(f"WordSim, {len(pairs)} pairs with unknown words", values, 0.0, is_most=False)


def films(folder: Path) -> list[Line]:
    """Films that people liked, in the order of time: how often neighbours have a common genre."""
    lines, genres = liked_films()
    (path := folder / "films.txt").write_text("".join(" ".join(line) + "\n" for line in lines))
    counts = quality.counted(lines)
    values: dict[str, list[float]] = {way: [] for way in ("gensim", "native", "XLA")}
    for seed in SEEDS:
        for way in values:
            run_once(way, path, seed, folder / "films", epochs=LONG, sample=0)
            values[way].append(quality.genre_share(quality.Learned.read(folder / "films"), genres, counts))
    return _beside("films: common genre", values, -0.004, is_most=False)


def memory(folder: Path) -> list[Line]:
    """Memory beyond the imports, for 10 and 100 MB of text."""
    lines = []
    for megabytes in (10, 100):
        path = folder / "large.txt"
        with path.open("w") as file:
            for line in _repeated(shakespeare(folder).lines, megabytes * 1_000_000):
                file.write(line)
        taken = {way: run_once(way, path, 1, epochs=1)["bytes"] for way in ("native", "XLA", "gensim, by file")}
        theirs = taken["gensim, by file"]
        for way in ("native", "XLA"):
            ratio = taken[way] / theirs
            limit = 1.5 if megabytes == 100 else None
            lines.append(Line(f"memory, {megabytes} MB of text", way, ratio, (ratio, ratio), theirs, limit))
    return lines


GROUPS = {"skipgram": skipgram, "cbow": cbow, "subwords": subwords, "films": films, "memory": memory}


def run_once(
    way: str, text: Path, seed: int, output: Path | None = None, ask: Path | None = None, **options: float
) -> dict[str, float]:
    """Train in a process of its own; returns its seconds, CPU seconds and bytes."""
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("trainers.py"), way, text, "--seed", seed]
    for name, value in ({"output": output, "ask": ask} | options).items():
        command += [] if value is None else [f"--{name}", value]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _runs(
    folder: Path, ways: Sequence[str], text: Path, keep: bool = False, ask: Path | None = None
) -> dict[str, list[dict[str, float]]]:
    """Let all ways take turns, once a seed."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number, seed in enumerate(SEEDS):
        for way in (*ways[number:], *ways[:number]):
            output = folder / f"{way} {seed}" if keep else None
            runs[way].append(run_once(way, text, seed, output, ask, epochs=EPOCHS))
    return runs


def _speeds(work: str, runs: dict[str, list[dict[str, float]]], limits: dict[str, tuple[Any, Any]]) -> list[Line]:
    """How many times as fast as the faster way of gensim, and the share of its CPU seconds."""

    def medians(key: str) -> dict[str, float]:
        return {way: statistics.median(run[key] for run in found) for way, found in runs.items()}

    seconds, cpu = medians("seconds"), medians("cpu")
    fastest = min((way for way in runs if way.startswith("gensim")), key=seconds.__getitem__)
    lines = []
    for way, (speed, share) in limits.items():
        pairs = list(zip(runs[way], runs[fastest], strict=True))
        speeds = [theirs["seconds"] / own["seconds"] for own, theirs in pairs]
        shares = [own["cpu"] / theirs["cpu"] for own, theirs in pairs]
        value, spread = seconds[fastest] / seconds[way], (min(speeds), max(speeds))
        lines.append(Line(f"{work}: speed", way, value, spread, seconds[fastest], speed, is_most=False))
        spread = min(shares), max(shares)
        lines.append(Line(f"{work}: CPU seconds", way, cpu[way] / cpu[fastest], spread, cpu[fastest], share))
    return lines


def _beside(work: str, values: dict[str, list[float]], slack: float, is_most: bool) -> list[Line]:
    """Means of the seeds, the first way's being gensim's."""
    theirs, *others = values
    other = statistics.mean(values[theirs])
    return [
        Line(
            work, way, statistics.mean(values[way]), (min(values[way]), max(values[way])), other, other + slack, is_most
        )
        for way in others
    ]


def _repeated(lines: Sequence[Sequence[str]], size: int) -> Iterator[str]:
    """A text of a size: paragraphs in random order, a word in fifty being another one in each round."""
    rng, written, number = np.random.default_rng(0), 0, 0
    while written < size:
        number += 1
        for index in rng.permutation(len(lines)).tolist():
            words = list(lines[index])
            for place in np.flatnonzero(rng.random(len(words)) < 0.02).tolist():
                words[place] += f"{number % 50}"
            written += len(line := " ".join(words) + "\n")
            yield line
            if written >= size:
                return


def word_pairs() -> list[tuple[str, str, float]]:
    """The pairs of WordSim-353, as gensim has them."""
    spec = importlib.util.find_spec("gensim")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "test" / "test_data" / "wordsim353.tsv").read_text("utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    return [(one.lower(), other.lower(), float(score)) for one, other, score, *_ in rows]


def liked_films() -> tuple[list[list[str]], dict[str, set[str]]]:
    """The films that each person rated with 4 or more, in the order of time, and the genres of each film."""
    sys.path.append(str(ROOT / "examples"))
    import film_ratings

    data = film_ratings.load()
    data["film"] = data["movieId"].astype(str)
    lines = [films.tolist() for _, films in film_ratings.liked(data).groupby("userId")["film"]]
    about = data.drop_duplicates("film")
    genres = dict(zip(about["film"], map(set, about["genres"].astype(str).str.split("|")), strict=True))
    return lines, genres


def _print(group: str, lines: Sequence[Line]) -> None:
    table = Table(title=group, title_justify="left")
    for column in ("", "way", "value", "from and to", "gensim", "limit"):
        table.add_column(column)
    for line in lines:
        low, high = line.spread
        limit = "" if line.limit is None else f"{'at most' if line.is_most else 'at least'} {line.limit:.4g}"
        colour = "" if line.limit is None else "[red]" if line.falls_short else "[green]"
        values = f"{colour}{line.value:.4g}", f"{low:.4g} to {high:.4g}", f"{line.other:.4g}"
        table.add_row(line.work, line.way, *values, limit)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
