"""A lookup, its gradient and its write-back in float64 NumPy, line by line as the contract says: loops, no JAX."""

import numpy as np


def row_of(index, rows, out_of_range="error", wrap=True):
    """The row that an id reads, or None where it reads none (traced ids under "error", too)."""
    index = int(index)
    if (-rows if wrap else 0) <= index < rows:
        return index % rows
    if out_of_range == "clip" and rows:
        return rows - 1 if index > 0 else 0
    return None


def padding_rows(padding_idx, rows):
    """The numbers of the padding rows, none, one or several."""
    given = () if padding_idx is None else padding_idx if isinstance(padding_idx, tuple) else (padding_idx,)
    return {row % rows for row in given}


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
    padding = padding_rows(padding_idx, rows)
    out = np.empty((*ids.shape, *weight.shape[1:]))
    for position in np.ndindex(ids.shape):
        row = row_of(ids[position], rows, out_of_range)
        if row is None:
            out[position] = 0 if out_of_range == "zero" else np.nan
        elif max_norm is None or row in padding:
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
    padding = padding_rows(padding_idx, rows)
    out = np.zeros(np.shape(weight))
    counts = np.zeros(rows, int)
    for position in np.ndindex(ids.shape):
        row = row_of(ids[position], rows, out_of_range)
        if row is None:
            continue
        counts[row] += 1
        if row not in padding and not freeze:
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
    padding = padding_rows(padding_idx, rows)
    if max_norm is None or freeze:
        return weight
    for index in {row_of(index, rows, out_of_range) for index in np.asarray(ids).ravel()}:
        if index is not None and index not in padding:
            weight[index] = clip(weight[index], max_norm, norm_type)
    return weight


def counted_in_bag(weight, ids, weights, padding_idx=None, **rules):
    """The places in a bag that are not padding, the rows there, `(counted, *dim)`, and their weights, or ones."""
    rows = np.shape(weight)[0]
    padding = padding_rows(padding_idx, rows)
    places = [i for i, id_ in enumerate(ids) if row_of(id_, rows, rules.get("out_of_range")) not in padding]
    vectors = lookup(weight, np.asarray([ids[i] for i in places], int), padding_idx=padding_idx, **rules)
    return places, vectors, np.array([1.0 if weights is None else weights[i] for i in places])


def divisor(factors, mode):
    """The number by which the weighted sum of a bag is divided."""
    return {"sum": 1.0, "mean": factors.sum(), "sqrtn": np.sqrt((factors**2).sum())}[mode]


def embedding_bag(weight, bags, weights=None, mode="sum", **rules):
    """The pooled rows of each bag; bags and weights are lists of lists."""
    out = np.zeros((len(bags), *np.shape(weight)[1:]))
    for b, ids in enumerate(bags):
        places, rows, factors = counted_in_bag(weight, ids, None if weights is None else weights[b], **rules)
        if not places:
            continue
        out[b] = rows.max(0) if mode == "max" else np.tensordot(factors, rows, 1) / divisor(factors, mode)
    return out


def embedding_bag_gradient(weight, bags, cotangent, weights=None, mode="sum", **rules):
    """The gradients of the weight and of the weights, these as a list of arrays, given that of the output."""
    weight, cotangent = np.asarray(weight, np.float64), np.asarray(cotangent, np.float64)
    out = embedding_bag(weight, bags, weights, mode, **rules)
    of_rows = [np.zeros((len(ids), *weight.shape[1:])) for ids in bags]
    of_weights = [np.zeros(len(ids)) for ids in bags]
    for b, ids in enumerate(bags):
        places, rows, factors = counted_in_bag(weight, ids, None if weights is None else weights[b], **rules)
        if places and mode == "max":
            for column in np.ndindex(weight.shape[1:]):
                first = np.argmax(rows[(slice(None), *column)])  # of equals
                of_rows[b][(places[first], *column)] = cotangent[(b, *column)]
            continue
        for place, row, factor in zip(places, rows, factors, strict=True):
            by = divisor(factors, mode)
            of_rows[b][place] = factor / by * cotangent[b]
            of_divisor = {"sum": 0.0, "mean": 1.0, "sqrtn": factor / by}[mode]
            of_weights[b][place] = ((row - of_divisor * out[b]) / by * cotangent[b]).sum()
    flat = np.asarray([id_ for ids in bags for id_ in ids], int)
    return gradient(weight, flat, np.concatenate([np.zeros((0, *weight.shape[1:])), *of_rows]), **rules), of_weights


def attend(weight, x, mask_padding=False, **rules):
    """The product of each vector with each row as it is read, `(*batch, rows)`."""
    rows, dim = np.shape(weight)[0], np.shape(weight)[1:]
    read = lookup(weight, np.arange(rows), **rules)
    logits = np.tensordot(
        np.asarray(x, np.float64), read, (range(np.ndim(x) - len(dim), np.ndim(x)), range(1, read.ndim))
    )
    if mask_padding:
        logits[..., sorted(padding_rows(rules.get("padding_idx"), rows))] = -np.inf
    return logits


