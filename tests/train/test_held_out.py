import numpy as np
import pytest
from corpora import ids_of

from embax import train
from embax.train import _held_out
from embax.train._held_out import draw_held_out
from embax.train._input.corpus import BREAK, encode
from embax.train._parts import WHOLE, Parts


def text(*sequences):
    """A corpus of these sequences alone."""
    return encode(sequences, 1, WHOLE)[0]


ALL = np.ones(100)  # all words are kept


def drawn(corpus, window, whole_windows=False, kept=ALL):
    rows = len(corpus.tokens)
    return draw_held_out(corpus, window, kept[:rows], np.arange(1.0, rows + 1), whole_windows)


def test_encode_holds_out_every_so_many_th_sequence():
    sequences = [["a", "b"], ["a", "x"], ["b", "a", "x"], ["a"], ["b"], ["y", "b"]]
    corpus, held = encode(sequences, 1, WHOLE, held_out=3)
    assert (corpus.tokens, corpus.counts.tolist()) == (["a", "b", "x"], [3, 2, 1])
    assert ids_of(corpus) == [0, 1, BREAK, 0, 2, BREAK, 0, BREAK, 1, BREAK]
    assert (held.tokens, ids_of(held)) == (corpus.tokens, [1, 0, 2, BREAK, 1, BREAK])
    # Parts get the other sequences in turn, and each process has the same text to hold out.
    *parts, again = encode(sequences, 1, Parts(None, 2, (0, 1)), held_out=3)
    assert [ids_of(part) for part in parts] == [[0, 1, BREAK, 0, BREAK], [0, 2, BREAK, 1, BREAK]]
    assert ids_of(again) == ids_of(held)


def test_draw_held_out_weights_pairs_by_their_distance():
    corpus = text([str(number) for number in range(90)], ["x"])
    found = drawn(corpus, 3)
    assert found.contexts.shape == (len(found.centres), 1)
    assert found.noise.shape == (len(found.centres), 5)
    number = np.asarray([int(token) if token != "x" else 1000 for token in corpus.tokens])
    distance = number[found.contexts[:, 0]] - number[found.centres]
    assert set(distance.tolist()) == {-3, -2, -1, 1, 2, 3}
    # Out of 540 draws, words at the ends lack some.
    share = np.bincount(np.abs(distance))[1:] / len(distance)
    np.testing.assert_allclose(share, [3 / 6, 2 / 6, 1 / 6], atol=0.08)  # 4 standard deviations
    np.testing.assert_array_equal(drawn(corpus, 3).contexts, found.contexts)


def test_draw_held_out_takes_whole_windows():
    corpus = text([str(number) for number in range(90)])
    number = np.asarray([int(token) for token in corpus.tokens])
    found = drawn(corpus, 3, whole_windows=True)
    assert sorted(found.centres.tolist()) == list(range(90))
    widths = []
    for centre, contexts in zip(found.centres, found.contexts, strict=True):
        distance = number[contexts[contexts != BREAK]] - number[centre]
        widths.append(np.abs(distance).max())
        inside = [k for k in range(-widths[-1], widths[-1] + 1) if k and 0 <= number[centre] + k < 90]
        assert distance.tolist() == inside
    assert set(widths) == {1, 2, 3}


def test_draw_held_out_returns_none_for_text_without_pairs():
    assert drawn(text(["a"], ["b"], ["a"]), 5) is None
    assert drawn(text(["a", "b"]), 5, kept=np.zeros(2)) is None


def test_draw_held_out_draws_noise_by_its_weights(monkeypatch):
    monkeypatch.setattr(_held_out, "PAIRS", 4000)
    found = drawn(text(["a", "b", "c"] * 3000), 2)
    assert found.centres.shape == (4000,)
    share = np.bincount(found.noise.ravel(), minlength=3) / found.noise.size
    np.testing.assert_allclose(share, [1 / 6, 2 / 6, 3 / 6], atol=0.015)  # 4 standard deviations


