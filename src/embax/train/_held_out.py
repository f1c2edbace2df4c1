"""The loss on text that is held out: how well vectors predict words that they were not trained on."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from ._input.corpus import BREAK, Corpus

# A twentieth of the text is held out.
EVERY = 20
# The most pairs, and the noise words of each. More would change the loss by less than training with another seed does.
PAIRS, NOISE = 60_000, 5
# The ids that are looked at, evenly spread over the text, if there are more.
_BLOCKS, _BLOCK = 64, 1 << 14
# Pairs that are computed at once.
_AT_ONCE = 1 << 12


class HeldOut(NamedTuple):
    """Predictions to make: centres from their contexts, and noise words with each. The same for every run of a text."""

    contexts: Int32[np.ndarray, "pairs width"]  # one word for skip-gram, all of a window for CBOW; BREAK where none
    centres: Int32[np.ndarray, " pairs"]
    noise: Int32[np.ndarray, "pairs noise"]

    def loss(self, inputs: Float32[np.ndarray, "rows dim"], outputs: Float32[np.ndarray, "rows dim"]) -> float:
        """The mean loss of a prediction, in nats: `-log s(h . u_centre) - sum_k log s(-h . u_noise_k)`.

        `h` is the mean of the input vectors of the contexts.

        Args:
          inputs: The vectors that are returned after training.
          outputs: The vectors that they are multiplied with.

        Returns:
          The loss.
        """
        total = 0.0
        for first in range(0, len(self.centres), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            exists = (self.contexts[part] != BREAK).astype(np.float32)
            shares = exists / exists.sum(axis=1, keepdims=True)
            hidden = np.einsum("pwd,pw->pd", inputs[self.contexts[part]], shares)
            real = np.einsum("pd,pd->p", hidden, outputs[self.centres[part]])
            noise = np.einsum("pd,pkd->pk", hidden, outputs[self.noise[part]])
            total += float(np.logaddexp(0, -real).sum(dtype=np.float64))
            total += float(np.logaddexp(0, noise).sum(dtype=np.float64))
        return total / len(self.centres)


def draw_held_out(
    corpus: Corpus,
    window: int,
    kept: Float64[np.ndarray, " rows"],
    noise_weights: Float64[np.ndarray, " rows"],
    whole_windows: bool,
) -> HeldOut | None:
    """Draw predictions from text that is held out.

    Args:
      corpus: The text.
      window: The most words on either side of a centre; each prediction draws its own width up to it.
      kept: The probability of keeping each word. The others are dropped first, as in training.
      noise_weights: How often each word is drawn as noise, not normalised.
      whole_windows: Whether a centre is predicted from all words of its window, as by CBOW, or from one, as by
        skip-gram.

    Returns:
      At most `PAIRS` predictions; None if the text gives none.
    """
    rng = np.random.default_rng(0)  # not the seed of the run, so that all runs have the same predictions
    ids, sequence = _text(corpus, kept, rng)
    if not len(ids):
        return None
    # Some have no context; with three times as many, there are enough unless the text is short.
    if whole_windows:
        positions = rng.permutation(len(ids))[: 3 * PAIRS]
        widths = rng.integers(1, window, (len(positions), 1), endpoint=True)
        offsets = np.concatenate([np.arange(-window, 0), np.arange(1, window + 1)])
    else:
        positions = rng.integers(0, len(ids), min(3 * PAIRS, 2 * window * len(ids)))
        # Of the widths from 1 to the window W, W + 1 - k reach a word at the distance k.
        reach = np.arange(window, 0, -1)
        offsets = rng.choice(np.arange(1, window + 1), (len(positions), 1), p=reach / reach.sum())
        offsets, widths = offsets * rng.choice([-1, 1], offsets.shape), window
    places = positions[:, None] + offsets
    inside = (places >= 0) & (places < len(ids)) & (np.abs(offsets) <= widths)
    places = np.where(inside, places, 0)
    inside &= sequence[places] == sequence[positions][:, None]
    contexts = np.where(inside, ids[places], np.int32(BREAK))
    exists = np.flatnonzero(inside.any(axis=1))[:PAIRS]
    if not len(exists):
        return None
    noise = rng.choice(len(kept), (len(exists), NOISE), p=noise_weights / noise_weights.sum())
    return HeldOut(contexts[exists], ids[positions[exists]], noise.astype(np.int32))


def _text(
    corpus: Corpus, kept: Float64[np.ndarray, " rows"], rng: np.random.Generator
) -> tuple[Int32[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """The words that subsampling keeps, and for each the number of its sequence."""
    step = max(_BLOCK, -(-corpus.length // _BLOCKS))
    blocks = [next(corpus.blocks(_BLOCK, first)) for first in range(0, corpus.length, step)]
    # No window reaches from one block into the next, unless the blocks are neighbours in the text.
    gap = np.full(int(step > _BLOCK), BREAK, np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(part for block in blocks for part in (block, gap))])
    sequence = np.cumsum(ids == BREAK)
    stays = (ids != BREAK) & (rng.random(len(ids)) < kept[ids])
    return ids[stays], sequence[stays]
