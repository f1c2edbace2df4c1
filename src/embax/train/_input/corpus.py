"""Number the words of a corpus.

For instance, the words `["the", "king"], ["the", "crown"]` become, by falling count and then by spelling, the tokens
`["the", "crown", "king"]` and the ids `[0, 2, -1, 0, 1, -1]`: -1 ends a sequence.

The count of a word is known only at the end of the text, so words are first numbered in the order in which they come,
`[1, 2, 0, 1, 3, 0]`. These numbers are kept in a `Spool`. At the end they are translated to ids, in place.

If there are too many words to count, the least frequent are dropped, and the others get new numbers. The numbers before
that stay as they are, and the translation to the new ones is kept in another spool.
"""

import collections
import itertools
import json
import numbers
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from ..._base.limits import MAX_VOCABULARY
from ...vocabulary import Vocabulary
from .._parts import Parts
from .sources import FileSequences
from .spool import IN_MEMORY, Spool
from .text import Paragraph
from .tokenizers import END

# Ends each sequence in the blocks of a corpus.
BREAK = -1
# An id that stands for a word that is not in the vocabulary, before it is removed.
_DROPPED = -2
# The number of the end of a sequence while words are numbered.
_END_NUMBER = 0
# The number of the part whose sequences are held out.
_HELD_OUT = -1
# Words that are numbered together.
_CHUNK = 1 << 16


class CorpusError(ValueError):
    """A corpus has no words to learn.

    Args:
      reason: A sentence about "it", the corpus.
      call: The call, for the message.
    """

    def __init__(self, reason: str, call: str = "embax.train.skipgram"):
        self.reason = reason
        super().__init__(f"`{call}(sequences=...)` must have words to learn: {reason}")


class Corpus:
    """A text, or a part of it, as row numbers of its vocabulary.

    Args:
      vocabulary: The tokens, the most frequent first. It takes a tenth of the memory of a list of strings.
      counts: How often each token occurs.
      ids: Row numbers, with `BREAK` after each sequence.

    Attributes:
      vocabulary: As above.
      counts: As above.
      length: The number of ids, each `BREAK` included.
    """

    def __init__(self, vocabulary: Vocabulary, counts: Int64[np.ndarray, " rows"], ids: Spool):
        self.vocabulary, self.counts, self.length = vocabulary, counts, ids.length
        self._ids = ids

    @property
    def tokens(self) -> list[str]:
        """The tokens as strings."""
        return self.vocabulary.tokens()

    def blocks(self, size: int, start: int = 0) -> Iterator[Int32[np.ndarray, " ids"]]:
        """Yield the ids, `size` at a time; the last block may be shorter.

        Args:
          size: The number of ids in a block.
          start: The number of the first id.

        Yields:
          Read-only arrays.
        """
        for first in range(start, self.length, size):
            yield self._ids.read(first, size)


