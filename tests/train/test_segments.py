import numpy as np
import pytest

from embax.train._engines import segments as _segments
from embax.train._engines import steps as _steps
from embax.train._engines.engine import kept
from embax.train._engines.segments import Shape, batches, segments, shape_of
from embax.train._input.corpus import BREAK, encode
from embax.train._parts import WHOLE

ALL = np.ones(100_000, np.float32)


def drawn(sequences, sample=np.inf, seed=0, epoch=1):
    (corpus,) = encode(sequences, 1, WHOLE)
    return corpus, list(batches([corpus], WHOLE, kept(corpus.counts, sample), Shape(32, 2, 8), seed, epoch))


def rows_of(corpus, found):
    """The row numbers in batches, without padding."""
    tokens = np.concatenate([batch.tokens.ravel() for batch in found])
    tokens = np.where(tokens < 0, ~tokens, tokens)
    return tokens[tokens < len(corpus.tokens)]


def test_segments_hold_the_words_in_order_and_mark_where_sequences_begin():
    ids = np.asarray([5, 6, BREAK, BREAK, 7, 8, 9, BREAK, 4], np.int32)
    found = segments(ids, ALL[:11], 3, np.random.default_rng(0))
    assert found.shape == (-(-found.size // 3), 3)
    lines = {tuple(line) for line in found.tolist()}
    assert any(
        lines == {tuple(([10] * offset + [~5, 6, ~7, 8, 9, ~4] + [10] * 3)[at : at + 3]) for at in range(0, 9, 3)}
        or (offset == 0 and lines == {(~5, 6, ~7), (8, 9, ~4)})
        for offset in range(3)
    )


def test_segments_begin_at_every_offset_and_in_every_order():
    ids = np.append(np.arange(12, dtype=np.int32), np.int32(BREAK))
    found = {tuple(segments(ids, ALL[:14], 4, np.random.default_rng(seed)).ravel().tolist()) for seed in range(50)}
    assert {line.index(~0) % 4 for line in found} == {0, 1, 2, 3}
    assert len(found) > 20


@pytest.mark.parametrize("ids", [[], [BREAK], [BREAK, BREAK]])
def test_segments_of_no_words_are_empty(ids):
    assert segments(np.asarray(ids, np.int32), ALL[:4], 8, np.random.default_rng(0)).shape == (0, 8)


@pytest.mark.parametrize("window", [1, 5, 10, 20])
def test_segments_weigh_each_distance_as_word2vec_expects(window):
    """On a million words, within 2 %: (window + 1 - distance) / window times the number of pairs in the text."""
    rng = np.random.default_rng(window)
    ids = np.where(rng.random(1_000_000) < 0.03, np.int32(BREAK), np.int32(0))
    plan = _steps.plan_of("skipgram", window, 5)
    found = segments(ids, ALL[:2], plan.length, rng)
    sequence = np.where(found == 1, -1 - np.arange(plan.length), np.cumsum(found < 0, axis=1))
    band = _steps._band(plan)
    in_text = np.cumsum(ids == BREAK)[ids != BREAK]
    for distance in range(1, window + 1):
        pairs = np.count_nonzero(sequence[:, distance:] == sequence[:, :-distance])
        # All pairs of this distance weigh the same.
        weight = np.diag(band, distance)
        assert (weight == weight[0]).all()
        expected = np.count_nonzero(in_text[distance:] == in_text[:-distance]) * (window + 1 - distance) / window
        np.testing.assert_allclose(pairs * weight[0], expected, rtol=0.02)
    assert not np.diag(band).any()
    assert not np.triu(band, window + 1).any()


def test_batches_have_one_shape_and_count_the_words_of_the_text():
    corpus, found = drawn([["a", "b"] * 700, ["c"] * 13])
    assert {batch.tokens.shape for batch in found} == {(32, 2, 8)}
    assert sum(batch.words for batch in found) == 1413 == len(rows_of(corpus, found))
    assert [batch.steps for batch in found] == [32, 32, 25]
    assert all((batch.tokens[batch.steps :] == 3).all() for batch in found)
    assert (found[-1].tokens[found[-1].steps - 1] != 3).any()


def test_batches_count_words_that_subsampling_drops():
    _, found = drawn([["a"] * 1000], sample=1e-12)
    assert [(batch.words, batch.steps) for batch in found] == [(1000, 0)]


def test_batches_take_blocks_of_a_long_corpus_one_by_one(monkeypatch):
    monkeypatch.setattr(_segments, "_BLOCK", 100)
    corpus, found = drawn([[str(number) for number in range(500)]])
    assert sorted(rows_of(corpus, found)) == list(range(500))
    assert [batch.words for batch in found] == [100, 100, 100, 100, 100]


def test_batches_of_different_epochs_and_seeds_differ():
    sequences = [[str(number) for number in range(500)]]
    first, again, later, other = (
        drawn(sequences, seed=seed, epoch=epoch)[1][0].tokens for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first, other)


def test_batches_subsample_like_word2vec_and_close_the_gaps():
    frequent, rare = 40_000, 10_000
    corpus, found = drawn([["a", "a", "a", "a", "b"] * rare], sample=0.1)
    rows = rows_of(corpus, found)
    relative = 0.1 * 50_000 / np.asarray([frequent, rare])
    expected = corpus.counts * np.minimum(1, np.sqrt(relative) + relative)
    stayed = np.bincount(rows, minlength=2)
    assert stayed[1] == np.round(expected[1]) == rare
    np.testing.assert_allclose(stayed, expected, rtol=0.02)  # 4 standard deviations of the frequent word


@pytest.mark.parametrize(
    ("words", "parts", "segments_of_a_step"),
    [(1, 1, 1), (16_000, 1, 2), (540_000, 1, 64), (540_000, 3, 22), (1e9, 1, 256), (1e9, 8, 32)],
)
def test_shape_of_grows_with_the_corpus(words, parts, segments_of_a_step):
    assert shape_of(16, words, parts) == (32, segments_of_a_step, 16)
