"""A tiny language model with a tied head in plain JAX: a Table among the parameters, and functions of it."""

import functools
from typing import Any

import jax
import optax
import shakespeare
from shakespeare import CONTEXT, DIM, HIDDEN

import embax

Params = dict[str, Any]


def init(key: jax.Array, rows: int) -> Params:
    """Make the parameters."""
    words, hidden, out = jax.random.split(key, 3)
    scaled = jax.nn.initializers.lecun_normal()
    return {
        "words": embax.Table.create(words, rows, DIM, padding_idx=0),
        "hidden": scaled(hidden, (CONTEXT * DIM, HIDDEN)),
        "out": scaled(out, (HIDDEN, DIM)),
    }


def loss(params: Params, contexts: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss, in nats a word."""
    rows = embax.lookup(params["words"], contexts)  # (batch, CONTEXT, DIM)
    hidden = jax.nn.gelu(rows.reshape(len(rows), -1) @ params["hidden"])
    vectors = hidden @ params["out"]
    return embax.softmax_cross_entropy(params["words"], vectors, targets, mask_padding=True, reduction="mean")


def start(rows: int) -> Any:
    """Make a model and return its training step."""
    tx = embax.optim.lift(optax.adam(shakespeare.LEARNING_RATE))
    params = init(jax.random.key(0), rows)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: Any, contexts: jax.Array, targets: jax.Array) -> Any:
        value, gradient = embax.value_and_grad(loss)(params, contexts, targets)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state, value

    def step(contexts: jax.Array, targets: jax.Array) -> jax.Array:
        nonlocal params, state
        params, state, value = update(params, state, contexts, targets)
        return value

    return step


if __name__ == "__main__":
    shakespeare.train(start)
