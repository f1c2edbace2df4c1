"""Exact nearest rows: first the greatest product of each segment of rows, then only the few segments that matter.

For instance, 400,000 rows are 3,125 segments of 128 rows. One matrix product in float32 gives the greatest product of
each segment. The ten nearest rows are in the segments whose greatest product is at least the tenth greatest of all,
less a bound of the rounding error: ten or little more. Their products are computed again in float64, which decides.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, PyTree

from .._base.unit_rows import ENTRIES, blocks
from .._base.unit_rows import unit_rows as unit_rows

# Rows of a segment. Smaller segments mean more maxima to choose from; larger ones take longer to search.
SEGMENT = 128
# A block of products has at most 512 x 4096 entries, 8 MB: the fastest of several sizes, with 50 and 300 columns on two
# cores.
_BLOCK_ROWS = 4096
_BLOCK_QUERIES = (32, 128, 512)  # each is compiled once; the smallest that fits is used
# Up to 8 queries are multiplied one by one, with a million rows at a time: 4 MB of products.
_FEW, _ROWS_OF_ONE, _LONG_SEGMENT = 8, 1 << 20, 512


class Queries(NamedTuple):
    """Queries scaled so that no product overflows or underflows float32; the order of the answers does not change."""

    scaled: Float32[np.ndarray, "queries dim"]  # the greatest entry is in [0.5, 1); NaN for queries that are not finite
    scale: Float64[np.ndarray, " queries"]  # a power of two; products must be multiplied by it
    error: Float64[np.ndarray, " queries"]  # a bound of the error of a float32 product with a unit row


def nearest(
    unit: Float32[np.ndarray, "rows dim"],
    queries: Float[np.ndarray, "queries dim"],
    k: int,
    exclude: Int64[np.ndarray, "queries excluded"] | None = None,
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Find the rows with the highest product with each query.

    Products in float32 select the rows that can be among the first; products in float64 decide. So the result equals
    that of float64 throughout, and a query has the same answer alone and among others.

    Args:
      unit: Rows of length 1 at most; rows of NaN are never found.
      queries: Any vectors. A vector that is not finite finds no row.
      k: The number of rows to find.
      exclude: Row numbers to leave out, for each query; -1 excludes nothing.

    Returns:
      The rows and their products (cosines if the queries have length 1), the highest product first, the lower row first
      if products are equal. If there are fewer than `k` rows, unused places have row -1 and NaN.
    """
    rows = np.full((queries.shape[0], k), -1, np.int64)
    products = np.full((queries.shape[0], k), np.nan, np.float32)
    if not k or not unit.shape[0]:
        return rows, products
    if exclude is None:
        exclude = np.empty((queries.shape[0], 0), np.int64)
    for start in range(0, queries.shape[0], _BLOCK_QUERIES[-1]):
        group = slice(start, start + _BLOCK_QUERIES[-1])
        prepared = scaled(queries[group])
        few = prepared.error.shape[0] <= _FEW
        maxima = None if few else _greatest(unit, prepared.scaled)
        for place in np.flatnonzero(np.isfinite(prepared.error)):
            query, wanted = Queries(*(field[place] for field in prepared)), k + exclude.shape[1]
            near = _near(unit, query, wanted) if maxima is None else _near_segments(unit, query, maxima[place], wanted)
            found, values = _best(unit, query, *near, k, exclude[start + place])
            rows[start + place, : found.shape[0]] = found
            products[start + place, : found.shape[0]] = values
    return rows, products


def scaled(queries: Float[np.ndarray, "queries dim"]) -> Queries:
    """Scale queries by powers of two, which is exact."""
    queries = np.asarray(queries, np.float64)
    largest = np.abs(queries).max(axis=1, initial=0)
    largest[~np.isfinite(largest)] = np.nan
    # Halved, since 2**1024 is no float64. The exponent of NaN is arbitrary, and not used.
    scale = np.ldexp(1.0, np.where(largest > 0, np.frexp(np.where(largest > 0, largest, 1))[1], 0) - 1)
    near_one = queries / np.where(np.isnan(largest), np.nan, scale)[:, None] / 2
    # Each of `dim` products and sums has an error of at most eps / 2. Twice that also covers the rounding of the query
    # to float32, and of this bound.
    error = (2 + queries.shape[1]) * float(np.finfo(np.float32).eps) * np.sqrt((near_one**2).sum(axis=1))
    return Queries(near_one.astype(np.float32), 2 * scale, error)


