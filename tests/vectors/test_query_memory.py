"""Queries take memory for the tokens that there are, however many are asked for."""

import traced


def test_queries_take_memory_for_no_more_than_all_tokens():
    found = traced.traced("""
        import numpy as np
        from embax.vectors import Vectors

        vectors = Vectors([f"t{row}" for row in range(50)], np.random.default_rng(0).normal(size=(50, 3)))
        queries = {
            "most_similar": lambda k: vectors.most_similar("t0", k=k),
            "approximate": lambda k: vectors.most_similar("t0", k=k, approx=True),
            "batch": lambda k: vectors.most_similar_batch(["t0", "t1"], k=k)[0],
            "add": lambda k: vectors.analogy("t0", "t1", "t2", k=k),
            "mul": lambda k: vectors.analogy("t0", "t1", "t2", k=k, method="mul"),
        }
        found = {}
        for name, query in queries.items():
            expected = query(50)
            found[name] = [peak(lambda: query(10**7)), query(10**7) == expected, query(10**18) == expected]
    """)
    assert len(found) == 5
    for name, (peak, is_equal, is_equal_for_more) in found.items():
        assert peak < 1 << 20, name  # one number for each of 10**7 would be 40 MB
        assert is_equal, name
        assert is_equal_for_more, name
