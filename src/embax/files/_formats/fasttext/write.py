"""Write fastText models as .bin files."""

import os
import struct
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from ...._base.text.strings import Strings, padded
from ....vocabulary import Vocabulary
from ..._io.atomic import replacing
from ..._io.contents import Contents
from .model import BEHIND, LONGEST_WORD, MAGIC, SUPERVISED, VERSIONS, Arguments
from .occurring import rows_of
from .subwords import Subwords

_ROWS = 1 << 14
_ZEROS = 1 << 20  # zero bytes that are written at once


def write_fasttext(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a model of version 12, which fastText and gensim can read.

    With sub-words, the rows of words and n-grams are written as they were read. The rows of words with a changed vector
    are computed so that they give the new vector, up to rounding. Tokens keep the encoding of the file. Without
    sub-words, the model has no n-grams, and one row for each word, in float32. The output matrix, from which further
    training would start, is all zeros. Counts are at least 1, because gensim leaves out words with count 0.

    Args:
      path: The destination; an existing file is replaced.
      contents: The contents to write.

    Raises:
      ValueError: If a token has a zero byte or more than 65,536 bytes, the sub-words are pruned, as in .ftz files, or
        their vectors have another size than the weight.
      OSError: If the file cannot be written.
    """
    vocabulary, weight, counts, subwords, _ = contents
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
            for block in rows_of(subwords.ngrams, np.arange(buckets)):
                file.write(_bytes_of(block))
        file.write(struct.pack("<?qq", False, words.number, dim))
        _write_zeros(file, 4 * words.number * dim)


def _write_zeros(file: BinaryIO, size: int) -> None:
    if file.seekable():  # on most file systems, these zeros take no space
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
    # A supervised model needs labels, and there are none.
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
