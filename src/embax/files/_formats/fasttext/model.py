"""The header and the dictionary of a fastText model."""

import math
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from ...._base.text.strings import Strings, padded
from ..._io.open import Source

MAGIC = 793712314
VERSIONS = (11, 12)
SUPERVISED = 3
_ARGUMENTS = struct.Struct("<12id")
# Longer words and n-grams are refused, so that no small file can cause much work.
LONGEST_WORD = 1 << 16
LONGEST_NGRAM = 64
# The largest number of bytes 10xxxxxx (UTF-8 continuation bytes) in a row; more are no text in any encoding.
_LONGEST_CHARACTER = 256
# The bytes after each word: a zero, the count (8 bytes) and the type.
BEHIND = 10
_CHUNK = 1 << 22


class Arguments(NamedTuple):
    """The arguments with which fastText trained a model, in the order of the file."""

    dim: int
    ws: int = 5
    epoch: int = 5
    min_count: int = 1
    neg: int = 5
    word_ngrams: int = 1
    loss: int = 2  # 1: hierarchical softmax, 2: negative sampling, 3: softmax, 4: one against all
    model: int = 2  # 1: CBOW, 2: skip-gram, 3: supervised
    bucket: int = 0
    minn: int = 0
    maxn: int = 0
    lr_update_rate: int = 100
    t: float = 1e-4

    @property
    def packed(self) -> bytes:
        """The arguments as bytes of a file."""
        return _ARGUMENTS.pack(*self)


class Header(NamedTuple):
    """The header of a model."""

    arguments: Arguments
    version: int  # 0 for the oldest models, which have no magic number

    @property
    def has_subwords(self) -> bool:
        """Whether the vectors of words include n-grams of characters."""
        args = self.arguments
        # Supervised models of version 11 do not use n-grams, whatever their arguments say; fastText treats them so.
        unused = self.version == 11 and args.model == SUPERVISED
        return args.bucket > 0 and args.maxn >= max(args.minn, 1) and not unused


class Dictionary(NamedTuple):
    """The words of a model, without its labels."""

    words: Strings  # the first words, up to the limit of the caller
    counts: Int64[np.ndarray, " words"]
    number: int  # the number of words in the file
    # If n-grams were pruned: the buckets that were kept, and their rows.
    kept: tuple[Int32[np.ndarray, " kept"], Int32[np.ndarray, " kept"]] | None


def starts_like_a_model(start: bytes) -> bool:
    """Return whether these are the first bytes of a model: the magic number, or arguments that are all plausible."""
    if len(start) >= 8 and struct.unpack_from("<i", start) == (MAGIC,):
        return True
    if len(start) < _ARGUMENTS.size + 12:
        return False
    args = Arguments(*_ARGUMENTS.unpack_from(start))
    size, words, labels = struct.unpack_from("<3i", start, _ARGUMENTS.size)
    small = (args.dim, args.ws, args.epoch, args.word_ngrams)
    others = (args.min_count, args.neg, args.bucket, args.minn, args.maxn, args.lr_update_rate, words, labels)
    return (
        all(0 < number < 1 << 16 for number in small)
        and all(number >= 0 for number in others)
        and args.loss in (1, 2, 3, 4)
        and args.model in (1, 2, 3, 4, 5)
        and 0 <= args.t <= 1
        and size == words + labels
    )


def read_header(source: Source) -> Header:
    """Read the header of a model.

    Raises:
      FormatError: If it is no fastText model, or its version or its arguments are not supported.
    """
    if not starts_like_a_model(source.start):
        raise source.error("is no model of fastText: its first bytes are neither those of new ones nor of the oldest.")
    version = 0
    if struct.unpack_from("<i", source.start) == (MAGIC,):
        _, version = struct.unpack("<2i", source.read_exactly(8, "the header"))
        if version not in VERSIONS:
            raise source.error(f"is of version {version} of fastText's models, of which {VERSIONS} can be read.")
    args = Arguments(*_ARGUMENTS.unpack(source.read_exactly(_ARGUMENTS.size, "the header")))
    if args.dim < 1 or args.bucket < 0 or args.maxn > LONGEST_NGRAM or not math.isfinite(args.t):
        raise source.error(
            f"the header must have dim of at least 1, bucket of at least 0 and maxn up to {LONGEST_NGRAM}, got "
            f"{args.dim}, {args.bucket} and {args.maxn}."
        )
    return Header(args, version)


