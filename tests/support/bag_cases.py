"""What several tests of bags share: the modes, lists cut out of flat arrays, comparison by bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from embax import Collection, RowGrad

# The last of which takes no weights.
MODES = ["sum", "mean", "sqrtn", "max"]

# Lists of different lengths, which are no matrix, and what the error says of them.
UNEQUAL = [
    [[1, 2], [3]],
    [[1], []],
    ([1, 2], (3,)),
    [[[1, 2], [3]], [[1], [2]]],
    [[1, 2], 3],
    [np.array([1, 2]), np.array([3])],
    [jnp.array([1, 2]), jnp.array([3])],
]
UNEQUAL_MATCH = r"lists of different lengths\..*embax\.Ragged\.from_lists"


def cut(flat, lists):
    """Split an array with one number for each id into one array for each list."""
    ends = itertools.accumulate(map(len, lists), initial=0)
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def in_capacity(parts, capacity):
    """The numbers of each bag's ids in one array, with zeros behind the last bag."""
    return np.concatenate([*parts, np.zeros(capacity)])[:capacity]


def ids_of(gradients):
    """The ids of a gradient by rows, or of each of a tree of them, in NumPy."""
    return jax.device_get(_ids_of(gradients))


@jax.jit
def _ids_of(gradients):
    return jax.tree.map(lambda gradient: gradient.ids, gradients, is_leaf=_is_gradient)


def _is_gradient(node):
    return isinstance(node, RowGrad)


def dense(gradients):
    """The whole of a gradient by rows, or of each of a tree of them, in NumPy. The number of rows stands for none."""

    def whole(gradient, ids):
        out = np.zeros((gradient.rows + 1, *gradient.values.shape[1:]), gradient.values.dtype)
        np.add.at(out, ids, np.asarray(gradient.values))
        return out[: gradient.rows]

    return jax.tree.map(whole, gradients, ids_of(gradients), is_leaf=_is_gradient)


def put_together(tables, features):
    """A Collection made by one program, where one outside of jit is made by one a stack."""
    names = list(tables)  # whose order jit would not keep
    return jax.jit(lambda *tables: Collection(dict(zip(names, tables, strict=True)), features))(*tables.values())


def assert_same_bits(actual, expected):
    """The arrays of two dictionaries are the same, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
        assert np.asarray(actual[name]).tobytes() == np.asarray(value).tobytes(), name