def test_draw_held_out_looks_at_blocks_of_a_long_text(monkeypatch):
    monkeypatch.setattr(_held_out, "_BLOCK", 100)
    monkeypatch.setattr(_held_out, "_BLOCKS", 4)
    corpus = text([str(number) for number in range(9_999)])
    number = np.asarray([int(token) for token in corpus.tokens])
    found = drawn(corpus, 2, kept=np.ones(10_000))
    assert set(np.abs(number[found.contexts[:, 0]] - number[found.centres]).tolist()) == {1, 2}
    assert set((number[found.centres] // 100).tolist()) == {0, 25, 50, 75}


@pytest.mark.parametrize("pairs", [3, 5000])
def test_loss_equals_the_sum_over_predictions(pairs):
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(2, 7, 4)).astype(np.float32)
    contexts = rng.integers(0, 7, (pairs, 3)).astype(np.int32)
    contexts[::2, 1] = BREAK
    centres, noise = rng.integers(0, 7, pairs).astype(np.int32), rng.integers(0, 7, (pairs, 5)).astype(np.int32)
    total = 0.0
    for row, centre, words in zip(contexts, centres, noise, strict=True):
        hidden = inputs[row[row != BREAK]].astype(np.float64).mean(axis=0)
        total += np.log1p(np.exp(-hidden @ outputs[centre]))
        total += np.log1p(np.exp(outputs[words].astype(np.float64) @ hidden)).sum()
    found = _held_out.HeldOut(contexts, centres, noise).loss(inputs, outputs)
    np.testing.assert_allclose(found, total / pairs, rtol=1e-5)  # float32


# One shape for all runs, so that they share a compiled program.
CORPUS = [[f"{topic}{number % 7}" for number in range(start, start + 9)] for start in range(40) for topic in "abc"]
OPTIONS = {"dim": 8, "window": 2, "epochs": 3, "min_count": 1, "sample": 0, "learning_rate": 0.1}


def test_after_epoch_gets_the_vectors_and_a_falling_loss():
    epochs = []
    vectors = train.skipgram(CORPUS, **OPTIONS, held_out=True, after_epoch=epochs.append)
    assert [(epoch.epoch, epoch.epochs) for epoch in epochs] == [(1, 3), (2, 3), (3, 3)]
    losses = [epoch.held_out for epoch in epochs]
    assert 6 * np.log(2) > losses[0] > losses[1] > losses[2] > 0
    np.testing.assert_array_equal(epochs[2].vectors.weight, vectors.weight)
    assert not np.array_equal(epochs[1].vectors.weight, vectors.weight)
    assert vectors.counts.sum() == 9 * (120 - 6)
    assert not any(epoch.vectors.weight.flags.writeable for epoch in epochs)  # the last one shares the result's memory


def test_training_ends_if_a_callback_returns_true():
    epochs, reports = [], []
    ended = train.skipgram(CORPUS, **OPTIONS, after_epoch=lambda epoch: epochs.append(epoch) or epoch.epoch == 2)
    np.testing.assert_array_equal(ended.weight, epochs[1].vectors.weight)
    assert len(epochs) == 2
    train.skipgram(CORPUS, **OPTIONS, progress=lambda report: reports.append(report) or True)
    assert len(reports) == 1
    assert 0 <= reports[0].waited <= reports[0].seconds
    assert 0 < reports[0].learning_rate < 0.1


def test_held_out_needs_enough_text():
    with pytest.raises(train.CorpusError, match="every 20th sequence is held out, but these have no pairs"):
        train.skipgram(CORPUS[:19], **OPTIONS, held_out=True)


def test_max_vocabulary_keeps_the_most_frequent_words():
    words = train.skipgram([["a"] * 9 + ["b"] * 5 + ["c"] * 3], **OPTIONS, max_vocabulary=2)
    assert words.vocabulary.tokens() == ["a", "b"]
    with pytest.raises(ValueError, match=r"cbow\(max_vocabulary=\.\.\.\)` must be at least 1"):
        train.cbow(CORPUS, max_vocabulary=0)
