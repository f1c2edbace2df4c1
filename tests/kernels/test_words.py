"""The training of word vectors by the native library, against the same in float64 with the same random numbers."""

import numpy as np
import pytest

native = pytest.importorskip("native", reason="the native kernels are not installed")
if not hasattr(native.LIBRARY, "EmbaxTrainWords"):
    pytest.skip("the native library cannot train word vectors", allow_module_level=True)

import word_reference  # noqa: E402

ROWS, BUCKETS = 40, 25
SEED = np.array([7, 2**32 - 5], np.uint32)
RATES = np.array([0.1, 0.02], np.float32)


def vocabulary(rng, rows=ROWS, subwords=False, sample=True):
    weights = 1 / np.arange(1, rows + 1)
    keep = np.minimum(1, 4 * weights[::-1]) if sample else np.ones(rows)
    starts, pieces = native.NOTHING, native.NOTHING
    if subwords:
        lengths = rng.integers(1, 6, rows)
        lengths[3] = 150  # more than are added up at a time
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        pieces = rng.integers(0, rows + BUCKETS, starts[-1]).astype(np.int32)
    keep = (keep * 0xFFFFFFFF).astype(np.uint32)
    return word_reference.Vocabulary(keep, *word_reference.alias_tables(weights**0.75), starts, pieces)


def text(rng, rows=ROWS, lengths=(30, 1, 0, 2, 55, 1, 12)):
    """Sequences of frequent and rare words, some of one word or of none, and breaks that fill up a chunk."""
    parts = [np.append((rows * rng.random(n) ** 2).astype(np.int32), np.int32(-1)) for n in lengths]
    return np.concatenate([*parts, np.full(9, -1, np.int32)])


def tables(rng, dim, input_rows, rows=ROWS):
    stride = -(-dim // 16) * 16
    made = []
    for number in (input_rows, rows):
        table = np.zeros((number, stride), np.float32)
        table[:, :dim] = rng.normal(size=(number, dim)) / np.sqrt(dim)
        made.append(table)
    return made


# Every count of targets in a call, many targets and many contexts; rows of the usual stride, of one line, of some.
CASES = [
    ("skipgram", False, 100, 5, 5),
    ("skipgram", False, 1, 1, 1),
    ("skipgram", False, 19, 20, 7),
    ("skipgram", False, 300, 5, 20),
    ("skipgram", False, 33, 3, 2),
    ("skipgram", False, 64, 100, 3),
    ("cbow", False, 100, 5, 5),
    ("cbow", False, 7, 20, 20),
    ("cbow", True, 50, 5, 7),
    ("skipgram", True, 100, 5, 5),
    ("skipgram", True, 21, 20, 1),
    ("skipgram", True, 16, 1, 20),
]


@pytest.mark.parametrize(("model", "subwords", "dim", "window", "negative"), CASES)
def test_train_words_is_plain_sgd_on_windows(model, subwords, dim, window, negative):
    rng = np.random.default_rng(dim)
    words, ids = vocabulary(rng, subwords=subwords), text(rng)
    before = tables(rng, dim, ROWS + BUCKETS if subwords else ROWS)
    arguments = (*before, words, ids, RATES, SEED, window, negative, model == "cbow")
    inputs, outputs, loss = native.train_words(*arguments)
    expected = word_reference.train(*arguments)
    for got, want, old in zip((inputs, outputs), expected, before, strict=False):
        assert np.abs(want - old).max() > 0.02
        # Some hundred steps round to 24 bits; each sees the errors of those before it.
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-6)
        assert not np.asarray(got)[:, dim:].any()
    np.testing.assert_allclose(np.asarray(loss), expected[2], rtol=1e-5)
