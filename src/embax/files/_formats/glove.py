"""GloVe's text format: each line has a token and its numbers; there is no header."""

import os

from .._io.atomic import replacing
from .._io.contents import Contents, Gathered, Options
from .._io.open import Source
from .._lines.layout import layout_of
from .._lines.line_ends import BYTE_ORDER_MARK
from .._lines.lines import add_lines, first_lines, whole_lines
from .._lines.written_lines import check_tokens, lines_of
from .format import Format

NAME = "glove"
# Not all lines have to fit: then a file with one damaged line is recognised, and the error names that line.
_MOST = 0.5


def recognises(source: Source) -> bool:
    """Return whether most of the first lines have a token and the same number of numbers."""
    layout, share = layout_of(first_lines(source))
    return layout.dim > 0 and share > _MOST


def read(source: Source, options: Options) -> Contents:
    """Read a GloVe file."""
    if options.mmap:
        raise source.error("text cannot be mapped into memory. Leave mmap=True out.")
    blocks = whole_lines(source)
    block = next(blocks, b"")
    layout, _ = layout_of(block)
    if not layout.dim:
        raise source.error("the first lines are no tokens with numbers after them.")
    gathered, line = Gathered(source, options, layout.dim, expected=_expected(source, options, block, layout.dim)), 1
    while block and not gathered.is_full:
        line = add_lines(source, gathered, block, layout, line, options.limit)
        block = next(blocks, b"")
    return gathered.contents()


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a GloVe file. There must be a row: without a header, the size of a row would be lost."""
    check_tokens(contents, NAME)
    if not len(contents.weight):
        raise ValueError(
            f"`embax.files.save(contents=...)` must have a row for the format {NAME!r}, which has no header, got none. "
            "Save it as .safetensors."
        )
    with replacing(path) as file:
        # Readers drop a byte-order mark. If the first token begins with one, a second one protects it.
        if contents.vocabulary.utf8[0][: len(BYTE_ORDER_MARK)].tobytes() == BYTE_ORDER_MARK:
            file.write(BYTE_ORDER_MARK)
        # The line "7 1" would be read as a header of word2vec's format.
        for lines in lines_of(contents, with_points=contents.weight.shape[1] == 1):
            file.write(lines)


def _expected(source: Source, options: Options, block: bytes, dim: int) -> int:
    """Estimate the number of rows from the length of the first lines, with a tenth to spare."""
    if source.size is None:
        return 0
    lines = block.count(b"\n")
    likely = int(1.1 * source.size / len(block) * lines) + 1
    return min(likely, source.size // (2 * dim) + 1, likely if options.limit is None else options.limit)


FORMAT = Format(NAME, (".glove",), recognises, read, write)
