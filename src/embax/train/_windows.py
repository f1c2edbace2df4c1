"""Windows: a corpus to batches of centres and their contexts, of one shape throughout."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

from ._corpus import BREAK, Corpus

# Centres in a step: few against the frequency of rows, as all of them see the same weights. A short corpus gets fewer,
# so that an epoch still has about 512 steps.
_SMALLEST_BATCH, _LARGEST_BATCH, _STEPS_AN_EPOCH = 32, 1024, 512
# Steps in one call of the compiled program.
_STEPS_A_CALL = 16
# Ids that are subsampled, windowed and shuffled together.
_SHUFFLED = 1 << 20


class Windows(NamedTuple):
    """Batches for a few steps; `rows` where there is no word."""

    epoch: int  # from 1
    words: int  # of the corpus, before subsampling, in all epochs up to the end of these
    centres: Int32[np.ndarray, "steps batch"]
    contexts: Int32[np.ndarray, "steps batch slots"]  # slots = 2 * window


def batches(corpus: Corpus, window: int, epochs: int, sample: float, rng: np.random.Generator) -> Iterator[Windows]:
    """Draw the windows of a corpus, epoch after epoch.

    Args:
      corpus: The corpus.
      window: The most words on either side of a centre.
      epochs: How often to pass over the corpus.
      sample: The frequency above which words are left out at random; infinity keeps all.
      rng: Draws the words that are left out, the widths of the windows, and the order.

    Yields:
      Windows of one shape; the last ones of a part are filled up with windows of no words.
    """
    rows, words = len(corpus.tokens), int(corpus.counts.sum())
    kept = _kept(corpus.counts, sample)
    batch = 2 ** int(np.log2(max(words // _STEPS_AN_EPOCH, 1)))
    batch = min(max(batch, _SMALLEST_BATCH), _LARGEST_BATCH)
    done = 0
    for epoch in range(1, epochs + 1):
        for first in range(0, len(corpus.ids), _SHUFFLED):
            part = corpus.ids[first : first + _SHUFFLED]
            part_words = int(np.count_nonzero(part != BREAK))
            ids, sequence = _subsample(part, kept, rng)
            order = rng.permutation(len(ids))
            width = rng.integers(1, window, size=len(ids), endpoint=True)
            for start in range(0, len(order), batch * _STEPS_A_CALL):
                chosen = order[start : start + batch * _STEPS_A_CALL]
                centres, contexts = _windows(ids, sequence, chosen, width[chosen], window, rows)
                so_far = done + part_words * (start + len(chosen)) // len(ids)
                shape = (_STEPS_A_CALL, batch)
                yield Windows(epoch, so_far, *(_fill(x, shape, rows) for x in (centres, contexts)))
            done += part_words


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
    ids: Int32[np.ndarray, " words"],
    sequence: Int64[np.ndarray, " words"],
    chosen: Int64[np.ndarray, " centres"],
    width: Int64[np.ndarray, " centres"],
    window: int,
    rows: int,
) -> tuple[Int32[np.ndarray, " centres"], Int32[np.ndarray, "centres slots"]]:
    offsets = np.concatenate([np.arange(-window, 0), np.arange(1, window + 1)])
    positions = chosen[:, None] + offsets
    inside = (positions >= 0) & (positions < len(ids)) & (np.abs(offsets) <= width[:, None])
    positions = np.where(inside, positions, 0)
    inside &= sequence[positions] == sequence[chosen][:, None]
    return ids[chosen], np.where(inside, ids[positions], np.int32(rows))


def _fill(values: Int32[np.ndarray, "centres *slots"], shape: tuple[int, int], rows: int) -> Int32[np.ndarray, "..."]:
    """Fill up to the shape of a whole call with `rows`, which reads as no word."""
    full = np.full((shape[0] * shape[1], *values.shape[1:]), rows, np.int32)
    full[: len(values)] = values
    return full.reshape(*shape, *values.shape[1:])
