"""What a head costs: its loss and gradient beside the plain way through the logits, in time and in memory.

And the loss over sampled rows beside that over all, and beside itself with ten times the rows.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table
from timing import Ratio, ratio, report, timed

import embax

ROWS, SAMPLES = 32_768, 1_024
SIZES = ((512, 64), (512, 256), (512, 768), (2_048, 64), (2_048, 256), (2_048, 768))  # tokens, dim
CHUNKS = (128, 512, 2_048)
# Where there are no logits, memory should not follow the rows.
MEMORY_ROWS = (8_192, 65_536)


class Memory(NamedTuple):
    """Temporary memory of a compiled program."""

    work: str
    rows: int
    bytes: int


def plain(table: embax.Table, x: jax.Array, labels: jax.Array) -> jax.Array:
    """What one would write without embax."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ table.weight.T, labels)


def blocks(chunk: int | None = None) -> Callable[..., jax.Array]:
    """Ours, by blocks of so many rows."""
    return lambda table, x, labels: embax.softmax_cross_entropy(table, x, labels, chunk=chunk)


def sampled(table: embax.Table, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Ours, over some rows."""
    return embax.sampled_softmax(table, x, labels, jax.random.key(2), samples=SAMPLES)


def compiled(function: Callable[..., jax.Array], *args: Any) -> Any:
    """The mean of the losses, with the gradients of the table and of the vectors, compiled."""

    def loss(table: embax.Table, x: jax.Array, labels: jax.Array) -> jax.Array:
        return function(table, x, labels).mean()

    return jax.jit(embax.value_and_grad(loss, argnums=(0, 1), on_dense="allow")).lower(*args).compile()


def with_gradient(function: Callable[..., jax.Array], tokens: int, dim: int, rows: int = ROWS) -> Callable[[], float]:
    """The same on random numbers, timed."""
    keys = jax.random.split(jax.random.key(0), 3)
    table = embax.Table.create(keys[0], rows, dim)
    x, labels = jax.random.normal(keys[1], (tokens, dim)), jax.random.randint(keys[2], (tokens,), 0, rows)
    program = compiled(function, table, x, labels)
    return timed(lambda: program(table, x, labels))


def against_logits(rounds: int) -> list[Ratio]:
    """All rows, by blocks of the default size and of others, beside the plain way."""
    lines = []
    for tokens, dim in SIZES:
        name, limit = f"{tokens:,} tokens, dim {dim}", 1.3
        theirs = with_gradient(plain, tokens, dim)
        ours = with_gradient(blocks(), tokens, dim)
        lines.append(ratio(f"cross-entropy, {name}", ours, "optax on x @ W.T", theirs, limit, rounds, 1, 2))
        for chunk in CHUNKS:
            ours = with_gradient(blocks(chunk), tokens, dim)
            lines.append(ratio(f"chunk {chunk:,}, {name}", ours, "optax on x @ W.T", theirs, None, rounds, 1, 2))
    return lines


def against_all_rows(rounds: int) -> list[Ratio]:
    """The sampled loss."""
    tokens, dim = 512, 256
    name = f"sampled, {tokens:,} tokens, dim {dim}, {SAMPLES:,} of"
    many = with_gradient(sampled, tokens, dim, 16 * ROWS)
    few, whole = with_gradient(sampled, tokens, dim), with_gradient(blocks(), tokens, dim)
    return [
        ratio(f"{name} {ROWS:,} rows", few, "cross-entropy", whole, 0.25, rounds),
        ratio(f"{name} {16 * ROWS:,} rows", many, f"{ROWS:,} rows", few, 2, rounds),
    ]


def memory() -> list[Memory]:
    """Temporary memory beside that of the plain way, with few rows and with many."""
    tokens, dim = 2_048, 256
    x, labels = jax.ShapeDtypeStruct((tokens, dim), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    lines = []
    for name, function in (("x @ W.T", plain), ("cross-entropy", blocks()), ("sampled", sampled)):
        for rows in MEMORY_ROWS:
            table = embax.Table(jax.ShapeDtypeStruct((rows, dim), jnp.float32))
            needed = compiled(function, table, x, labels).memory_analysis().temp_size_in_bytes
            lines.append(Memory(f"{name}, {tokens:,} tokens, dim {dim}", rows, needed))
    return lines


def report_memory(lines: list[Memory], output: Path) -> None:
    """Print temporary memory as a table, and write it as JSON."""
    table = Table("value and gradient", "rows", "temporary memory", title="heads", title_justify="left")
    for line in lines:
        table.add_row(line.work, f"{line.rows:,}", f"{line.bytes / 2**20:.2f} MiB")
    Console(width=140).print(table)
    output.write_text(json.dumps([line._asdict() for line in lines], indent=2) + "\n")


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="turns a line, 30 or more")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    lines = against_all_rows(options.rounds) + against_logits(options.rounds)
    report("heads", lines, options.output / "heads.json")
    report_memory(memory(), options.output / "heads_memory.json")


if __name__ == "__main__":
    main()
