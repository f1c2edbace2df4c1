"""What several tests of bags share: the modes, lists cut out of flat arrays, comparison by bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

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
    """What belongs to each list, of an array that has one number for each of their ids."""
    ends = itertools.accumulate(map(len, lists), initial=0)
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def in_capacity(parts, capacity):
    """The numbers of each bag's ids in one array, with zeros behind the last bag."""
    return np.concatenate([*parts, np.zeros(capacity)])[:capacity]


def ids_of(gradient):
    """The ids of a gradient by rows, in NumPy."""
    return np.asarray(_ids_of(gradient))


_ids_of = jax.jit(lambda gradient: gradient.ids)


def dense(gradient):
    """The whole of a gradient by rows, in NumPy. The number of rows stands for none."""
    out = np.zeros((gradient.rows + 1, *gradient.values.shape[1:]), gradient.values.dtype)
    np.add.at(out, ids_of(gradient), np.asarray(gradient.values))
    return out[: gradient.rows]


def assert_same_bits(actual, expected):
    """The arrays of two dictionaries are the same, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
        assert np.asarray(actual[name]).tobytes() == np.asarray(value).tobytes(), name
