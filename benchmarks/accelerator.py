"""What lookups, bags, steps and the search for duplicates cost on the accelerator that JAX finds; on a CPU, small ones.

A run calls a compiled function several times before it waits, as training does, so that the time to launch a program is
hidden behind the one before it. Tables and states are donated.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ours import OPTIMIZERS, first_number
from rich.console import Console
from rich.table import Table
from turns import Time, time_of
from workload import LENGTH, Case, batches_of, gradient_of

import embax
from embax._base.distinct import combine

SIZES = (
    Case(1_000_000, 64, 16_384),
    Case(1_000_000, 128, 262_144),
    Case(10_000_000, 128, 65_536),
)
SMALL = (Case(1_000, 8, 64), Case(1_000, 16, 256), Case(10_000, 8, 256))
# The arrays of a table and its state that a step holds, beside what a batch needs.
ARRAYS = {"Adagrad": 2, "Adam": 3, "row-wise Adam": 2}
CALLS = 8  # of a function before it waits


class Line(NamedTuple):
    """The time of a call."""

    work: str
    case: str
    turns: int
    seconds: Time
    compile_seconds: float


def works() -> dict[str, Callable[[Case], Callable[[], Any]]]:
    """The works by name; each gives, for a case, a function that starts it once."""
    steps = {f"{name}, step": functools.partial(_step, name) for name in OPTIMIZERS}
    duplicates = {f"duplicates by {way}": functools.partial(_duplicates, way) for way in ("slots", "sort")}
    return {"lookup": _lookup, "bag": _bag, **steps, **duplicates}


def _lookup(case: Case) -> Callable[[], Any]:
    read, table, ids = jax.jit(embax.lookup), _table(case), _ids(case)
    return lambda: read(table, next(ids))


def _bag(case: Case) -> Callable[[], Any]:
    def bag(table: embax.Table, ids: jax.Array) -> jax.Array:
        return embax.embedding_bag(table, jnp.reshape(ids, (-1, LENGTH)), mode="sum")

    read, table, ids = jax.jit(bag), _table(case), _ids(case)
    return lambda: read(table, next(ids))


def _step(optimizer: str, case: Case) -> Callable[[], Any]:
    tx = OPTIMIZERS[optimizer]()

    def loss(table: embax.Table, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = embax.lookup(table, ids)
        return first_number(rows, gradient), rows

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: embax.Table, state: Any, ids: jax.Array, gradient: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, rows), of_table = embax.value_and_grad(loss, has_aux=True)(table, ids, gradient)
        return *embax.optim.step(tx, of_table, state, table), rows

    table = _table(case)
    held, ids, gradient = [table, jax.jit(tx.init)(table)], _ids(case), jnp.asarray(gradient_of(case))

    def run() -> Any:
        held[0], held[1], rows = step(held[0], held[1], next(ids), gradient)
        return held, rows

    return run


def _duplicates(way: str, case: Case) -> Callable[[], Any]:
    """The sum of the gradients of each row, as it is before a step; which way is taken is chosen by platform."""
    held = [jnp.zeros(case.rows, jnp.int32) if way == "slots" else None]
    summed = jax.jit(functools.partial(combine, rows=case.rows), donate_argnums=0)
    ids, gradient = _ids(case), jnp.asarray(gradient_of(case))

    def run() -> Any:
        held[0], distinct = summed(held[0], next(ids), gradient)
        return held, distinct

    return run


def _table(case: Case) -> embax.Table:
    return embax.Table(jnp.full((case.rows, case.dim), 0.01, jnp.float32))


def _ids(case: Case) -> "itertools.cycle[jax.Array]":
    return itertools.cycle([jnp.asarray(ids) for ids in batches_of(case)])


def measure(work: str, case: Case, turns: int, calls: int = CALLS) -> Line:
    """Build a work and time it.

    Args:
      work: One of `works`.
      case: The size.
      turns: How often it is timed.
      calls: How many calls a turn has.

    Returns:
      The time of a call.
    """
    call = works()[work](case)
    start = time.perf_counter()
    jax.block_until_ready(call())
    compiling, seconds = time.perf_counter() - start, []
    for turn in range(turns + 2):
        start = time.perf_counter()
        done = [call() for _ in range(calls)][-1]  # they run one after the other
        jax.block_until_ready(done)
        if turn >= 2:
            seconds.append((time.perf_counter() - start) / calls)
    return Line(work, str(case), turns, time_of(seconds), compiling)


def fits(work: str, case: Case) -> bool:
    """Say whether a device has room for a work, where it says how much it has: half as much again as its arrays."""
    bytes_of = 4 * case.dim * (case.rows * ARRAYS.get(work.partition(",")[0], 1) + 4 * case.ids)
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return room is None or 1.5 * bytes_of < room


def table_of(lines: list[Line]) -> Table:
    """A row a work, a column a case."""
    cases = list(dict.fromkeys(line.case for line in lines))
    table = Table("us a call", *cases, title=jax.devices()[0].device_kind, title_justify="left")
    for work in works():
        cells = {line.case: line.seconds for line in lines if line.work == work}
        shown = {case: " ({:.0f} to {:.0f})".format(*(1e6 * x for x in time[1:])) for case, time in cells.items()}
        table.add_row(
            work, *(f"{1e6 * cells[case].median:.0f}" + shown[case] if case in cells else "" for case in cases)
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30, help="how often a work is timed")
    parser.add_argument("--seconds", type=float, default=300, help="after which no other work begins")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/accelerator.json"), help="the JSON")
    options = parser.parse_args(arguments)
    began, device = time.perf_counter(), jax.devices()[0]
    lines, left_out = [], []
    for case, work in itertools.product(SMALL if device.platform == "cpu" else SIZES, works()):
        if time.perf_counter() - began > options.seconds or not fits(work, case):
            left_out.append(f"{work}: {case}")
            continue
        lines.append(measure(work, case, options.turns))
        about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
        about |= {"embax": embax.__version__, "numpy": np.__version__, "seconds": time.perf_counter() - began}
        kept = [line._asdict() | {"seconds": list(line.seconds)} for line in lines]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": about, "lines": kept, "left out": left_out}, indent=1)
        options.output.write_text(text + "\n")
    Console(width=160).print(table_of(lines))
    median = statistics.median(line.compile_seconds for line in lines)
    print(f"Compiled in {median:.1f} s each. {'Left out: ' + ', '.join(left_out) if left_out else 'Nothing left out.'}")


if __name__ == "__main__":
    main()
