"""Read sequences of words from files: text, and columns of parquet and Arrow files."""

import errno
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from ...files import is_stream, read_column, read_text
from ...files._formats.sequences import has_columns
from .ahead import Ahead
from .text import Paragraph, blocks_of_text
from .tokenizers import END, Tokenizer, in_blocks, tokenizer_of

# Characters, or items, that are cut at once: few enough to stay in the caches.
_BLOCK = 1 << 17
_STANDARD = "-"


def read_sequences(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    tokenizer: str | os.PathLike[str] | Callable[[str], list[str]] = "words",
    lines: bool = False,
    column: str | None = None,
) -> "FileSequences":
    r"""Read sequences of words or ids from files, one after the other, in bounded memory.

    Files are UTF-8 text, plain or compressed by gzip or xz, or parquet and Arrow files. In a text, each paragraph is a
    sequence; in a column, each row is one: a string, which is cut into words, or a list of tokens or ids.

    Args:
      files: One file, or several. A name with `*`, `?` or `[` that is no file stands for all files that match, in the
        order of their names; `**` matches folders, too. `-` is standard input.
      tokenizer: `"words"` cuts text as `tokenize` does. `"whitespace"` splits it at white space and keeps its case. Any
        other string is the path of a JSON file of the library `tokenizers`, whose tokens become the words; special
        tokens are not added. Or a function from a text to a list of words.
      lines: Whether each line of a text is a sequence, rather than each paragraph.
      column: The column to read, as in `embax.files.read_column`; all files must then be parquet or Arrow files.
        Default: plain files are recognised by their first bytes, and compressed files and streams are text.

    Returns:
      An iterable of sequences. Texts are cut into words only when they are iterated.

    Raises:
      embax.files.FormatError: If a file cannot be read, or is no JSON file of a tokenizer; see `embax.files.read_text`
        and `embax.files.read_column`.
      ImportError: If the library `tokenizers` is needed and missing.
      OSError: If a file cannot be opened. All are opened before the first one is read.
      ValueError: If there is no file, standard input is named twice, or `lines` is given with `column`.

    Example:
      >>> import embax.train, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "verses.txt")
      >>> size = path.write_text("To be, or not\nto be")
      >>> [list(words) for words in embax.train.read_sequences(path, tokenizer="whitespace", lines=True)]
      [['To', 'be,', 'or', 'not'], ['to', 'be']]
    """
    if lines and column is not None:
        raise ValueError(
            "`embax.train.read_sequences(lines=...)` must be False for a column, each of whose rows is a sequence, got "
            "True. Leave it out."
        )
    paths = expanded([files] if isinstance(files, str | os.PathLike) else files)
    cut = tokenizer_of(tokenizer)
    is_table = [column is not None or (not is_stream(path) and has_columns(path)) for path in paths]
    if lines and all(is_table):
        raise ValueError("`embax.train.read_sequences(lines=...)` must be False without text, got True. Leave it out.")
    return FileSequences(list(zip(paths, is_table, strict=True)), cut, lines, column)


class FileSequences:
    """The sequences of files; see `read_sequences`.

    Args:
      files: The path of each file, and whether it has columns.
      tokenizer: Cuts texts.
      lines: Whether each line of a text is a sequence.
      column: The column to read.

    Attributes:
      report: Called with the number of words so far while `batches` is iterated.
    """

    def __init__(self, files: list[tuple[str, bool]], tokenizer: Tokenizer, lines: bool, column: str | None):
        self._files, self._tokenizer, self._lines, self._column = files, tokenizer, lines, column
        self.report: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[Iterable[str] | list[int]]:
        for block in self._blocks():
            for row in block:
                yield Paragraph(row, self._tokenizer.cut) if isinstance(row, str) else row

    def batches(self) -> Iterator[list[Any]]:
        """Yield the items of many sequences at once, with `END` after each sequence."""
        words = 0
        for block in in_blocks(itertools.chain.from_iterable(self._blocks()), _BLOCK):
            if isinstance(block[0], str):
                batch = self._tokenizer.many(cast(list[str], block))
            else:
                batch = [item for row in block for item in (*row, END)]
                if batch.count(END) > len(block):
                    raise ValueError(
                        "`embax.train.read_sequences(files=...)` must not have the zero character as a word. Leave it "
                        "out."
                    )
            words += len(batch) - len(block)
            if self.report is not None:
                self.report(words)
            yield batch

    def _blocks(self) -> Iterator[Sequence[str | list[str] | list[int]]]:
        """Yield some texts, or lists of items, at a time."""
        for path, is_table in self._files:
            if is_table:
                yield from ([row] for row in read_column(path, self._column))
            elif is_stream(path):  # not ahead: an interrupt could not end a thread that waits for a stream
                yield from blocks_of_text(read_text(path), self._lines)
            else:
                with Ahead(read_text(path)) as pieces:
                    yield from blocks_of_text(pieces, self._lines)


def expanded(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Find the paths of all files for `read_sequences`: patterns become the files that match.

    Raises:
      OSError: If a file cannot be opened, or none matches a pattern.
      ValueError: If there is no file, or standard input is named twice.
    """
    argument, paths = "embax.train.read_sequences(files=...)", list[str]()
    for file in [os.fspath(file) for file in files]:
        if is_stream(file) or os.path.exists(file) or not glob.has_magic(file):
            paths.append(file)
            continue
        found = sorted(path for path in glob.iglob(file, recursive=True) if not os.path.isdir(path))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "No file matches", file)
        paths += found
    if not paths:
        raise ValueError(f"`{argument}` must name a file, got none. Name one.")
    if paths.count(_STANDARD) > 1:
        raise ValueError(f"`{argument}` must name standard input once, got it twice. Leave one out.")
    for path in paths:
        if not is_stream(path):
            open(path, "rb").close()
    return paths
