"""Hash the n-grams of words as fastText does, for many words at once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32

from ...._base.text.strings import Strings, packed

# FNV-1a of 32 bits (Fowler, Noll and Vo, public domain).
_BASIS, _PRIME = np.uint32(2166136261), np.uint32(16777619)
# fastText puts "<" and ">" around a word. The word "</s>", the end of a line, has no n-grams.
_BEGIN, _END, _LINE_END = b"<", b">", b"</s>"
# The number of n-grams, and of numbers in a result, that are computed at once.
_NGRAMS, _NUMBERS = 1 << 22, 1 << 23


class Hashes(NamedTuple):
    """The hashes of the n-grams of words."""

    hashes: UInt32[np.ndarray, " ngrams"]  # word by word; within a word sorted by beginning, then by length
    counts: Int64[np.ndarray, " words"]  # the number of n-grams of each word


def hashed(words: Strings, minimum: int, maximum: int, line_end: bool = False) -> Hashes:
    """Hash the n-grams of words.

    The n-grams of "cat" are pieces of "<cat>", except "<" and ">" alone: of length 3, they are "<ca", "cat" and "at>".
    They are cut between UTF-8 characters. As in fastText, the hash treats bytes as signed numbers: a byte above 127 is
    extended to 32 bits with ones.

    Args:
      words: The words. They need not be valid UTF-8: a byte `10xxxxxx` always belongs to the character before it.
      minimum: The length of the shortest n-grams, in characters.
      maximum: The length of the longest n-grams.
      line_end: Whether "</s>" has n-grams, too.

    Returns:
      The hashes.
    """
    text, ends = _wrapped(words)
    minimum = max(minimum, 1)
    starts = np.flatnonzero((text & 0xC0) != 0x80)
    sizes = np.diff(starts, append=text.size)
    # Characters of a word are numbered from first[word] to first[word + 1].
    first = np.searchsorted(starts, ends)
    left = np.repeat(first[1:], np.diff(first)) - np.arange(starts.size)
    signed = text.view(np.int8).astype(np.int32).view(np.uint32)

    grid = np.zeros((starts.size, max(0, maximum - minimum + 1)), np.uint32)
    is_ngram = np.zeros(grid.shape, bool)
    open_ = np.flatnonzero(left) if grid.size else np.zeros(0, np.int64)
    hashes = np.full(open_.size, _BASIS)
    for length in range(1, maximum + 1):
        keep = left[open_] >= length
        open_, hashes = open_[keep], hashes[keep]
        if not open_.size:
            break
        hashes = _extended(hashes, signed, starts[open_ + (length - 1)], sizes[open_ + (length - 1)])
        if length >= minimum:
            grid[open_, length - minimum] = hashes
            is_ngram[open_, length - minimum] = True
    if minimum == 1 and grid.size:
        is_ngram[first[:-1], 0] = is_ngram[first[1:] - 1, 0] = False
    if not line_end:
        for word in np.flatnonzero(_is_line_end(words)):
            is_ngram[first[word] : first[word + 1]] = False
    before = np.zeros(starts.size + 1, np.int64)
    np.cumsum(is_ngram.sum(axis=1), out=before[1:])
    return Hashes(grid[is_ngram], before[first[1:]] - before[first[:-1]])


def blocks(words: Strings, widths: int, dim: int) -> Iterator[tuple[int, int, Strings]]:
    """Split words into blocks, so that the n-grams and vectors of a block take little memory.

    Args:
      words: The words.
      widths: The number of lengths of n-grams: `maximum - minimum + 1`.
      dim: The size of a vector.

    Yields:
      The first word of a block, the one after its last, and the words.
    """
    sizes = words.offsets + 2 * np.arange(words.number + 1)
    start = 0
    while start < words.number:
        stop = int(np.searchsorted(sizes, sizes[start] + _NGRAMS // max(1, widths), side="right")) - 1
        stop = max(start + 1, min(stop, start + _NUMBERS // max(1, dim)))
        yield start, stop, Strings(words.text, words.offsets[start : stop + 1])
        start = stop


def _wrapped(words: Strings) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " words_and_1"]]:
    """Put "<" and ">" around words; return the text, and where each word begins and the last one ends."""
    ends = words.offsets - words.offsets[0] + 2 * np.arange(words.number + 1)
    text = np.empty(int(ends[-1]), np.uint8)
    is_inside = np.ones(text.size, bool)
    is_inside[ends[:-1]] = is_inside[ends[1:] - 1] = False
    text[ends[:-1]], text[ends[1:] - 1] = ord(_BEGIN), ord(_END)
    text[is_inside] = words.text[words.offsets[0] : words.offsets[-1]]
    return text, ends


def _extended(
    hashes: UInt32[np.ndarray, " ngrams"],
    signed: UInt32[np.ndarray, " bytes"],
    starts: Int64[np.ndarray, " ngrams"],
    sizes: Int64[np.ndarray, " ngrams"],
) -> UInt32[np.ndarray, " ngrams"]:
    """Extend the hash of each n-gram by one more character."""
    hashes = (hashes ^ signed[starts]) * _PRIME
    more, shift = np.flatnonzero(sizes > 1), 1
    while more.size:
        hashes[more] = (hashes[more] ^ signed[starts[more] + shift]) * _PRIME
        shift += 1
        more = more[sizes[more] > shift]
    return hashes


def _is_line_end(words: Strings) -> Bool[np.ndarray, " words"]:
    wanted = packed([_LINE_END]).text[: len(_LINE_END)]
    found = np.diff(words.offsets) == wanted.size
    rows = np.flatnonzero(found)
    found[rows] = (words.text[words.offsets[rows, None] + np.arange(wanted.size)] == wanted).all(axis=1)
    return found
