"""What a training step of one table costs: beside dense optax, beside more rows, and beside torch and FBGEMM.

A step looks rows up, takes their gradient as given, and changes the table. The rows are part of what it returns, since
a model would go on with them.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from peers import Peer
from timing import Ratio, in_turns, ratio, report, timed
from workload import BATCHES, DIM, LEARNING_RATE, ROWS, batches, cotangent

import embax

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "row-wise Adagrad": lambda: embax.optim.rowwise_adagrad(LEARNING_RATE),
    "Adagrad": lambda: embax.optim.adagrad(LEARNING_RATE, 0.0, 1e-10),
    "SGD": lambda: embax.optim.sgd(LEARNING_RATE),
    "Adam": lambda: embax.optim.adam(LEARNING_RATE),
}
# Ours, a peer's, and the most that ours may take of its time.
PEERS = (
    ("row-wise Adagrad", "FBGEMM row-wise Adagrad", 0.45),
    ("row-wise Adagrad", "FBGEMM row-wise Adagrad, bags of one", None),
    ("Adagrad", "torch Adagrad", 0.8),
    ("SGD", "torch SGD", 0.5),
    ("SGD", "FBGEMM SGD", 0.5),
    ("SGD", "FBGEMM SGD, bags of one", None),
    ("Adam", "torch SparseAdam", 0.9),
)
# Where the figure has points. Dense Adam of 3 million rows holds 2.3 GB and its gradient.
FIGURE_ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)


def sparse_step(optimizer: str, rows: int) -> Callable[[], float]:
    """Our step."""
    return _step(OPTIMIZERS[optimizer](), rows, embax.value_and_grad, embax.optim.step)


def dense_step(rows: int) -> Callable[[], float]:
    """The step that JAX and optax take: Adam over a dense gradient, donated."""

    def step(tx: optax.GradientTransformation, gradient: Any, state: Any, table: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient, state, table)
        return optax.apply_updates(table, updates), state

    return _step(optax.adam(LEARNING_RATE), rows, jax.value_and_grad, step)


def _step(
    tx: optax.GradientTransformation,
    rows: int,
    value_and_grad: Callable[..., Any],
    step_of: Callable[..., Any],
) -> Callable[[], float]:
    def loss(table: embax.Table, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        read = embax.lookup(table, ids)
        return jnp.vdot(read, gradient), read

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(table: embax.Table, state: Any, ids: jax.Array, gradient: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, read), of_table = value_and_grad(loss, has_aux=True)(table, ids, gradient)
        return *step_of(tx, of_table, state, table), read

    table = embax.Table.create(jax.random.key(0), rows, DIM)
    held = [table, jax.jit(tx.init)(table)]
    all_ids, gradient, turns = jnp.asarray(batches(rows)), jnp.asarray(cotangent()), itertools.count()
    all_ids = [all_ids[i] for i in range(BATCHES)]

    def run() -> Any:
        held[0], held[1], read = step(held[0], held[1], all_ids[next(turns) % BATCHES], gradient)
        return held, read

    return timed(run)


def lookup_only(rows: int) -> Callable[[], float]:
    """A jitted lookup."""
    table, turns = embax.Table.create(jax.random.key(0), rows, DIM), itertools.count()
    all_ids, read = [jnp.asarray(ids) for ids in batches(rows)], jax.jit(embax.lookup)
    return timed(lambda: read(table, all_ids[next(turns) % BATCHES]))


def against_dense(rounds: int) -> list[Ratio]:
    """Adam on the rows that were read beside Adam on all."""
    return [ratio("Adam", sparse_step("Adam", ROWS), "dense optax.adam, donated", dense_step(ROWS), 0.06, rounds)]


def against_rows(rounds: int) -> list[Ratio]:
    """Ten times the rows, the same number of ids."""
    many = 10 * ROWS
    return [
        ratio(f"{name}, {many:,} rows", sparse_step(name, many), f"{ROWS:,} rows", sparse_step(name, ROWS), 2, rounds)
        for name in OPTIMIZERS
    ]


def against_peers(python: str, rounds: int) -> list[Ratio]:
    """The other libraries, each in turns with ours."""
    peer = Peer(python)
    lines = [
        ratio(name, sparse_step(name, ROWS), other, peer.step(other, ROWS), limit, rounds)
        for name, other, limit in PEERS
    ]
    lines.append(ratio("lookup", lookup_only(ROWS), "torch lookup", peer.step("torch lookup", ROWS), None, rounds))
    peer.close()
    return lines


def figure(path: Path, rounds: int) -> None:
    """Draw the time of a step against the number of rows."""
    times: dict[str, list[float]] = {"dense": [], "embax": []}
    for rows in FIGURE_ROWS:
        measured = in_turns({"dense": dense_step(rows), "embax": sparse_step("Adam", rows)}, rounds)
        for name, values in measured.items():
            times[name].append(1e3 * sorted(values)[len(values) // 2])
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.loglog(FIGURE_ROWS, times["dense"], "o-", color="tab:gray", label="optax.adam, dense gradient")
    axes.loglog(FIGURE_ROWS, times["embax"], "o-", color="tab:blue", label="embax.optim.adam")
    axes.set(xlabel="rows of the table", ylabel="time of a step, ms")
    axes.set_title("16,384 ids a step, 64 numbers a row, 2 CPU cores", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main() -> None:
    """Measure, print a table, and write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", metavar="PYTHON", help="measure the peers, too, with this environment's python")
    parser.add_argument("--rounds", type=int, default=50, help="turns a line, 30 or more")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    parser.add_argument("--figure", type=Path, help="draw the figure to this file")
    options = parser.parse_args()
    if options.peers:
        lines, name = against_peers(options.peers, options.rounds), "row_sparse_peers"
    else:
        lines, name = against_dense(options.rounds) + against_rows(options.rounds), "row_sparse"
    report("a training step", lines, options.output / f"{name}.json")
    if options.figure:
        figure(options.figure, 30)


if __name__ == "__main__":
    main()
