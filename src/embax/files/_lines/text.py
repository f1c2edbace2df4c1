"""Read text corpora piece by piece: UTF-8, from plain, gzip and xz files and from standard input."""

import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from .._io.error import FormatError
from .._io.refused import explain_pointer
from .._io.streams import is_stream, name_of_input, reading_from
from .line_ends import BYTE_ORDER_MARK, without_mark

# Bytes read at once: small compared with a corpus, large enough that the cost of a call does not matter.
_PIECE = 1 << 20
# The largest size of a Git LFS pointer.
_START = 1 << 10
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\x00"


def read_text(path: str | os.PathLike[str]) -> Iterator[str]:
    """Read UTF-8 text piece by piece, so that a corpus of any size needs little memory.

    Gzip and xz are recognised by the first bytes, not by the name. A byte-order mark is left out.

    Args:
      path: The file, or `-` for standard input, or another stream.

    Yields:
      Pieces of about a million characters, in order; words and lines may be cut anywhere.

    Raises:
      FormatError: If the text is not UTF-8 (the message names the byte), compressed data are truncated or corrupt, or
        the file is a Git LFS pointer.
      OSError: If the file cannot be opened or read.

    Example:
      >>> import embax.files, gzip, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "corpus.gz")
      >>> size = path.write_bytes(gzip.compress("In the beginning ...".encode()))
      >>> list(embax.files.read_text(path))
      ['In the beginning ...']
    """
    path = os.fspath(path)
    with reading_from(path) if is_stream(path) else open(path, "rb") as file:
        yield from _decoded(name_of_input(path), file)


def _decoded(name: str, file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    for piece in _pieces(name, file):
        if not read and piece.startswith(BYTE_ORDER_MARK):
            read, piece = len(BYTE_ORDER_MARK), without_mark(piece)
        pending = len(decoder.getstate()[0])  # bytes of a character that continues in this piece
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            position = read - pending + error.start
            raise FormatError(
                name, f"byte {position:,} of the text is not UTF-8 ({error.reason}). Convert the text to UTF-8."
            ) from None
        read += len(piece)
        if text:
            yield text


def _pieces(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Yield the uncompressed bytes of the text in full pieces, and an empty piece at the end."""
    start = file.read(_START)
    if (error := explain_pointer(name, start)) is not None:
        raise error
    whole = cast(BinaryIO, io.BufferedReader(_Rejoined(start, file)))
    if start.startswith(_GZIP):
        whole = cast(BinaryIO, gzip.GzipFile(fileobj=whole))
    elif start.startswith(_XZ):
        whole = lzma.LZMAFile(whole)
    piece = b"?"
    while piece:
        try:
            piece = whole.read(_PIECE)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise FormatError(
                name,
                f"the compressed data are truncated or corrupt ({str(error).rstrip('.')}). Compress the text anew.",
            ) from None
        yield piece


class _Rejoined(io.RawIOBase):
    """A stream that cannot be rewound, with the bytes that were read from it put back."""

    def __init__(self, start: bytes, rest: BinaryIO):
        self._start = start
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._start[: len(buffer)] or self._rest.read(len(buffer))
        self._start = self._start[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
