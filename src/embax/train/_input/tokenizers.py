"""Cut texts into words: one by one, or many at once into one list, which takes half of the time."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...files._io.error import FormatError
from .text import ascii_words, words_of

# Stands after each sequence in a list of several. No word has this character.
END = "\0"


class Tokenizer:
    """Cuts texts by a function.

    Args:
      cut: The function.
    """

    def __init__(self, cut: Callable[[str], list[str]]):
        self.cut = cut

    def many(self, texts: list[str]) -> list[str]:
        """Cut texts; returns the words of all of them, with `END` after each text."""
        return _with_ends(map(self.cut, texts))


class Words(Tokenizer):
    """Cuts texts into lower-cased words, as `tokenize` does."""

    def __init__(self):
        super().__init__(words_of)

    def many(self, texts: list[str]) -> list[str]:
        """Cut texts."""
        return ascii_words(_joined(texts)) if _can_join(texts, only_ascii=True) else super().many(texts)


class Whitespace(Tokenizer):
    """Splits texts at white space."""

    def __init__(self):
        super().__init__(str.split)

    def many(self, texts: list[str]) -> list[str]:
        """Cut texts."""
        return _joined(texts).split() if _can_join(texts) else super().many(texts)


class FileTokenizer(Tokenizer):
    """Cuts texts by a file of the library `tokenizers`, without special tokens.

    Args:
      path: A JSON file.

    Raises:
      FormatError: If it is none.
      ImportError: If the library is not installed.
      OSError: If it cannot be opened.
    """

    def __init__(self, path: str):
        open(path, "rb").close()  # or the library's own error would be no OSError
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ImportError(
                "`embax.train.read_sequences(tokenizer=...)` needs the library tokenizers for a JSON file. "
                'Run pip install "embax[tokenizers]".'
            ) from None
        try:
            self._loaded: Any = Loaded.from_file(path)
        except Exception as error:  # the library raises no narrower one
            reason = str(error).splitlines()[0][:200].rstrip(".")
            raise FormatError(path, f'must be "words", "whitespace" or a JSON file of tokenizers ({reason}).') from None
        super().__init__(lambda text: self._loaded.encode(text, add_special_tokens=False).tokens)

    def many(self, texts: list[str]) -> list[str]:
        """Cut texts, by several threads."""
        return _with_ends(found.tokens for found in self._loaded.encode_batch(texts, add_special_tokens=False))


def tokenizer_of(given: str | os.PathLike[str] | Callable[[str], list[str]]) -> Tokenizer:
    """Make the tokenizer that the user asks for; see `read_sequences`."""
    if given == "words":
        return Words()
    if given == "whitespace":
        return Whitespace()
    return Tokenizer(given) if callable(given) else FileTokenizer(os.fspath(given))


def _with_ends(sequences: Iterable[list[str]]) -> list[str]:
    """Put sequences of words one after the other, with `END` after each."""
    words: list[str] = []
    for sequence in sequences:
        words += (word for word in sequence if word != END)
        words.append(END)
    return words


def _joined(texts: list[str]) -> str:
    return f" {END} ".join([*texts, ""])


def _can_join(texts: list[str], only_ascii: bool = False) -> bool:
    """Whether texts can be cut as one, in which `END` has another meaning than in the texts."""
    return all((text.isascii() or not only_ascii) and END not in text for text in texts)


def in_blocks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Collect rows of one type until they have so many characters or items."""
    block: list[Any] = []
    length = 0
    for row in rows:
        if block and type(row) is not type(block[0]):
            yield block
            block, length = [], 0
        block.append(row)
        length += len(row) + 1
        if length >= size:
            yield block
            block, length = [], 0
    if block:
        yield block
