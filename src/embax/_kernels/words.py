"""train_words: word vectors learned from a text by a native kernel, in place. XLA has no version of it.

The tables are donated, so a call reads and writes their memory; a chunk of the text, its learning rates and its seed
are arguments, so one compiled program serves a whole run.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from .library import has
from .primitive import call

# Rows of a table are padded with zeros to a multiple of so many numbers, a line of the cache.
LINE = 16


class Words(NamedTuple):
    """The vocabulary as the kernel reads it."""

    keep: UInt32[Array, " rows"]  # a word is kept if 32 random bits are at most this
    cut: UInt32[Array, " rows"]  # a noise word is a random row, or its alias if 32 random bits are more than this
    alias: Int32[Array, " rows"]
    starts: Int32[Array, " starts"]  # word k is the mean of inputs[pieces[starts[k] : starts[k + 1]]]; empty: of row k
    pieces: Int32[Array, " pieces"]


class Tables(NamedTuple):
    """The vectors, in rows of `stride` numbers, a multiple of `LINE`; zero behind the numbers of a vector."""

    inputs: Float32[Array, "input_rows stride"]
    outputs: Float32[Array, "rows stride"]


def available() -> bool:
    """Return whether the kernel is in this process."""
    return has("train_words")


@functools.partial(jax.jit, static_argnames=("window", "negative", "model", "threads"), donate_argnames="tables")
def train_words(
    tables: Tables,
    words: Words,
    ids: Int32[Array, " ids"],
    rates: Float32[Array, "2"],
    seed: UInt32[Array, "2"],
    *,
    window: int,
    negative: int,
    model: Literal["skipgram", "cbow"],
    threads: int,
) -> tuple[Tables, Float32[Array, "2"]]:
    """Learn from a chunk of text, a window at a time.

    Args:
      tables: The vectors; donated.
      words: The vocabulary.
      ids: The text as row numbers, with -1 after each sequence.
      rates: The learning rates at the first and after the last word.
      seed: The seed of all random numbers of the call.
      window: The largest width of a window; each centre draws its own.
      negative: The number of noise words.
      model: Whether each context, or the mean of them, pairs with the centre and the noise words.
      threads: The parts of the text that are learned side by side. With more than one, results depend on their timing.

    Returns:
      The vectors; the loss summed over a sample of pairs, and the number of these pairs.

    Raises:
      RuntimeError: If the kernel is not in this process.
    """
    if not available():
        raise RuntimeError("`embax-kernels` must be installed and switched on to train by the native kernel.")
    outs = [
        *(jax.ShapeDtypeStruct(table.shape, table.dtype) for table in tables),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    ]
    *new, loss = call(
        "train_words",
        outs,
        *tables,
        ids,
        *words,
        rates,
        seed,
        aliases={0: 0, 1: 1},
        window=np.int64(window),
        negative=np.int64(negative),
        threads=np.int64(threads),
        cbow=np.int32(model == "cbow"),
    )
    return Tables(*new), loss
