"""Corpora: cut text into sequences of words, and number them.

For instance, the text "The king. The crown." is the sequence `["the", "king", "the", "crown"]`. Numbered by falling
count, then by spelling, the tokens are `["the", "crown", "king"]` and the ids `[0, 2, 0, 1, -1]`: -1 ends a sequence.
"""

import array
import collections
import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from ._parts import Parts

# Ends each sequence in `Corpus.ids`.
BREAK = -1
# A blank line ends a paragraph; lines of verse and wrapped lines belong together.
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
# The zero-width non-joiner and joiner: inside a word, they control how letters join (Unicode Annex 29, rule WB4).
_JOINERS = "\u200c\u200d"
_ASCII_WORD = re.compile(r"\w+(?:'\w+)*")
# The most characters of a paragraph. A longer one, such as a whole corpus on one line, is cut.
_LONGEST = 1 << 20


class CorpusError(ValueError):
    """A corpus has no words to learn.

    Args:
      reason: A sentence about "it", the corpus.
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(f"`embax.train.skipgram(sequences=...)` must have words to learn: {reason}")


class Corpus(NamedTuple):
    """A text as row numbers of its vocabulary."""

    tokens: list[str]  # (rows,), the most frequent first
    counts: Int64[np.ndarray, " rows"]  # how often each token occurs
    ids: Int32[np.ndarray, " length"]  # row numbers, with BREAK after each sequence

    @property
    def length(self) -> int:
        """The number of ids."""
        return len(self.ids)

    def blocks(self, size: int, start: int = 0) -> Iterator[Int32[np.ndarray, " ids"]]:
        """Yield `size` ids at a time, from id number `start` on; the last ones may be fewer."""
        for first in range(start, len(self.ids), size):
            yield self.ids[first : first + size]


class Paragraph:
    """A paragraph of text that is cut into words only when it is iterated.

    Args:
      text: The text.
    """

    __slots__ = ("text",)

    def __init__(self, text: str):
        self.text = text

    def __iter__(self) -> Iterator[str]:
        return iter(_words_of(self.text))


def paragraphs(pieces: Iterable[str]) -> Iterator[Paragraph]:
    r"""Cut text into paragraphs that are not cut into words yet.

    If several processes train together, each of them must count all paragraphs, but needs the words of its own only.

    Args:
      pieces: As in `tokenize`.

    Yields:
      The paragraphs that `tokenize` cuts, including those without words.

    Example:
      >>> import embax.train
      >>> [list(words) for words in embax.train.paragraphs(["Bright angel!\n\n***\n\nO, speak."])]
      [['bright', 'angel'], [], ['o', 'speak']]
    """
    pending = ""
    for piece in pieces:
        pending += piece
        if len(pending) >= _LONGEST:
            complete = _PARAGRAPH.split(pending)
            pending = complete.pop()
            if not complete:
                cut = pending.rfind(" ") + 1 or pending.rfind("\n") + 1 or len(pending)
                complete, pending = [pending[:cut]], pending[cut:]
            yield from map(Paragraph, complete)
    yield from map(Paragraph, _PARAGRAPH.split(pending))


def tokenize(pieces: Iterable[str]) -> Iterator[list[str]]:
    r"""Cut text into paragraphs of lower-cased words.

    A word is a run of letters, digits and combining marks; inside, it may have apostrophes and zero-width joiners and
    non-joiners: `King's` becomes `king's`. Composed and decomposed accents give the same word, as do straight and curly
    apostrophes. Soft hyphens are dropped. A blank line ends a paragraph. Languages without spaces between words must be
    segmented first.

    Args:
      pieces: The text in order, such as from `embax.files.read_text`; pieces may end inside of a word.

    Yields:
      The words of each paragraph that has any. A paragraph of more than a million characters is cut into parts.

    Example:
      >>> import embax.train
      >>> list(embax.train.tokenize(["O, speak ag", "ain, bright angel!\n\nROMEO'S love."]))
      [['o', 'speak', 'again', 'bright', 'angel'], ["romeo's", 'love']]
    """
    for paragraph in paragraphs(pieces):
        if words := _words_of(paragraph.text):
            yield words


def encode(sequences: Iterable[Iterable[str]], min_count: int, parts: Parts) -> list[Corpus]:
    """Number the words of a corpus in one pass, with four bytes for each word; the text is not kept.

    Sequence `i` belongs to part `i mod n`. A process keeps the sequences of its own parts, counts their words, and sums
    the counts over all processes.

    Args:
      sequences: The words of each sequence, the same in all processes. A window never reaches into another sequence.
      min_count: Words that occur less often are removed.
      parts: The parts.

    Returns:
      For each part of this process: the vocabulary of the whole corpus, by falling count and then by spelling, and the
      row numbers of this part.

    Raises:
      TypeError: If a sequence is a string, whose items would be characters.
      CorpusError: If no word occurs often enough.
    """
    seen: collections.defaultdict[str, int] = collections.defaultdict()
    seen.default_factory = seen.__len__
    own = {number: array.array("i") for number in parts.own}
    for number, sequence in enumerate(sequences):
        if isinstance(sequence, str):
            raise TypeError(
                f"`embax.train.skipgram(sequences=...)` must be sequences of words, got the string {sequence[:40]!r}. "
                "Split it, as in embax.train.tokenize([text])."
            )
        if (ids := own.get(number % parts.number)) is not None:
            ids.extend(map(seen.__getitem__, sequence))
            ids.append(BREAK)
    encoded = [np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32) for ids in own.values()]
    own_counts = sum(np.bincount(ids[ids != BREAK], minlength=len(seen)) for ids in encoded)
    spellings, counts = _of_all_processes(list(seen), np.asarray(own_counts), parts)
    order = sorted(np.flatnonzero(counts >= min_count).tolist(), key=lambda first: (-counts[first], spellings[first]))
    if not order:
        raise CorpusError(_why_empty(spellings, counts, min_count))
    tokens, counts = [spellings[first] for first in order], counts[order]
    row_of = dict(zip(tokens, range(len(tokens)), strict=True))
    rows = np.asarray([*(row_of.get(word, BREAK - 1) for word in seen), BREAK], np.int32)
    return [Corpus(tokens, counts, (found := rows[ids])[found >= BREAK]) for ids in encoded]


def _of_all_processes(
    spellings: list[str], counts: Int64[np.ndarray, " distinct"], parts: Parts
) -> tuple[list[str], Int64[np.ndarray, " distinct"]]:
    """Sum the counts of each word over all processes."""
    if not parts.is_shared:
        return spellings, counts
    total: collections.Counter[str] = collections.Counter()
    for found in parts.gather(json.dumps([spellings, counts.tolist()]).encode()):
        total.update(dict(zip(*json.loads(found), strict=True)))
    return list(total), np.asarray(list(total.values()), np.int64)


def _why_empty(spellings: list[str], counts: Int64[np.ndarray, " distinct"], min_count: int) -> str:
    if not spellings:
        return "it holds no words."
    most = int(np.argmax(counts))
    return (
        f"none of its {counts.sum():,} words occurs {min_count:,} times, the most frequent being "
        f"{spellings[most]!r} with {counts[most]:,}. Give more text or a lower minimum count."
    )


def _words_of(text: str) -> list[str]:
    word = _ASCII_WORD
    if not text.isascii():
        # Drop soft hyphens first: a combining mark behind one belongs to the letter before it.
        text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).replace("\u2019", "'")
        word = _any_word(has_joiners=any(joiner in text for joiner in _JOINERS))
    return word.findall(text.lower().replace("_", " "))


@functools.cache
def _any_word(has_joiners: bool) -> re.Pattern[str]:
    # `\w` lacks combining marks, so Hindi words would be cut at their vowel signs. Ranges make the pattern ten times
    # faster than single characters.
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    firsts = [code for code in codes if unicodedata.category(chr(code - 1))[0] != "M"]
    lasts = [code for code in codes if unicodedata.category(chr(code + 1))[0] != "M"]
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))
    # The pattern without joiners is faster, and most texts have none.
    inside = f"(?:[{_JOINERS}]+(?:'[{_JOINERS}]*)?|'[{_JOINERS}]*)" if has_joiners else "'"
    return re.compile(rf"[\w{marks}]+(?:{inside}[\w{marks}]+)*")
