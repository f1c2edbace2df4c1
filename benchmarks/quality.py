"""How good word vectors are: held-out loss, overlap of neighbours, genres of neighbours, similarity of word pairs.

Each of them is measured the same way for all libraries, from the arrays that trainers.py has written.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

PAIRS, NOISE, WINDOW, SAMPLE = 60_000, 5, 5, 1e-3
OFTEN, NEAREST, ASKED = 10, 10, 2_000


class Learned(NamedTuple):
    """What a run has learned."""

    tokens: list[str]
    inputs: np.ndarray  # float32 (rows, dim)
    outputs: np.ndarray  # float32 (rows, dim)
    asked: np.ndarray  # float32 (asked, dim), the vectors of words that were asked for

    @classmethod
    def read(cls, folder: Path) -> "Learned":
        """Read what trainers.py has written."""
        arrays = np.load(folder / "vectors.npz")
        tokens = json.loads((folder / "tokens.json").read_text())
        return cls(tokens, arrays["inputs"][: len(tokens)], arrays["outputs"][: len(tokens)], arrays["asked"])

    def rows_of(self, tokens: Sequence[str]) -> np.ndarray:
        """The row numbers of tokens, all of which are there."""
        row_of = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        return np.asarray([row_of[token] for token in tokens])


class HeldOut:
    """Pairs of text that was not learned from, with noise words; drawn once, the same for all.

    Args:
      counts: How often each word occurs in the text that is learned from.
      lines: The text that is not.
    """

    def __init__(self, counts: Mapping[str, int], lines: Sequence[Sequence[str]]):
        self.words = sorted(counts, key=lambda word: (-counts[word], word))
        row_of, rng = dict(zip(self.words, range(len(counts)), strict=True)), np.random.default_rng(123)
        of_words = np.asarray([counts[word] for word in self.words], float)
        share = SAMPLE * of_words.sum() / of_words
        kept = np.minimum(1, np.sqrt(share) + share)
        ids = np.asarray([row_of[word] for line in lines for word in line if word in row_of])
        numbers = [number for number, line in enumerate(lines) for word in line if word in row_of]
        stays = rng.random(len(ids)) < kept[ids]
        ids, line = ids[stays], np.asarray(numbers)[stays]
        # A word at distance k is a context as often as a width drawn from 1 to WINDOW reaches it.
        at = rng.integers(0, len(ids), 6 * PAIRS)
        distance, width = (rng.integers(1, WINDOW + 1, len(at)) for _ in range(2))
        other = at + distance * rng.choice([-1, 1], len(at))
        good = (distance <= width) & (other >= 0) & (other < len(ids))
        good &= line[np.clip(other, 0, len(ids) - 1)] == line[at]
        noise = of_words**0.75 / (of_words**0.75).sum()
        self.centres, self.contexts = ids[at[good]][:PAIRS], ids[other[good]][:PAIRS]
        self.noise = rng.choice(len(noise), (len(self.centres), NOISE), p=noise)

    def loss(self, learned: Learned) -> float:
        """The mean loss of a pair with its noise words, in nats."""
        rows = learned.rows_of(self.words)
        inputs, outputs = learned.inputs[rows].astype(float), learned.outputs[rows].astype(float)
        vectors = inputs[self.contexts]
        of_pairs = np.einsum("nd,nd->n", vectors, outputs[self.centres])
        of_noise = np.einsum("nd,nkd->nk", vectors, outputs[self.noise])
        return float(np.logaddexp(0, -of_pairs).mean() + np.logaddexp(0, of_noise).sum(1).mean())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def nearest(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The NEAREST rows by cosine of each of some rows, without itself; in no order."""
    unit_vectors = unit(vectors)
    cosines = unit_vectors[rows] @ unit_vectors.T
    cosines[np.arange(len(rows)), rows] = -2
    return np.argpartition(-cosines, NEAREST, axis=1)[:, :NEAREST]


def overlap(one: Learned, others: Sequence[Learned], counts: Mapping[str, int]) -> float:
    """The share of nearest words that are also nearest in other models, of ASKED words, frequent ones first."""
    words = sorted((word for word in counts if counts[word] >= OFTEN), key=lambda word: (-counts[word], word))
    asked = np.unique(np.linspace(50, len(words) - 1, ASKED).astype(int))

    def of(learned: Learned) -> list[set[int]]:
        return [set(row) for row in nearest(learned.inputs[learned.rows_of(words)], asked).tolist()]

    own = of(one)
    return float(np.mean([len(a & b) / NEAREST for other in others for a, b in zip(own, of(other), strict=True)]))


def genre_share(learned: Learned, genres: Mapping[str, set[str]], counts: Mapping[str, int]) -> float:
    """The share of the NEAREST films of a film, of those liked often, that have a genre in common with it."""
    films = [film for film in learned.tokens if counts[film] >= OFTEN]
    found = nearest(learned.inputs[learned.rows_of(films)], np.arange(len(films)))
    return float(np.mean([bool(genres[films[i]] & genres[films[j]]) for i, row in enumerate(found) for j in row]))


def similarity(vectors: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str, float]]) -> float:
    """Spearman's correlation of cosines with what people said of pairs of words."""
    cosines = [float(unit(vectors[a][None])[0] @ unit(vectors[b][None])[0]) for a, b, _ in pairs]
    return float(spearmanr(cosines, [score for *_, score in pairs])[0])


def counted(lines: Sequence[Sequence[str]], min_count: int = 5) -> dict[str, int]:
    """How often each word occurs, without rare ones."""
    counts = Counter(word for line in lines for word in line)
    return {word: count for word, count in counts.items() if count >= min_count}
