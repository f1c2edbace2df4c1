import brainstate
import jax.numpy as jnp
import numpy as np
import pytest
import real

import embax
from embax import Vectors, Vocabulary
from embax.vectors import MissingTokensWarning, UnknownTokenError

VECTORS = Vectors(["a", "b"], np.asarray([[1, 2], [3, 4]], np.float32))


def test_from_vectors_freezes_like_from_pretrained():
    embedding = embax.Embedding.from_vectors(VECTORS)
    assert embedding.freeze
    np.testing.assert_array_equal(embedding([1, 0]), VECTORS.weight[[1, 0]])


def test_from_vectors_fills_a_given_vocabulary_and_reports_missing_tokens():
    own = Vocabulary(["[PAD]", "b", "x"], special={"padding": "[PAD]"})
    with pytest.warns(MissingTokensWarning, match=r'from_vectors`: 1 of 3 tokens have no vector, such as "x"\.'):
        embedding = embax.Embedding.from_vectors(VECTORS, own, freeze=False, max_norm=100.0)
    assert (embedding.padding_idx, embedding.freeze, embedding.max_norm) == (0, False, 100.0)

    @brainstate.transform.jit
    def rows_and_gradient(ids):
        return embedding(ids), brainstate.transform.grad(lambda: embedding(ids).sum(), embedding.weight)()

    rows, gradient = rows_and_gradient(jnp.arange(3))
    np.testing.assert_array_equal(rows, [[0, 0], [3, 4], [2, 3]])
    np.testing.assert_array_equal(gradient, [[0, 0], [1, 1], [1, 1]])
    embedding, report = embax.Embedding.from_vectors(VECTORS, own, "zero", return_report=True, padding_idx=None)
    assert (report.missing, report.found, embedding.padding_idx) == (("x",), 2, None)
    assert not embedding(2).any()
    with pytest.raises(UnknownTokenError, match='"x" is not'):
        embax.Embedding.from_vectors(VECTORS, own, "error")
    with pytest.raises(TypeError, match="unexpected keyword argument 'frozen'"):
        embax.Embedding.from_vectors(VECTORS, frozen=True)


def test_from_vectors_of_glove_returns_the_vectors_of_words():
    words = ["the", "king", "embaxian", "sword"]
    embedding, report = embax.Embedding.from_vectors(real.glove(), words, "random", seed=1, return_report=True)
    assert report.missing == ("embaxian",)
    np.testing.assert_array_equal(embedding([0, 1, 3]), real.glove()[["the", "king", "sword"]])
    assert abs(float(jnp.linalg.norm(embedding(2))) - 5) < 2  # as long as others of them
