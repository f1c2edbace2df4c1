"""Read sequences of words from files: text, and columns of parquet and Arrow files."""

import errno
import functools
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..files import is_stream, read_column, read_text
from ..files._formats.sequences import has_columns
from ..files._io.error import FormatError
from ._ahead import Ahead
from ._text import LONGEST, Paragraph, paragraphs, words_of

# Cuts a text into words.
Cut = Callable[[str], list[str]]
_STANDARD = "-"


def read_sequences(
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    tokenizer: str | os.PathLike[str] | Cut = "words",
    lines: bool = False,
    column: str | None = None,
) -> Iterator[Iterable[str] | list[int]]:
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
      An iterator of sequences. Those of strings are cut into words only when they are iterated.

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
    cut = _cut_of(tokenizer)
    is_table = [column is not None or (not is_stream(path) and has_columns(path)) for path in paths]
    if lines and all(is_table):
        raise ValueError("`embax.train.read_sequences(lines=...)` must be False without text, got True. Leave it out.")
    return _read(list(zip(paths, is_table, strict=True)), cut, lines, column)


def _read(
    files: list[tuple[str, bool]], cut: Cut, lines: bool, column: str | None
) -> Iterator[Iterable[str] | list[int]]:
    for path, is_table in files:
        if is_table:
            for row in read_column(path, column):
                yield Paragraph(row, cut) if isinstance(row, str) else row
        elif is_stream(path):  # not ahead: an interrupt could not end a thread that waits for a stream
            yield from _of_text(read_text(path), cut, lines)
        else:
            with Ahead(read_text(path)) as pieces:
                yield from _of_text(pieces, cut, lines)


def _of_text(pieces: Iterable[str], cut: Cut, lines: bool) -> Iterator[Paragraph]:
    return (Paragraph(line, cut) for line in _lines(pieces)) if lines else paragraphs(pieces, cut)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    pending = ""
    for piece in pieces:
        *complete, pending = (pending + piece).split("\n")
        yield from complete
        if len(pending) >= LONGEST:
            end = pending.rfind(" ") + 1 or len(pending)
            yield pending[:end]
            pending = pending[end:]
    yield pending


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


def _cut_of(tokenizer: str | os.PathLike[str] | Cut) -> Cut:
    if tokenizer == "words":
        return words_of
    if tokenizer == "whitespace":
        return str.split
    if callable(tokenizer):
        return tokenizer
    return functools.partial(_tokens, _loaded(os.fspath(tokenizer)))


def _tokens(loaded: Any, text: str) -> list[str]:
    return loaded.encode(text, add_special_tokens=False).tokens


def _loaded(path: str) -> Any:
    """Read a tokenizer of the library `tokenizers`."""
    open(path, "rb").close()  # or the library's own error would be no OSError
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError(
            "`embax.train.read_sequences(tokenizer=...)` needs the library tokenizers for a JSON file. "
            'Run pip install "embax[tokenizers]".'
        ) from None
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises no narrower one
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise FormatError(path, f'must be "words", "whitespace" or a JSON file of tokenizers ({reason}).') from None
