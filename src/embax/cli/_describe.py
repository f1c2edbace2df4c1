"""The description of a file that `embax info` prints, as a dict and as a table."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ._common import bytes_in_words, plain_table, printable

if TYPE_CHECKING:
    from embax.files import Contents, Identity

# Rows that are read at a time, so that a mapped file is not in memory as a whole.
_BLOCK = 1 << 14
# The number of first tokens to show.
_SHOWN = 10


def described(file: str, identity: "Identity", contents: "Contents", duplicates: int) -> dict[str, Any]:
    """Describe a file, as the JSON document."""
    vocabulary, weight, counts, subwords, metadata = contents
    norms = _norms(weight)
    finite = np.sort(norms[np.isfinite(norms)])
    ngrams = None if subwords is None else subwords.ngrams
    return {
        "file": file,
        "format": identity.format,
        "compression": identity.compression,
        "bytes": identity.size,
        "rows": weight.shape[0],
        "dim": weight.shape[1],
        "dtype": str(weight.dtype),
        "memory": {"weight": weight.nbytes, "vocabulary": sum(array.nbytes for array in vocabulary.utf8)},
        "norms": {
            "min": float(finite[0]) if finite.size else None,
            "median": float(np.median(finite)) if finite.size else None,
            "max": float(finite[-1]) if finite.size else None,
        },
        "zero_rows": int((norms == 0).sum()),
        "not_finite_rows": int(norms.size - finite.size),
        "duplicates_left_out": duplicates,
        "counts": None
        if counts is None or not counts.any()
        else {"min": int(counts.min()), "max": int(counts.max()), "total": int(counts.sum())},
        "special": {role: vocabulary.tokens(row) for role, row in vocabulary.special.items()},
        "subwords": None
        if ngrams is None
        else {"minimum": ngrams.minimum, "maximum": ngrams.maximum, "buckets": ngrams.buckets},
        "metadata": dict(metadata or {}),
        "first_tokens": vocabulary.tokens(np.arange(min(_SHOWN, len(vocabulary)))),
    }


def _norms(weight: np.ndarray) -> np.ndarray:
    """The length of each row, in float64; NaN if an entry is not finite."""
    norms = np.empty(len(weight))
    for start in range(0, len(weight), _BLOCK):
        block = np.asarray(weight[start : start + _BLOCK], np.float64)
        # Divide by the largest entry first, so that no square overflows or underflows.
        largest = np.abs(block).max(axis=1, initial=0)
        largest[~np.isfinite(largest)] = np.nan
        scaled = block / np.where(largest == 0, 1, largest)[:, None]
        norms[start : start + _BLOCK] = largest * np.sqrt(np.einsum("rd,rd->r", scaled, scaled))
    return norms


def as_table(found: dict[str, Any]) -> Any:
    """Format a description as a table, without empty entries."""
    from rich.text import Text

    memory, norms, counts, subwords = (found[name] for name in ("memory", "norms", "counts", "subwords"))
    kind = found["compression"]
    compression = "" if kind is None else f", in {kind}" if "tar" in kind else f", compressed by {kind}"
    lines = {
        "file": found["file"],
        "format": found["format"] + compression,
        "size on disk": bytes_in_words(found["bytes"] or 0),
        "rows": f"{found['rows']:,}",
        "dimensions": f"{found['dim']:,} of {found['dtype']}",
        "memory": f"{bytes_in_words(memory['weight'])} of numbers, {bytes_in_words(memory['vocabulary'])} of tokens",
    }
    if norms["min"] is not None:
        lines["norms"] = f"{norms['min']:.4g} to {norms['max']:.4g}, median {norms['median']:.4g}"
    lines["rows of zeros"] = f"{found['zero_rows']:,}"
    lines["rows with NaN or infinity"] = f"{found['not_finite_rows']:,}"
    lines["duplicates left out"] = f"{found['duplicates_left_out']:,}"
    if counts:
        lines["counts"] = f"{counts['min']:,} to {counts['max']:,}, {counts['total']:,} in all"
    if found["special"]:
        lines["special tokens"] = ", ".join(f"{role} {token}" for role, token in found["special"].items())
    if subwords:
        lines["sub-words"] = (
            f"of {subwords['minimum']} to {subwords['maximum']} characters, {subwords['buckets']:,} buckets"
        )
    if found["metadata"]:
        lines["metadata"] = ", ".join(f"{name} {value}" for name, value in found["metadata"].items())
    lines["first tokens"] = " ".join(found["first_tokens"])
    table = plain_table("", "")
    table.show_header = False
    table.columns[0].no_wrap = True
    for name, value in lines.items():
        table.add_row(name, Text(printable(value)))
    return table
