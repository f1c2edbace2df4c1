"""What a training step of a model with a framework's own embedding layer costs, by rows and densely.

The models of docs/nnx.md, docs/equinox.md and docs/brainstate.md: an embedding, the mean of a bag of ids, a linear
layer and cross entropy, trained by AdamW. Both steps change the model and the state in place.
"""

import argparse
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import keystr
from timing import Ratio, ratio, report, timed
from workload import BAGS, BATCHES, DIM, LENGTH, ROWS, zipf

import embax
import embax.nnx

CLASSES, RATE = 2, 1e-3


def tables(path: Any, leaf: Any) -> bool:
    """Choose the embedding, in each framework."""
    return "embedding" in keystr(path)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean over the bags."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class NnxModel(nnx.Module):
    """A model of Flax NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding, self.head = nnx.Embed(ROWS, DIM, rngs=rngs), nnx.Linear(DIM, CLASSES, rngs=rngs)

    def loss(self, ids: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the loss of a batch."""
        return cross_entropy(self.head(self.embedding(ids).mean(axis=1)), labels)


def of_nnx(by_rows: bool) -> Callable[..., Any]:
    """Make a step of Flax NNX."""
    model = NnxModel(nnx.Rngs(0))
    if by_rows:
        optimizer = embax.nnx.Optimizer(model, embax.optim.lift(optax.adamw(RATE), tables=tables))
        differentiated = embax.nnx.value_and_grad(NnxModel.loss, tables=tables)
    else:
        optimizer = nnx.Optimizer(model, optax.adamw(RATE), wrt=nnx.Param)
        differentiated = nnx.value_and_grad(NnxModel.loss)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: NnxModel, optimizer: nnx.Optimizer, ids: jax.Array, labels: jax.Array) -> jax.Array:
        value, gradient = differentiated(model, ids, labels)
        optimizer.update(model, gradient)
        return value

    return lambda *batch: (step(model, optimizer, *batch), nnx.state((model, optimizer)))


class EquinoxModel(eqx.Module):
    """A model of Equinox."""

    embedding: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return the logits of a bag."""
        return self.head(jax.vmap(self.embedding)(ids).mean(axis=0))


def of_equinox(by_rows: bool) -> Callable[..., Any]:
    """Make a step of Equinox."""
    keys = jax.random.split(jax.random.key(0))
    model = EquinoxModel(eqx.nn.Embedding(ROWS, DIM, key=keys[0]), eqx.nn.Linear(DIM, CLASSES, key=keys[1]))

    def loss(model: EquinoxModel, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(model)(ids), labels)

    if by_rows:
        tx: optax.GradientTransformation = embax.optim.lift(optax.adamw(RATE), tables=tables)
        differentiated, apply_updates = embax.value_and_grad(loss, tables=tables), embax.apply_updates
    else:
        tx, differentiated, apply_updates = optax.adamw(RATE), eqx.filter_value_and_grad(loss), eqx.apply_updates

    @eqx.filter_jit(donate="all-except-first")
    def step(batch: tuple[jax.Array, jax.Array], model: EquinoxModel, state: Any) -> Any:
        value, gradient = differentiated(model, *batch)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return apply_updates(model, updates), state, value

    held = [model, tx.init(eqx.filter(model, eqx.is_inexact_array))]

    def run(*batch: jax.Array) -> Any:
        held[0], held[1], value = step(batch, *held)
        return value, eqx.filter(held, eqx.is_array)

    return run


class BrainstateModel(brainstate.nn.Module):
    """A model of brainstate."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = brainstate.nn.Embedding(ROWS, DIM), brainstate.nn.Linear(DIM, CLASSES)

    def update(self, ids: jax.Array) -> jax.Array:
        """Return the logits of bags."""
        return self.head(self.embedding(ids).mean(axis=1))


def of_brainstate(by_rows: bool) -> Callable[..., Any]:
    """Make a step of brainstate; the dense one by optax, too, and in place by embax.brainstate.jit."""
    model = BrainstateModel()
    weights = model.states(brainstate.ParamState)

    def loss(ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(model(ids), labels)

    if by_rows:
        optimizer = embax.brainstate.Optimizer(embax.optim.lift(optax.adamw(RATE), tables=tables))
        differentiated = embax.brainstate.grad(loss, weights, return_value=True, tables=tables)
    else:
        optimizer = embax.brainstate.Optimizer(optax.adamw(RATE))
        differentiated = brainstate.transform.grad(loss, weights, return_value=True)
    optimizer.register_trainable_weights(weights)

    @embax.brainstate.jit
    def step(ids: jax.Array, labels: jax.Array) -> jax.Array:
        gradients, value = differentiated(ids, labels)
        optimizer.update(gradients)
        return value

    return lambda *batch: (step(*batch), [state.value for state in weights.values()], optimizer.opt_state.value)


FRAMEWORKS = {
    "nnx.Embed": of_nnx,
    "equinox.nn.Embedding": of_equinox,
    "brainstate.nn.Embedding": of_brainstate,
}


def measured(name: str, rounds: int) -> Ratio:
    """Measure both steps of a framework in turns."""
    ids = [jnp.asarray(x) for x in zipf(ROWS, (BATCHES, BAGS, LENGTH))]
    labels = jnp.asarray(np.random.default_rng(0).integers(0, CLASSES, BAGS, dtype=np.int32))

    def timed_step(by_rows: bool) -> Callable[[], float]:
        step, turns = FRAMEWORKS[name](by_rows), itertools.count()
        return timed(lambda: step(ids[next(turns) % BATCHES], labels))

    line = ratio(
        f"{name}, AdamW, {ROWS:,} x {DIM}, {BAGS:,} bags of {LENGTH}",
        timed_step(True),
        "the dense step, donated",
        timed_step(False),
        None,
        rounds,
    )
    gc.collect()  # so that the next framework has the memory of this one
    return line


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="turns a line, 30 or more")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="the folder for the JSON")
    options = parser.parse_args()
    lines = [measured(name, options.rounds) for name in FRAMEWORKS]
    report("A training step with a framework's own layer", lines, options.output / "other_layers.json")


if __name__ == "__main__":
    main()
