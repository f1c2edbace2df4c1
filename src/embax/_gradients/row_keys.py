"""Ids of rows held as random keys, for which JAX refuses arithmetic.

Of 3 rows, the ids `[2, 0, 3]`, the last one for none, are held as the words `[[0, 3], [0, 1], [0, 0]]`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Int, Integer, Key, PyTree

from .._core import ids as _ids

# What JAX says of arithmetic that does not know a RowGrad, which optax does for each leaf: in the name of the dtype of
# the ids, and in that of the type where trees do not match.
HINT = "put this inside of embax.optim.lift"


def _no_random_numbers(*_: Any) -> PyTree:
    raise TypeError("`jax.random` must be given a random key, got the ids of an embax.RowGrad. Leave them out.")


# Ids are held as random keys of two words of 32 bits.
KEYS = define_prng_impl(
    key_shape=(2,),
    seed=_no_random_numbers,
    split=_no_random_numbers,
    random_bits=_no_random_numbers,
    fold_in=_no_random_numbers,
    name="embax.RowGrad",
    tag=f"RowGrad: {HINT}",
)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def encode(ids: Integer[Array, "*length"], rows: int) -> Key[Array, "*length"]:
    """Hold ids as keys: their number from 1, and 0 for none."""
    ids = _ids.narrow(ids, rows, jnp)
    valid = (ids >= 0) & (ids < rows)
    numbers = jnp.where(valid, ids, -1) + 1
    high = jnp.zeros_like(ids) if numbers.dtype.itemsize <= 4 else numbers >> 32
    words = jnp.stack([high.astype(jnp.uint32), numbers.astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl=KEYS)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def decode(keys: Key[Array, "*length"], rows: int) -> Int[Array, "*length"]:
    """Return the ids that keys hold, `rows` for none."""
    words = jax.random.key_data(keys)
    # Of keys that are not ours, the high word may be anything.
    numbers = jnp.where(words[..., 0] == 0, words[..., 1], 0).astype(jnp.int32)
    if rows > np.iinfo(np.int32).max:
        numbers = (words[..., 0].astype(jnp.int64) << 32) | words[..., 1].astype(jnp.int64)
    return jnp.where(numbers == 0, rows, numbers - 1)
