"""Measures the ways to do a work in turns, in the processes of processes.py, and gives their times and ratios."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from processes import Process
from workload import Case, Tables

# Runs in a turn. The first does not count: threads of the way before it may still wait for more work on a core, and the
# caches are full of its data. The turn counts with the median of the others, as steps follow each other in training.
RUNS = 4
WARM_UP = 4  # turns
FEWEST = 12
# After a turn of these, their threads still look for work for some milliseconds.
SPINNING, PAUSE = "peers", 0.01


class Way(NamedTuple):
    """A way to do a work."""

    name: str
    process: str
    work: str  # by the name that the process knows
    case: Case | Tables
    most: float | None = None  # that the first way may take of this one's time


class Time(NamedTuple):
    """Seconds, or a ratio of them: of all turns, the median and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


class Measured(NamedTuple):
    """What was measured of a work; the first way is compared to each of the others."""

    work: str
    case: str
    turns: int
    seconds: dict[str, Time]  # by way
    ratios: dict[str, Time]  # to each other way; the median here is the ratio of the medians
    more: dict[str, Time]  # seconds more than each other way; the median is the difference of the medians
    most: dict[str, float]


def measure(
    processes: Mapping[str, Process],
    work: str,
    ways: Sequence[Way],
    seconds: float,
    *,
    most_turns: int = 100,
    runs: int = RUNS,
) -> Measured:
    """Let all ways take turns.

    Args:
      processes: The processes by name. Ways of a process that is not there are left out.
      work: The name of the work.
      ways: The ways; the first one is compared to the others.
      seconds: For how long turns begin, after the warm-up; there are at least `FEWEST`.
      most_turns: How many turns there are at most.
      runs: How many runs a turn has; the first one does not count.

    Returns:
      The times.

    Raises:
      RuntimeError: If a process fails, or compiles in its turns.
    """
    ways = [way for way in ways if way.process in processes]
    used = {name: processes[name] for name in dict.fromkeys(way.process for way in ways)}
    _build(used, ways)
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    programs: dict[str, int] = {}
    start, turn = time.perf_counter(), -WARM_UP
    while turn < FEWEST or (turn < most_turns and time.perf_counter() - start < seconds):
        if turn == 0:
            start = time.perf_counter()
        shift = turn % len(ways)  # so that none comes after the same one all the time
        for way in (*ways[shift:], *ways[:shift]):
            answer = used[way.process].ask(do="run", way=way.name, runs=runs)
            if way.process == SPINNING:
                time.sleep(PAUSE)
            if turn >= 0:
                times[way.name].append(statistics.median(answer["seconds"][min(1, runs - 1) :]))
                if programs.setdefault(way.process, answer["programs"]) != answer["programs"]:
                    raise RuntimeError(f"{work}: {way.name} must not compile in its turns.")
        turn += 1
    for process in used.values():
        process.ask(do="clear")
    gc.collect()
    case = next(way.case for way in ways)
    return summary(work, str(case), times, {way.name: way.most for way in ways if way.most is not None})


def _build(processes: Mapping[str, Process], ways: Sequence[Way]) -> None:
    """Build all ways, those of different processes at once."""
    left = {name: [way for way in ways if way.process == name] for name in processes}
    while any(left.values()):
        asked = [(processes[name], own.pop(0)) for name, own in left.items() if own]
        for process, way in asked:
            process.send(do="build", way=way.name, work=way.work, size=way.case)
        for process, _ in asked:
            process.receive()


def summary(work: str, case: str, times: Mapping[str, Sequence[float]], most: dict[str, float]) -> Measured:
    """Sum up the seconds of turns, by way."""
    first, *others = times
    seconds = {name: time_of(values) for name, values in times.items()}
    ratios, more = {}, {}
    for name in others:
        pairs, (own, other) = list(zip(times[first], times[name], strict=True)), (seconds[first], seconds[name])
        ratios[name] = time_of([a / b for a, b in pairs])._replace(median=own.median / other.median)
        more[name] = time_of([a - b for a, b in pairs])._replace(median=own.median - other.median)
    return Measured(work, case, len(times[first]), seconds, ratios, more, most)


def time_of(values: Sequence[float]) -> Time:
    """The median and the spread."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return Time(statistics.median(values), low, high)


_TIMES = ("seconds", "ratios", "more")


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What is measured as JSON, with four digits of each number."""

    def short(times: Mapping[str, Time]) -> dict[str, list[float]]:
        return {name: [float(f"{x:.4g}") for x in time] for name, time in times.items()}

    return [line._asdict() | {name: short(getattr(line, name)) for name in _TIMES} for line in measured]


def from_json(lines: Sequence[dict[str, Any]]) -> list[Measured]:
    """The other way round."""

    def times(values: Mapping[str, Sequence[float]]) -> dict[str, Time]:
        return {name: Time(*value) for name, value in values.items()}

    return [Measured(**(line | {name: times(line[name]) for name in _TIMES})) for line in lines]
