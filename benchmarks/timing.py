"""Times several ways to do one thing in turns, so that a busy moment of the machine falls on all of them."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Runs in a turn. The first does not count: threads of the way before it may still wait for more work on a core, and the
# caches are full of its data. The turn counts with the median of the others, as steps follow each other in training.
_RUNS = 4


class Ratio(NamedTuple):
    """How long one way takes as a part of another, both measured in turns."""

    work: str
    against: str
    ratio: float  # of the medians
    ratio_low: float  # the 10th percentile of the ratios of the turns
    ratio_high: float  # the 90th
    limit: float | None  # the most it is meant to be
    seconds: float  # the median of the one
    seconds_against: float  # and of the other
    rounds: int


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Make a function that calls another, waits for what it returns, and gives the seconds that took."""

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return run


def in_turns(
    ways: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 5, runs: int = _RUNS
) -> dict[str, list[float]]:
    """Run each way a few times in each round.

    Args:
      ways: Functions by name that give the seconds they took.
      rounds: How many turns each has.
      warmup: How many turns come before, not counted.
      runs: How many runs a turn has; the first does not count where there are others.

    Returns:
      The seconds of each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warmup + rounds):
        for name, way in ways.items():
            seconds = statistics.median([way() for _ in range(runs)][min(1, runs - 1) :])
            if number >= warmup:
                times[name].append(seconds)
    return times


def compare(title: str, ways: Mapping[str, Callable[[], Any]], rounds: int = 200) -> dict[str, float]:
    """Time each way, print the times and their ratio to the first, and return the medians in seconds."""
    times = in_turns({name: timed(way) for name, way in ways.items()}, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    table = Table("", "median", "10 % to 90 %", "ratio", title=title, title_justify="left")
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=10)
        spread, ratio = f"{_time(low)} to {_time(high)}", f"{medians[name] / first:.3f}"
        table.add_row(escape(name), _time(medians[name]), spread, ratio)
    Console().print(table)
    return medians


def ratio(
    work: str,
    ours: Callable[[], float],
    against: str,
    theirs: Callable[[], float],
    limit: float | None,
    rounds: int,
    warmup: int = 5,
    runs: int = _RUNS,
) -> Ratio:
    """Measure one way as a part of another.

    Args:
      work: What is done.
      ours: A function that does it and gives the seconds.
      against: What it is measured against.
      theirs: The same for that.
      limit: The most the ratio is meant to be.
      rounds: How many turns: 30 or more, where a run takes milliseconds.
      warmup: As in `in_turns`.
      runs: As in `in_turns`.

    Returns:
      The ratio.
    """
    times = in_turns({"ours": ours, "theirs": theirs}, rounds, warmup, runs)
    mine, others = (statistics.median(times[name]) for name in ("ours", "theirs"))
    low, *_, high = statistics.quantiles([a / b for a, b in zip(times["ours"], times["theirs"], strict=True)], n=10)
    return Ratio(work, against, mine / others, low, high, limit, mine, others, rounds)


def report(title: str, ratios: Sequence[Ratio], output: Path) -> None:
    """Print ratios as a table, and write them as JSON."""
    table = Table("work", "against", "ratio", "10 % to 90 %", "at most", "ours", "theirs", title=title)
    for line in ratios:
        limit = "" if line.limit is None else f"{line.limit:g}"
        colour = "" if line.limit is None else "green" if line.ratio <= line.limit else "red"
        table.add_row(
            escape(line.work),
            escape(line.against),
            f"[{colour}]{line.ratio:.3f}[/]" if colour else f"{line.ratio:.3f}",
            f"{line.ratio_low:.3f} to {line.ratio_high:.3f}",
            limit,
            _time(line.seconds),
            _time(line.seconds_against),
        )
    Console(width=140).print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "jax": jax.__version__, "backend": jax.default_backend()}
    output.write_text(json.dumps({"machine": machine, "ratios": [line._asdict() for line in ratios]}, indent=2) + "\n")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