def read_dictionary(source: Source, header: Header, limit: int | None) -> Dictionary:
    """Read the dictionary of a model.

    Args:
      source: The file, after the header.
      header: The header.
      limit: The number of words to read. Default: all.

    Returns:
      The dictionary.

    Raises:
      FormatError: If the file ends within it, or its parts contradict each other.
    """
    size, number, labels, _ = struct.unpack("<3iq", source.read_exactly(20, "the dictionary"))
    pruned = -1 if not header.version else struct.unpack("<q", source.read_exactly(8, "the dictionary"))[0]
    if number < 0 or labels < 0 or size != number + labels or not -1 <= pruned <= header.arguments.bucket:
        raise source.error(
            f"the dictionary must have as many entries as words and labels, got {size} for {number} and {labels}, and "
            f"at most {header.arguments.bucket} pruned n-grams, got {pruned}."
        )
    wanted = number if limit is None else min(limit, number)
    read, texts, lengths, counts = 0, [], [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
    data = b""
    while read < size:
        data, is_end = _continued(source, data)
        ends, place = _entries(data, size - read)
        if not ends.size and (is_end or len(data) > LONGEST_WORD + BEHIND):
            if is_end and len(data) <= LONGEST_WORD + BEHIND:
                raise source.truncated("the dictionary")
            raise source.error(f"entry {read} of the dictionary is longer than {LONGEST_WORD} bytes.")
        entries = np.frombuffer(data, np.uint8, place)
        starts = np.concatenate([[0], ends + BEHIND])[:-1]
        _check_entries(source, entries, starts, ends, read, number)
        keep = max(0, min(wanted - read, ends.size))
        texts.append(entries[_inside(entries.size, starts[:keep], ends[:keep])])
        lengths.append((ends - starts)[:keep])
        counts.append(_numbers(entries, ends[:keep] + 1))
        read, data = read + ends.size, data[place:]
    source.unread(data)
    words = Strings(padded(np.concatenate([np.zeros(0, np.uint8), *texts])), np.cumsum(np.concatenate(lengths)))
    joined = np.concatenate(counts)
    if (joined < 0).any():
        raise source.error(f"word {int((joined < 0).argmax())} of the dictionary has a negative count.")
    return Dictionary(words, joined, number, _read_kept(source, pruned))


def _continued(source: Source, data: bytes) -> tuple[bytes, bool]:
    more = source.read(_CHUNK)
    return data + more, not more


def _entries(data: bytes, number: int) -> tuple[Int64[np.ndarray, " entries"], int]:
    """Return the ends of the words of all complete entries, and the end of the last entry."""
    ends: list[int] = []
    place, last = 0, len(data) - BEHIND
    for _ in range(number):
        end = data.find(0, place)
        if end < 0 or end > last:
            break
        ends.append(end)
        place = end + BEHIND
    return np.asarray(ends, np.int64), place


def _check_entries(source: Source, entries: np.ndarray, starts: np.ndarray, ends: np.ndarray, read: int, words: int):
    if ends.size and (ends - starts).max() > LONGEST_WORD:
        raise source.error(
            f"entry {read + int((ends - starts).argmax())} of the dictionary is longer than {LONGEST_WORD} bytes."
        )
    wrong = np.flatnonzero(entries[ends + BEHIND - 1] != (np.arange(ends.size) + read >= words))
    if wrong.size:
        raise source.error(
            f"entry {read + int(wrong[0])} of the dictionary must be a word if it is one of the first {words}, and a "
            f"label if not, got type {entries[ends[wrong[0]] + BEHIND - 1]}."
        )
    leading = np.flatnonzero((entries & 0xC0) != 0x80)
    if entries.size and np.diff(leading, prepend=0, append=entries.size).max() > _LONGEST_CHARACTER:
        raise source.error(f"the dictionary has words that are no text, after entry {read}.")


def _inside(size: int, starts: np.ndarray, ends: np.ndarray) -> Bool[np.ndarray, " bytes"]:
    change = np.zeros(size + 1, np.int8)
    change[starts] += 1
    change[ends] -= 1
    return np.cumsum(change[:-1], dtype=np.int8).view(bool)


def _numbers(data: UInt8[np.ndarray, " bytes"], places: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
    return data[places[:, None] + np.arange(8)].view("<i8")[:, 0].astype(np.int64)


def _read_kept(source: Source, number: int) -> tuple[np.ndarray, np.ndarray] | None:
    if number < 0:
        return None
    data = source.read_exactly(8 * number, "the pruned n-grams")
    pairs = np.frombuffer(data, "<i4").reshape(-1, 2).astype(np.int32)
    buckets, last = np.unique(pairs[::-1, 0], return_index=True)  # if a bucket occurs twice, the last pair counts
    return buckets, pairs[::-1, 1][last]
