"""Parts of an array: equations of a gradient's program that move rows to other positions, or cut some out.

The gradient of a slice is padded with zeros, and the gradient of a padding is sliced. Each primitive here has a rule,
as in `linear`, and a function that computes its terms, as in `terms`. For instance, the gradient of
`weight[2:8:3][[1, 1]]`, for a weight of 40 rows:

    a = add_rows [u, v] [1, 1]     rows 1 and 1 of a part of two rows
    b = pad a (2, 34, 2)           rows 5 and 5 of all 40: row k of the part is row 2 + 3 k
    c = pad x (0, 30, 0)           x is an array of 10 rows: they become rows 0 to 9 of 40

An array that is a part is turned into rows if it is at most half of the whole; else the whole array is cheaper.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from ..._base.axes import on_every_device
from ..._base.dtypes import index_dtype
from .equations import shape_of
from .opening import FEW, Lanes, Opening, is_zero, rows_of_arrays
from .rows import Read, Rows, Term, Terms, replicated
from .scattered import scattered_opening, scattered_terms


class Part(NamedTuple):
    """The rule and the terms of a primitive."""

    opening: Callable[[JaxprEqn, Lanes], Opening | None]
    terms: Callable[..., list[Term]]  # called as `terms(eqn, j, opening, read, terms)`, like `terms.terms_of`


def _moved(
    rows: Rows, sizes: tuple[int, int], place: Callable[[Array], Array], values: Callable[[Array], Array]
) -> Rows:
    """Move rows to other positions, in an array of another size.

    Args:
      rows: The rows.
      sizes: The number of rows of the array before and after.
      place: Maps ids to new ids; a result outside of the new array drops the row.
      values: Maps the values of one row.

    Returns:
      The moved rows.
    """
    before, after = sizes
    rows = replicated(rows)
    ids = rows.ids.astype(index_dtype(max(sizes)))
    there = place(ids)
    exists = (ids >= 0) & (ids < before) & (there >= 0) & (there < after)
    function = values
    for _ in range(rows.ids.ndim):
        function = jax.vmap(function)
    return Rows(jnp.where(exists, there, after).astype(index_dtype(after)), function(rows.values), rows.axes)


# ---- pad: the gradient of a slice, with or without strides.


def _pad_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    operand, value = eqn.invars
    config = [tuple(x) for x in eqn.params["padding_config"]]
    if not is_zero(value) or not config:
        return None
    if (leading := lanes(operand)) is not None:
        return Opening({0: False}, by_place=True) if config[:leading] == [(0, 0, 0)] * leading else None
    leading = next((axis for axis, x in enumerate(config) if x != (0, 0, 0)), 0)
    rows, total = shape_of(operand)[leading], shape_of(eqn.outvars[0])[leading]
    if min(min(x) for x in config) < 0 or FEW * rows > total:
        return None
    return rows_of_arrays((0,), math.prod(shape_of(operand)[: leading + 1]), leading)


def _pad_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    operand, _ = eqn.invars
    config = [tuple(x) for x in eqn.params["padding_config"]]

    def moved(rows: Rows, lanes: int) -> Rows:
        low, _, between = config[lanes]
        sizes = shape_of(operand)[lanes], shape_of(eqn.outvars[0])[lanes]
        zero = jnp.zeros((), rows.values.dtype)
        return _moved(
            rows,
            sizes,
            lambda ids: low + ids * (between + 1),
            lambda x: lax.pad(x, zero, config[lanes + 1 :]) if x.ndim else x,
        )

    if opening.terms:
        return [moved(x, _lanes(x, operand)) for x in terms(operand)]
    (kind,) = opening.kinds
    return [moved(_all_rows(read(operand), kind.lanes), kind.lanes)]


def _all_rows(array: Array, lanes: int) -> Rows:
    ids = jnp.arange(array.shape[lanes], dtype=index_dtype(array.shape[lanes]))
    return Rows(jnp.broadcast_to(ids, array.shape[: lanes + 1]), array)


def _lanes(rows: Rows, v: Any) -> int:
    return len(shape_of(v)) - 1 - rows.dim


# ---- slice and split: the gradients of padding and of concatenation.


def _slice_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    leading, before, after = lanes(eqn.invars[0]), shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if leading is None or before[:leading] != after[:leading]:
        return None
    return Opening({0: False}, by_place=True)


def _slice_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    return [_cut(eqn, 0, x, starts, limits, eqn.params["strides"]) for x in terms(eqn.invars[0])]


def _cut(eqn: JaxprEqn, j: int, rows: Rows, starts: Sequence[int], limits: Sequence[int], steps: Any) -> Rows:
    before, after, k = shape_of(eqn.invars[0]), shape_of(eqn.outvars[j]), _lanes(rows, eqn.invars[0])
    steps = steps or (1,) * len(starts)

    def place(ids: Array) -> Array:
        return jnp.where((ids - starts[k]) % steps[k] == 0, (ids - starts[k]) // steps[k], -1)

    def values(x: Array) -> Array:
        return lax.slice(x, starts[k + 1 :], limits[k + 1 :], steps[k + 1 :]) if x.ndim else x

    return _moved(rows, (before[k], after[k]), place, values)


def _split_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    limits = list(shape_of(eqn.invars[0]))
    starts = [0] * len(limits)
    starts[axis], limits[axis] = sum(sizes[:j]), sum(sizes[: j + 1])
    return [_cut(eqn, j, x, starts, limits, None) for x in terms(eqn.invars[0])]


# ---- rev: the gradient of reading in reverse order.


def _rev_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    leading = lanes(eqn.invars[0])
    return (
        None
        if leading is None or min(eqn.params["dimensions"], default=leading) < leading
        else Opening({0: False}, by_place=True)
    )


def _rev_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    shape, axes = shape_of(eqn.invars[0]), eqn.params["dimensions"]

    def moved(rows: Rows) -> Rows:
        k = _lanes(rows, eqn.invars[0])
        of_row = [axis - k - 1 for axis in axes if axis > k]
        sizes = shape[k], shape[k]
        return _moved(rows, sizes, lambda ids: shape[k] - 1 - ids if k in axes else ids, lambda x: lax.rev(x, of_row))

    return [moved(x) for x in terms(eqn.invars[0])]


# ---- concatenate: the gradient of a split.


def _concatenate_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    known, axis = [lanes(v) for v in eqn.invars], eqn.params["dimension"]
    sums = {k: False for k, leading in enumerate(known) if leading is not None}
    if any(leading is not None and axis < leading for leading in known):
        return None
    arrays = [k for k in range(len(known)) if k not in sums]
    if not arrays:
        return Opening(sums, by_place=True)
    rows = sum(shape_of(eqn.invars[k])[0] for k in arrays)
    if axis or FEW * rows > shape_of(eqn.outvars[0])[0]:
        return None
    return rows_of_arrays(arrays, rows, terms=sums, by_place=True)


def _concatenate_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    axis, whole, before, found = eqn.params["dimension"], shape_of(eqn.outvars[0]), 0, []
    for k, v in enumerate(eqn.invars):
        size = shape_of(v)[axis]
        for rows in terms(v) if k in opening.terms else [_all_rows(read(v), 0)]:
            lanes = _lanes(rows, v)
            config = [(0, 0, 0)] * (len(whole) - 1 - lanes)
            if axis > lanes:
                config[axis - lanes - 1] = (before, whole[axis] - before - size, 0)
            first, zero = before if axis == lanes else 0, jnp.zeros((), rows.values.dtype)
            found.append(
                _moved(
                    rows,
                    (shape_of(v)[lanes], whole[lanes]),
                    lambda ids, first=first: ids + first,
                    lambda x, zero=zero, config=config: lax.pad(x, zero, config) if x.ndim else x,
                )
            )
        before += size
    return found


# ---- reshape: rows of another shape, or each row as several rows.


def _reshape_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    before, after, leading = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), lanes(eqn.invars[0])
    added = len(after) - len(before)
    if added > 0 and after == (*[1] * added, *before):  # new lanes, as under `jax.vmap` for an array without them
        return Opening({0: False}, joined=-added)
    zeros = Opening({0: False}, of_zeros=True)
    if leading is None or before[:leading] != after[:leading] or len(after) <= leading or not math.prod(before):
        return zeros
    if after[leading] % before[leading] or eqn.params.get("dimensions") is not None:
        return zeros
    return Opening({0: False}, by_place=True, times=after[leading] // before[leading])


def _reshape_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])

    def moved(rows: Rows) -> Rows:
        lanes, rows = _lanes(rows, eqn.invars[0]), replicated(rows)
        index, shape = index_dtype(after[lanes]), (*rows.ids.shape, opening.times)
        each = lax.broadcasted_iota(index, shape, len(shape) - 1)
        ids = rows.ids.astype(index)[..., None] * opening.times + each
        exists = (rows.ids >= 0) & (rows.ids < before[lanes])
        values = jnp.reshape(rows.values, (*ids.shape, *after[lanes + 1 :]))
        return Rows(jnp.where(exists[..., None], ids, after[lanes]), values, rows.axes)

    def in_lanes(term: Term) -> Term:
        axes = tuple(range(-opening.joined))
        if not isinstance(term, Rows):
            return jnp.expand_dims(term, axes)
        return Rows(jnp.expand_dims(term.ids, axes), jnp.expand_dims(term.values, axes), term.axes)

    if opening.of_zeros:
        return []
    return [in_lanes(x) if opening.joined else moved(x) for x in terms(eqn.invars[0])]


# ---- dynamic_update_slice: the gradient of `weight[k]`, or of a window from `k` on, for a traced `k`.


def _update_opening(eqn: JaxprEqn, lanes: Lanes) -> Opening | None:
    operand, update, *starts = eqn.invars
    rows = shape_of(update)[0] if starts else 0
    if not starts or FEW * rows > shape_of(operand)[0]:
        return None
    return rows_of_arrays(range(1, 2 + len(starts)), rows, terms={0: False}, of_zeros=True)


def _update_terms(eqn: JaxprEqn, j: int, opening: Opening, read: Read, terms: Terms) -> list[Term]:
    operand, update, start, *others = eqn.invars
    values, (total, *dim) = on_every_device(read(update)), shape_of(operand)
    rows, index = values.shape[0], index_dtype(total)
    # XLA moves a slice that would reach beyond the end.
    first = jnp.clip(jnp.asarray(read(start)), 0, total - rows).astype(index)
    if values.shape[1:] != tuple(dim):
        zeros = jnp.zeros((rows, *dim), values.dtype)
        columns = [jnp.asarray(read(v)) for v in others]
        values = lax.dynamic_update_slice(zeros, values, [jnp.zeros((), columns[0].dtype), *columns])
    return [Rows(first + jnp.arange(rows, dtype=index), values)]


PARTS = {
    "pad": Part(_pad_opening, _pad_terms),
    "slice": Part(_slice_opening, _slice_terms),
    "split": Part(_slice_opening, _split_terms),
    "rev": Part(_rev_opening, _rev_terms),
    "concatenate": Part(_concatenate_opening, _concatenate_terms),
    "reshape": Part(_reshape_opening, _reshape_terms),
    "dynamic_update_slice": Part(_update_opening, _update_terms),
    "scatter-add": Part(scattered_opening, scattered_terms),
}
