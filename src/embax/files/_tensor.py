"""A tensor of any safetensors file, with the vocabulary of the tokenizer beside it."""

import os
import warnings
from typing import NoReturn

import numpy as np

from ._array import table_of
from ._contents import Contents, Options, contents_of
from ._format import Format
from ._open import Source
from ._safetensors_header import FLOATS, Tensor, is_safetensors, read_header
from ._vocabularies import TOKENIZERS, Listed, tokenizer_beside


class UnnamedRowsWarning(UserWarning):
    """A table has rows that no token of its vocabulary names; those are left out."""


def _read(source: Source, options: Options) -> Contents:
    _, tensors = read_header(source)
    listed = tokenizer_beside(source.path, options)
    if listed is None:
        raise source.error(f"has no vocabulary beside it. Put {' or '.join(TOKENIZERS)} into its folder.")
    highest = int(listed.ids[-1]) + 1 if listed.ids.size else 0
    tensor = _chosen(source, tensors, highest)
    rows = tensor.shape[0]
    if rows < highest:
        raise source.error(f"has {rows:,} rows, fewer than the {highest:,} that {listed.path} has tokens for.")
    unnamed = rows - len(listed.ids)
    if unnamed:
        warnings.warn(
            f"{source.name}: {unnamed:,} of {rows:,} rows are left out, as {listed.path} has no token for them.",
            UnnamedRowsWarning,
            stacklevel=2,
        )
    if options.limit is not None:
        listed = listed.first(options.limit)
    weight = _rows_of(source, options, tensor, listed)
    special = {role: int(np.searchsorted(listed.ids, row)) for role, row in listed.special.items()}
    return contents_of(source, options._replace(is_decoded=True), listed.text, listed.offsets, weight, special=special)


def _chosen(source: Source, tensors: dict[str, Tensor], rows: int) -> Tensor:
    """Return the tensor that the caller names, or else the only one that fits the vocabulary."""
    tables = {name: one for name, one in tensors.items() if len(one.shape) == 2 and one.dtype in FLOATS}
    if source.member is not None:
        if source.member not in tensors:
            raise source.error(f"there is no such tensor. It has {_listing(tables)}.")
        if source.member not in tables:
            one = tensors[source.member]
            raise source.error(
                f"is {one.dtype} {one.shape}, which is no table of {', '.join(FLOATS)}. It has {_listing(tables)}."
            )
        return tables[source.member]
    fitting = [one for one in tables.values() if one.shape[0] == rows]
    if len(fitting) != 1:
        raise source.error(
            f"{len(fitting)} of its tensors have a row for each of {rows:,} tokens, so that one has to be named, as "
            f"{source.path}:NAME. It has {_listing(tables)}."
        )
    return fitting[0]


def _listing(tables: dict[str, Tensor]) -> str:
    """List tensors for a message, the likely ones first."""
    names = sorted(tables, key=lambda name: ("embed" not in name.lower(), -tables[name].shape[0]))
    listing = ", ".join(f"{name!r} {tables[name].shape}" for name in names[:10])
    return (listing + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "no table of floats"


def _rows_of(source: Source, options: Options, tensor: Tensor, listed: Listed) -> np.ndarray:
    number = len(listed.ids)
    end = int(listed.ids[-1]) + 1 if number else 0
    shape = (tensor.shape[0], tensor.shape[1])
    table = table_of(source, options._replace(limit=end), FLOATS[tensor.dtype], shape, tensor.begin)
    return table if end == number else table[listed.ids]


def _write(path: str | os.PathLike[str], contents: Contents) -> NoReturn:
    raise ValueError(
        '`embax.files.save(format=...)` must be a format that is written, got "tensor", which is only read. '
        'Save as "safetensors".'
    )


FORMAT = Format("tensor", (), is_safetensors, _read, _write)
