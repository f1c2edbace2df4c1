"""A tiny language model with a tied head in Flax NNX: `embax.nnx.Embedding` in the place of `nnx.Embed`."""

from collections.abc import Callable

import jax
import optax
import shakespeare
from flax import nnx
from shakespeare import CONTEXT, DIM, HIDDEN

import embax
import embax.nnx


class Model(nnx.Module):
    """The words before a word to the vector that the word's own is compared with."""

    def __init__(self, rows: int, rngs: nnx.Rngs):
        self.words = embax.nnx.Embedding(rows, DIM, padding_idx=0, rngs=rngs)
        self.hidden = nnx.Linear(CONTEXT * DIM, HIDDEN, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, DIM, use_bias=False, rngs=rngs)

    def __call__(self, contexts: jax.Array) -> jax.Array:
        """Return one vector for each row of contexts."""
        rows = self.words(contexts)  # (batch, CONTEXT, DIM)
        return self.out(nnx.gelu(self.hidden(rows.reshape(len(rows), -1))))


def loss(model: Model, contexts: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss, in nats a word."""
    vectors = model(contexts)
    return embax.softmax_cross_entropy(model.words.table, vectors, targets, mask_padding=True, reduction="mean")


def start(rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make a model and return its training step."""
    model = Model(rows, nnx.Rngs(0))
    optimizer = embax.nnx.Optimizer(model, embax.optim.lift(optax.adam(shakespeare.LEARNING_RATE)), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def update(model: Model, optimizer: embax.nnx.Optimizer, contexts: jax.Array, targets: jax.Array) -> jax.Array:
        value, gradient = embax.nnx.value_and_grad(loss)(model, contexts, targets)
        optimizer.update(model, gradient)
        return value

    return lambda contexts, targets: update(model, optimizer, contexts, targets)


if __name__ == "__main__":
    shakespeare.train(start)
