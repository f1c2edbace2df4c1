"""The time of a lookup and a training step of one table on a CPU, compared with XLA, torch, FBGEMM and memory speed.

With `--figure`, it also draws a step's time against the number of rows, compared with dense optax.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from measured import print_table, write
from processes import Process, start
from turns import Measured, Way, measure
from workload import IDS, ROWS, Case

FIRST = Case()
# Each of one difference to the first, and the rows that a table of the same bytes has.
OTHERS = (
    Case(law="uniform"),
    Case(dim=128),
    Case(rows=10 * ROWS, dim=16),
    Case(ids=1_024),
    Case(ids=65_536),
)
# Other ways to do a work: their name, who does it, by which name, and what part of its time embax may take in the first
# case. Unpooled, FBGEMM reads a sequence; it has another program for bags, also of one id.
Others = tuple[tuple[str, str, str, float | None], ...]
PEERS: dict[str, Others] = {
    "lookup": (
        ("torch", "peers", "torch lookup", 1.5),
        ("FBGEMM, unpooled", "peers", "FBGEMM lookup, unpooled", None),
        ("`weight[ids]`", "XLA", "weight[ids]", None),
    ),
    "SGD": (
        ("torch", "peers", "torch SGD", 0.6),
        ("FBGEMM, unpooled", "peers", "FBGEMM SGD, unpooled", None),
        ("FBGEMM, bags of one", "peers", "FBGEMM SGD, bags of one", None),
    ),
    "Adagrad": (("torch", "peers", "torch Adagrad", 0.35),),
    "Adam": (("torch SparseAdam", "peers", "torch Adam", 0.3),),
    "row-wise Adagrad": (
        ("FBGEMM, unpooled", "peers", "FBGEMM row-wise Adagrad, unpooled", 0.2),
        ("FBGEMM, bags of one", "peers", "FBGEMM row-wise Adagrad, bags of one", 0.3),
    ),
}
STEPS = ("SGD", "Adagrad", "Adam", "row-wise Adagrad")
# Where the figure has points. Dense Adam of 3 million rows holds 2.3 GB and its gradient.
FIGURE_ROWS = (10_000, 100_000, 1_000_000, 3_000_000)


def ways_of(work: str, case: Case, others: Others, more: Others = ()) -> list[Way]:
    """All ways to do a work; those of XLA, which take longest to compile, in the first case only.

    Args:
      work: The work.
      case: Its sizes.
      others: Other ways, as in PEERS; they come last.
      more: More ways of embax, which come second.
    """
    own = [Way(name, name, work, case) for name in ("embax", "XLA", "limit")]
    of_embax, peers = (
        [Way(name, process, theirs, case, most) for name, process, theirs, most in x] for x in (more, others)
    )
    ways = [own[0], *of_embax, *own[1:], *peers]
    return ways if case == FIRST else [way._replace(most=None) for way in ways if way.process != "XLA"]


def in_cases(processes: Mapping[str, Process], seconds: float) -> Iterator[Measured]:
    """All works in all cases; the first case has twice the time."""
    for case in (FIRST, *OTHERS):
        for work in PEERS:
            yield measure(processes, work, ways_of(work, case, PEERS[work]), seconds * (2 if case == FIRST else 1))


def beside_rows(processes: Mapping[str, Process], seconds: float) -> Iterator[Measured]:
    """Ten times the rows, the same number of ids; the memory's limit beside its own."""
    cases = {f"{rows:,} rows": Case(rows=rows) for rows in (10 * ROWS, ROWS)}
    for process in ("embax", "limit"):
        for work in STEPS if process in processes else ():
            most = 1.3 if process == "embax" else None
            ways = [Way(name, process, work, case, most if case == FIRST else None) for name, case in cases.items()]
            yield measure(processes, f"{work}, {process}", ways, seconds)


def beside_dense(processes: Mapping[str, Process], seconds: float) -> Measured:
    """Adam on the rows that were read beside Adam on all."""
    ours = [Way(name, name, "Adam", FIRST) for name in ("embax", "XLA")]
    dense = Way("dense optax.adam, donated", "XLA", "Adam, dense", FIRST, 0.06)
    return measure(processes, "Adam", [*ours, dense], seconds)


def figure(path: Path, processes: Mapping[str, Process], seconds: float) -> None:
    """Draw the time of a step against the number of rows."""
    lines = {"dense": "optax.adam, dense gradient", "XLA": "embax.optim.adam, by XLA", "embax": "by native kernels"}
    points: dict[str, list[float]] = {name: [] for name in lines}
    for rows in FIGURE_ROWS:
        case = Case(rows=rows)
        ways = [Way(name, name, "Adam", case) for name in ("embax", "XLA")]
        found = measure(processes, "Adam", [*ways, Way("dense", "XLA", "Adam, dense", case)], seconds, runs=2)
        for name, time in found.seconds.items():
            points[name].append(1e3 * time.median)
    drawn, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, label), color in zip(lines.items(), ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        if points[name]:
            axes.loglog(FIGURE_ROWS, points[name], "o-", color=color, label=label)
    axes.set(xlabel="rows of the table", ylabel="time of a step, ms")
    axes.set_title(f"{IDS:,} ids a step, 64 numbers a row, 2 CPU cores", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Measure, print tables, and write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", metavar="PYTHON", help="measure torch and FBGEMM, too, by this environment's python")
    parser.add_argument("--seconds", type=float, default=2, help="how long the turns of a work go on")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    parser.add_argument("--figure", type=Path, help="draw the figure to this file")
    options = parser.parse_args()
    processes = start(options.peers)
    path, groups = options.output / "row_sparse.json", {"cases": [], "rows": [], "dense": []}
    for name, lines in (
        ("cases", in_cases(processes, options.seconds)),
        ("rows", beside_rows(processes, options.seconds)),
        ("dense", iter([beside_dense(processes, options.seconds)])),
    ):
        for line in lines:
            groups[name].append(line)
            print_table(line)
            write(path, processes, groups)
    if options.figure:
        figure(options.figure, processes, options.seconds)
    for process in processes.values():
        process.close()


if __name__ == "__main__":
    main()
