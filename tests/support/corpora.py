"""Corpora of tests."""

import numpy as np


def ids_of(corpus, size=1 << 20):
    """All ids of a corpus, as a list."""
    return np.concatenate([np.zeros(0, np.int32), *corpus.blocks(size)]).tolist()


def nine_words():
    return ["the king holds the crown the queen wears the crown the dog eats the bone".split()] * 400


def half_is_one_item():
    rng = np.random.default_rng(0)
    items = np.where(rng.random((400, 50)) < 0.5, 0, rng.integers(1, 50, (400, 50)))
    return [[str(item) for item in line] for line in items]
