"""Windows: a corpus to batches of centres and their contexts, of one shape throughout."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

from ._corpus import BREAK, Corpus
from ._parts import Parts

# Centres in a step: few against the frequency of rows, as all of them see the same weights. A short corpus gets fewer,
# so that an epoch still has about 512 steps.
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS_AN_EPOCH = 32, 1024, 512
# Steps in one call of the compiled program.
STEPS_A_CALL = 16
# Ids that are subsampled, windowed and shuffled together.
_SHUFFLED = 1 << 20


class Windows(NamedTuple):
    """Batches for a few steps; `rows` where there is no word."""

    epoch: int  # from 1
    words: int  # of the corpus, before subsampling, in all epochs up to the end of these
    words_before: int  # the same, up to the end of those before these
    centres: Int32[np.ndarray, "steps batch"]
    contexts: Int32[np.ndarray, "steps batch slots"]  # slots = 2 * window


class _Block(NamedTuple):
    """Some words of a part, drawn and shuffled."""

    words: int  # before subsampling
    ids: Int32[np.ndarray, " words"]
    sequence: Int64[np.ndarray, " words"]  # the number of the one that each is in
    order: Int64[np.ndarray, " words"]
    width: Int64[np.ndarray, " words"]


def batches(
    corpora: Sequence[Corpus],
    parts: Parts,
    window: int,
    epochs: int,
    sample: float,
    rngs: Sequence[np.random.Generator],
    skip: int = 0,
) -> Iterator[Windows]:
    """Draw the windows of a corpus, epoch after epoch, those of each part in a place of their own.

    Args:
      corpora: The parts of this process.
      parts: All parts.
      window: The most words on either side of a centre.
      epochs: How often to pass over the corpus.
      sample: The frequency above which words are left out at random; infinity keeps all.
      rngs: For each of the parts of this process, what draws the words that are left out, the widths of the windows,
        and the order.
      skip: How many Windows to leave out at the beginning. What they were made of is drawn, so that the rest is as it
        would be after them.

    Yields:
      Windows of one shape, the parts of this process side by side; the last ones are filled up with windows of no
      words.
    """
    rows, counts = len(corpora[0].tokens), corpora[0].counts
    kept, batch = _kept(counts, sample), -(-_batch(int(counts.sum())) // parts.number)
    shape, size = (STEPS_A_CALL, batch), STEPS_A_CALL * batch
    lengths = np.zeros(parts.number, np.int64)
    lengths[list(parts.own)] = [len(corpus.ids) for corpus in corpora]
    done, so_far, number = 0, 0, 0
    for epoch in range(1, epochs + 1):
        for first in range(0, int(parts.total(lengths).max()), _SHUFFLED):
            blocks = [
                _block(x.ids[first : first + _SHUFFLED], kept, window, rng)
                for x, rng in zip(corpora, rngs, strict=True)
            ]
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
    """How many centres a step has."""
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
    """Return the probability of each row to be kept, by the formula of word2vec.c, which the paper simplifies."""
    relative = sample * counts.sum() / counts
    return np.minimum(1.0, np.sqrt(relative) + relative)


def _subsample(
    part: Int32[np.ndarray, " length"], kept: Float64[np.ndarray, " rows"], rng: np.random.Generator
) -> tuple[Int32[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """Leave out words at random; return the others and the number of the sequence that each is in."""
    sequence = np.cumsum(part == BREAK)
    # BREAK reads the last row's probability, which does not matter as it is left out anyway.
    stays = (part != BREAK) & (rng.random(len(part)) < kept[part])
    return part[stays], sequence[stays]


def _windows(
    block: _Block, start: int, size: int, window: int, rows: int
) -> tuple[Int32[np.ndarray, " centres"], Int32[np.ndarray, "centres slots"]]:
    """Look up some centres, and the contexts of each."""
    ids, sequence, chosen = block.ids, block.sequence, block.order[start : start + size]
    offsets = np.concatenate([np.arange(-window, 0), np.arange(1, window + 1)])
    positions = chosen[:, None] + offsets
    inside = (positions >= 0) & (positions < len(ids)) & (np.abs(offsets) <= block.width[chosen][:, None])
    positions = np.where(inside, positions, 0)
    if not len(chosen):  # of a part that has come to its end before others
        return ids[:0], np.zeros(positions.shape, np.int32)
    inside &= sequence[positions] == sequence[chosen][:, None]
    return ids[chosen], np.where(inside, ids[positions], np.int32(rows))


def _fill(values: Int32[np.ndarray, "centres *slots"], shape: tuple[int, int], rows: int) -> Int32[np.ndarray, "..."]:
    """Fill up to the shape of a whole call with `rows`, which reads as no word."""
    full = np.full((shape[0] * shape[1], *values.shape[1:]), rows, np.int32)
    full[: len(values)] = values
    return full.reshape(*shape, *values.shape[1:])
