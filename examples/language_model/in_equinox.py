"""A tiny language model with a tied head in Equinox: `embax.equinox.Embedding` in the place of `eqx.nn.Embedding`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax
import shakespeare
from shakespeare import CONTEXT, DIM, HIDDEN

import embax
import embax.equinox


class Model(eqx.Module):
    """The words before a word to the vector that the word's own is compared with."""

    words: embax.equinox.Embedding
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, rows: int, key: jax.Array):
        words, hidden, out = jax.random.split(key, 3)
        init = jax.nn.initializers.normal(DIM**-0.5)
        self.words = embax.equinox.Embedding(rows, DIM, key=words, init=init, padding_idx=0)
        self.hidden = eqx.nn.Linear(CONTEXT * DIM, HIDDEN, use_bias=False, key=hidden)
        self.out = eqx.nn.Linear(HIDDEN, DIM, use_bias=False, key=out)

    def __call__(self, contexts: jax.Array) -> jax.Array:
        """Return one vector for each row of contexts."""
        rows = self.words(contexts)  # (batch, CONTEXT, DIM)
        return jax.vmap(lambda row: self.out(jax.nn.gelu(self.hidden(row))))(rows.reshape(len(rows), -1))


def loss(model: Model, contexts: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss, in nats a word."""
    vectors = model(contexts)
    return embax.softmax_cross_entropy(model.words.table, vectors, targets, mask_padding=True, reduction="mean")


def start(rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a model and return its training step."""
    tx = embax.optim.lift(optax.adam(shakespeare.LEARNING_RATE))
    model = Model(rows, jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def update(batch: tuple[jax.Array, jax.Array], model: Model, state: Any) -> Any:
        value, gradient = embax.value_and_grad(loss)(model, *batch)
        updates, state = tx.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return embax.apply_updates(model, updates), state, value

    def step(contexts: jax.Array, targets: jax.Array) -> jax.Array:
        nonlocal model, state
        model, state, value = update((contexts, targets), model, state)
        return value

    return step


if __name__ == "__main__":
    shakespeare.train(start)
