"""hash_ids: row numbers for keys that are no row numbers, such as 64-bit integers and strings."""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, PyTree, Shaped, UInt32
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.text.escapes import encoded

_Words = UInt32[Array, "*batch"] | UInt32[np.ndarray, "*batch"]
_Integers = Integer[Array, "*batch"] | Integer[np.ndarray, "*batch"]
_Rows = Int32[Array, "*batch"] | Int32[np.ndarray, "*batch"]
_MOST_ROWS = np.iinfo(np.int32).max


def hash_ids(values: ArrayLike, rows: int, seed: int = 0) -> Int32[Array, "*batch"] | Int32[np.ndarray, "*batch"]:
    """Map any integers or strings to rows by hashing.

    Two values may get the same row. With `n` values in `rows` rows, the probability that a given value shares its row
    is `1 - exp(-n / rows)`: 63 % with as many rows as values, 10 % with ten times as many rows. Another seed gives
    another, independent map, so two tables with different seeds distinguish values that collide in one of them.

    Integers are hashed by their 64-bit value, with the same result on the host and in JAX: NumPy arrays of any integer
    dtype give a NumPy array; JAX arrays, traced or not, give a JAX array. Strings and bytes are hashed on the host,
    strings by their UTF-8.

    Args:
      values: An array of any integer dtype, or a string, bytes, or a nested list or array of these.
      rows: The number of rows, from 1 to 2**31 - 1.
      seed: Any number from 0 to 2**32 - 1.

    Returns:
      Row numbers of the same shape.

    Raises:
      TypeError: If the values are neither integers nor strings.
      ValueError: If `rows` or the seed is outside its range.

    Example:
      >>> import embax, numpy as np
      >>> embax.hash_ids(np.array([2**40, 2**40 + 1, -1]), rows=1_000)
      array([663, 342, 384], dtype=int32)
      >>> embax.hash_ids(["user:17", "user:18"], rows=1_000)
      array([440, 824], dtype=int32)

    References:
      Weinberger et al., Feature hashing for large scale multitask learning, 2009, https://arxiv.org/abs/0902.2206.
      The mixing of integers is MurmurHash3 by Appleby, https://github.com/aappleby/smhasher; that of strings XXH3 by
      Collet, https://xxhash.com.
    """
    rows = _check.size("embax.hash_ids(rows=...)", rows)
    seed = _check.size("embax.hash_ids(seed=...)", seed)
    if not 1 <= rows <= _MOST_ROWS:
        raise ValueError(f"`embax.hash_ids(rows=...)` must be from 1 to {_MOST_ROWS}, got {rows}. Pass fewer rows.")
    if seed >= 2**32:
        raise ValueError(f"`embax.hash_ids(seed=...)` must be below 2**32, got {seed}. Pass a smaller number.")
    if isinstance(values, jax.Array):
        return _of_jax(values, rows, seed)
    array = np.asarray(values)
    if not isinstance(values, np.ndarray):
        if array.size == 0:  # a list without a dtype of its own
            array = array.astype(np.int32)
        elif array.dtype.kind in "SU":  # NumPy strips zero bytes at the end, and turns numbers into strings
            array = np.asarray(values, object)
    if array.dtype.kind in "iu":
        return _of_integers(array, rows, seed, np)
    if array.dtype.kind in "SUO":
        return _of_strings(array if array.dtype.kind == "O" else array.astype(object), rows, seed)
    raise TypeError(f"`embax.hash_ids(values=...)` must be integers or strings, got {array.dtype}. Cast them.")


def _of_integers(values: PyTree, rows: int, seed: int, xp: ModuleType) -> _Rows:
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"`embax.hash_ids(values=...)` must be integers or strings, got {values.dtype}. Cast them.")
    flat = values.reshape(-1)  # NumPy scalars would warn when they wrap around
    return _below(_mixed(_words(flat, xp), seed, xp), rows, xp).reshape(values.shape)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)  # one program for an eager call
def _of_jax(values: Shaped[Array, "*batch"], rows: int, seed: int) -> _Rows:
    return _of_integers(values, rows, seed, jnp)


def _words(values: _Integers, xp: ModuleType) -> tuple[_Words, _Words]:
    """The low and the high 32 bits of each 64-bit value."""
    info = jnp.iinfo(values.dtype)
    low = values.astype(xp.uint32)
    if info.bits == 64:
        return low, (values >> xp.asarray(32, values.dtype)).astype(xp.uint32)
    if info.min == 0:
        return low, xp.zeros_like(low)
    return low, xp.where(values < 0, xp.uint32(0xFFFFFFFF), xp.uint32(0))


def _mixed(words: tuple[_Words, _Words], seed: int, xp: ModuleType) -> _Words:
    """MurmurHash3 (32 bits) of two words."""
    h = xp.full_like(words[0], seed)
    for word in words:
        k = _rotated(word * xp.uint32(0xCC9E2D51), 15, xp) * xp.uint32(0x1B873593)
        h = _rotated(h ^ k, 13, xp) * xp.uint32(5) + xp.uint32(0xE6546B64)
    h = h ^ xp.uint32(8)  # the number of bytes
    h = (h ^ (h >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return h ^ (h >> xp.uint32(16))


def _rotated(word: _Words, by: int, xp: ModuleType) -> _Words:
    return (word << xp.uint32(by)) | (word >> xp.uint32(32 - by))


def _below(h: _Words, rows: int, xp: ModuleType) -> _Rows:
    """Map 32 bits to `[0, rows)`: `h * rows >> 32`, computed in halves of 16 bits, since JAX may have no 64 bits."""
    low, high = h & xp.uint32(0xFFFF), h >> xp.uint32(16)
    rows_low, rows_high = xp.uint32(rows & 0xFFFF), xp.uint32(rows >> 16)
    middle = high * rows_low + (low * rows_low >> xp.uint32(16))
    other = low * rows_high + (middle & xp.uint32(0xFFFF))
    return (high * rows_high + (middle >> xp.uint32(16)) + (other >> xp.uint32(16))).astype(xp.int32)


def _of_strings(values: np.ndarray, rows: int, seed: int) -> Int32[np.ndarray, "*batch"]:
    import xxhash

    flat = np.empty(values.size, np.int32)
    for i, value in enumerate(values.ravel().tolist()):
        if not isinstance(value, str | bytes):
            raise TypeError(
                f"`embax.hash_ids(values=...)` must be integers or strings, got {value!r} at position {i}. Cast them."
            )
        flat[i] = xxhash.xxh3_64_intdigest(encoded(value) if isinstance(value, str) else value, seed) * rows >> 64
    return flat.reshape(values.shape)
