"""Windows: cut a corpus into batches of centres and their contexts, all of one shape.

For instance, the sequence "the king holds the crown" has the ids `[0, 2, 3, 0, 1]`, of 4 rows. With a window of 2, a
centre has four slots, for the positions -2, -1, 1 and 2. The centre 3 ("holds"), which drew the width 1, has the
contexts `[4, 2, 0, 4]`: 4 is the sentinel for no word.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

from ._corpus import BREAK, Corpus
from ._parts import Parts

# Centres in a step. All centres of a step see the same weights, so there should not be too many. A short corpus gets
# fewer, so that an epoch still has about 512 steps.
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS_AN_EPOCH = 32, 1024, 512
# Steps in one call of the compiled program.
STEPS_A_CALL = 16
# Ids of a part that are subsampled and shuffled together.
_SHUFFLED = 1 << 20


class Windows(NamedTuple):
    """Batches for one call of the compiled program; `rows` is the sentinel for no word."""

    epoch: int  # from 1
    words: int  # words of all epochs up to the end of these windows, before subsampling
    words_before: int  # words of all epochs before these windows
    centres: Int32[np.ndarray, "steps batch"]
    contexts: Int32[np.ndarray, "steps batch slots"]  # slots = 2 * window


class _Block(NamedTuple):
    """Some words of a part, after subsampling, with a random order and random widths."""

    words: int  # before subsampling
    ids: Int32[np.ndarray, " words"]
    sequence: Int64[np.ndarray, " words"]  # the number of each word's sequence
    order: Int64[np.ndarray, " words"]  # a permutation
    width: Int64[np.ndarray, " words"]  # the width of each word's window


def batches(
    corpora: Sequence[Corpus],
    parts: Parts,
    window: int,
    epochs: int,
    sample: float,
    rngs: Sequence[np.random.Generator],
    skip: int = 0,
) -> Iterator[Windows]:
    """Yield the windows of a corpus, epoch after epoch; each part has its own columns of a batch.

    Args:
      corpora: The parts of this process.
      parts: All parts.
      window: The most words on either side of a centre.
      epochs: The number of passes over the corpus.
      sample: The frequency above which words are dropped at random; infinity keeps all.
      rngs: A generator for each part of this process; it draws dropped words, widths and the order.
      skip: The number of Windows to skip at the beginning. Their random numbers are still drawn, so that the rest does
        not change.

    Yields:
      Windows of one shape, the parts of this process side by side; the last ones are padded with the sentinel.
    """
    rows, counts = len(corpora[0].tokens), corpora[0].counts
    kept, batch = _kept(counts, sample), -(-_batch(int(counts.sum())) // parts.number)
    shape, size = (STEPS_A_CALL, batch), STEPS_A_CALL * batch
    lengths = np.zeros(parts.number, np.int64)
    lengths[list(parts.own)] = [corpus.length for corpus in corpora]
    done, so_far, number = 0, 0, 0
    for epoch in range(1, epochs + 1):
        texts = [corpus.blocks(_SHUFFLED) for corpus in corpora]
        for _ in range(0, int(parts.total(lengths).max()), _SHUFFLED):
            nothing = np.zeros(0, np.int32)
            blocks = [_block(next(x, nothing), kept, window, rng) for x, rng in zip(texts, rngs, strict=True)]
            about = np.zeros((parts.number, 2), np.int64)
            about[list(parts.own)] = [(block.words, len(block.ids)) for block in blocks]
            words, drawn = parts.total(about).T
            for start in range(0, int(drawn.max()), size):
                before, number = so_far, number + 1
                so_far = done + int(words.sum()) * int(np.minimum(drawn, start + size).sum()) // int(drawn.sum())
                if number <= skip:
                    continue
                found = [_windows(block, start, size, window, rows) for block in blocks]
                centres, contexts = (
                    np.concatenate([_fill(x, shape, rows) for x in arrays], axis=1)
                    for arrays in zip(*found, strict=True)
                )
                yield Windows(epoch, so_far, before, centres, contexts)
            done += int(words.sum())


def _batch(words: int) -> int:
    """The number of centres of a step."""
    batch = 2 ** int(np.log2(max(words // _STEPS_AN_EPOCH, 1)))
    return min(max(batch, _SMALLEST_BATCH), _LARGEST_BATCH)


def _block(
    part: Int32[np.ndarray, " length"], kept: Float64[np.ndarray, " rows"], window: int, rng: np.random.Generator
) -> _Block:
    words = int(np.count_nonzero(part != BREAK))
    ids, sequence = _subsample(part, kept, rng)
    order = rng.permutation(len(ids))
    return _Block(words, ids, sequence, order, rng.integers(1, window, size=len(ids), endpoint=True))


def _kept(counts: Int64[np.ndarray, " rows"], sample: float) -> Float64[np.ndarray, " rows"]:
    """The probability of keeping each word, by the formula of word2vec.c, which the paper simplifies."""
    relative = sample * counts.sum() / counts
    return np.minimum(1.0, np.sqrt(relative) + relative)


def _subsample(
    part: Int32[np.ndarray, " length"], kept: Float64[np.ndarray, " rows"], rng: np.random.Generator
) -> tuple[Int32[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """Drop words at random; returns the others, and the number of each one's sequence."""
    sequence = np.cumsum(part == BREAK)
    # BREAK, -1, reads the probability of the last row, but is dropped anyway.
    stays = (part != BREAK) & (rng.random(len(part)) < kept[part])
    return part[stays], sequence[stays]


def _windows(
    block: _Block, start: int, size: int, window: int, rows: int
) -> tuple[Int32[np.ndarray, " centres"], Int32[np.ndarray, "centres slots"]]:
    """Some centres, and the contexts of each."""
    ids, sequence, chosen = block.ids, block.sequence, block.order[start : start + size]
    offsets = np.concatenate([np.arange(-window, 0), np.arange(1, window + 1)])
    positions = chosen[:, None] + offsets
    inside = (positions >= 0) & (positions < len(ids)) & (np.abs(offsets) <= block.width[chosen][:, None])
    positions = np.where(inside, positions, 0)
    if not len(chosen):  # this part has ended before others
        return ids[:0], np.zeros(positions.shape, np.int32)
    inside &= sequence[positions] == sequence[chosen][:, None]
    return ids[chosen], np.where(inside, ids[positions], np.int32(rows))


def _fill(values: Int32[np.ndarray, "centres *slots"], shape: tuple[int, int], rows: int) -> Int32[np.ndarray, "..."]:
    """Pad with the sentinel `rows` to the shape of a whole call."""
    full = np.full((shape[0] * shape[1], *values.shape[1:]), rows, np.int32)
    full[: len(values)] = values
    return full.reshape(*shape, *values.shape[1:])
