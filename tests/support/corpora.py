"""Corpora of tests."""

import numpy as np


def ids_of(corpus, size=1 << 20):
    """All ids of a corpus, as a list."""
    return np.concatenate([np.zeros(0, np.int32), *corpus.blocks(size)]).tolist()
