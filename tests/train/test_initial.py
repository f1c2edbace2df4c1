import numpy as np
import pytest

from embax import train
from embax.train._engines import native as _native
from embax.train._input.corpus import encode
from embax.train._parts import WHOLE
from embax.vectors import Vectors

DIM = 16
OLD = Vectors(["king", "crown", "sword"], np.eye(3, DIM, dtype=np.float32), [40, 30, 3])
TEXT = [["king", "queen"] * 20, ["sword"], ["rare"]]


def test_encode_keeps_known_words_however_rare():
    (corpus,) = encode(TEXT, 5, WHOLE, known=OLD.vocabulary)
    assert (corpus.tokens, corpus.counts.tolist()) == (["king", "queen", "sword"], [20, 20, 1])


@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
def test_training_continues_from_vectors(learn):
    vectors = learn(TEXT, initial=OLD, epochs=1, sample=0, learning_rate=0.01)
    assert vectors.vocabulary.tokens() == ["king", "crown", "queen", "sword"]
    assert vectors.counts.tolist() == [60, 30, 20, 4]
    np.testing.assert_array_equal(vectors["crown"], OLD["crown"])  # it does not occur
    assert not np.array_equal(vectors["king"], OLD["king"])
    np.testing.assert_allclose(vectors["king"], OLD["king"], atol=0.2)
    assert 0 < np.abs(vectors["queen"]).max() < 0.3  # fresh vectors are within 1 / 16
    again = learn(TEXT, initial=OLD, epochs=1, sample=0, learning_rate=0.01)
    np.testing.assert_array_equal(vectors.weight, again.weight)


@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
@pytest.mark.parametrize("engine", ["xla", "native"])
def test_training_continues_from_the_second_table(learn, engine):
    if engine == "native" and _native.lacking(None) is not None:
        pytest.skip("the native kernels are not installed, or switched off")
    options = {"sample": 0, "min_count": 1, "engine": engine}
    tables = []
    text = [[f"{topic}{number % 7}" for number in range(start, start + 9)] for start in range(40) for topic in "abc"]
    first = learn(text, dim=DIM, epochs=10, learning_rate=0.1, keep_second=tables.append, **options)
    (second,) = tables
    assert second.vocabulary.tokens() == first.vocabulary.tokens()
    assert second.metadata["table"] == "second"
    assert np.abs(second.weight).max() > 0.1
    text, rates = [*text, ["new"] * 9], {"epochs": 1, "learning_rate": 1e-6}
    losses = {}
    for name, more in {"none": {}, "second": {"initial_second": second}}.items():
        reports = []
        learn(text, initial=first, progress=reports.append, keep_second=tables.append, **rates, **options, **more)
        losses[name] = reports[-1].loss
    assert losses["second"] < 0.9 * losses["none"]  # as of a table of zeros
    *_, fresh, kept = tables
    np.testing.assert_allclose(kept[first.vocabulary.tokens()], second.weight, atol=1e-3)
    assert np.abs(fresh.weight).max() < 1e-3
    assert np.abs(kept["new"]).max() < 1e-3


def test_training_from_vectors_resumes_only_from_the_same_ones(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    options = {"epochs": 1, "sample": 0, "checkpoint": tmp_path, "checkpoint_every": 1}
    train.skipgram(TEXT, initial=OLD, **options)
    other = Vectors(OLD.vocabulary, OLD.weight * 2, OLD.counts)
    with pytest.raises(train.CheckpointError, match="other options"):
        train.skipgram(TEXT, initial=other, **options)


@pytest.mark.parametrize(
    ("initial", "error", "match"),
    [
        (Vectors(["a"], [[1.0, 2.0]]), ValueError, r"skipgram\(initial=\.\.\.\)` must have .* dim=3, got 2"),
        (Vectors(["a", "b"], [[1.0, 2, 3], [np.nan, 0, 0]]), ValueError, "must be finite, got NaN .* of 'b'"),
        (None, ValueError, r"skipgram\(initial_second=\.\.\.\)` must come with `initial`"),
        ("vectors.safetensors", TypeError, r"initial=\.\.\.\)` must be Vectors, got str"),
    ],
)
def test_training_refuses_vectors_that_it_cannot_continue_from(initial, error, match):
    with pytest.raises(error, match=match):
        train.skipgram(TEXT, dim=3, initial=initial, initial_second=OLD if initial is None else None)