def encode(
    sequences: Iterable[Iterable[Any]],
    min_count: int,
    parts: Parts,
    *,
    max_vocabulary: int = MAX_VOCABULARY,
    known: Container[str] = (),
    held_out: int | None = None,
    call: str = "embax.train.skipgram",
) -> list[Corpus]:
    """Number the words of a corpus in one pass; the text is not kept.

    Sequence `i` belongs to part `i mod n`. A process keeps the sequences of its own parts, counts their words, and sums
    the counts over all processes. Sequences that are held out belong to no part, and their words are not counted.

    Memory is bounded: the longest sequence, 4 MiB for ids, and about 150 bytes for each distinct word, of which
    `max_vocabulary + 65,536` are counted at a time in each part. Further ids are in a temporary file, four bytes each.

    Args:
      sequences: The words of each sequence, the same in all processes; integers stand for their decimal spelling. A
        window never reaches into another sequence.
      min_count: Words that occur less often are removed.
      parts: The parts.
      max_vocabulary: The most words to keep. Whenever more are counted, the least frequent quarter is dropped, the
        earliest first among words of equal frequency. A dropped word that comes again is counted from 0. Each part
        counts and drops its own words.
      known: Words to keep however seldom they occur.
      held_out: Hold out every so many-th sequence. Default: none.
      call: The call, for messages.

    Returns:
      For each part of this process: the vocabulary of the whole corpus, by falling count and then by spelling, and the
      row numbers of this part. With `held_out`, the last one has the row numbers of the sequences that are held out; it
      is the same in all processes.

    Raises:
      TypeError: If a sequence is a string, whose items would be characters, or not a sequence, or has items that are
        neither strings nor integers.
      CorpusError: If no word occurs often enough.
      OSError: If there is no space for the temporary file.
    """
    own = [*parts.own, *([_HELD_OUT] if held_out else [])]
    # Each part numbers its own words, so that the words that it drops do not depend on the other parts of the process.
    groups = [own] if parts.number == 1 else [[part] for part in own]
    numberings = [_Numbering(group, max_vocabulary, IN_MEMORY // len(own)) for group in groups]
    if isinstance(sequences, FileSequences) and parts.number == 1:
        for batch in sequences.batches():
            numberings[0].add_batch(batch, held_out)
    else:
        of_part = {part: numbering for group, numbering in zip(groups, numberings, strict=True) for part in group}
        _add_each(of_part, sequences, parts, held_out, call)
    finished = [numbering.finish(call) for numbering in numberings]
    counted = [(words, times) for group, (words, times) in zip(groups, finished, strict=True) if group != [_HELD_OUT]]
    spellings, counts = _of_all_parts(counted, parts)
    chosen = [
        first
        for first, count in enumerate(counts.tolist())
        if count >= min_count or (count and spellings[first] in known)
    ]
    order = sorted(chosen, key=lambda first: (-counts[first], spellings[first]))
    if not order:
        raise CorpusError(_why_empty(spellings, counts, min_count), call)
    order = order[:max_vocabulary]
    tokens, counts = [spellings[first] for first in order], counts[order]
    row_of = dict(zip(tokens, range(len(tokens)), strict=True))
    spools: list[Spool] = []
    for numbering, (words, _) in zip(numberings, finished, strict=True):
        rows = np.asarray([BREAK, *(row_of.get(word, _DROPPED) for word in words)], np.int32)
        spools += numbering.translate(rows)
    vocabulary = Vocabulary(tokens)
    return [Corpus(vocabulary, counts, spool) for spool in spools]


def _add_each(
    numberings: Mapping[int, "_Numbering"],
    sequences: Iterable[Iterable[Any]],
    parts: Parts,
    held_out: int | None,
    call: str,
) -> None:
    """Add each sequence to its part."""
    number = -1
    for place, sequence in enumerate(sequences, 1):
        if isinstance(sequence, str | bytes):
            raise TypeError(
                f"`{call}(sequences=...)` must be sequences of words, got the string {sequence[:40]!r}. "
                "Split it, as in embax.train.tokenize([text])."
            )
        part = _HELD_OUT
        if not held_out or place % held_out:
            number += 1
            part = number % parts.number
        if part in numberings:
            try:
                numberings[part].add(part, sequence)
            except TypeError:
                if isinstance(sequence, Iterable):
                    raise
                raise TypeError(
                    f"`{call}(sequences=...)` must be sequences of words, got the item {sequence!r}. Pass a list of "
                    "lists."
                ) from None


class _Numbering:
    """Words numbered in the order in which they come, from 1.

    Args:
      own: The numbers of the parts to keep.
      most: The most words to count at a time.
      in_memory: The bytes of numbers of a part that are kept in memory.
    """

    def __init__(self, own: Sequence[int], most: int, in_memory: int):
        self.pending: dict[int, list[Any]] = {part: [] for part in own}  # items that have no number yet
        self._most = most
        self._spools = {part: Spool(in_memory) for part in own}
        # Translations of the numbers before each time that words were dropped, one behind the other.
        self._translations, self._sizes = Spool(), list[int]()
        self._ends: list[list[int]] = []  # the lengths of the spools at these times
        self._counts = np.zeros(1, np.int64)  # with space for more words
        self._sequences = 0  # of batches
        self._added = 0  # sequences, one by one
        self._numbers: collections.defaultdict[Any, int] = collections.defaultdict()
        self._renumber([])

    def _renumber(self, items: Iterable[Any]) -> None:
        self._numbers.default_factory = None  # which refers to it, so that its memory would not be freed
        self._numbers = collections.defaultdict()
        self._numbers.default_factory = self._numbers.__len__
        self._numbers[END] = _END_NUMBER
        self._numbers.update(zip(items, itertools.count(1)))

    def add(self, part: int, sequence: Iterable[Any]) -> None:
        """Add a sequence to a part."""
        pending = self.pending[part]
        if isinstance(sequence, np.ndarray):
            sequence = sequence.tolist()
        if isinstance(sequence, list | tuple | Paragraph):
            pending += sequence
        else:  # it may be longer than memory
            items = iter(sequence)
            while found := list(itertools.islice(items, _CHUNK)):
                pending += found
                self._prune()
                self._number(part)
        pending.append(END)
        self._added += part != _HELD_OUT
        if len(pending) >= _CHUNK:
            self._prune()
            self._number(part)

    def add_batch(self, batch: list[Any], held_out: int | None) -> None:
        """Add the items of many sequences, with `END` after each, to the one part; empty sequences are left out."""
        self._prune()  # before: the last words are kept as far as `max_vocabulary` allows
        found = self._numbered(batch)
        ends = found == _END_NUMBER
        stays = ~ends | np.append(False, ~ends[:-1])
        found, ends = found[stays], ends[stays]
        if held_out:
            number = self._sequences + np.cumsum(ends) - ends
            self._sequences += int(np.count_nonzero(ends))
            is_held_out = number % held_out == held_out - 1
            self._keep(_HELD_OUT, found[is_held_out])
            found = found[~is_held_out]
        self._keep(0, found)

    def _number(self, part: int) -> None:
        pending = self.pending[part]
        self._keep(part, self._numbered(pending))
        pending.clear()

    def _numbered(self, items: list[Any]) -> Int32[np.ndarray, " items"]:
        return np.fromiter(map(self._numbers.__getitem__, items), np.int32, len(items))

    def _keep(self, part: int, found: Int32[np.ndarray, " items"]) -> None:
        if (distinct := len(self._numbers)) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(distinct, np.int64)])
        if part != _HELD_OUT or len(self._spools) == 1:  # alone, only for the choice of words to drop
            np.add.at(self._counts, found, 1)
        self._spools[part].append(found)

    def _prune(self) -> None:
        """Drop the least frequent words of too many, among equals the first ones: the others may be on the rise."""
        if len(self._numbers) - 1 <= self._most:
            return
        counts = self._counts[: len(self._numbers)]
        words = np.arange(1, len(counts))
        kept = 1 + np.sort(np.lexsort((-words, -counts[1:]))[: -(-3 * self._most // 4)])
        translation = np.full(len(counts), _DROPPED, np.int32)
        translation[_END_NUMBER] = _END_NUMBER
        translation[kept] = np.arange(1, len(kept) + 1)
        self._translations.append(translation)
        self._sizes.append(len(translation))
        self._ends.append([spool.length for spool in self._spools.values()])
        stays = np.zeros(len(counts), bool)
        stays[kept] = True
        items = list(itertools.compress(self._numbers, stays.tolist()))
        self._counts = np.concatenate([counts[:1], counts[kept]])
        self._renumber(items)

    def finish(self, call: str) -> tuple[list[str], Int64[np.ndarray, " distinct"]]:
        """Number the last words; returns the spelling of each number from 1, and its count."""
        for part, pending in self.pending.items():
            if pending:
                self._number(part)
        if self._added and self._counts[_END_NUMBER] != self._added:
            raise ValueError(
                f"`{call}(sequences=...)` must not have the zero character as a word, got one. Leave it out."
            )
        items = list(self._numbers)[1:]
        self._renumber([])
        spellings = [item if type(item) is str else _spelling(item, call) for item in items]
        return spellings, self._counts[1 : len(items) + 1]

    def translate(self, rows: Int32[np.ndarray, " numbers"]) -> list[Spool]:
        """Replace numbers by rows in all spools, and remove dropped words.

        Args:
          rows: The row of each number, `_DROPPED` or `BREAK`.

        Returns:
          The spool of each part.
        """
        # From the last translation to the first: compose each with all later ones.
        firsts = [0, *itertools.accumulate(self._sizes)]
        later = rows
        for first, size in reversed(list(zip(firsts[:-1], self._sizes, strict=True))):
            translation = self._translations.read(first, size)
            later = np.where(translation == _DROPPED, np.int32(_DROPPED), later[translation])
            self._translations.write(first, later)
        ends = [*self._ends, [spool.length for spool in self._spools.values()]]
        for number, spool in enumerate(self._spools.values()):
            written = start = 0
            for generation, end in enumerate(ends):
                is_last = generation == len(self._sizes)
                table = rows if is_last else self._translations.read(firsts[generation], self._sizes[generation])
                while start < end[number]:
                    found = table[spool.read(start, min(_CHUNK, end[number] - start))]
                    start += len(found)
                    found = found[found != _DROPPED]
                    spool.write(written, found)
                    written += len(found)
            spool.cut(written)
        return list(self._spools.values())


def _spelling(item: Any, call: str) -> str:
    if isinstance(item, str):
        return str(item)
    if isinstance(item, numbers.Integral) and not isinstance(item, bool):
        return str(int(item))
    raise TypeError(
        f"`{call}(sequences=...)` must be sequences of strings or integers, got the {type(item).__name__} {item!r}. "
        "Convert it."
    )


def _of_all_parts(
    found: list[tuple[list[str], Int64[np.ndarray, " distinct"]]], parts: Parts
) -> tuple[list[str], Int64[np.ndarray, " of_all"]]:
    """Sum the counts of each spelling over the parts of all processes."""
    (spellings, counts), *others = found
    if others or len(set(spellings)) < len(spellings):  # a word and an integer may be spelled alike
        spellings, counts = _summed((words, times.tolist()) for words, times in found)
    if not parts.is_shared:
        return spellings, counts
    return _summed(map(json.loads, parts.gather(json.dumps([spellings, counts.tolist()]).encode())))


def _summed(found: Iterable[tuple[list[str], list[int]]]) -> tuple[list[str], Int64[np.ndarray, " of_all"]]:
    total: collections.Counter[str] = collections.Counter()
    for words, times in found:
        for word, count in zip(words, times, strict=True):
            total[word] += count
    return list(total), np.asarray(list(total.values()), np.int64)


def _why_empty(spellings: list[str], counts: Int64[np.ndarray, " distinct"], min_count: int) -> str:
    if not spellings:
        return "it holds no words."
    most = int(np.argmax(counts))
    return (
        f"none of its {counts.sum():,} words occurs {min_count:,} times, the most frequent being "
        f"{spellings[most]!r} with {counts[most]:,}. Give more text or a lower minimum count."
    )
