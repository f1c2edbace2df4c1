"""Queries by vector: arrays of every library and dtype, whatever the size of their numbers, alone and as a batch."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from embax import Table
from embax.vectors import Vectors

WEIGHT = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
VECTORS = Vectors([f"t{row}" for row in range(9)], WEIGHT)
ROW = np.asarray(WEIGHT[3], ml_dtypes.bfloat16).astype(np.float64)  # as bfloat16 holds it, so that all forms are equal

FORMS = {
    "float64": ROW,
    "float32": ROW.astype(np.float32),
    "bfloat16": ROW.astype(ml_dtypes.bfloat16),
    "jax": jnp.asarray(ROW, jnp.float32),
    "jax bfloat16": jnp.asarray(ROW, jnp.bfloat16),
    "a row of a table": Table(jnp.asarray(ROW[None], jnp.bfloat16)).weight[0],
    "list": ROW.tolist(),
    "list of numpy scalars": list(ROW.astype(np.float32)),
    "tuple": tuple(ROW.tolist()),
    "integers": np.rint(ROW * 256).astype(np.int64),  # of which bfloat16 has no more digits
    "tiny": ROW * 1e-60,
    "denormal": ROW * 1e-300,
    "huge": ROW * 1e200,
}


def cosines(row):
    products = WEIGHT.astype(np.float64) @ row
    return products / np.linalg.norm(WEIGHT, axis=1) / np.linalg.norm(row)


@pytest.mark.parametrize("form", FORMS)
def test_a_vector_of_any_form_has_its_cosines(form):
    tolerance = 2e-2 if form == "integers" else 1e-6  # rounded to whole numbers; float32
    expected = cosines(ROW)
    order = np.argsort(-expected)
    query = FORMS[form]
    for found in VECTORS.most_similar(query, k=9), VECTORS.most_similar([query], k=9):
        assert [token for token, _ in found][:3] == [f"t{row}" for row in order[:3]]
        np.testing.assert_allclose([cosine for _, cosine in found], expected[order], atol=tolerance)
    assert VECTORS.similarity(query, "t3") == pytest.approx(expected[3], abs=tolerance)
    assert VECTORS.most_similar(["t1"], negative=query, k=1) == VECTORS.most_similar(["t1"], negative=[query], k=1)


@pytest.mark.parametrize("batch", [WEIGHT, jnp.asarray(WEIGHT), WEIGHT.astype(ml_dtypes.bfloat16), WEIGHT.tolist()])
def test_a_matrix_is_a_batch(batch):
    found = VECTORS.most_similar_batch(batch, k=1)
    assert [of_query[0][0] for of_query in found] == [f"t{row}" for row in range(9)]


def test_a_matrix_is_the_sum_of_its_rows():
    assert VECTORS.most_similar(jnp.asarray(WEIGHT[:2]), k=3) == VECTORS.most_similar([WEIGHT[0], WEIGHT[1]], k=3)


@pytest.mark.parametrize("wrong", [np.ones(3), np.ones(4, bool), np.ones(4, complex), np.ones((2, 2)), np.array("a")])
def test_a_vector_of_another_form_is_refused(wrong):
    with pytest.raises(ValueError, match=r"most_similar\(positive=...\)` must be tokens, or vectors of 4 numbers, got"):
        VECTORS.most_similar_batch([[wrong]])


CALLS = {
    "most_similar": lambda bad: VECTORS.most_similar(bad),
    "similarity": lambda bad: VECTORS.similarity("t0", bad),
    "analogy": lambda bad: VECTORS.analogy("t0", "t1", bad),
    "doesnt_match": lambda bad: VECTORS.doesnt_match(["t0", bad]),
}


@pytest.mark.parametrize("call", CALLS)
def test_errors_name_the_call(call):
    for bad, message in (np.ones(3), "must be tokens"), (np.full(4, np.nan), "must have finite vectors"):
        with pytest.raises(ValueError, match=rf"embax\.Vectors\.{call}\(.*\)` {message}"):
            CALLS[call](bad)
