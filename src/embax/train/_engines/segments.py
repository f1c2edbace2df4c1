"""Segments: cut a corpus into short pieces of one length; a step takes many of them.

For instance, the ids `[0, 2, 0, 1, -1, 3, 0, -1]`, of two sequences and 4 rows, lose the second 0 by subsampling. Cut
into segments of 4 from a random offset of 1 on, the other 5 words become

    [[4, ~0, 2, 1], [~3, 0, 4, 4]]

where 4, the number of rows, is padding, and a word that begins a sequence is stored as its complement, `~id`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from .._input.corpus import BREAK, Corpus
from .._parts import Parts

# Ids of a part that are subsampled and shuffled together.
_BLOCK = 1 << 20
# Ids that are subsampled at once.
_AT_ONCE = 1 << 16
# Steps in one call of the compiled program.
STEPS_A_CALL = 32
# All words of a step see the same weights, so a step of a short corpus takes few: an epoch has at least 500 steps.
_STEPS_AN_EPOCH, _LARGEST_STEP = 500, 4096


# The segments of a block, for each part of this process; the numbers of segments and words, for each part.
_Block = tuple[list[np.ndarray], Int64[np.ndarray, "parts 2"]]


class Shape(NamedTuple):
    """The shape of a call's segments in each part."""

    steps: int
    segments: int  # of a step
    length: int  # words of a segment


class Segments(NamedTuple):
    """Segments for one call of the compiled program."""

    words: int  # of the text in it, before subsampling
    tokens: Int32[np.ndarray, "steps segments length"]  # the parts of this process side by side
    steps: int  # steps that are not all padding


def words_a_step(words: float) -> int:
    """The words of a step, for an epoch of so many words, both after subsampling."""
    return min(2 ** int(np.log2(max(words / _STEPS_AN_EPOCH, 1))), _LARGEST_STEP)


def shape_of(length: int, words: float, parts: int) -> Shape:
    """Choose how many segments a step has.

    Args:
      length: The words of a segment.
      words: The expected number of words of an epoch, after subsampling.
      parts: The number of parts, which share a step.

    Returns:
      The shape.
    """
    return Shape(STEPS_A_CALL, -(-max(words_a_step(words) // length, 1) // parts), length)


def segments(
    ids: Int32[np.ndarray, " ids"], kept: Float32[np.ndarray, " rows_and_1"], length: int, rng: np.random.Generator
) -> Int32[np.ndarray, "segments length"]:
    """Subsample a block of ids, and cut it into segments in random order.

    Args:
      ids: Row numbers, with BREAK after each sequence.
      kept: The probability of keeping each word, and then 1, for BREAK.
      length: The words of a segment.
      rng: Draws the words that stay, the offset and the order.

    Returns:
      The segments.
    """
    rows = len(kept) - 1
    # Some at a time, to save memory. BREAK, -1, reads the last entry.
    some = (ids[first : first + _AT_ONCE] for first in range(0, len(ids), _AT_ONCE))
    ids = np.concatenate([np.zeros(0, np.int32), *(x[rng.random(len(x), np.float32) < kept[x]] for x in some)])
    is_word = ids != BREAK
    begins = np.flatnonzero(is_word & np.append(True, ~is_word[:-1])[: len(ids)])
    ids[begins] = ~ids[begins]
    words = ids[is_word]
    offset = int(rng.integers(length))
    number = -(-(offset + len(words)) // length) if len(words) else 0
    padded = np.full(number * length, rows, np.int32)
    padded[offset : offset + len(words)] = words
    return padded.reshape(number, length)[rng.permutation(number)]


def batches(
    corpora: Sequence[Corpus], parts: Parts, kept: Float64[np.ndarray, " rows"], shape: Shape, seed: int, epoch: int
) -> Iterator[Segments]:
    """Cut an epoch into segments, in batches of one shape.

    Several processes tell each other the sizes of their blocks first, so that all have the same number of batches.

    Args:
      corpora: The parts of this process.
      parts: All parts.
      kept: The probability of keeping each word.
      shape: The shape of a batch in each part.
      seed: The seed of the run; with the epoch, the part and the block, it gives all random numbers.
      epoch: The number of the epoch.

    Returns:
      An iterator over the batches; the last ones are padded.
    """
    probabilities = np.append(kept, 1).astype(np.float32)

    def blocks() -> Iterator[_Block]:
        """The blocks of this process, with the sizes of its own parts."""
        nothing = np.zeros(0, np.int32)
        for number, block in enumerate(
            itertools.zip_longest(*(corpus.blocks(_BLOCK) for corpus in corpora), fillvalue=nothing)
        ):
            found = [
                segments(ids, probabilities, shape.length, np.random.default_rng((seed, epoch, part, number)))
                for part, ids in zip(parts.own, block, strict=True)
            ]
            words = (int(np.count_nonzero(ids != BREAK)) for ids in block)
            yield found, np.asarray([(len(x), n) for x, n in zip(found, words, strict=True)], np.int64)

    sizes = None
    if parts.is_shared:
        own = [size for _, size in blocks()]
        number = max(int(x) for x in parts.gather(str(len(own)).encode()))
        sizes = np.zeros((number, parts.number, 2), np.int64)
        for at, size in enumerate(own):
            sizes[at, list(parts.own)] = size
        sizes = parts.total(sizes)
    return _batches(_sized(blocks(), sizes), shape, len(kept), len(corpora))


def _sized(blocks: Iterator[_Block], sizes: Int64[np.ndarray, "blocks parts 2"] | None) -> Iterator[_Block]:
    """Blocks, and the sizes of the parts of all processes; empty blocks at the end, while other processes have more."""
    if sizes is None:
        yield from blocks
        return
    for size in sizes:
        yield next(blocks, ([], size))[0], size


def _batches(blocks: Iterator[_Block], shape: Shape, padding: int, own: int) -> Iterator[Segments]:
    a_call = shape.steps * shape.segments
    for found, size in blocks:
        most, (drawn, words), done = int(size[:, 0].max()), size.sum(axis=0), 0
        for start in range(0, max(most, int(words > 0)), a_call):  # once if no word stays: progress counts them
            tokens = np.full((own, a_call, shape.length), padding, np.int32)
            for part, of_part in zip(tokens, found, strict=False):
                chosen = of_part[start : start + a_call]
                part[: len(chosen)] = chosen
            so_far = int(words) * int(np.minimum(size[:, 0], start + a_call).sum()) // max(int(drawn), 1)
            so_far = so_far if start + a_call < most else int(words)
            tokens = tokens.reshape(own, *shape).swapaxes(0, 1).reshape(shape.steps, -1, shape.length)
            yield Segments(so_far - done, tokens, min(shape.steps, -(-(most - start) // shape.segments)))
            done = so_far
