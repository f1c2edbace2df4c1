"""A lookup, its gradient and its write-back in float64 NumPy, line by line as the contract says: loops, no JAX."""

import numpy as np


def row_of(index, rows, out_of_range="error"):
    """The row that an id reads, or None where it reads none (traced ids under "error", too)."""
    index = int(index)
    if -rows <= index < rows:
        return index % rows
    if out_of_range == "clip" and rows:
        return rows - 1 if index > 0 else 0
    return None


def clip(row, max_norm, norm_type=2.0):
    """The row scaled to the norm `max_norm` where it is longer."""
    magnitude = np.abs(np.asarray(row, np.float64))
    if magnitude.size == 0:
        return row
    norm = magnitude.max() if np.isinf(norm_type) else (magnitude**norm_type).sum() ** (1 / norm_type)
    return row * (max_norm / norm) if norm > max_norm else row


def lookup(
    weight, ids, *, padding_idx=None, max_norm=None, norm_type=2.0, out_of_range="error", scale_grad_by_freq=False,
    freeze=False,
):  # fmt: skip
    """The rows that the ids read."""
    weight, ids = np.asarray(weight, np.float64), np.asarray(ids)
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    out = np.empty((*ids.shape, *weight.shape[1:]))
    for position in np.ndindex(ids.shape):
        row = row_of(ids[position], rows, out_of_range)
        if row is None:
            out[position] = 0 if out_of_range == "zero" else np.nan
        elif max_norm is None or row == padding:
            out[position] = weight[row]
        else:
            out[position] = clip(weight[row], max_norm, norm_type)
    return out


def gradient(
    weight, ids, cotangent, *, padding_idx=None, max_norm=None, norm_type=2.0, out_of_range="error",
    scale_grad_by_freq=False, freeze=False,
):  # fmt: skip
    """The gradient of the weight, given that of the output. The clipping passes it straight through."""
    ids, cotangent = np.asarray(ids), np.asarray(cotangent, np.float64)
    rows = np.shape(weight)[0]
    padding = None if padding_idx is None else padding_idx % rows
    out = np.zeros(np.shape(weight))
    counts = np.zeros(rows, int)
    for position in np.ndindex(ids.shape):
        row = row_of(ids[position], rows, out_of_range)
        if row is None:
            continue
        counts[row] += 1
        if row != padding and not freeze:
            out[row] += cotangent[position]
    if scale_grad_by_freq:
        for row in range(rows):
            out[row] /= max(counts[row], 1)
    return out


def jacobian(weight, ids, **rules):
    """The derivative of the output with respect to the weight, `(*output, *weight)`: one gradient an entry."""
    shape = (*np.shape(ids), *np.shape(weight)[1:])
    out = np.zeros((*shape, *np.shape(weight)))
    for position in np.ndindex(shape):
        cotangent = np.zeros(shape)
        cotangent[position] = 1
        out[position] = gradient(weight, ids, cotangent, **rules)
    return out


def renormalize(
    weight, ids, *, padding_idx=None, max_norm=None, norm_type=2.0, out_of_range="error", scale_grad_by_freq=False,
    freeze=False,
):  # fmt: skip
    """The weight with the rows that the ids read stored clipped."""
    weight = np.array(weight, np.float64)
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    if max_norm is None or freeze:
        return weight
    for index in {row_of(index, rows, out_of_range) for index in np.asarray(ids).ravel()}:
        if index is not None and index != padding:
            weight[index] = clip(weight[index], max_norm, norm_type)
    return weight
