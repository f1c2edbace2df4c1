import pickle

import numpy as np
import pytest
import real

import embax
from embax import Vocabulary
from embax.vectors import NotFiniteWarning, UnknownTokenError, Vectors


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


def test_most_similar_counts_repeated_tokens():
    vectors = Vectors("abcd", [[1, 0], [0, 1], [2, 1], [1, 1]])
    assert vectors.most_similar(["a", "a", "b"], k=1)[0] == ("c", pytest.approx(1))
    assert vectors.most_similar(["a", "b"], k=1)[0] == ("d", pytest.approx(1))


@pytest.mark.parametrize(("k", "length"), [(0, 0), (1, 1), (49, 49), (50, 49), (10**9, 49)])
def test_most_similar_returns_k_tokens_if_there_are_so_many(k, length):
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
    np.testing.assert_array_equal(vectors[["t7", "t1", "t7"]], vectors.weight[[7, 1, 7]])
    assert vectors[[]].shape == (0, 7)
    np.testing.assert_array_equal(vectors["t7"], vectors.weight[7])
    assert list(vectors) == vectors.vocabulary.tokens() == [token for token in vectors if token in vectors]
    assert dict(zip(vectors, vectors.counts.tolist(), strict=True))["t7"] == 42
    for other in (7, None, [7], ["t1", 7], np.arange(2)):
        with pytest.raises(TypeError, match=r"embax\.Vectors\[\.\.\.\]` must be a token or several, got"):
            vectors[other]
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
        ((["a", "b", "a"], np.eye(3)), ValueError, "must not repeat a token, got 'a' twice"),
    ],
)
def test_vectors_refuse_arguments_that_do_not_fit_together(arguments, error, match):
    with pytest.raises(error, match=match):
        Vectors(*arguments)


def test_weights_keep_their_dtype_of_floats():
    for dtype in (np.float16, np.float32, np.float64):
        assert Vectors(["a"], np.ones((1, 2), dtype)).weight.dtype == dtype
    for weight in ([[1, 2]], [[1.0, 2.0]], np.ones((1, 2), int)):
        assert Vectors(["a"], weight).weight.dtype == np.float32


def test_load_returns_the_saved_vectors(tmp_path):
    vectors = some()
    vectors.save(tmp_path / "v")
    loaded = Vectors.load(tmp_path / "v")
    assert loaded.vocabulary == vectors.vocabulary
    np.testing.assert_array_equal(loaded.weight, vectors.weight)
    np.testing.assert_array_equal(loaded.counts, vectors.counts)


def test_rows_that_are_not_finite_are_reported_and_left_out(tmp_path):
    weight = np.asarray([[1, 0], [np.nan, 0], [0.6, 0.8], [np.inf, 0], [3e38, 3e38]], np.float32)
    Vectors("abcde", weight).save(tmp_path / "v")
    with pytest.warns(NotFiniteWarning, match="v: 2 of 5 vectors hold NaN or infinity. Queries leave them out"):
        Vectors.load(tmp_path / "v", mmap=False)
    vectors = Vectors.load(tmp_path / "v")
    with pytest.warns(NotFiniteWarning, match="Vectors: 2 of 5 vectors hold NaN or infinity. Queries leave them out"):
        vectors.similarity("a", "c")
    np.testing.assert_array_equal(vectors.weight, weight)
    assert [token for token, _ in vectors.most_similar("a")] == ["e", "c"]
    assert [token for token, _ in vectors.analogy("a", "c", "e", method="mul")] == []
    for ask in (lambda: vectors.most_similar("b"), lambda: vectors.similarity("a", "d")):
        with pytest.raises(ValueError, match=r'must have finite vectors, got (.*, )?"[bd]".* NaN or infinity'):
            ask()
    assert vectors.normalized()["b"].tolist() == pytest.approx([np.nan] * 2, nan_ok=True)