def attend_gradient(weight, x, cotangent, mask_padding=False, **rules):
    """The gradients of the weight and of `x`, given that of the logits. The clipping passes it straight through."""
    rows, dim = np.shape(weight)[0], np.shape(weight)[1:]
    x, cotangent = np.asarray(x, np.float64), np.array(cotangent, np.float64)
    padding = sorted(padding_rows(rules.get("padding_idx"), rows))
    if mask_padding:
        cotangent[..., padding] = 0
    batch = range(cotangent.ndim - 1)
    of_weight = np.tensordot(cotangent, x, (batch, batch))
    of_weight[padding] = 0
    if rules.get("freeze"):
        of_weight[:] = 0
    assert of_weight.shape == (rows, *dim)
    return of_weight, np.tensordot(cotangent, lookup(weight, np.arange(rows), **rules), 1)


TERMS = "ignore_index", "label_smoothing", "z_loss"


def reduce(losses, labels, reduction, ignore_index=-100, left_out=()):
    """The losses, their sum, or their mean over the labels that count."""
    if reduction == "none":
        return losses
    number = sum(label != ignore_index and label not in left_out for label in np.asarray(labels).ravel().tolist())
    return losses.sum() / (max(number, 1) if reduction == "mean" else 1)


def cross_entropy(
    weight, x, labels, mask_padding=False, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, **rules
):  # fmt: skip
    """The loss of each label, and the derivative of that by the logits, `(*batch, rows)`."""
    logits, labels = attend(weight, x, mask_padding, **rules), np.asarray(labels)
    rows, policy = np.shape(weight)[0], rules.get("out_of_range", "error")
    padding = padding_rows(rules.get("padding_idx"), rows) if mask_padding else set()
    predicted = [row for row in range(rows) if row not in padding]
    losses, errors = np.zeros(labels.shape), np.zeros(logits.shape)
    for position in np.ndindex(labels.shape):
        row, of_one = row_of(labels[position], rows, policy, wrap=False), logits[position]
        if labels[position] == ignore_index or row in padding:
            continue
        if row is None and policy != "zero":
            losses[position] = np.nan
            continue
        largest = of_one.max()
        normalizer = largest + np.log(np.exp(of_one - largest).sum())
        target = np.zeros(rows)
        target[predicted] = label_smoothing / len(predicted)
        if row is not None:
            target[row] += 1 - label_smoothing
        losses[position] = normalizer - (target[predicted] * of_one[predicted]).sum() + z_loss * normalizer**2
        errors[position] = np.exp(of_one - normalizer) * (1 + 2 * z_loss * normalizer) - target
    return losses, errors


def cross_entropy_gradient(weight, x, labels, cotangent, mask_padding=False, **options):
    """The gradients of the weight and of `x`, given that of the losses. Where there is no error, `x` is not read."""
    _, errors = cross_entropy(weight, x, labels, mask_padding, **options)
    counted = errors.any(-1)
    x = np.where(counted.reshape(*counted.shape, *[1] * (np.ndim(x) - counted.ndim)), x, 0)
    errors *= np.where(counted, cotangent, 0)[..., None]
    rules = {name: value for name, value in options.items() if name not in TERMS}
    return attend_gradient(weight, x, errors, mask_padding, **rules)


def chance_of_row(samples, probability):
    """The probability that a row is drawn; 1 for a row that is never drawn, so that nothing is corrected."""
    return 1.0 if probability == 0 else 1 - (1 - probability) ** samples


def sampled_softmax(
    weight, x, labels, drawn, probabilities, remove_hits=True, *, ignore_index=-100, z_loss=0.0, **rules
):  # fmt: skip
    """The loss of each label among the rows that were drawn, each counted once, and the probability of each row."""
    logits, labels = attend(weight, x, **rules), np.asarray(labels)
    rows, policy = np.shape(weight)[0], rules.get("out_of_range", "error")
    padding = padding_rows(rules.get("padding_idx"), rows)
    losses = np.zeros(labels.shape)
    for position in np.ndindex(labels.shape):
        label = row_of(labels[position], rows, policy, wrap=False)
        if labels[position] == ignore_index or label in padding:
            continue
        if label is None and policy != "zero":
            losses[position] = np.nan
            continue
        scores = [0.0]
        if label is not None:
            scores = [logits[(*position, label)] - np.log(chance_of_row(len(drawn), probabilities[label]))]
        for row in sorted(set(np.asarray(drawn).tolist()) - padding - ({label} if remove_hits else set())):
            scores.append(logits[(*position, row)] - np.log(chance_of_row(len(drawn), probabilities[row])))
        normalizer = np.log(np.exp(np.asarray(scores)).sum())
        losses[position] = normalizer - scores[0] + z_loss * normalizer**2
    return losses