def _greatest(
    unit: Float32[np.ndarray, "rows dim"], queries: Float32[np.ndarray, "queries dim"]
) -> Float32[np.ndarray, "queries segments"]:
    """The greatest product of each query with each segment of rows, ignoring NaN."""
    number, dim = queries.shape
    maxima = np.empty((number, -(-unit.shape[0] // SEGMENT)), np.float32)
    size = next(size for size in _BLOCK_QUERIES if number <= size)
    queries = np.concatenate([queries, np.zeros((size - number, dim), np.float32)])
    fill_maxima(_greatest_of_block, unit, queries, block_rows(dim), maxima)
    return maxima


def block_rows(dim: int) -> int:
    """The number of rows of a block."""
    return max(SEGMENT, min(_BLOCK_ROWS, ENTRIES // max(dim, 1)) // SEGMENT * SEGMENT)


def fill_maxima(
    greatest_of_block: Callable[[Any, jax.Array], jax.Array],
    unit: Float32[np.ndarray, "rows dim"],
    queries: PyTree,
    length: int,
    maxima: Float32[np.ndarray, "queries segments"],
) -> None:
    """Compute the greatest value of each segment, block by block.

    Args:
      greatest_of_block: A compiled function of the queries and a block of rows; returns `(padded queries, segments)`.
      unit: The rows.
      queries: An array, or a tree of arrays, of the queries.
      length: The rows of a block. The last block is padded with NaN, so that one program serves all.
      maxima: The output array.
    """
    device = _cpu()
    on_device = jax.device_put(queries, device)
    started: tuple[int, jax.Array] | None = None
    for start in range(0, unit.shape[0], length):
        block = unit[start : start + length]
        if block.shape[0] < length:
            block = np.concatenate([block, np.full((length - block.shape[0], unit.shape[1]), np.nan, np.float32)])
        before, started = started, (start, greatest_of_block(on_device, jax.device_put(block, device)))
        if before is not None:  # read a block's result while the next one is computed
            _store(maxima, *before)
    if started is not None:
        _store(maxima, *started)


def _store(maxima: Float32[np.ndarray, "queries segments"], start: int, of_block: jax.Array) -> None:
    place = maxima[:, start // SEGMENT :][:, : of_block.shape[1]]
    place[:] = np.asarray(of_block)[: place.shape[0], : place.shape[1]]


@jax.jit
def _greatest_of_block(queries: Float32[jax.Array, "queries dim"], rows: Float32[jax.Array, "rows dim"]) -> jax.Array:
    # Some accelerators would use lower precision by default, and break the bound of the error.
    return by_segment(jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST))


def by_segment(values: Float32[jax.Array, "queries rows"]) -> Float32[jax.Array, "queries segments"]:
    """The greatest value of each segment, ignoring NaN."""
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % SEGMENT)), constant_values=-jnp.inf)
    return values.reshape(values.shape[0], -1, SEGMENT).max(axis=-1)


@functools.cache
def _cpu() -> Any:
    """The CPU device, whose memory holds the rows; another device if JAX was configured without a CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _near(
    unit: Float32[np.ndarray, "rows dim"], query: Queries, wanted: int
) -> tuple[Int64[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
    """Find the rows that can be among the `wanted` first of one query, and their products.

    For one query, reading the rows takes the time; NumPy's product runs at the speed of memory.
    """
    found, least = [], -np.inf
    for start in range(0, unit.shape[0], _ROWS_OF_ONE):
        products = unit[start : start + _ROWS_OF_ONE] @ query.scaled
        whole = products.shape[0] // _LONG_SEGMENT * _LONG_SEGMENT
        maxima = products[:whole].reshape(-1, _LONG_SEGMENT).max(axis=1)
        # At least `wanted` rows have products of `least` or more. Segments with NaN are ignored.
        least = max(least, nth_greatest(maxima[~np.isnan(maxima)], wanted))
        near = np.flatnonzero(products >= max(least - 2 * query.error, np.finfo(np.float32).min))
        found.append((near + start, products[near]))
    rows, products = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, products


def _near_segments(
    unit: Float32[np.ndarray, "rows dim"], query: Queries, maxima: Float32[np.ndarray, " segments"], wanted: int
) -> tuple[Int64[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
    """The same as `_near`, given the greatest product of each segment."""
    rows = rows_of(np.flatnonzero(maxima >= nth_greatest(maxima, wanted) - 2 * query.error), unit.shape[0])
    products = products_of(unit, rows, query.scaled, np.float32)
    return rows[~np.isnan(products)], products[~np.isnan(products)]


def _best(
    unit: Float32[np.ndarray, "rows dim"],
    query: Queries,
    rows: Int64[np.ndarray, " near"],
    products: Float32[np.ndarray, " near"],
    k: int,
    exclude: Int64[np.ndarray, " excluded"],
) -> tuple[Int64[np.ndarray, " found"], Float64[np.ndarray, " found"]]:
    """Find the first `k` rows of one query among candidates."""
    # Among `k + excluded` rows, at least k are not excluded. A row among the first k has a true product of at least the
    # least of these, and two float32 products differ from the true ones by one error each.
    rows = rows[products >= nth_greatest(products, k + exclude.shape[0]) - 2 * query.error]
    for excluded in exclude:
        rows = rows[rows != excluded]
    exact = products_of(unit, rows, query.scaled, np.float64)
    order = np.lexsort((rows, -exact))[:k]
    return rows[order], exact[order] * query.scale


def products_of(
    unit: Float32[np.ndarray, "rows dim"], rows: Int64[np.ndarray, " some"], query: np.ndarray, dtype: type[np.floating]
) -> Float[np.ndarray, " some"]:
    """Multiply some rows with a query; in float64, equal rows have equal products."""
    products = np.empty(rows.shape[0], dtype)
    for block in blocks(rows.shape[0], unit.shape[1]):
        part = unit[rows[block]]
        if dtype == np.float32:
            np.matmul(part, query, out=products[block])
        else:
            # NumPy sums each row in the same order, however many rows there are; a BLAS does not guarantee this.
            (part * query.astype(np.float64)).sum(axis=1, out=products[block])
    return products


def rows_of(segments: Int64[np.ndarray, " segments"], number: int) -> Int64[np.ndarray, " rows"]:
    """The rows of some segments, given the number of all rows."""
    rows = (segments[:, None] * SEGMENT + np.arange(SEGMENT)).ravel()
    return rows[: np.searchsorted(rows, number)]


def nth_greatest(values: Float32[np.ndarray, " number"], n: int) -> float:
    """The n-th greatest of some values; minus infinity if there are fewer."""
    size = values.shape[0]
    return float(np.partition(values, size - n)[size - n]) if n <= size else -np.inf