def test_a_batch_equals_single_queries():
    vectors = some()
    queries = ["t3", ["t3", "t5"], (["t3", "t5"], ["t8"]), vectors["t9"], [vectors["t9"], "t1"], (["t2"], [])]
    one_by_one = [
        vectors.most_similar("t3", k=4),
        vectors.most_similar(["t3", "t5"], k=4),
        vectors.most_similar(["t3", "t5"], "t8", k=4),
        vectors.most_similar(vectors["t9"], k=4),
        vectors.most_similar([vectors["t9"], "t1"], k=4),
        vectors.most_similar("t2", k=4),
    ]
    assert vectors.most_similar_batch(queries, k=4) == one_by_one
    assert one_by_one[3][0] == ("t9", pytest.approx(1))  # a vector is not a token that is left out
    assert vectors.most_similar_batch([]) == []


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((2, 7)), 5, None])
def test_queries_that_are_neither_token_nor_vector_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match=r"must be tokens, or vectors of 7 numbers|not iterable"):
        some().most_similar_batch([[bad]])


def test_analogies_rank_by_sum_or_product():
    vectors = some()
    unit = vectors.normalized().weight.astype(np.float64)
    cosines = unit @ unit[[3, 5, 8]].T
    added = cosines[:, 0] - cosines[:, 1] + cosines[:, 2]
    moved = (1 + cosines) / 2
    multiplied = moved[:, 0] * moved[:, 2] / (moved[:, 1] + 1e-6)
    for method, scores in (("add", added), ("mul", multiplied)):
        expected = [f"t{row}" for row in np.argsort(-scores) if row not in (3, 5, 8)][:5]
        assert [token for token, _ in vectors.analogy("t5", "t3", "t8", k=5, method=method)] == expected
    found = dict(vectors.analogy("t5", "t3", "t8", k=5, method="mul"))
    for token, score in found.items():
        assert score == pytest.approx(multiplied[vectors.vocabulary.ids(token)], rel=1e-5)  # float32
    with pytest.raises(ValueError, match=r"method=\.\.\.\)` must be one of 'add', 'mul', got 'sum'"):
        vectors.analogy("t1", "t2", "t3", method="sum")


def test_similarity_and_doesnt_match():
    vectors = Vectors("abcz", [[1, 0], [0.6, 0.8], [0, -2], [0, 0]])
    assert vectors.similarity("a", "b") == pytest.approx(0.6)
    assert vectors.similarity(["a", "b"], np.array([-1.0, 0])) == pytest.approx(-0.8944272)
    assert vectors.similarity("a", "z") == 0
    assert vectors.doesnt_match(["a", "c", "b"]) == "c"
    with pytest.raises(ValueError, match="must name tokens, got none"):
        vectors.doesnt_match([])


def test_subset_and_normalized():
    vectors = some()
    part = vectors.subset(["t9", "t2"])
    assert part.vocabulary.tokens() == ["t9", "t2"]
    np.testing.assert_array_equal(part.weight, vectors.weight[[9, 2]])
    np.testing.assert_array_equal(part.counts, vectors.counts[[9, 2]])
    with pytest.raises(ValueError, match="must not repeat a token, got 't2' twice"):
        vectors.subset(["t2", "t2"])
    with pytest.raises(UnknownTokenError, match="t99"):
        vectors.subset(["t99"])
    np.testing.assert_allclose(np.linalg.norm(vectors.normalized().weight, axis=1), 1, rtol=1e-6)  # float32


def test_a_table_of_vectors_has_the_padding_row_of_the_vocabulary():
    vectors = Vectors(Vocabulary(["a", "[PAD]"], special={"padding": "[PAD]"}), [[1, 2], [0, 0]])
    table = vectors.to_table(max_norm=1.0)
    assert (table.padding_idx, table.max_norm) == (1, 1.0)
    assert vectors.to_table(padding_idx=None).padding_idx is None
    np.testing.assert_array_equal(table.weight, vectors.weight)


