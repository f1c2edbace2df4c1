"""The time of a lookup compared with plain indexing, and of clipping by `max_norm` compared with brainstate's layer."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from timing import compare

import embax

ROWS, DIM = 1_000_000, 64


def jitted_lookup() -> None:
    """16,384 ids: a table without rules is to cost what indexing costs."""
    table = embax.Table.create(jax.random.key(0), ROWS, DIM)
    ids = random_ids(16_384)
    index = jax.jit(lambda weight, ids: weight[ids])
    lookup = jax.jit(embax.lookup)
    every_rule = embax.Table(table.weight, padding_idx=0, max_norm=1.0, scale_grad_by_freq=True)
    compare(
        f"jitted, 16,384 ids into {ROWS:,} x {DIM}",
        {
            "weight[ids]": lambda: index(table.weight, ids),
            "embax.lookup": lambda: lookup(table, ids),
            "embax.lookup, padding and max_norm": lambda: lookup(every_rule, ids),
        },
    )


def max_norm() -> None:
    """128 ids into a large table: storing the clipped rows is to cost those rows."""
    ids = random_ids(128)

    def layer() -> embax.Embedding:
        return embax.Embedding(ROWS, DIM, max_norm=1.0)

    in_place, copied, eager = layer(), layer(), layer()
    theirs = brainstate.nn.Embedding(ROWS, DIM, max_norm=1.0)
    in_place_call = embax.brainstate.jit(in_place)
    copied_call, theirs_call = brainstate.transform.jit(copied), brainstate.transform.jit(theirs)
    compare(
        f"max_norm, 128 ids into {ROWS:,} x {DIM}",
        {
            "embax, embax.brainstate.jit": lambda: (in_place_call(ids), in_place.weight.value),
            "embax, brainstate's jit": lambda: (copied_call(ids), copied.weight.value),
            "embax, eager": lambda: (eager(ids), eager.weight.value),
            "brainstate, its jit (stores nothing)": lambda: (theirs_call(ids), theirs.weight.value),
        },
        rounds=20,
    )


def random_ids(number: int, rows: int = ROWS) -> jax.Array:
    """Draw ids uniformly."""
    return jnp.asarray(np.random.default_rng(0).integers(0, rows, number, dtype=np.int32))


if __name__ == "__main__":
    jitted_lookup()
    max_norm()
