"""What calls with few ids cost on a CPU, called directly and compiled, with native kernels and without."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from measured import print_table, write
from processes import Process, start
from turns import Measured, Way, measure
from workload import Case

CASE = Case(ids=64)
WORKS = ("lookup", "eager lookup", "bag", "eager bag", "SGD", "Adagrad", "Adam", "row-wise Adagrad")
RUNS = 40  # a turn


def small_calls(processes: Mapping[str, Process], seconds: float) -> Iterator[Measured]:
    """Each call in turns."""
    for work in WORKS:
        ways = [Way(name, name, work, CASE) for name in ("embax", "XLA")]
        yield measure(processes, work, ways, seconds, runs=RUNS)


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="how long the turns of a call go on")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    processes, lines = start(None), []
    for line in small_calls(processes, options.seconds):
        lines.append(line)
        print_table(line)
        write(options.output / "calls.json", processes, {"calls": lines})
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
