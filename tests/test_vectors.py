import pickle

import numpy as np
import pytest

from embax import files
from embax.vectors import UnknownTokenError, Vectors


def some(rows=50, dim=7, seed=0):
    weight = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return Vectors([f"t{row}" for row in range(rows)], weight, np.arange(rows)[::-1])


def test_most_similar_equals_float64_cosines():
    vectors = some()
    weight = vectors.weight.astype(np.float64)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    query = unit[3] + unit[5] - unit[8]
    cosines = unit @ query / np.linalg.norm(query)
    expected = [row for row in np.argsort(-cosines) if row not in (3, 5, 8)][:6]
    found = vectors.most_similar(["t3", "t5"], negative="t8", k=6)
    assert [token for token, _ in found] == [f"t{row}" for row in expected]
    np.testing.assert_allclose([cosine for _, cosine in found], cosines[expected], atol=1e-6)  # float32


def test_most_similar_counts_a_token_as_often_as_it_is_given():
    vectors = Vectors("abcd", [[1, 0], [0, 1], [2, 1], [1, 1]])
    assert vectors.most_similar(["a", "a", "b"], k=1)[0] == ("c", pytest.approx(1))
    assert vectors.most_similar(["a", "b"], k=1)[0] == ("d", pytest.approx(1))


@pytest.mark.parametrize(("k", "length"), [(0, 0), (1, 1), (49, 49), (50, 49), (10**9, 49)])
def test_most_similar_returns_k_where_there_are_as_many(k, length):
    found = some().most_similar("t0", k=k)
    assert len(found) == length
    assert "t0" not in dict(found)
    assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)


def test_most_similar_breaks_ties_by_row():
    vectors = Vectors("abcd", np.ones((4, 2)))
    assert [token for token, _ in vectors.most_similar("b")] == ["a", "c", "d"]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e30, 3e38])
def test_most_similar_does_not_depend_on_the_length_of_vectors(scale):
    weight = np.asarray([[1, 0], [0.6, 0.8], [0, 1], [0, 0]]) * scale
    found = Vectors("abcz", weight).most_similar("a")
    assert [token for token, _ in found] == ["b", "c", "z"]
    np.testing.assert_allclose([cosine for _, cosine in found], [0.6, 0, 0], atol=1e-6)  # float32


def test_most_similar_of_zeros_is_zero_and_not_nan():
    found = Vectors("abz", [[1, 0], [0, 1], [0, 0]]).most_similar("z")
    assert found == [("a", 0.0), ("b", 0.0)]
    assert some(dim=0).most_similar("t1", k=2) == [("t0", 0.0), ("t2", 0.0)]


def test_most_similar_of_a_single_token_is_empty():
    assert Vectors("a", [[1.0]]).most_similar("a") == []


def test_most_similar_refuses_no_token_and_a_negative_k():
    with pytest.raises(ValueError, match=r"positive=\.\.\.\)` must name a token"):
        some().most_similar([])
    with pytest.raises(ValueError, match=r"k=\.\.\.\)` must not be negative"):
        some().most_similar("t1", k=-1)


def test_unknown_tokens_are_named_with_the_closest_spellings():
    vectors = Vectors(["king", "ring", "Sword", "night"], np.eye(4))
    with pytest.raises(KeyError, match=r'^"kinng" is not .* spellings: "king", "ring"\.$') as caught:
        vectors.most_similar("kinng")
    assert isinstance(caught.value, UnknownTokenError)
    assert caught.value.closest == ("king", "ring")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(KeyError, match='spellings: "Sword"'):
        vectors["sword"]
    with pytest.raises(KeyError, match=r'^"xyzzy" is not in the vocabulary\.$'):
        vectors.most_similar("king", negative=["xyzzy"])
    with pytest.raises(KeyError, match=r"^'\\x1b\[2J' is not"):
        vectors["\x1b[2J"]


def test_vectors_are_a_mapping_of_tokens():
    vectors = some()
    assert len(vectors) == 50
    assert "t7" in vectors
    assert "T7" not in vectors
    assert 7 not in vectors
    assert vectors.row("t7") == 7
    np.testing.assert_array_equal(vectors["t7"], vectors.weight[7])
    assert repr(vectors) == "Vectors(50 tokens, dim=7)"


def test_vectors_do_not_change_the_callers_arrays():
    weight, counts = np.ones((2, 3), np.float32), np.ones(2, np.int64)
    vectors = Vectors(["a", "b"], weight, counts)
    with pytest.raises(ValueError, match="read-only"):
        vectors["a"][0] = 5
    weight[0], counts[0] = 2, 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((["a", 1], np.eye(2)), TypeError, "must be strings, got 1"),
        ((["a"], np.eye(2)), ValueError, r"each of 1 tokens, got shapes \(2, 2\)"),
        ((["a", "b"], np.ones(2)), ValueError, "one row and one count"),
        ((["a", "b"], np.eye(2), [1]), ValueError, "one row and one count"),
        ((["a", "b"], [[0, 1], [np.nan, 0]]), ValueError, "must be finite, got NaN or infinity in row 1"),
        ((["a", "b", "a"], np.eye(3)), ValueError, "must not repeat a token, got 'a' twice"),
    ],
)
def test_vectors_refuse_arguments_that_do_not_fit_together(arguments, error, match):
    with pytest.raises(error, match=match):
        Vectors(*arguments)


def test_load_gives_what_save_wrote(tmp_path):
    vectors = some()
    vectors.save(tmp_path / "v")
    loaded = Vectors.load(tmp_path / "v")
    assert loaded.tokens == vectors.tokens
    np.testing.assert_array_equal(loaded.weight, vectors.weight)
    np.testing.assert_array_equal(loaded.counts, vectors.counts)


def test_load_refuses_weights_that_are_not_finite(tmp_path):
    files.write_safetensors(tmp_path / "v", files.Contents(["a"], np.full((1, 2), np.nan, np.float32), np.ones(1)))
    with pytest.raises(files.FormatError, match="v: `weight` must be finite"):
        Vectors.load(tmp_path / "v")
