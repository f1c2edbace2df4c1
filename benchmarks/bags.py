"""What bags cost: beside a sum of gathered rows, beside torch and FBGEMM, and many tables stored as one."""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import Peer
from timing import Ratio, ratio, report, timed
from workload import BAGS, BATCHES, DIM, LEARNING_RATE, LENGTH, ROWS, batches, cotangent

import embax

TABLES, TABLE_ROWS, TABLE_DIM = 100, 100_000, 16
# Bags of one id a table: 4,096 in all of them, and in each.
FEW_BAGS, MANY_BAGS = 4_096 // TABLES, 4_096


def forward(function: Callable[..., jax.Array]) -> Callable[[], float]:
    """A jitted function of a table and bags of ids."""
    table = embax.Table.create(jax.random.key(0), ROWS, DIM)
    return _over(_bags_of_ids(), jax.jit(functools.partial(function, table)))


def plain(table: embax.Table, ids: jax.Array) -> jax.Array:
    """What one would write without a bag."""
    return table.weight[ids].sum(1)


def ragged(table: embax.Table, ids: jax.Array) -> jax.Array:
    """The same bags as a Ragged."""
    offsets = jnp.arange(0, BAGS * LENGTH + 1, LENGTH, dtype=jnp.int32)
    return embax.embedding_bag(table, embax.Ragged(jnp.ravel(ids), offsets), mode="sum")


def bag_step() -> Callable[[], float]:
    """A training step of one table by row-wise Adagrad; the gradient of the bags is given."""

    def loss(table: embax.Table, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = embax.embedding_bag(table, ids, mode="sum")
        return jnp.vdot(out, gradient), out

    table = embax.Table.create(jax.random.key(0), ROWS, DIM)
    return _training(table, loss, _bags_of_ids(), jnp.asarray(cotangent(BAGS)))


def collection_step(stacked: bool, bags: int) -> Callable[[], float]:
    """A training step of many tables by row-wise Adagrad, stored as one or one by one."""
    keys = jax.random.split(jax.random.key(0), TABLES)
    tables = {f"table{i}": embax.Table.create(keys[i], TABLE_ROWS, TABLE_DIM) for i in range(TABLES)}
    rng = np.random.default_rng(0)
    batch = [
        {name: jnp.asarray(rng.integers(0, TABLE_ROWS, (bags, 1), dtype=np.int32)) for name in tables}
        for _ in range(BATCHES // 4)
    ]

    def loss(params: Any, ids: dict[str, jax.Array], gradient: jax.Array) -> tuple[jax.Array, Any]:
        if stacked:
            out = params(ids)
        else:
            out = {name: embax.embedding_bag(params[name], ids[name], mode="sum") for name in params}
        return sum((jnp.vdot(x, gradient) for x in out.values()), start=jnp.float32(0)), out

    gradient = jnp.asarray(rng.normal(size=(bags, TABLE_DIM)).astype(np.float32))
    features = [embax.Feature(name, name, "sum") for name in tables]
    return _training(embax.Collection(tables, features) if stacked else tables, loss, batch, gradient)


def _bags_of_ids() -> list[jax.Array]:
    return [jnp.asarray(ids.reshape(BAGS, LENGTH)) for ids in batches(ROWS)]


def _over(batch: Sequence[Any], function: Callable[..., Any]) -> Callable[[], float]:
    """Run a function on one batch after the other."""
    turns = itertools.count()
    return timed(lambda: function(batch[next(turns) % len(batch)]))


def _training(params: Any, loss: Callable[..., Any], batch: Sequence[Any], gradient: jax.Array) -> Callable[[], float]:
    tx = embax.optim.rowwise_adagrad(LEARNING_RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: Any, gradient: jax.Array) -> tuple[Any, Any, Any]:
        (_, out), of_params = embax.value_and_grad(loss, has_aux=True)(params, ids, gradient)
        return *embax.optim.step(tx, of_params, state, params), out

    held = [params, tx.init(params)]

    def run(ids: Any) -> Any:
        held[0], held[1], out = step(held[0], held[1], ids, gradient)
        return held, out

    return _over(batch, run)


def against_jax(rounds: int) -> list[Ratio]:
    """Beside what JAX alone would do."""
    bag = functools.partial(embax.embedding_bag, mode="sum")
    lines = [
        ratio("bag forward", forward(bag), "jitted W[ids].sum(1)", forward(plain), 0.4, rounds),
        ratio("bag forward, Ragged", forward(ragged), "jitted W[ids].sum(1)", forward(plain), None, rounds),
    ]
    for bags, limit in ((FEW_BAGS, 0.3), (MANY_BAGS, None)):
        stacked, one_by_one = collection_step(True, bags), collection_step(False, bags)
        lines.append(ratio(f"{TABLES} tables of {bags:,} bags", stacked, "one by one", one_by_one, limit, rounds))
    return lines


def against_peers(python: str, rounds: int) -> list[Ratio]:
    """Beside torch and FBGEMM."""
    peer = Peer(python)
    bag, name = peer.step("torch EmbeddingBag", ROWS), "FBGEMM row-wise Adagrad, bags"
    ours = forward(functools.partial(embax.embedding_bag, mode="sum"))
    lines = [ratio("bag forward", ours, "torch EmbeddingBag", bag, 3.5, rounds)]
    lines.append(ratio("row-wise Adagrad, bags", bag_step(), name, peer.step(name, ROWS), 0.6, rounds))
    peer.close()
    return lines


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", metavar="PYTHON", help="measure the peers, too, with this environment's python")
    parser.add_argument("--rounds", type=int, default=50, help="turns a line, 30 or more")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    if options.peers:
        lines, name = against_peers(options.peers, options.rounds), "bags_peers"
    else:
        lines, name = against_jax(options.rounds), "bags"
    report("bags", lines, options.output / f"{name}.json")


if __name__ == "__main__":
    main()
