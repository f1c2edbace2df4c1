r"""Cut text into sequences of words.

For instance, the text "The king.\n\nThe crown." has the sequences `["the", "king"]` and `["the", "crown"]`.
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator

# A blank line ends a paragraph; lines of verse and wrapped lines belong together.
_PARAGRAPH, _LINE = re.compile(r"\n[^\S\n]*\n"), re.compile(r"\n")
# The zero-width non-joiner and joiner: inside a word, they control how letters join (Unicode Annex 29, rule WB4).
_JOINERS = "\u200c\u200d"
# ASCII letters in lower case, digits, apostrophes and zero characters; a space for each other character.
_ASCII = bytes(ord(x.lower()) if x.isascii() and (x.isalnum() or x in "'\0") else 32 for x in map(chr, range(256)))
# The most characters of a paragraph. A longer one, such as a whole corpus on one line, is cut.
_LONGEST = 1 << 20


class Paragraph:
    """A paragraph of text that is cut into words only when it is iterated.

    Args:
      text: The text.
      cut: Cuts it into words. Default: as `tokenize` does.
    """

    __slots__ = ("cut", "text")

    def __init__(self, text: str, cut: Callable[[str], list[str]] | None = None):
        self.text, self.cut = text, words_of if cut is None else cut

    def __iter__(self) -> Iterator[str]:
        return iter(self.cut(self.text))


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
    for block in blocks_of_text(pieces):
        yield from map(Paragraph, block)


def blocks_of_text(pieces: Iterable[str], lines: bool = False) -> Iterator[list[str]]:
    """Cut text into lists of paragraphs, or of lines, each of about a million characters.

    Args:
      pieces: As in `tokenize`.
      lines: Whether to cut into lines.
    """
    split = _LINE.split if lines else _PARAGRAPH.split
    pending = ""
    for piece in pieces:
        pending += piece
        if len(pending) >= _LONGEST:
            complete = split(pending)
            pending = complete.pop()
            if not complete:
                end = pending.rfind(" ") + 1 or pending.rfind("\n") + 1 or len(pending)
                complete, pending = [pending[:end]], pending[end:]
            yield complete
    yield split(pending)


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
        if words := words_of(paragraph.text):
            yield words


def words_of(text: str) -> list[str]:
    """Cut text into lower-cased words, as `tokenize` describes."""
    if text.isascii():
        return ascii_words(text.replace("\0", " "))
    # Drop soft hyphens first: a combining mark behind one belongs to the letter before it.
    text = unicodedata.normalize("NFC", text.replace("\u00ad", "")).replace("\u2019", "'")
    word = _any_word(has_joiners=any(joiner in text for joiner in _JOINERS))
    return word.findall(text.lower().replace("_", " "))


def ascii_words(text: str) -> list[str]:
    """Cut ASCII text, twice as fast as by a regular expression; zero characters are kept."""
    marked = text.encode().translate(_ASCII)
    if b"'" in marked:  # only single ones between letters belong to words
        marked = b" %b " % marked.replace(b"''", b"  ")
        marked = marked.replace(b" '", b"  ").replace(b"' ", b"  ")
    return marked.decode().split()


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
