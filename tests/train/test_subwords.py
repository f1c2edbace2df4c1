import numpy as np
import pytest

import embax
from embax import train
from embax.train._subwords import NgramOptions, pieces_of
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


@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
def test_training_with_subwords_answers_unknown_words_and_writes_models(learn, tmp_path):
    vectors = learn(text(), dim=DIM, epochs=4, sample=0, learning_rate=0.1, subwords=True, buckets=4096)
    assert "walker" not in vectors
    assert {token for token, _ in vectors.most_similar("kingdoms", k=3)} == {"kings", "kingly", "kingdom"}
    vectors.save(tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").stat().st_size < 4 * 4096 * DIM  # only the n-grams that occur
    embax.Vectors.load(tmp_path / "v.safetensors").save(tmp_path / "model.bin", format="fasttext")
    for name in ("v.safetensors", "model.bin"):
        again = embax.Vectors.load(tmp_path / name)
        assert again.vocabulary.tokens() == vectors.vocabulary.tokens()
        np.testing.assert_array_equal(again.weight, vectors.weight)
        np.testing.assert_array_equal(again["walker"], vectors["walker"])
        np.testing.assert_array_equal(again.counts, vectors.counts)


OPTIONS = {"dim": DIM, "sample": 0, "subwords": True, "ngram_lengths": (3, 4), "buckets": 4096, "min_count": 1}
# So small that no vector moves.
STILL = {"epochs": 1, "learning_rate": 1e-12}


@pytest.mark.parametrize("format", [None, "fasttext", "safetensors"])
def test_training_with_subwords_continues_from_a_model(format, tmp_path):
    first = train.skipgram([*text(), ["sings", "singing"] * 2], epochs=2, **OPTIONS)
    if format is not None:
        first.save(tmp_path / "model", format=format)
        first = embax.Vectors.load(tmp_path / "model")
    epochs = []
    more = [["walker", "walks", "zzz"]] * 40
    options = OPTIONS | STILL | {"initial": first, "after_epoch": epochs.append, "held_out": True}
    vectors = train.skipgram(more, **options)
    assert set(vectors.vocabulary.tokens()) == {*first.vocabulary.tokens(), "walker", "zzz"}
    kept = first.vocabulary.tokens()
    # Words whose n-grams all occurred before are where they were; a mean is rounded in float32.
    np.testing.assert_allclose(vectors.weight[vectors.vocabulary.ids(kept)], first.weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(vectors["singly"], first["singly"], rtol=1e-5, atol=1e-7)
    before, after = (x.counts[x.vocabulary.ids("walks")] for x in (first, vectors))
    assert after == before + 38  # two sequences are held out
    np.testing.assert_array_equal(epochs[0].vectors.weight, vectors.weight)
    assert epochs[0].held_out > 0


def test_known_ngrams_begin_at_their_vectors_in_new_words():
    first = train.skipgram(text(), epochs=3, **OPTIONS)
    vectors = train.skipgram([["walkk", "walks"]] * 9, initial=first, **OPTIONS | STILL)
    old, new = (x.subwords.vectors(["walk"]) for x in (first, vectors))
    grams = vectors.subwords.vectors(["walkk"])
    assert np.abs(grams).max() > 0
    # "walk" has the n-grams <wa wal alk lk> <wal walk alk>; "walkk" brings none of these back to a random vector.
    np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-7)


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
        (
            {"subwords": True, "initial": embax.Vectors(["a"], [[1.0]])},
            ValueError,
            r"skipgram\(initial=..., subwords=True\)` must have sub-words that are complete and in UTF-8, got none",
        ),
    ],
)
def test_skipgram_refuses_wrong_subword_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        train.skipgram([["a"]], **arguments)


def test_skipgram_refuses_to_continue_with_other_ngrams():
    first = train.skipgram(text()[:30], epochs=1, **OPTIONS)
    match = "of 3 to 6 characters in 2,000,000 buckets, got 3 to 4 characters in 4,096 buckets"
    with pytest.raises(ValueError, match=match):
        train.skipgram([["a"]], initial=first, subwords=True)
