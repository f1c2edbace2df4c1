"""fastText's models, written as .bin files."""

import os
import struct
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from ...._base.strings import Strings, padded
from ....vocabulary import Vocabulary
from ..._io.atomic import replacing
from ..._io.contents import Contents
from .model import BEHIND, LONGEST_WORD, MAGIC, SUPERVISED, VERSIONS, Arguments
from .subwords import Subwords

_ROWS = 1 << 14
_ZEROS = 1 << 20  # bytes that are written at once


def write_fasttext(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a model, version 12, as fastText and gensim read it.

    With sub-words, the rows of words and n-grams are those that were read; where the vectors have changed since,
    rows of words are chosen that give the vectors, up to rounding. Tokens keep the encoding of the file. Without, the
    model has no n-grams, and one row a word, in float32. The output matrix, which a further training would start from,
    is all zeros. Counts are at least 1, as gensim leaves out words of count 0.

    Args:
      path: The destination; an existing file is replaced.
      contents: What to write.

    Raises:
      ValueError: If a token has a zero byte or more than 65,536 bytes, or the sub-words are pruned, as in .ftz files,
        or have another size of vectors than the weight.
      OSError: If the file cannot be written.
    """
    vocabulary, weight, counts, subwords = contents
    words, dim = _words_to_write(vocabulary, subwords), weight.shape[1]
    buckets, args = 0, Arguments(dim)
    if subwords is not None:
        buckets, args = subwords.ngrams.buckets, _arguments_to_write(subwords, dim)
    frequencies = np.maximum(np.ones(words.number, np.int64) if counts is None else counts, 1)
    with replacing(path) as file:
        file.write(struct.pack("<2i", MAGIC, VERSIONS[-1]) + args.packed)
        file.write(struct.pack("<3iqq", words.number, words.number, 0, int(frequencies.sum()), -1))
        for start in range(0, words.number, _ROWS):
            file.write(_entries(words, frequencies, start, min(start + _ROWS, words.number)))
        file.write(struct.pack("<?qq", False, words.number + buckets, dim))
        if subwords is None:
            for start in range(0, words.number, _ROWS):
                file.write(_bytes_of(weight[start : start + _ROWS]))
        else:
            for block in subwords.own_rows(vocabulary, weight):
                file.write(_bytes_of(block))
            first = subwords.ngrams.first
            for start in range(0, buckets, _ROWS):
                rows = np.arange(start, min(start + _ROWS, buckets)) + first
                file.write(_bytes_of(subwords.ngrams.rows.take(rows, axis=0)))
        file.write(struct.pack("<?qq", False, words.number, dim))
        _write_zeros(file, 4 * words.number * dim)


def _write_zeros(file: BinaryIO, size: int) -> None:
    if file.seekable():  # there, they take no room on most file systems
        file.truncate(file.tell() + size)
        file.seek(0, os.SEEK_END)
        return
    zeros = bytes(min(size, _ZEROS))
    for start in range(0, size, _ZEROS):
        file.write(zeros[: size - start])


def _words_to_write(vocabulary: Vocabulary, subwords: Subwords | None) -> Strings:
    if subwords is None:
        text, offsets = vocabulary.utf8
        words = Strings(padded(text), offsets)
    else:
        words = subwords.encoded(vocabulary)
    zeros = np.flatnonzero(words.text[: words.offsets[-1]] == 0)
    long = np.flatnonzero(np.diff(words.offsets) > LONGEST_WORD)
    if zeros.size or long.size:
        row = int(np.searchsorted(words.offsets, zeros[0], side="right")) - 1 if zeros.size else int(long[0])
        raise ValueError(
            f"`embax.files.save(contents=...)` must have tokens without zero bytes, of up to {LONGEST_WORD} bytes, for "
            f"a model of fastText, got {vocabulary.tokens(row)[:40]!r}. Leave it out, or choose another format."
        )
    return words


def _arguments_to_write(subwords: Subwords, dim: int) -> Arguments:
    ngrams = subwords.ngrams
    if ngrams.kept is not None:
        raise ValueError(
            "`embax.files.save(contents=...)` must have sub-words that are not pruned for a model of fastText, got "
            "some of a quantised one. Leave the sub-words out, or choose another format."
        )
    if subwords.dim != dim:
        raise ValueError(
            f"`embax.files.save(contents=...)` must have sub-words of the size of the vectors, {dim}, got "
            f"{subwords.dim}. Leave the sub-words out."
        )
    args = Arguments(*(subwords.arguments or (dim,)))
    # There are no labels that a supervised model could be of.
    if args.model == SUPERVISED:
        args = args._replace(model=Arguments(dim).model, loss=Arguments(dim).loss)
    return args._replace(dim=dim, bucket=ngrams.buckets, minn=ngrams.minimum, maxn=ngrams.maximum)


def _entries(words: Strings, counts: Int64[np.ndarray, " words"], start: int, stop: int) -> bytes:
    """Return the dictionary's entries of some words."""
    offsets = words.offsets[start : stop + 1]
    lengths = np.diff(offsets)
    ends = np.cumsum(lengths + BEHIND) - BEHIND
    data = np.zeros(int((lengths + BEHIND).sum()), np.uint8)
    behind = ends[:, None] + np.arange(BEHIND)
    data[behind[:, 1:-1]] = counts[start:stop].astype("<i8")[:, None].view(np.uint8)
    is_word = np.ones(data.size, bool)
    is_word[behind] = False
    data[is_word] = words.text[offsets[0] : offsets[-1]]
    return data.tobytes()


def _bytes_of(rows: np.ndarray) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(rows, "<f4").tobytes()
