import numpy as np
import pytest

import embax
from embax import train
from embax.train._subwords import NgramOptions, OccurringRows, Pieces, pieces_of
from embax.vocabulary import Vocabulary

DIM = 16


def text():
    rng = np.random.default_rng(0)
    groups = [["walks", "walked", "walking"], ["talks", "talked", "talking"], ["kings", "kingly", "kingdom"]]
    return [[groups[i % 3][j] for j in rng.integers(0, 3, 10)] for i in range(300)]


def test_pieces_of_words_are_their_own_row_and_their_ngrams():
    pieces = pieces_of(Vocabulary(["cat", "cats", "", "的"]), NgramOptions(3, 3, 1000))
    rows = [pieces.ids[start:end].tolist() for start, end in zip(pieces.starts[:-1], pieces.starts[1:], strict=True)]
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    assert [len(row) for row in rows] == [4, 5, 1, 2]  # <ca cat at>; <ca cat ats ts>; none; <的>
    assert rows[0][1:3] == rows[1][1:3]
    assert sorted({row for of in rows for row in of}) == list(range(pieces.rows)) == list(range(4 + 6))
    assert (np.diff(pieces.used) > 0).all()


def test_pieces_share_few_buckets():
    pieces = pieces_of(Vocabulary(["cat", "dogs"]), NgramOptions(3, 6, 2))
    assert pieces.used.tolist() == [0, 1]
    assert pieces.rows == 4


def test_rows_of_buckets_that_do_not_occur_are_zeros():
    pieces = Pieces(np.asarray([0, 2, 3]), np.asarray([0, 2, 1], np.int32), np.asarray([5, 9]))
    rows = OccurringRows(np.arange(1, 5, dtype=np.float32)[:, None], pieces, 12)
    assert rows.shape == (14, 1)
    assert rows.take(np.arange(14), axis=0).ravel().tolist() == [1, 2, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0]


@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
def test_training_with_subwords_answers_unknown_words_and_writes_fasttext(learn, tmp_path):
    vectors = learn(text(), dim=DIM, epochs=4, sample=0, learning_rate=0.1, subwords=True, buckets=4096)
    assert "walker" not in vectors
    assert {token for token, _ in vectors.most_similar("kingdoms", k=3)} == {"kings", "kingly", "kingdom"}
    vectors.save(tmp_path / "model.bin", format="fasttext")
    again = embax.Vectors.load(tmp_path / "model.bin")
    assert again.vocabulary.tokens() == vectors.vocabulary.tokens()
    np.testing.assert_array_equal(again.weight, vectors.weight)
    np.testing.assert_array_equal(again["walker"], vectors["walker"])
    np.testing.assert_array_equal(again.counts, vectors.counts)


def test_training_with_subwords_reads_vectors_of_words_after_an_epoch():
    epochs = []
    options = {"dim": DIM, "epochs": 2, "subwords": True, "ngram_lengths": (2, 4), "held_out": True, "min_count": 1}
    vectors = train.skipgram(text(), **options, after_epoch=epochs.append)
    np.testing.assert_array_equal(epochs[1].vectors.weight, vectors.weight)
    assert epochs[1].held_out < epochs[0].held_out < 4.2
    assert (vectors.subwords.ngrams.minimum, vectors.subwords.ngrams.maximum) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"subwords": 1}, TypeError, r"subwords=\.\.\."),
        ({"ngram_lengths": (4, 3)}, ValueError, r"ngram_lengths=\.\.\.\)` must be two lengths, the shorter first"),
        ({"ngram_lengths": (0, 3)}, ValueError, "must be at least 1"),
        ({"ngram_lengths": (3, 65)}, ValueError, "at most 64 characters"),
        ({"ngram_lengths": 3}, TypeError, "must be two lengths"),
        ({"buckets": 0}, ValueError, "buckets"),
        ({"subwords": True, "initial": embax.Vectors(["a"], [[1.0]])}, ValueError, "vectors or sub-words, got both"),
    ],
)
def test_skipgram_refuses_wrong_subword_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        train.skipgram([["a"]], **arguments)
