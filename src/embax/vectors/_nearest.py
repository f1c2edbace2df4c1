"""Nearest rows, exactly: the greatest product of each segment of rows first, then the few segments that matter."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, PyTree

from .._base.unit_rows import ENTRIES, blocks
from .._base.unit_rows import unit_rows as unit_rows

# Of so many rows one greatest product is kept. Fewer rows a segment make more of them to choose from, more rows make
# each of those chosen dearer to look at.
SEGMENT = 128
# A block of products has at most 512 x 4096 entries, 8 MB: best of those tried with 50 and 300 columns on two cores.
_BLOCK_ROWS = 4096
_BLOCK_QUERIES = (32, 128, 512)  # each compiled once, the smallest that holds what is left of the queries
# As few queries are multiplied one by one, with so many rows at a time: 4 MB of products.
_FEW, _ROWS_OF_ONE, _LONG_SEGMENT = 8, 1 << 20, 512


class Queries(NamedTuple):
    """Queries scaled so that no product leaves the range of float32; the order of the rows stays."""

    scaled: Float32[np.ndarray, "queries dim"]  # the greatest entry is in [0.5, 1); NaN where one is not finite
    scale: Float64[np.ndarray, " queries"]  # a power of two, by which the products are multiplied
    error: Float64[np.ndarray, " queries"]  # how far at most a float32 product with a unit row is from the true one


def nearest(
    unit: Float32[np.ndarray, "rows dim"],
    queries: Float[np.ndarray, "queries dim"],
    k: int,
    exclude: Int64[np.ndarray, "queries excluded"] | None = None,
) -> tuple[Int64[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """Find the rows of the highest product with each query.

    Products in float32 tell which rows can be among the first; those are multiplied again in float64, which
    decides. So the result is that of float64 throughout, and the same for a query alone as among others.

    Args:
      unit: Rows of length 1 at most; those of NaN never come.
      queries: Any vectors. One that is not finite finds no row.
      k: How many rows to find.
      exclude: Row numbers to leave out, for each query; -1 is none.

    Returns:
      The rows, of the highest product first and of equal ones the lower row first, and their products (cosines where
      the queries have length 1). Where there are fewer than `k`, row -1 and NaN stand in the places left over.
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
    """Scale queries by powers of two, which changes no digit of a product."""
    queries = np.asarray(queries, np.float64)
    largest = np.abs(queries).max(axis=1, initial=0)
    largest[~np.isfinite(largest)] = np.nan
    # No float is as large as 2 to the power of 1025; the exponent of NaN is whatever it is.
    scale = np.ldexp(1.0, np.where(largest > 0, np.frexp(np.where(largest > 0, largest, 1))[1], 0) - 1)
    near_one = queries / np.where(np.isnan(largest), np.nan, scale)[:, None] / 2
    # Each of dim products and sums is off by half an eps at most; twice that covers the rounding of the bound, and
    # the rounding of the query to float32.
    error = (2 + queries.shape[1]) * float(np.finfo(np.float32).eps) * np.sqrt((near_one**2).sum(axis=1))
    return Queries(near_one.astype(np.float32), 2 * scale, error)


