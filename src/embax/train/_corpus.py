"""Corpora: text to sequences of words, and those to a vocabulary and one array of ids."""

import array
import collections
import functools
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

# Stands between two sequences in `Corpus.ids`.
BREAK = -1
# A blank line ends a paragraph; lines of verse and wrapped lines belong together.
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
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


def tokenize(pieces: Iterable[str]) -> Iterator[list[str]]:
    r"""Cut text into paragraphs of lower-cased words.

    A word is a run of letters, digits and combining marks, with apostrophes inside: `King's` is `king's`. Composed and
    decomposed accents, and straight and curly apostrophes, make the same word. A blank line ends a paragraph.
    Languages that are written without spaces have to be segmented first.

    Args:
      pieces: The text in order, as `embax.files.read_text` gives it; words may be cut anywhere between pieces.

    Yields:
      The words of each paragraph that has any; of one longer than a million characters, its parts.

    Example:
      >>> import embax.train
      >>> list(embax.train.tokenize(["O, speak ag", "ain, bright angel!\n\nROMEO'S love."]))
      [['o', 'speak', 'again', 'bright', 'angel'], ["romeo's", 'love']]
    """
    pending = ""
    for piece in pieces:
        pending += piece
        if len(pending) >= _LONGEST:
            paragraphs = _PARAGRAPH.split(pending)
            pending = paragraphs.pop()
            if not paragraphs:
                cut = pending.rfind(" ") + 1 or pending.rfind("\n") + 1 or len(pending)
                paragraphs, pending = [pending[:cut]], pending[cut:]
            yield from _words_of(paragraphs)
    yield from _words_of(_PARAGRAPH.split(pending))


def encode(sequences: Iterable[Iterable[str]], min_count: int) -> Corpus:
    """Number the words of a corpus in one pass, four bytes a word; its text is not kept.

    Args:
      sequences: The words of each sequence. No window reaches from one into another.
      min_count: Words that occur less often are left out, as though they had not been there.

    Returns:
      The vocabulary, by falling count and then by spelling, and the corpus in its row numbers.

    Raises:
      TypeError: If a sequence is a string, whose items are characters.
      CorpusError: If no word occurs often enough.
    """
    seen: collections.defaultdict[str, int] = collections.defaultdict()
    seen.default_factory = seen.__len__
    ids = array.array("i")
    for sequence in sequences:
        if isinstance(sequence, str):
            raise TypeError(
                f"`embax.train.skipgram(sequences=...)` must be sequences of words, got the string {sequence[:40]!r}. "
                "Split it, as in embax.train.tokenize([text])."
            )
        ids.extend(map(seen.__getitem__, sequence))
        ids.append(BREAK)
    encoded = np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)
    counts = np.bincount(encoded[encoded != BREAK], minlength=len(seen))
    spellings = list(seen)
    order = sorted(np.flatnonzero(counts >= min_count).tolist(), key=lambda first: (-counts[first], spellings[first]))
    if not order:
        raise CorpusError(_why_empty(spellings, counts, min_count))
    rows = np.full(len(seen) + 1, BREAK - 1, np.int32)
    rows[order] = np.arange(len(order), dtype=np.int32)
    rows[BREAK] = BREAK
    encoded = rows[encoded]
    return Corpus([spellings[first] for first in order], counts[order], encoded[encoded >= BREAK])


def _why_empty(spellings: list[str], counts: Int64[np.ndarray, " distinct"], min_count: int) -> str:
    if not spellings:
        return "it holds no words."
    most = int(np.argmax(counts))
    return (
        f"none of its {counts.sum():,} words occurs {min_count:,} times, the most frequent being "
        f"{spellings[most]!r} with {counts[most]:,}. Give more text or a lower minimum count."
    )


def _words_of(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    for paragraph in paragraphs:
        text, word = paragraph, _ASCII_WORD
        if not text.isascii():
            text, word = unicodedata.normalize("NFC", text).replace("\u2019", "'"), _any_word()
        if words := word.findall(text.lower().replace("_", " ")):
            yield words


@functools.cache
def _any_word() -> re.Pattern[str]:
    # `\w` has no combining marks, without which a word of Hindi falls apart at its vowel signs. As ranges: the single
    # characters make the pattern ten times slower.
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    firsts = [code for code in codes if unicodedata.category(chr(code - 1))[0] != "M"]
    lasts = [code for code in codes if unicodedata.category(chr(code + 1))[0] != "M"]
    marks = "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))
    return re.compile(rf"[\w{marks}]+(?:'[\w{marks}]+)*")
