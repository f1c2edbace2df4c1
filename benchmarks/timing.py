"""Times several ways to do one thing in turns, so that a busy moment of the machine falls on all of them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def compare(title: str, ways: dict[str, Callable[[], Any]], rounds: int = 200, warmup: int = 5) -> dict[str, float]:
    """Time each way, print the times and their ratio to the first, and return the medians.

    Args:
      title: What is timed, for the heading.
      ways: Functions without arguments by name; what they return is waited for.
      rounds: How many times each is called, in turns.
      warmup: How many calls come before, not timed.

    Returns:
      The median time of each, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(warmup + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    table = Table("", "median", "10 % to 90 %", "ratio", title=title, title_justify="left")
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=10)
        spread, ratio = f"{_time(low)} to {_time(high)}", f"{medians[name] / first:.3f}"
        table.add_row(escape(name), _time(medians[name]), spread, ratio)
    Console().print(table)
    return medians


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
