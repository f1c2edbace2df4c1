"""Strings in one buffer of bytes: hashed and compared all at once by NumPy, and found by an index of hashes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt8, UInt64

from .escapes import decoded

# Strings are read 8 bytes at a time, so a buffer ends with this many zero bytes.
_PAD = 8
# Strings that are hashed at a time, so that temporary memory stays small.
_BLOCK = 1 << 15
# From the 64-bit finalizer of MurmurHash3 (Austin Appleby, public domain), which mixes every bit into every other.
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


class Strings(NamedTuple):
    """Strings, one after the other: `["ab", "c"]` is the text `b"abc"` with the offsets `[0, 2, 3]`."""

    text: UInt8[np.ndarray, " bytes"]  # UTF-8 or any other bytes, then 8 zero bytes
    offsets: Int64[np.ndarray, " number_and_1"]  # where each begins, and where the last ends

    @property
    def number(self) -> int:
        """The number of strings."""
        return self.offsets.shape[0] - 1

    def decoded(self, row: int) -> str:
        """One string as a str."""
        return decoded(self.text[self.offsets[row] : self.offsets[row + 1]].tobytes())


class Index(NamedTuple):
    """An index of strings by hash."""

    hashes: UInt64[np.ndarray, " number"]  # rising
    rows: Int[np.ndarray, " number"]  # the string of each hash; rising among equal hashes


def packed(encoded: list[bytes]) -> Strings:
    """Put strings into one buffer."""
    return Strings(np.frombuffer(b"".join([*encoded, bytes(_PAD)]), np.uint8), offsets_of(encoded))


def offsets_of(encoded: list[bytes]) -> Int64[np.ndarray, " number_and_1"]:
    """Offsets of consecutive strings: where each begins, and where the last one ends."""
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
    return offsets


def padded(text: UInt8[np.ndarray, " bytes"]) -> UInt8[np.ndarray, " padded"]:
    """Copy a buffer and append the zero bytes."""
    return np.concatenate([text, np.zeros(_PAD, np.uint8)])


def indexed(strings: Strings) -> Index:
    """Make the index of some strings."""
    hashes = _hashes(strings)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    return Index(hashes, order.astype(np.int32) if strings.number < 1 << 31 else order)


def find(index: Index, strings: Strings, wanted: Strings) -> Int64[np.ndarray, " wanted"]:
    """Find each wanted string among `strings`.

    Args:
      index: The index of `strings`.
      strings: The strings to search.
      wanted: The strings to find.

    Returns:
      For each wanted string, the number of the first equal one, or -1.
    """
    hashes = _hashes(wanted)
    found = np.full(wanted.number, -1, np.int64)
    places = np.searchsorted(index.hashes, hashes)
    open_ = np.arange(wanted.number)
    while True:
        # Each round compares the next string of the same hash.
        open_ = open_[places[open_] < index.hashes.shape[0]]
        open_ = open_[index.hashes[places[open_]] == hashes[open_]]
        if not open_.size:
            return found
        rows = index.rows[places[open_]]
        same = _equal(strings, rows, wanted, open_)
        found[open_[same]] = rows[same]
        open_ = open_[~same]
        places[open_] += 1


def first_of_each(index: Index, strings: Strings) -> Bool[np.ndarray, " number"]:
    """Which strings do not occur before: False for duplicates."""
    is_first = np.ones(strings.number, bool)
    again = np.flatnonzero(index.hashes[1:] == index.hashes[:-1])
    if again.size:
        rows = np.unique(np.concatenate([index.rows[again], index.rows[again + 1]]))
        is_first[rows] = find(index, strings, taken(strings, rows)) == rows
    return is_first


def taken(strings: Strings, rows: Int64[np.ndarray, " some"]) -> Strings:
    """Copy the strings with the given numbers, in that order."""
    lengths = strings.offsets[rows + 1] - strings.offsets[rows]
    offsets = np.zeros(rows.shape[0] + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # The position of each byte in the old buffer: its new position plus the shift of its string.
    places = np.arange(offsets[-1]) + np.repeat(strings.offsets[rows] - offsets[:-1], lengths)
    return Strings(padded(strings.text[places]), offsets)


def _hashes(strings: Strings) -> UInt64[np.ndarray, " number"]:
    words, hashes = _words(strings), np.empty(strings.number, np.uint64)
    for start in range(0, strings.number, _BLOCK):
        offsets = strings.offsets[start : start + _BLOCK + 1]
        starts, left = offsets[:-1], np.diff(offsets)
        of_block = _mixed(left.astype(np.uint64))
        rows, shift = np.flatnonzero(left > 0), 0
        while rows.size:
            length = left[rows] - shift
            of_block[rows] = _mixed(of_block[rows] ^ _up_to(words[starts[rows] + shift], length))
            rows, shift = rows[length > _PAD], shift + _PAD
        hashes[start : start + _BLOCK] = of_block
    return hashes


def _equal(a: Strings, a_rows: np.ndarray, b: Strings, b_rows: np.ndarray) -> Bool[np.ndarray, " rows"]:
    a_words, b_words = _words(a), _words(b)
    a_starts, b_starts = a.offsets[a_rows], b.offsets[b_rows]
    left = a.offsets[a_rows + 1] - a_starts
    same = left == b.offsets[b_rows + 1] - b_starts
    rows, shift = np.flatnonzero(same & (left > 0)), 0
    while rows.size:
        length = left[rows] - shift
        equal = _up_to(a_words[a_starts[rows] + shift], length) == _up_to(b_words[b_starts[rows] + shift], length)
        same[rows[~equal]] = False
        rows, shift = rows[equal & (length > _PAD)], shift + _PAD
    return same


def _words(strings: Strings) -> UInt64[np.ndarray, " bytes"]:
    """For each byte, the 8 bytes that begin there, as one number."""
    return np.ndarray(strings.text.shape[0] - _PAD + 1, "<u8", strings.text, strides=(1,))


def _up_to(words: UInt64[np.ndarray, " rows"], length: Int64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    """Keep the first `length` bytes of each word, and zero the others."""
    unused = 8 * (_PAD - np.clip(length, 0, _PAD)).astype(np.uint64)
    return words & (~np.uint64(0) >> unused)


def _mixed(hashes: UInt64[np.ndarray, " rows"]) -> UInt64[np.ndarray, " rows"]:
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX_1
    hashes = (hashes ^ (hashes >> _SHIFT)) * _MIX_2
    return hashes ^ (hashes >> _SHIFT)
