import numpy as np
import pytest

from embax.train._corpus import encode
from embax.train._parts import WHOLE
from embax.train._windows import batches


def drawn(sequences, window=2, epochs=1, sample=np.inf, seed=0):
    (corpus,) = encode(sequences, 1, WHOLE)
    return corpus, list(batches([corpus], WHOLE, window, epochs, sample, [np.random.default_rng(seed)]))


def pairs_of(corpus, windows):
    """The (centre, slot, context) triples, in words."""
    found = []
    for part in windows:
        for centre, contexts in zip(part.centres.ravel(), part.contexts.reshape(part.centres.size, -1), strict=True):
            for slot, context in enumerate(contexts):
                if context < len(corpus.tokens):
                    found.append((corpus.tokens[centre], slot, corpus.tokens[context]))
    return sorted(found)


def test_batches_of_window_one_are_all_neighbours_within_a_sequence():
    corpus, windows = drawn([["a", "b", "c"], ["d"], ["e", "f"]], window=1)
    expected = [("a", 1, "b"), ("b", 0, "a"), ("b", 1, "c"), ("c", 0, "b"), ("e", 1, "f"), ("f", 0, "e")]
    assert pairs_of(corpus, windows) == expected


def test_batches_draw_widths_evenly_from_one_to_the_window():
    corpus, windows = drawn([[str(number) for number in range(3000)]], window=3)
    found = pairs_of(corpus, windows)
    assert all(int(context) - int(centre) == (slot - 3 if slot < 3 else slot - 2) for centre, slot, context in found)
    # Slots 2 and 3 are next to the centre, 0 and 5 three words off.
    share = np.bincount([slot for _, slot, _ in found]) / 3000
    np.testing.assert_allclose(share, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], atol=0.04)  # 4 standard deviations


def test_batches_have_one_shape_and_count_the_words():
    corpus, windows = drawn([["a", "b"] * 700, ["c"] * 13], epochs=3)
    assert {(part.centres.shape, part.contexts.shape) for part in windows} == {((16, 32), (16, 32, 4))}
    assert [part.epoch for part in windows] == sorted(part.epoch for part in windows)
    assert {part.epoch for part in windows} == {1, 2, 3}
    words = [part.words for part in windows]
    assert words == sorted(words)
    assert words[-1] == 3 * 1413
    assert sum(int((part.centres < len(corpus.tokens)).sum()) for part in windows) == 3 * 1413


@pytest.mark.parametrize("words", [1, 2, 100_000])
def test_batches_grow_with_the_corpus(words):
    _, windows = drawn([["a"] * words])
    assert windows[0].centres.shape[1] == {1: 32, 2: 32, 100_000: 128}[words]


def test_batches_of_different_epochs_and_seeds_differ():
    sequences = [[str(number) for number in range(500)]]
    _, (first, second) = drawn(sequences, epochs=2)
    _, (other,) = drawn(sequences, seed=1)
    _, (again,) = drawn(sequences)
    assert not np.array_equal(first.centres, second.centres)
    assert not np.array_equal(first.centres, other.centres)
    np.testing.assert_array_equal(first.centres, again.centres)
    np.testing.assert_array_equal(first.contexts, again.contexts)


def test_batches_subsample_as_word2vec_does_and_close_the_gaps():
    frequent, rare = 40_000, 10_000
    corpus, windows = drawn([["a", "a", "a", "a", "b"] * rare], sample=0.1)
    rows = np.concatenate([part.centres.ravel() for part in windows])
    kept = np.bincount(rows, minlength=3)[:2]
    relative = 0.1 * 50_000 / np.asarray([frequent, rare])
    expected = corpus.counts * np.minimum(1, np.sqrt(relative) + relative)
    assert kept[1] == np.round(expected[1]) == rare
    np.testing.assert_allclose(kept, expected, rtol=0.02)  # 4 standard deviations of the frequent word
    # Windows are taken of what is left: next to `b` stands a word wherever `b` is not at the end.
    contexts = np.concatenate([part.contexts.reshape(-1, 4) for part in windows])[rows == 1]
    assert (contexts[:, 1:3] < 2).mean() > 0.999
