"""Corpora: text to sequences of words, and those to a vocabulary and one array of ids."""

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

# Stands between two sequences in `Corpus.ids`.
BREAK = -1
# A blank line ends a paragraph; lines of verse and wrapped lines belong together.
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
# The zero-width non-joiner and joiner: inside a word, they say how letters are written (Unicode Annex 29, rule WB4).
_JOINERS = "\u200c\u200d"
_ASCII_WORD = re.compile(r"\w+(?:'\w+)*")
# Characters that a paragraph is looked for in. One without an end, such as a whole corpus on one line, is cut here.
_LONGEST = 1 << 20


class CorpusError(ValueError):
    """A corpus in which there is nothing to learn.

    Args:
      reason: What it lacks, as a sentence about "it".
    """

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(f"`embax.train.skipgram(sequences=...)` must have words to learn: {reason}")


class Corpus(NamedTuple):
    """A text as row numbers of its vocabulary."""

    tokens: list[str]  # (rows,), the most frequent first
    counts: Int64[np.ndarray, " rows"]  # how often each occurs
    ids: Int32[np.ndarray, " length"]  # row numbers, with BREAK after each sequence


class Paragraph:
    """A paragraph of text that is cut into words only when it is iterated over.

    Args:
      text: The text.
    """

    __slots__ = ("text",)

    def __init__(self, text: str):
        self.text = text

    def __iter__(self) -> Iterator[str]:
        return iter(_words_of(self.text))


def paragraphs(pieces: Iterable[str]) -> Iterator[Paragraph]:
    r"""Cut text into paragraphs whose words nobody has looked for yet.

    Of several processes that train together, each has to know how many paragraphs there are, but looks for the words of
    its own ones only.

    Args:
      pieces: As in `tokenize`.

    Yields:
      The paragraphs as `tokenize` cuts them, those without words included.

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

    A word is a run of letters, digits and combining marks, with apostrophes and zero-width joiners and non-joiners
    inside: `King's` is `king's`. Composed and decomposed accents make the same word, and so do straight and curly
    apostrophes. Soft hyphens are dropped. A blank line ends a paragraph. Languages that are written without spaces have
    to be segmented first.

    Args:
      pieces: The text in order, as `embax.files.read_text` gives it; words may be cut anywhere between pieces.

    Yields:
      The words of each paragraph that has any; of one longer than a million characters, its parts.

    Example:
      >>> import embax.train
      >>> list(embax.train.tokenize(["O, speak ag", "ain, bright angel!\n\nROMEO'S love."]))
      [['o', 'speak', 'again', 'bright', 'angel'], ["romeo's", 'love']]
    """
    for paragraph in paragraphs(pieces):
        if words := _words_of(paragraph.text):
            yield words


def encode(sequences: Iterable[Iterable[str]], min_count: int, parts: Parts) -> list[Corpus]:
    """Number the words of a corpus in one pass, four bytes a word; its text is not kept.

    Sequence `i` belongs to part `i mod n`. A process keeps the sequences of its own parts, counts their words, and adds
    up the counts with the other processes.

    Args:
      sequences: The words of each sequence, the same in all processes. No window reaches from one into another.
      min_count: Words that occur less often are left out, as though they had not been there.
      parts: The parts.

    Returns:
      For each part of this process, the vocabulary of all, by falling count and then by spelling, and the part in its
      row numbers.

    Raises:
      TypeError: If a sequence is a string, whose items are characters.
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
    """Add up the counts of all processes, word by word."""
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
        # Soft hyphens go first: a combining mark behind one belongs to the letter before it.
        text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).replace("\u2019", "'")
        word = _any_word(has_joiners=any(joiner in text for joiner in _JOINERS))
    return word.findall(text.lower().replace("_", " "))


@functools.cache
def _any_word(has_joiners: bool) -> re.Pattern[str]:
    # `\w` has no combining marks, without which a word of Hindi falls apart at its vowel signs. As ranges: the single
    # characters make the pattern ten times slower.
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    firsts = [code for code in codes if unicodedata.category(chr(code - 1))[0] != "M"]
    lasts = [code for code in codes if unicodedata.category(chr(code + 1))[0] != "M"]
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))
    # Most texts have no joiners, and the pattern without them is faster.
    inside = f"(?:[{_JOINERS}]+(?:'[{_JOINERS}]*)?|'[{_JOINERS}]*)" if has_joiners else "'"
    return re.compile(rf"[\w{marks}]+(?:{inside}[\w{marks}]+)*")
