"""What sampled_softmax draws, against its distribution."""

import math
import re

import jax
import numpy as np
import pytest
from cases import ROWS
from head_cases import CANDIDATES, KEY, probabilities_of

from embax import Unigram
from embax._heads import candidates as _candidates


def chances(candidates, ids, rows):
    return np.asarray(jax.jit(lambda ids: _candidates.probability(candidates, ids, rows))(np.asarray(ids)))


@pytest.mark.parametrize("name", CANDIDATES)
def test_probabilities(name):
    actual = chances(CANDIDATES[name], np.arange(-1, ROWS + 1), ROWS)
    np.testing.assert_allclose(actual, [0, *probabilities_of(name), 0], rtol=1e-6, atol=1e-9)


def test_rows_are_drawn_by_their_probability():
    number = 200_000
    cases = [(name, ROWS) for name in CANDIDATES] + [("log_uniform", rows) for rows in (1, 2, 3, 50)]

    @jax.jit
    def run(key):
        return [_candidates.draw(key, CANDIDATES[name], number, rows) for name, rows in cases]

    for (name, rows), drawn in zip(cases, run(KEY), strict=True):
        assert drawn.dtype == np.int32
        expected = probabilities_of(name, rows) * number
        counts = np.bincount(drawn, minlength=rows)
        assert len(counts) == rows, name
        assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all(), (name, rows)


@pytest.mark.parametrize("rows", [pytest.param(10**8, marks=pytest.mark.exhaustive), 2**31 - 1])
def test_log_uniform_reaches_every_row_of_a_large_table(rows):
    """The last rows are distinct as often as if each was drawn by itself; no row is out of range."""
    number = 2_000_000
    drawn = np.asarray(jax.jit(_candidates.draw, static_argnums=(1, 2, 3))(KEY, "log_uniform", number, rows))
    assert 0 <= drawn.min() < drawn.max() < rows
    last = drawn[drawn >= rows // 2]
    expected = number * math.log(2) / math.log(rows + 1)
    assert abs(len(last) - expected) < 5 * math.sqrt(expected)
    # Were only multiples of 2**23 reached, or of float32's spacing, most would be there more than once.
    assert len(np.unique(last)) > 0.999 * len(last)
    assert np.abs(np.bincount(last % 8, minlength=8) - len(last) / 8).max() < 5 * math.sqrt(len(last) / 8)
    # Near the end of the float32 range of the exponent the steps are widest: no gaps between them.
    places = np.sort(last[: 10**6].astype(np.float64))
    assert np.diff(places).max() < 40 * rows / len(places)


def test_log_uniform_of_more_rows_than_int32_has():
    with jax.enable_x64(True):
        drawn = np.asarray(jax.jit(lambda key: _candidates.draw(key, "log_uniform", 10_000, 2**40))(KEY))
        assert drawn.dtype == np.int64
        assert 0 <= drawn.min() < 2**39 < drawn.max() < 2**40


def test_unigram():
    unigram = CANDIDATES["unigram"]
    assert repr(unigram) == "Unigram(7 rows)"
    assert repr(jax.tree.map(lambda _: None, unigram)) == "Unigram(None)"
    assert len(jax.tree.leaves(unigram)) == 1
    np.testing.assert_array_equal(chances(Unigram.from_counts([5]), [0, 0], 1), 1)
    alike = Unigram.from_counts([5, 0, 1], power=0)
    np.testing.assert_allclose(chances(alike, range(3), 3), [0.5, 0, 0.5], atol=1e-9)
    last = Unigram.from_counts([1.0, 0.0], power=1)  # that of 0 has nothing but the one number that rounding leaves
    np.testing.assert_allclose(chances(last, range(2), 2), [1, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("counts", "power", "error", "message"),
    [
        (["a", "b"], 1, TypeError, r"counts=...\)` must be of real numbers, got <U1"),
        ([[1, 2]], 1, ValueError, r"counts=...\)` must be one number a row, \(rows,\), got the shape \(1, 2\)"),
        ([1, -1], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0, got \[1.0, -1.0\]"),
        ([1, np.nan], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([0, 0], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([1, 2], -1, ValueError, r"power=...\)` must be positive, got -1"),
        ([1, 2], "1", TypeError, r"power=...\)` must be a positive number, got '1'"),
        ([1, 2], math.inf, ValueError, r"power=...\)` must be finite, got inf"),
    ],
)
def test_errors_of_unigram(counts, power, error, message):
    with pytest.raises(error, match=re.escape("`embax.Unigram.from_counts(") + message):
        Unigram.from_counts(counts, power)
