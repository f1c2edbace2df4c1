"""Row ids stored as random keys, for which JAX refuses arithmetic.

A key has two 32-bit words, the number `id + 1`; 0 means no row. So the ids `[2, 0, 3]` of a table of 3 rows, where 3 is
the sentinel, are the words `[[0, 3], [0, 1], [0, 0]]`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Int, Integer, Key, PyTree

from .._base.arrays import as_jax
from .._core import ids as _ids

# This text is part of the dtype's name and of the type's, so JAX's own error shows it when optax computes with the ids.
HINT = "put this inside of embax.optim.lift"


def _no_random_numbers(*_: Any) -> PyTree:
    raise TypeError("`jax.random` must be given a random key, got the ids of an embax.RowGrad. Leave them out.")


# Keys of two 32-bit words, from which no random number can be drawn.
KEYS = define_prng_impl(
    key_shape=(2,),
    seed=_no_random_numbers,
    split=_no_random_numbers,
    random_bits=_no_random_numbers,
    fold_in=_no_random_numbers,
    name="embax.RowGrad",
    tag=f"RowGrad: {HINT}",
)


def encode(ids: Integer[Array | np.ndarray, "*length"], rows: int) -> Key[Array, "*length"]:
    """Turn ids into keys; an id without a row becomes 0."""
    if isinstance(ids, np.ndarray):  # NumPy needs no program for each length
        return jax.random.wrap_key_data(as_jax(_words(ids, rows, np)), impl=KEYS)
    return _encode(ids, rows)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _encode(ids: Integer[Array, "*length"], rows: int) -> Key[Array, "*length"]:
    return jax.random.wrap_key_data(_words(ids, rows, jnp), impl=KEYS)


def _words(ids: Any, rows: int, xp: Any) -> Any:
    ids = _ids.narrow(ids, rows, xp)
    valid = (ids >= 0) & (ids < rows)
    numbers = xp.where(valid, ids, -1) + 1
    high = xp.zeros_like(ids) if numbers.dtype.itemsize <= 4 else numbers >> 32
    return xp.stack([high.astype(xp.uint32), numbers.astype(xp.uint32)], axis=-1)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def decode(keys: Key[Array, "*length"], rows: int) -> Int[Array, "*length"]:
    """Turn keys into ids, `rows` for no row."""
    words = jax.random.key_data(keys)
    # Keys that `encode` did not make, such as zeros from optax, may have any high word.
    numbers = jnp.where(words[..., 0] == 0, words[..., 1], 0).astype(jnp.int32)
    if rows > np.iinfo(np.int32).max:
        numbers = (words[..., 0].astype(jnp.int64) << 32) | words[..., 1].astype(jnp.int64)
    return jnp.where(numbers == 0, rows, numbers - 1)