def test_fill_makes_a_weight_for_another_vocabulary():
    vectors = Vectors("abc", [[1, 2], [3, 4], [np.nan, 0]])
    own = Vocabulary(["b", "x", "[PAD]", "a", "y"], special={"padding": "[PAD]"})
    filled = vectors.fill(own)
    assert filled.weight.tolist() == [[3, 4], [2, 3], [0, 0], [1, 2], [2, 3]]
    assert (filled.missing, filled.found) == (("x", "y"), 3)
    assert vectors.fill(own, "zero").weight.tolist() == [[3, 4], [0, 0], [0, 0], [1, 2], [0, 0]]
    random = vectors.fill(own, "random", seed=3)
    assert random.weight[[0, 3]].tolist() == [[3, 4], [1, 2]]
    assert not random.weight[2].any()
    assert random.weight[1].tolist() != random.weight[4].tolist()
    np.testing.assert_array_equal(random.weight, vectors.fill(own, "random", seed=3).weight)
    with pytest.raises(UnknownTokenError, match='"x" is not'):
        vectors.fill(own, "error")
    with pytest.raises(ValueError, match=r"missing=\.\.\.\)` must be one of 'mean', 'random'"):
        vectors.fill(own, "skip")
    many = vectors.fill([f"w{row}" for row in range(4_000)], "random").weight
    np.testing.assert_allclose(many.mean(axis=0), [2, 3], atol=0.1)  # the standard error is 0.016
    np.testing.assert_allclose(many.std(axis=0), 1, atol=0.1)
    assert vectors.fill([]).weight.shape == (0, 2)


class Suffixes:
    """Stands for fastText's n-grams: tokens in -s have a vector."""

    def covers(self, tokens):
        return np.asarray([token.endswith("s") for token in tokens], bool)

    def vectors(self, tokens):
        return np.asarray([[len(token), 1] for token in tokens], np.float32).reshape(-1, 2)


def test_subwords_give_unknown_tokens_a_vector():
    vectors = Vectors(["a", "b"], [[1, 0], [0, 1]], subwords=Suffixes())
    assert vectors["cats"].tolist() == [4, 1]
    assert vectors[["b", "cats"]].tolist() == [[0, 1], [4, 1]]
    assert "cats" not in vectors
    assert vectors.similarity("cats", "a") == pytest.approx(4 / 17**0.5)
    assert vectors.most_similar(["b"], ["cats"], k=1)[0] == ("a", pytest.approx(-0.7882, abs=1e-4))
    assert vectors.fill(["as", "c", "b"], "zero") == (pytest.approx(np.asarray([[2, 1], [0, 0], [0, 1]])), ("c",), 2)
    for ask in (lambda: vectors["cat"], lambda: vectors[["a", "cats", "cat"]], lambda: vectors.most_similar("cat")):
        with pytest.raises(UnknownTokenError, match='"cat" is not in the vocabulary'):
            ask()


def test_an_empty_set_of_vectors_answers_nothing():
    vectors = Vectors([], np.zeros((0, 3), np.float32))
    assert vectors.most_similar(np.ones(3)) == []
    assert vectors[[]].shape == (0, 3)
    assert vectors.normalized().weight.shape == (0, 3)
    assert repr(embax.Table(vectors.weight)) == repr(vectors.to_table())


def test_answers_on_glove_equal_gensims():
    from gensim.models import KeyedVectors

    vectors = real.glove_of(20_000)
    theirs = KeyedVectors(50)
    theirs.add_vectors(vectors.vocabulary.tokens(), np.asarray(vectors.weight))
    asked = [(["king"], []), (["king", "woman"], ["man"]), (["paris", "italy"], ["france"]), (["a", "b", "c"], ["d"])]
    asked += [([token], []) for token in vectors.vocabulary.tokens(np.arange(0, 20_000, 2_501))]
    for (positive, negative), ours in zip(asked, vectors.most_similar_batch(asked, k=20), strict=True):
        expected = theirs.most_similar(positive, negative, topn=20)
        assert [token for token, _ in ours] == [token for token, _ in expected]
        np.testing.assert_allclose([x for _, x in ours], [x for _, x in expected], atol=1e-5)
        assert vectors.most_similar(positive, negative, k=20) == ours
    words = "breakfast cereal dinner lunch".split()
    assert vectors.doesnt_match(words) == theirs.doesnt_match(words) == "cereal"
    assert vectors.similarity("king", "queen") == pytest.approx(theirs.similarity("king", "queen"), abs=1e-6)
    ours = vectors.analogy("man", "king", "woman", method="mul")
    with pytest.warns(DeprecationWarning, match="init_sims"):
        expected = theirs.most_similar_cosmul(["king", "woman"], ["man"])
    assert [token for token, _ in ours] == [token for token, _ in expected]
    np.testing.assert_allclose([x for _, x in ours], [x for _, x in expected], rtol=1e-4)
