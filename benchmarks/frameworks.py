"""What a call of each framework's layer costs beside that framework's own layer, and beside plain indexing."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import Ratio, ratio, report, timed
from workload import DIM, IDS, ROWS

import embax
import embax.equinox
import embax.nnx

SMALL, FEW = 1_000, 128
ROUNDS = 100


def layers(weight: jax.Array) -> dict[str, Any]:
    """Make each framework's layer of embax of a weight."""
    table = embax.Table(weight)
    kinds = {"brainstate": embax.Embedding, "Flax NNX": embax.nnx.Embedding, "Equinox": embax.equinox.Embedding}
    return {name: kind.from_table(table) for name, kind in kinds.items()}


def eager() -> list[Ratio]:
    """A few ids into a small table: the cost of a call."""
    weight = jax.random.normal(jax.random.key(0), (SMALL, DIM))
    ids = random_ids(FEW, SMALL)
    ours = layers(weight)
    of_brainstate = brainstate.nn.Embedding(SMALL, DIM, embedding_init=weight)
    of_nnx = nnx.Embed(SMALL, DIM, rngs=nnx.Rngs(0))
    of_equinox = eqx.nn.Embedding(weight=weight)
    theirs: dict[str, tuple[str, Callable[[], Any], float]] = {
        "brainstate": ("brainstate.nn.Embedding", lambda: of_brainstate(ids), 0.5),
        "Flax NNX": ("nnx.Embed", lambda: of_nnx(ids), 1.5),
        "Equinox": ("jax.vmap of equinox.nn.Embedding", lambda: jax.vmap(of_equinox)(ids), 1.5),
    }
    work = f"{{}}, eager, {FEW} ids into {SMALL:,} x {DIM}"
    return [
        ratio(work.format(name), timed(lambda layer=ours[name]: layer(ids)), peer, timed(call), limit, ROUNDS)
        for name, (peer, call, limit) in theirs.items()
    ]


def jitted() -> list[Ratio]:
    """Many ids into a large table: a layer without rules is to cost what indexing costs.

    Once under `jax.jit`, and once under the framework's own jit, whose calls cost more, beside plain indexing under the
    same. NNX's carries every Param out again and so copies it, unless it is donated.
    """
    weight = jax.random.normal(jax.random.key(0), (ROWS, DIM))
    ids = random_ids(IDS, ROWS)
    index, lookup, table = jax.jit(lambda weight, ids: weight[ids]), jax.jit(embax.lookup), embax.Table(weight)
    calls = {"embax.lookup": lambda: lookup(table, ids)}
    for name, layer in layers(weight).items():
        calls[f"{name}, jax.jit"] = functools.partial(jax.jit(layer), ids)
    plain = timed(lambda: index(weight, ids))
    work = f"{{}}, {IDS:,} ids into {ROWS:,} x {DIM}"
    lines = [
        ratio(work.format(name), timed(call), "jitted weight[ids]", plain, 1.1, ROUNDS) for name, call in calls.items()
    ]
    return lines + [
        ratio(work.format(f"{name}, its own jit"), timed(call), "weight[ids], its own jit", timed(index), 1.1, ROUNDS)
        for name, (call, index) in own_jits(weight, ids).items()
    ]


def own_jits(weight: jax.Array, ids: jax.Array) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Make, for each framework, a call of the layer and one of plain indexing, both compiled by that framework."""
    ours = layers(weight)
    state, param = brainstate.ParamState(weight), nnx.Param(weight.copy())
    of_brainstate = brainstate.transform.jit(ours["brainstate"])
    index_of_brainstate = brainstate.transform.jit(lambda ids: state.value[ids])
    of_nnx = nnx.jit(lambda layer, ids: layer(ids), donate_argnums=0)
    index_of_nnx = nnx.jit(lambda param, ids: param[...][ids], donate_argnums=0)
    module = embax.nnx.Embedding.from_table(embax.Table(weight.copy()))
    of_equinox = eqx.filter_jit(lambda layer, ids: layer(ids))
    index_of_equinox = eqx.filter_jit(lambda weight, ids: weight[ids])
    return {
        "brainstate": (lambda: of_brainstate(ids), lambda: index_of_brainstate(ids)),
        "Flax NNX": (lambda: of_nnx(module, ids), lambda: index_of_nnx(param, ids)),
        "Equinox": (lambda: of_equinox(ours["Equinox"], ids), lambda: index_of_equinox(weight, ids)),
    }


def random_ids(number: int, rows: int) -> jax.Array:
    """Draw ids uniformly."""
    return jnp.asarray(np.random.default_rng(0).integers(0, rows, number, dtype=np.int32))


if __name__ == "__main__":
    report("A call of each framework's layer", eager() + jitted(), Path("build/benchmarks/frameworks.json"))
