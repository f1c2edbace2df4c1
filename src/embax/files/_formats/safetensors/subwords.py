"""Sub-words in embax's own format, as further tensors and one entry of the metadata.

- `subword_rows` float32 `(tokens + buckets, dim)`: the own row of each token, then the rows of n-grams, as far as
  they occur
- `subword_buckets` int64 `(buckets)`: the bucket of each row of n-grams, rising
- `subword_tokens` uint8 and `subword_token_offsets` int64 `(tokens + 1)`: the bytes of the tokens that are hashed, only
  if they differ from `tokens`
- metadata `subwords`: a `Description`, as JSON
"""

import itertools
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...._base.text.strings import Strings, padded
from ....vocabulary import Vocabulary
from ..._io.contents import Contents
from ..._io.open import Source
from ..fasttext.model import LONGEST_NGRAM, Arguments
from ..fasttext.occurring import OccurringRows, occurring, rows_of
from ..fasttext.subwords import Ngrams, Subwords
from .header import Tensor
from .written import Written

NAME = "subwords"
ROWS = "subword_rows"
_BUCKETS, _TOKENS, _OFFSETS = "subword_buckets", "subword_tokens", "subword_token_offsets"
# As in file.py.
LAYOUT = {_BUCKETS: ("<i8", "I64", 1), _OFFSETS: ("<i8", "I64", 1), _TOKENS: ("|u1", "U8", 1)}


class Description(NamedTuple):
    """What the metadata say of sub-words."""

    minimum: int  # the length of the shortest n-grams, in characters
    maximum: int  # the length of the longest n-grams
    buckets: int
    pruned: bool  # whether buckets without a row are left out of means, else their rows are zeros
    encoding: str  # of the bytes that are hashed
    arguments: tuple[Any, ...] | None  # fastText's, if a model has them


def written(contents: Contents) -> tuple[dict[str, Written], str]:
    """Describe the tensors of sub-words.

    Args:
      contents: The vectors with their sub-words.

    Returns:
      The tensors by name; and the entry of the metadata.

    Raises:
      ValueError: If the vectors of n-grams have another size than the weight.
    """
    subwords: Subwords = contents.subwords
    vocabulary, weight, ngrams = contents.vocabulary, contents.weight, subwords.ngrams
    if weight.shape[1] != subwords.dim:
        raise ValueError(
            f"`embax.files.write_safetensors(contents=...)` must have sub-words of the size of the vectors, "
            f"{weight.shape[1]}, got {subwords.dim}. Leave the sub-words out."
        )
    used = occurring(ngrams)
    own, of_ngrams = subwords.own_rows(vocabulary, weight), rows_of(ngrams, used)
    rows = (np.asarray(block, "<f4") for block in itertools.chain(own, of_ngrams))
    tensors = {_BUCKETS: Written.of(np.asarray(used, "<i8"), "I64")}
    utf8, (text, offsets) = vocabulary.escaped().utf8, subwords.encoded(vocabulary)
    text = text[: offsets[-1]]
    if not all(map(np.array_equal, utf8, (text, offsets))):
        tensors |= {_OFFSETS: Written.of(np.asarray(offsets, "<i8"), "I64"), _TOKENS: Written.of(text, "U8")}
    tensors[ROWS] = Written("F32", (len(vocabulary) + len(used), subwords.dim), rows)
    described = Description(
        ngrams.minimum, ngrams.maximum, ngrams.buckets, ngrams.kept is not None, subwords.encoding, subwords.arguments
    )
    return tensors, json.dumps(described._asdict(), separators=(",", ":"))


def checked(source: Source, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Description | None:
    """Check that the tensors of sub-words are there and fit together.

    Args:
      source: The file, for messages.
      metadata: The metadata.
      tensors: The tensors; `weight` and those of LAYOUT have been checked.

    Returns:
      What the metadata say of the sub-words; None without sub-words.

    Raises:
      FormatError: If something is missing or contradicts something else.
    """
    if NAME not in metadata:
        return None
    try:
        said = _described(metadata[NAME])
    except (ValueError, TypeError, KeyError, LookupError, RecursionError, struct.error):
        raise source.error(f"`{NAME}` must describe n-grams, got {metadata[NAME][:80]!r}.") from None
    rows, dim = tensors["weight"].shape
    for name in (ROWS, _BUCKETS):
        if name not in tensors:
            raise source.error(f"tensor `{name}` is missing.")
    shape = rows + tensors[_BUCKETS].shape[0], dim
    if tensors[ROWS].dtype != "F32" or tensors[ROWS].shape != shape:
        raise source.error(f"`{ROWS}` must be F32 {shape}, got {tensors[ROWS].dtype} {tensors[ROWS].shape}.")
    return said


def read(source: Source, said: Description, found: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> Subwords:
    """Make sub-words of the tensors.

    Args:
      source: The file, for messages.
      said: What `checked` returned.
      found: The tensors by name.
      vocabulary: The tokens; fewer than in the file if there is a limit.

    Returns:
      The sub-words.

    Raises:
      FormatError: If the buckets do not rise, or tokens overlap.
    """
    rows, used, number = found[ROWS], found[_BUCKETS], len(vocabulary)
    words = len(rows) - len(used)
    if used.size and (used[0] < 0 or used[-1] >= said.buckets or (used[1:] <= used[:-1]).any()):
        raise source.error(f"`{_BUCKETS}` must rise, below {said.buckets:,}.")
    kept = None
    if said.pruned:
        kept = used.astype(np.int32), np.arange(len(used), dtype=np.int32)
    elif len(used) < said.buckets:
        rows = OccurringRows(rows, used, said.buckets)
    raw = None
    if _OFFSETS in found:
        text, offsets = found.get(_TOKENS, np.zeros(0, np.uint8)), found[_OFFSETS]
        if len(offsets) != words + 1 or offsets[0] != 0 or offsets[-1] != len(text) or (np.diff(offsets) < 0).any():
            raise source.error(f"`{_OFFSETS}` must rise {words:,} times from 0 to the {len(text):,} bytes of tokens.")
        offsets = offsets[: number + 1]
        raw = Strings(padded(text[: offsets[-1]]), offsets)
    ngrams = Ngrams(rows, words, said.minimum, said.maximum, said.buckets, kept)
    own = np.arange(number)
    return Subwords(ngrams, vocabulary, own, encoding=said.encoding, raw=raw, arguments=said.arguments)


def _described(text: str) -> Description:
    """Read the entry of the metadata; an error says that something is wrong."""
    said = json.loads(text)
    said = Description(*(said[name] for name in Description._fields))
    if said.arguments is not None:
        arguments = Arguments(*said.arguments)
        said = said._replace(arguments=arguments)
        arguments.packed  # noqa: B018, an error for numbers that no file of fastText can hold
    "".encode(said.encoding)
    numbers = said.minimum, said.maximum, said.buckets
    if not (
        all(type(number) is int for number in numbers)
        and said.minimum <= said.maximum <= LONGEST_NGRAM
        and 1 <= said.buckets < 1 << 31
        and isinstance(said.pruned, bool)
    ):
        raise ValueError(text)
    return said
