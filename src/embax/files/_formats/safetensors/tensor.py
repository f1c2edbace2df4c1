"""Read a tensor of any safetensors file or model in shards, with the vocabulary of the tokenizer in its folder."""

import os
import warnings
from typing import NoReturn

import numpy as np

from ..._io.contents import Contents, Options, contents_of
from ..._io.open import Source
from ..array import table_of
from ..format import Format
from ..vocabularies import TOKENIZERS, Listed, tokenizer_beside
from . import model2vec as _model2vec
from . import shards as _shards
from .header import FLOATS, Tensor, is_safetensors, numpy_dtype, read_header


class UnnamedRowsWarning(UserWarning):
    """A table has rows without a token in the vocabulary; they are left out."""


def _recognises(source: Source) -> bool:
    return is_safetensors(source) or _shards.is_index(source)


def _read(source: Source, options: Options) -> Contents:
    tensors = None if _shards.is_index(source) else read_header(source)[1]
    listed = tokenizer_beside(source, options)
    if listed is None:
        raise source.error(f"has no vocabulary beside it. Put {' or '.join(TOKENIZERS)} into its folder.")
    if tensors is not None:
        return _read_table(source, options, tensors, listed)
    files = _shards.read_index(source)
    name = source.member
    if name is None:
        found = _shards.all_tensors(source, files)
        name = _chosen(source, found, _number(listed))
    elif name not in files:
        raise source.error(f"there is no such tensor. It has {_listing(dict.fromkeys(files))}.")
    with _shards.opened_shard(source, files[name], name) as shard:
        _, tensors = read_header(shard)
        return _read_table(shard, options, tensors, listed)


def _read_table(source: Source, options: Options, tensors: dict[str, Tensor], listed: Listed) -> Contents:
    """Read the tensor that the caller names, or else the only one that fits the vocabulary."""
    found = _model2vec.parts_of(source, tensors) or tensors[_chosen(source, tensors, _number(listed))]
    rows = found.rows if isinstance(found, _model2vec.Parts) else found.shape[0]
    if rows < _number(listed):
        raise source.error(f"has {rows:,} rows, fewer than the {_number(listed):,} that {listed.path} has tokens for.")
    unnamed = rows - len(listed.ids)
    if unnamed:
        warnings.warn(
            f"{source.name}: {unnamed:,} of {rows:,} rows are left out, as {listed.path} has no token for them.",
            UnnamedRowsWarning,
            stacklevel=2,
        )
    if options.limit is not None:
        listed = listed.first(options.limit)
    weight = _rows_of(source, options, found, listed)
    special = {role: int(np.searchsorted(listed.ids, row)) for role, row in listed.special.items()}
    return contents_of(source, options._replace(is_decoded=True), listed.text, listed.offsets, weight, special=special)


def _number(listed: Listed) -> int:
    """Return the number of rows that the tokens need."""
    return int(listed.ids[-1]) + 1 if listed.ids.size else 0


def _chosen(source: Source, tensors: dict[str, Tensor], rows: int) -> str:
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
        return source.member
    fitting = [name for name, one in tables.items() if one.shape[0] == rows]
    if len(fitting) != 1:
        raise source.error(
            f"{len(fitting)} of its tensors have a row for each of {rows:,} tokens, so that one has to be named, as "
            f"{source.whole_name}:NAME. It has {_listing(tables)}."
        )
    return fitting[0]


def _listing(tables: dict[str, Tensor] | dict[str, None]) -> str:
    """List tensors for a message, those with "embed" in their names first."""

    def order(name: str) -> tuple[bool, int]:
        one = tables[name]
        return "embed" not in name.lower(), 0 if one is None else -one.shape[0]

    names = sorted(tables, key=order)
    shapes = {name: "" if one is None else f" {one.shape}" for name, one in tables.items()}
    listing = ", ".join(f"{name!r}{shapes[name]}" for name in names[:10])
    return (listing + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "no table of floats"


def _rows_of(source: Source, options: Options, found: Tensor | _model2vec.Parts, listed: Listed) -> np.ndarray:
    if isinstance(found, _model2vec.Parts):
        return _model2vec.read(source, options, found, listed.ids)
    number, end = len(listed.ids), _number(listed)
    shape = (found.shape[0], found.shape[1])
    table = table_of(source, options._replace(limit=end), numpy_dtype(found.dtype), shape, found.begin)
    return table if end == number else table[listed.ids]


def _check(path: str | os.PathLike[str]) -> NoReturn:
    raise ValueError(
        '`embax.files.save(format=...)` must be a format that is written, got "tensor", which is only read. '
        'Save as "safetensors".'
    )


def _write(path: str | os.PathLike[str], contents: Contents) -> NoReturn:
    _check(path)


FORMAT = Format("tensor", (), _recognises, _read, _write, _check)
