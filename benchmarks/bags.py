"""What bags, and many tables, cost on a CPU, beside XLA, torch, FBGEMM and what the memory allows."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from measured import print_table, write
from processes import Process, start
from row_sparse import FIRST, OTHERS, Others, ways_of
from turns import Measured, Way, measure
from workload import Tables

# As in row_sparse.py.
PEERS: dict[str, Others] = {
    "bag": (
        ("torch EmbeddingBag", "peers", "torch bag", 1.8),
        ("FBGEMM", "peers", "FBGEMM lookup, bags", None),
        ("`weight[ids].sum(1)`", "XLA", "weight[ids].sum(1)", None),
    ),
    "row-wise Adagrad, bags": (("FBGEMM", "peers", "FBGEMM row-wise Adagrad, bags", 0.3),),
    "SGD, bags": (("FBGEMM", "peers", "FBGEMM SGD, bags", None),),
}
OF_EMBAX: dict[str, Others] = {"bag": (("embax, Ragged", "embax", "ragged bag", None),)}
# 40 bags a table, and 4,096.
TABLES = (Tables(bags=40), Tables())


def in_cases(processes: Mapping[str, Process], seconds: float) -> Iterator[Measured]:
    """All works in all cases; the first case has twice the time."""
    for case in (FIRST, *OTHERS):
        for work in PEERS if case == FIRST else ("bag", "row-wise Adagrad, bags"):
            ways = ways_of(work, case, PEERS[work], OF_EMBAX.get(work, ()))
            yield measure(processes, work, ways, seconds * (2 if case == FIRST else 1))


def of_tables(processes: Mapping[str, Process], seconds: float) -> Iterator[Measured]:
    """Many tables: stored as one by a Collection, and one by one."""
    for case in TABLES:
        ways = [
            Way("embax", "embax", "Collection", case),
            Way("embax, one by one", "embax", "one by one", case),
            Way("XLA", "XLA", "Collection", case),
            Way("limit", "limit", "tables", case),
            Way("FBGEMM", "peers", "FBGEMM tables", case, 0.5 if case == Tables() else None),
        ]
        yield measure(processes, "tables", ways, seconds, runs=3)


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", metavar="PYTHON", help="measure torch and FBGEMM, too, by this environment's python")
    parser.add_argument("--seconds", type=float, default=2, help="how long the turns of a work go on")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    processes, groups = start(options.peers), {"cases": [], "tables": []}
    for name, measure_all in (("cases", in_cases), ("tables", of_tables)):
        for line in measure_all(processes, options.seconds):
            groups[name].append(line)
            print_table(line)
            write(options.output / "bags.json", processes, groups)
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
