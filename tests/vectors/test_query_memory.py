"""Queries take memory for the tokens that there are, however many are asked for."""

import tracemalloc

import numpy as np
import pytest

from embax.vectors import Vectors

QUERIES = {
    "most_similar": lambda vectors, k: vectors.most_similar("t0", k=k),
    "approximate": lambda vectors, k: vectors.most_similar("t0", k=k, approx=True),
    "batch": lambda vectors, k: vectors.most_similar_batch(["t0", "t1"], k=k)[0],
    "add": lambda vectors, k: vectors.analogy("t0", "t1", "t2", k=k),
    "mul": lambda vectors, k: vectors.analogy("t0", "t1", "t2", k=k, method="mul"),
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_queries_take_memory_for_no_more_than_all_tokens(query):
    vectors = Vectors([f"t{row}" for row in range(50)], np.random.default_rng(0).normal(size=(50, 3)))
    expected = query(vectors, 50)
    tracemalloc.start()
    try:
        found = query(vectors, 10**7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == expected
    assert peak < 1 << 20  # one number for each of 10**7 would be 40 MB
    assert query(vectors, 10**18) == expected
