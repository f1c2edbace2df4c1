"""How tests compare trees of arrays: bit for bit, to a tolerance, or by an error relative to the largest number."""

import jax
import numpy as np

# Of sums of float32 in another order.
FLOAT32 = {"rtol": 5e-6, "atol": 5e-6}


def bits(tree):
    """The bytes of each leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same(ours, theirs, case=""):
    """The structure and what is static in it, dtypes, and numbers are the same."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs), case
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype, (case, path)
        np.testing.assert_array_equal(x, y, err_msg=f"{case} {jax.tree_util.keystr(path)}")


def assert_close(ours, theirs, case="", rtol=1e-5, atol=0.0):
    """As many leaves, and their numbers are the same to a tolerance; by default, one of float32."""
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=f"{case} {jax.tree_util.keystr(path)}")


def assert_close_to_largest(values, expected, case="", tolerance=2e-6, rtol=0.0):
    """The error is a share of the largest finite number, or of 1; by default, that of float32 in another order."""
    values, expected = (np.asarray(x, np.float64) for x in (values, expected))
    assert values.shape == expected.shape, case
    # NaN and infinities must be where they are expected.
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(values[~finite], expected[~finite], err_msg=str(case))
    largest = np.max(np.abs(expected[finite]), initial=1)
    np.testing.assert_allclose(values[finite], expected[finite], rtol, tolerance * largest, err_msg=str(case))
