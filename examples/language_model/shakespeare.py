"""Shakespeare as numbers, and the loop that trains on them: what the language models of this folder share.

Each of them is the neural probabilistic language model of Bengio et al. (2003) with a tied head: the vectors of the
last eight words go through a hidden layer to one vector, which is compared with that of every word in the same table.
The loss needs no array of all logits, and the gradient of the words that were read is added to that of the head row by
row. The losses of all four fall alike. Run `python examples/language_model/in_nnx.py`, or another one.

References:
  Bengio, Ducharme, Vincent, Jauvin, A neural probabilistic language model, 2003,
  https://www.jmlr.org/papers/v3/bengio03a.html
  Press, Wolf, Using the output embedding to improve language models, 2017, https://arxiv.org/abs/1608.05859
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

import embax.files
import embax.train

CORPUS = Path(__file__).parents[1] / "data" / "shakespeare.txt.xz"
CONTEXT, DIM, HIDDEN, BATCH, LEARNING_RATE = 8, 64, 128, 512, 0.01
PADDING, UNKNOWN = "<pad>", "<unk>"  # rows 0 and 1: before the first word of a paragraph, and rare words


def load(paragraphs: int | None = None, min_count: int = 5) -> tuple[embax.Vocabulary, np.ndarray, np.ndarray]:
    """Read the corpus.

    Args:
      paragraphs: How many paragraphs of it. Default: all.
      min_count: Words that occur less often are `<unk>`.

    Returns:
      The vocabulary, the words before each word `(words, CONTEXT)`, and each word `(words,)`.
    """
    read = embax.train.tokenize(embax.files.read_text(CORPUS))
    texts = [words for _, words in zip(range(paragraphs or 10**9), read, strict=False)]
    counts = Counter(word for words in texts for word in words)
    frequent = [word for word, count in counts.most_common() if count >= min_count]
    vocabulary = embax.Vocabulary([PADDING, UNKNOWN, *frequent])
    contexts, targets = [], []
    for words in texts:
        ids = np.concatenate([np.zeros(CONTEXT, np.int32), vocabulary.ids(words, unknown=1)])
        contexts.append(np.lib.stride_tricks.sliding_window_view(ids[:-1], CONTEXT))
        targets.append(ids[CONTEXT:])
    return vocabulary, np.concatenate(contexts).astype(np.int32), np.concatenate(targets).astype(np.int32)


def batches(
    contexts: np.ndarray, targets: np.ndarray, steps: int, seed: int = 0
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Draw batches of words and of what comes before them."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(0, len(targets), BATCH)
        yield jax.numpy.asarray(contexts[chosen]), jax.numpy.asarray(targets[chosen])


def train(start: Callable[[int], Callable[[jax.Array, jax.Array], jax.Array]]) -> list[float]:
    """Train a model by the options of the command line.

    Args:
      start: Given the number of rows, makes a model and returns its training step: contexts and targets to the loss.

    Returns:
      The loss of each step, in nats a word.
    """
    parser = argparse.ArgumentParser(description="A tiny language model with a tied head, on Shakespeare.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--paragraphs", type=int, default=None, help="how much of the corpus; all of it if left out")
    options = parser.parse_args()
    vocabulary, contexts, targets = load(options.paragraphs)
    print(f"{len(targets):,} words, {len(vocabulary):,} of them different")
    step, losses, began = start(len(vocabulary)), [], time.monotonic()
    for number, batch in enumerate(batches(contexts, targets, options.steps)):
        losses.append(step(*batch))
        if number % 50 == 0 or number == options.steps - 1:
            print(f"step {number:4}: {float(losses[-1]):.3f} nats a word, {time.monotonic() - began:.1f} s")
    return [float(loss) for loss in losses]
