"""A tiny language model with a tied head in brainstate: `embax.Embedding` in the place of `brainstate.nn.Embedding`."""

from collections.abc import Callable

import brainstate
import jax
import optax
import shakespeare
from shakespeare import CONTEXT, DIM, HIDDEN

import embax


class Model(brainstate.nn.Module):
    """The words before a word to the vector that the word's own is compared with."""

    def __init__(self, rows: int):
        super().__init__()
        init = jax.nn.initializers.normal(DIM**-0.5)
        self.words = embax.Embedding(rows, DIM, embedding_init=init, padding_idx=0)
        self.hidden = brainstate.nn.Linear(CONTEXT * DIM, HIDDEN, b_init=None)
        self.out = brainstate.nn.Linear(HIDDEN, DIM, b_init=None)

    def update(self, contexts: jax.Array) -> jax.Array:
        """Return one vector for each row of contexts."""
        rows = self.words(contexts)  # (batch, CONTEXT, DIM)
        return self.out(jax.nn.gelu(self.hidden(rows.reshape(len(rows), -1))))


def start(rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a model and return its training step."""
    brainstate.random.seed(0)
    model = Model(rows)
    weights = model.states(brainstate.ParamState)
    optimizer = embax.brainstate.Optimizer(embax.optim.lift(optax.adam(shakespeare.LEARNING_RATE)))
    optimizer = optimizer.register_trainable_weights(weights)

    def loss(contexts: jax.Array, targets: jax.Array) -> jax.Array:
        vectors = model(contexts)
        return embax.softmax_cross_entropy(model.words.table, vectors, targets, mask_padding=True, reduction="mean")

    @embax.brainstate.jit
    def step(contexts: jax.Array, targets: jax.Array) -> jax.Array:
        gradients, value = embax.brainstate.grad(loss, weights, return_value=True)(contexts, targets)
        optimizer.update(gradients)
        return value

    return step


if __name__ == "__main__":
    shakespeare.train(start)
