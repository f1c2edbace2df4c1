"""train_words: word vectors learned from a text by the native library, in place.

Python calls the library without XLA: the tables are NumPy arrays, and a run needs no compiler and no copy on a device.
While the library works, other threads of Python run.
"""

import ctypes
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from .library import has, library

# Rows of a table are padded with zeros to a multiple of so many numbers, a line of the cache.
LINE = 16


class Words(NamedTuple):
    """The vocabulary as the kernel reads it."""

    keep: UInt32[np.ndarray, " rows"]  # a word is kept if 32 random bits are at most this
    cut: UInt32[np.ndarray, " rows"]  # a noise word is a random row, or its alias if 32 random bits are more than this
    alias: Int32[np.ndarray, " rows"]
    starts: Int32[np.ndarray, " starts"]  # word k: the mean of inputs[pieces[starts[k] : starts[k + 1]]]; empty: row k
    pieces: Int32[np.ndarray, " pieces"]


class Tables(NamedTuple):
    """The vectors, in rows of `stride` numbers, a multiple of `LINE`; zero behind the numbers of a vector."""

    inputs: Float32[np.ndarray, "input_rows stride"]
    outputs: Float32[np.ndarray, "rows stride"]


class Training(ctypes.Structure):
    """`Training` of the library's `kernels.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inputs", "outputs", "ids", *Words._fields)),
        *((name, ctypes.c_int64) for name in ("stride", "input_rows", "rows", "number", "number_of_pieces")),
        *((name, ctypes.c_int64) for name in ("window", "negative", "parts")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("first_rate", "last_rate")),
        ("cbow", ctypes.c_bool),
    )


class TrainingLoss(ctypes.Structure):
    """`TrainingLoss` of the library's `kernels.h`."""

    _fields_ = (("sum", ctypes.c_double), ("pairs", ctypes.c_int64))


def available() -> bool:
    """Return whether the kernel is in this process."""
    return has("train_words")


def train_words(
    tables: Tables,
    words: Words,
    ids: Int32[np.ndarray, " ids"],
    rates: tuple[float, float],
    seed: UInt32[np.ndarray, "2"],
    *,
    window: int,
    negative: int,
    model: Literal["skipgram", "cbow"],
    threads: int,
) -> Float32[np.ndarray, "2"]:
    """Learn from a chunk of text, a window at a time.

    Args:
      tables: The vectors, which are changed in place.
      words: The vocabulary.
      ids: The text as row numbers, with -1 after each sequence.
      rates: The learning rates at the first and after the last word.
      seed: The seed of all random numbers of the call.
      window: The largest width of a window; each centre draws its own.
      negative: The number of noise words.
      model: Whether each context, or the mean of them, pairs with the centre and the noise words.
      threads: The parts of the text that are learned side by side. With more than one, results depend on their timing.

    Returns:
      The loss summed over a sample of pairs, and the number of these pairs.

    Raises:
      RuntimeError: If the kernel is not in this process.
      ValueError: If an array is of another shape or dtype, or has an id without a row.
      MemoryError: If there is no memory for the work.
    """
    found = library()
    if found is None or not available():
        raise RuntimeError("`embax-kernels` must be installed and switched on to train by the native kernel.")
    rows, stride = tables.outputs.shape
    if stride % LINE:
        raise ValueError(f"`outputs` must have rows of a multiple of {LINE} numbers, got {stride}. Pad them by zeros.")
    with_pieces = len(words.starts) > 0
    shapes = {name: ("u4" if name in ("keep", "cut") else "i4", (rows,)) for name in Words._fields}
    shapes["starts"] = "i4", (rows + 1 if with_pieces else 0,)
    shapes["pieces"] = "i4", (len(words.pieces) if with_pieces else 0,)
    arrays = {name: _address(name, array, *shapes[name]) for name, array in words._asdict().items()}
    if not with_pieces:
        arrays |= {"starts": None, "pieces": None}
    training = Training(
        inputs=_address("inputs", tables.inputs, "f4", (len(tables.inputs) if with_pieces else rows, stride), True),
        outputs=_address("outputs", tables.outputs, "f4", (rows, stride), True),
        ids=_address("ids", ids, "i4", (ids.size,)),
        **arrays,
        stride=stride,
        input_rows=len(tables.inputs),
        rows=rows,
        number=len(ids),
        number_of_pieces=len(words.pieces),
        window=window,
        negative=negative,
        parts=threads,
        seed=int(seed[0]) << 32 | int(seed[1]),
        first_rate=rates[0],
        last_rate=rates[1],
        cbow=model == "cbow",
    )
    loss, refused = TrainingLoss(), ctypes.c_char_p()
    failed = found.native.embax_kernels_train_words(ctypes.byref(training), ctypes.byref(loss), ctypes.byref(refused))
    if failed:
        raise MemoryError if refused.value is None else ValueError(refused.value.decode())
    return np.asarray([loss.sum, loss.pairs], np.float32)


def _address(name: str, array: Any, dtype: str, shape: tuple[int, ...], written: bool = False) -> int:
    """The address of an array's numbers, which lie behind one another."""
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == shape
    if not fits or not array.flags.c_contiguous or (written and not array.flags.writeable):
        seen = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(
            f"`{name}` must be a contiguous{' writable' * written} array, {np.dtype(dtype)}{list(shape)}, got {seen}."
        )
    return array.ctypes.data