def _greatest(
    unit: Float32[np.ndarray, "rows dim"], queries: Float32[np.ndarray, "queries dim"]
) -> Float32[np.ndarray, "queries segments"]:
    """The greatest product of each query with each segment of rows, leaving out NaN."""
    number, dim = queries.shape
    maxima = np.empty((number, -(-unit.shape[0] // SEGMENT)), np.float32)
    size = next(size for size in _BLOCK_QUERIES if number <= size)
    queries = np.concatenate([queries, np.zeros((size - number, dim), np.float32)])
    fill_maxima(_greatest_of_block, unit, queries, block_rows(dim), maxima)
    return maxima


def block_rows(dim: int) -> int:
    """How many rows a block has."""
    return max(SEGMENT, min(_BLOCK_ROWS, ENTRIES // max(dim, 1)) // SEGMENT * SEGMENT)


def fill_maxima(
    greatest_of_block: Callable[[Any, jax.Array], jax.Array],
    unit: Float32[np.ndarray, "rows dim"],
    queries: PyTree,
    length: int,
    maxima: Float32[np.ndarray, "queries segments"],
) -> None:
    """Fill in the greatest value of each segment, by blocks of rows.

    Args:
      greatest_of_block: A compiled function of the queries and a block of rows: `(padded queries, segments)`.
      unit: The rows.
      queries: An array, or several, of the queries.
      length: How many rows a block has; the last one is filled up with NaN, so that all compile to one program.
      maxima: What to fill in.
    """
    device = _cpu()
    on_device = jax.device_put(queries, device)
    started: tuple[int, jax.Array] | None = None
    for start in range(0, unit.shape[0], length):
        block = unit[start : start + length]
        if block.shape[0] < length:
            block = np.concatenate([block, np.full((length - block.shape[0], unit.shape[1]), np.nan, np.float32)])
        before, started = started, (start, greatest_of_block(on_device, jax.device_put(block, device)))
        if before is not None:  # is read while the next one is computed
            _store(maxima, *before)
    if started is not None:
        _store(maxima, *started)


def _store(maxima: Float32[np.ndarray, "queries segments"], start: int, of_block: jax.Array) -> None:
    place = maxima[:, start // SEGMENT :][:, : of_block.shape[1]]
    place[:] = np.asarray(of_block)[: place.shape[0], : place.shape[1]]


@jax.jit
def _greatest_of_block(queries: Float32[jax.Array, "queries dim"], rows: Float32[jax.Array, "rows dim"]) -> jax.Array:
    # Some accelerators would take fewer digits, which the bound of the error does not allow for.
    return by_segment(jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST))


def by_segment(values: Float32[jax.Array, "queries rows"]) -> Float32[jax.Array, "queries segments"]:
    """The greatest value of each segment, leaving out NaN."""
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % SEGMENT)), constant_values=-jnp.inf)
    return values.reshape(values.shape[0], -1, SEGMENT).max(axis=-1)


@functools.cache
def _cpu() -> Any:
    """The processor, as the rows are in its memory; another device where JAX was told to leave it alone."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _near(
    unit: Float32[np.ndarray, "rows dim"], query: Queries, wanted: int
) -> tuple[Int64[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
    """Find the rows that can be among the `wanted` first of one query, and their products.

    Of one query the time is that of reading the rows, which NumPy's product does as fast as memory allows.
    """
    found, least = [], -np.inf
    for start in range(0, unit.shape[0], _ROWS_OF_ONE):
        products = unit[start : start + _ROWS_OF_ONE] @ query.scaled
        whole = products.shape[0] // _LONG_SEGMENT * _LONG_SEGMENT
        maxima = products[:whole].reshape(-1, _LONG_SEGMENT).max(axis=1)
        # As many rows as are wanted have products of no less than this; a segment with NaN tells nothing.
        least = max(least, nth_greatest(maxima[~np.isnan(maxima)], wanted))
        near = np.flatnonzero(products >= max(least - 2 * query.error, np.finfo(np.float32).min))
        found.append((near + start, products[near]))
    rows, products = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, products


def _near_segments(
    unit: Float32[np.ndarray, "rows dim"], query: Queries, maxima: Float32[np.ndarray, " segments"], wanted: int
) -> tuple[Int64[np.ndarray, " near"], Float32[np.ndarray, " near"]]:
    """The same, given the greatest product of each segment."""
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
    """Find the first rows of one query among those that can be."""
    # Of so many rows that differ, k are not excluded. Every row that can be among the first has a true product of no
    # less than the least of theirs, and each float32 product is off by one error.
    rows = rows[products >= nth_greatest(products, k + exclude.shape[0]) - 2 * query.error]
    for excluded in exclude:
        rows = rows[rows != excluded]
    exact = products_of(unit, rows, query.scaled, np.float64)
    order = np.lexsort((rows, -exact))[:k]
    return rows[order], exact[order] * query.scale


def products_of(
    unit: Float32[np.ndarray, "rows dim"], rows: Int64[np.ndarray, " some"], query: np.ndarray, dtype: type[np.floating]
) -> Float[np.ndarray, " some"]:
    """Multiply some rows with a query, in float64 such that equal rows have equal products."""
    products = np.empty(rows.shape[0], dtype)
    for block in blocks(rows.shape[0], unit.shape[1]):
        part = unit[rows[block]]
        if dtype == np.float32:
            np.matmul(part, query, out=products[block])
        else:
            # Sums along the last axis are taken in one order for any number of rows, which a BLAS does not promise.
            (part * query.astype(np.float64)).sum(axis=1, out=products[block])
    return products


def rows_of(segments: Int64[np.ndarray, " segments"], number: int) -> Int64[np.ndarray, " rows"]:
    """The rows of some segments, of `number` rows in all."""
    rows = (segments[:, None] * SEGMENT + np.arange(SEGMENT)).ravel()
    return rows[: np.searchsorted(rows, number)]


def nth_greatest(values: Float32[np.ndarray, " number"], n: int) -> float:
    """The n-th greatest of some values, minus infinity where there are fewer."""
    size = values.shape[0]
    return float(np.partition(values, size - n)[size - n]) if n <= size else -np.inf
