"""3CosMul: find the best rows by a product of cosines, for many questions at once."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int64

from . import _nearest as _queries

# Added to the divisor, from Levy & Goldberg 2014, equation 4.
_EPSILON = 1e-6
_BLOCK = 128  # questions at a time; each takes three products with every row
# A bound of the relative error of float32 scores. It holds unless a divisor is below 0.01, for a row that points away
# from `a` more than any row of real vectors does.
_ERROR = 1e-3


def best(
    unit: Float32[np.ndarray, "rows dim"],
    positive: tuple[Float32[np.ndarray, "questions dim"], Float32[np.ndarray, "questions dim"]],
    negative: Float32[np.ndarray, "questions dim"],
    k: int,
    exclude: Int64[np.ndarray, "questions excluded"],
) -> tuple[Int64[np.ndarray, "questions k"], Float32[np.ndarray, "questions k"]]:
    """Find the rows with the highest `near(x, b) near(x, c) / (near(x, a) + 1e-6)`, where `near = (1 + cos) / 2`.

    Args:
      unit: Rows of length 1.
      positive: Unit vectors `b` and `c` of each question.
      negative: Unit vectors `a`.
      k: The number of rows to find.
      exclude: Row numbers to leave out, for each question.

    Returns:
      The rows and their scores, the best first, the lower row first if scores are equal; -1 and NaN in unused places.
    """
    number, dim = negative.shape
    rows, scores = np.full((number, k), -1, np.int64), np.full((number, k), np.nan, np.float32)
    if not (unit.shape[0] and k):
        return rows, scores
    for start in range(0, number, _BLOCK):
        group = np.stack([part[start : start + _BLOCK] for part in (*positive, negative)])
        size = group.shape[1]
        maxima = np.empty((size, -(-unit.shape[0] // _queries.SEGMENT)), np.float32)
        padded = np.concatenate([group, np.zeros((3, _BLOCK - size, dim), np.float32)], axis=1)
        _queries.fill_maxima(_greatest_of_block, unit, padded, _queries.block_rows(dim), maxima)
        for place in range(size):
            found, ranked_by = _best_of_one(unit, group[:, place], maxima[place], k, exclude[start + place])
            rows[start + place, : found.shape[0]] = found
            scores[start + place, : found.shape[0]] = ranked_by
    return rows, scores


@jax.jit
def _greatest_of_block(
    questions: Float32[jax.Array, "3 questions dim"], rows: Float32[jax.Array, "rows dim"]
) -> Float32[jax.Array, "questions segments"]:
    b, c, a = (0.5 + 0.5 * jnp.matmul(part, rows.T, precision=jax.lax.Precision.HIGHEST) for part in questions)
    return _queries.by_segment(b * c / (a + _EPSILON))


def _best_of_one(
    unit: Float32[np.ndarray, "rows dim"],
    question: Float32[np.ndarray, "3 dim"],
    maxima: Float32[np.ndarray, " segments"],
    k: int,
    exclude: Int64[np.ndarray, " excluded"],
) -> tuple[Int64[np.ndarray, " found"], Float64[np.ndarray, " found"]]:
    least = _queries.nth_greatest(maxima, k + exclude.shape[0])
    rows = _queries.rows_of(np.flatnonzero(maxima >= least - _ERROR * abs(least)), unit.shape[0])
    for excluded in exclude:
        rows = rows[rows != excluded]
    b, c, a = (0.5 + 0.5 * _queries.products_of(unit, rows, part, np.float64) for part in question)
    scores = b * c / (a + _EPSILON)
    finite = np.isfinite(scores)
    rows, scores = rows[finite], scores[finite]
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]
