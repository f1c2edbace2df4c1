"""The tables of cases that several tests share: rules and ids for a small table."""

import jax
import numpy as np

from embax import RowGrad, Table

ROWS = 7
WEIGHT = np.random.default_rng(0).normal(scale=2, size=(ROWS, 3)).astype(np.float32)

RULES = {
    "none": {},
    "padding_first": {"padding_idx": 0},
    "padding_last": {"padding_idx": ROWS - 1},
    "padding_negative": {"padding_idx": -ROWS + 2},
    "norm_2": {"max_norm": 1.5},
    "norm_1": {"max_norm": 1.5, "norm_type": 1},
    "norm_3": {"max_norm": 1.5, "norm_type": 3.0},
    "norm_inf": {"max_norm": 1.5, "norm_type": np.inf},
    "norm_half": {"max_norm": 4.0, "norm_type": 0.5},
    "frequency": {"scale_grad_by_freq": True},
    "freeze": {"freeze": True},
    "padding_frequency": {"padding_idx": 2, "scale_grad_by_freq": True},
    "all": {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True},
    "all_frozen": {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True, "freeze": True},
}

# Those that take different ways through the code.
MAIN_RULES = {name: RULES[name] for name in ("none", "padding_last", "norm_2", "frequency", "freeze", "all")}

IDS = {
    "scalar": np.array(2),
    "one": np.array([3]),
    "vector": np.array([2, 0, 6]),
    "matrix": np.array([[2, 0, 2, 6], [1, 2, 5, 2]]),
    "negative": np.array([-1, 6, -7, 0, -5, 2]),
    "empty": np.zeros(0, int),
    "empty_matrix": np.zeros((2, 0), int),
    "same": np.full(5, 4),
}


def cotangent(ids, weight=WEIGHT, seed=1):
    """A cotangent of the lookup of these ids."""
    shape = (*np.shape(ids), *weight.shape[1:])
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(tree):
    """The same with an array for the gradient of each table, whether it is held as rows or as a Table."""

    def array(leaf):
        return leaf.to_dense() if isinstance(leaf, RowGrad) else leaf.weight if isinstance(leaf, Table) else leaf

    return jax.tree.map(array, tree, is_leaf=lambda leaf: isinstance(leaf, RowGrad | Table))


def assert_same_gradient(actual, expected, **tolerance):
    """Two gradients of one tree are the same, whether a table's is held as rows or as a Table."""
    actual, expected = dense(actual), dense(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), **tolerance)
