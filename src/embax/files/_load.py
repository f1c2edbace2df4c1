"""Load and save vectors: choose the format, check the arguments, and call the format's reader or writer."""

import os
from pathlib import PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .._base import check as _check
from ..vocabulary._vocabulary import Errors
from ._formats.registry import ALL, BY_NAME, FORMATS, recognised
from ._formats.safetensors import file as _safetensors
from ._formats.safetensors import tensor as _tensor
from ._identify import Identity, identity_of
from ._io.contents import Contents, Options
from ._io.open import MAX_EXPANSION, opened
from ._io.streams import is_stream


def load(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    limit: int | None = None,
    dtype: DTypeLike | None = None,
    mmap: bool | None = None,
    encoding: str = "utf-8",
    errors: Errors = "escape",
    max_expansion: float = MAX_EXPANSION,
) -> Contents:
    r"""Read the tokens, rows and counts of a file of vectors; see `embax.Vectors.load`.

    Args:
      path: The file; `-` is standard input.
      format: One of `FORMATS`. Default: the format is recognised by the content.
      limit: Read only the first `limit` rows.
      dtype: Convert the rows to this dtype of floats.
      mmap: Whether the rows are mapped into memory.
      encoding: The encoding of the tokens.
      errors: How tokens that are invalid in the encoding are read: `"escape"` keeps their bytes, `"replace"` puts
        U+FFFD in place of invalid bytes, `"strict"` raises an error.
      max_expansion: The uncompressed data may be up to so many times as large as the file.

    Returns:
      The contents.

    Raises:
      FormatError: If the file is of no known format, truncated or corrupt, or a token is invalid in the encoding and
        `errors="strict"`.
      ValueError: If an argument is invalid.
      OSError: If it cannot be opened or read.

    Example:
      >>> import embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.txt")
      >>> size = path.write_text("2 3\nking 1 0 0\nqueen 0 1 0\n")
      >>> embax.files.load(path).weight.shape
      (2, 3)
    """
    return read(path, Asked(format, limit, dtype, mmap, encoding, errors, max_expansion))[1]


def load_identified(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    limit: int | None = None,
    dtype: DTypeLike | None = None,
    mmap: bool | None = None,
    encoding: str = "utf-8",
    errors: Errors = "escape",
    max_expansion: float = MAX_EXPANSION,
) -> tuple[Identity, Contents]:
    r"""Do the work of `identify` and `load` together. A stream can be read only once, so it needs this function.

    Args:
      path: See `load`.
      format: See `load`.
      limit: See `load`.
      dtype: See `load`.
      mmap: See `load`.
      encoding: See `load`.
      errors: See `load`.
      max_expansion: See `load`.

    Returns:
      The identity of the file, and its contents.

    Raises:
      FormatError: See `load`.
      ValueError: See `load`.
      OSError: See `load`.

    Example:
      >>> import embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.txt")
      >>> size = path.write_text("2 3\nking 1 0 0\nqueen 0 1 0\n")
      >>> identity, contents = embax.files.load_identified(path)
      >>> identity.format, contents.weight.shape
      ('word2vec', (2, 3))
    """
    return read(path, Asked(format, limit, dtype, mmap, encoding, errors, max_expansion))


class Asked(NamedTuple):
    """The arguments of `load`, unchecked."""

    format: str | None
    limit: int | None
    dtype: DTypeLike | None
    mmap: bool | None
    encoding: str
    errors: Errors
    max_expansion: float


def read(path: str | os.PathLike[str], asked: Asked) -> tuple[Identity, Contents]:
    """Check what a caller asks for, and do what `load_identified` does."""
    format, limit, dtype, mmap, encoding, errors, max_expansion = asked
    chosen = None if format is None else BY_NAME[_check.choice("embax.files.load(format=...)", format, FORMATS)]
    options = Options(
        None if limit is None else _check.size("embax.files.load(limit=...)", limit),
        None if dtype is None else _float("embax.files.load(dtype=...)", dtype),
        None if mmap is None else _check.flag("embax.files.load(mmap=...)", mmap),
        encoding,
        _check.choice("embax.files.load(errors=...)", errors, Errors),
    )
    max_expansion = _check.positive("embax.files.load(max_expansion=...)", max_expansion)
    with opened(path, max_expansion) as source:
        chosen = chosen or recognised(source)
        contents = chosen.read(source, options)
        identity = identity_of(path, source, chosen.name)
        return identity if identity.size is not None else identity._replace(size=source.position), contents


def save(path: str | os.PathLike[str], contents: Contents, *, format: str | None = None) -> None:
    """Write vectors to a file; see `embax.Vectors.save`.

    Args:
      path: The destination; `-` is standard output. Streams are written to directly, files are replaced.
      contents: The tokens, rows and counts to write.
      format: One of `FORMATS`. Default: chosen by the suffix; "safetensors" if there is none. A stream needs a format.

    Raises:
      ValueError: If no format has the suffix, a stream has no format, or the format cannot hold the contents.
      OSError: If the file cannot be written.

    Example:
      >>> import embax, embax.files, numpy as np, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.vec")
      >>> contents = embax.files.Contents(embax.Vocabulary(["a", "b"]), np.eye(2, dtype=np.float32))
      >>> embax.files.save(path, contents)
      >>> print(path.read_text(), end="")
      2 2
      a 1 0
      b 0 1
    """
    BY_NAME[format_to_write(path, format)].write(path, contents)


def format_to_write(path: str | os.PathLike[str], format: str | None = None) -> str:
    """Return the name of the format that `save` would write, so that mistakes show before long work.

    Args:
      path: The destination.
      format: See `save`.

    Returns:
      One of `FORMATS`.

    Raises:
      ValueError: If no format has the suffix, a stream has no format, or the format cannot be written there.

    Example:
      >>> import embax.files
      >>> embax.files.format_to_write("vectors.bin")
      'word2vec-binary'
    """
    name = _format_of(path) if format is None else _check.choice("embax.files.save(format=...)", format, FORMATS)
    BY_NAME[name].check(path)
    return name


def _format_of(path: str | os.PathLike[str]) -> str:
    name = PurePath(path).name.lower()
    fits = [(suffix, one) for one in ALL for suffix in one.suffixes if name.endswith(suffix)]
    if not fits and is_stream(path):
        formats = ", ".join(name for name in FORMATS if name != _tensor.FORMAT.name)
        raise ValueError(
            "`embax.files.save(format=...)` must name a format for a stream, whose name has no suffix to tell it, got "
            f"None for {os.fspath(path)!r}. Pass one of {formats}; on the command line, by --to."
        )
    if not fits and "." in name:
        suffixes = ", ".join(suffix for one in ALL for suffix in one.suffixes)
        raise ValueError(
            f"`embax.files.save(path=...)` must end in one of {suffixes}, or have no suffix, got {name!r}. "
            "Rename it, or pass format=."
        )
    # The longest suffix wins: "a.fasttext.bin" ends in ".bin", too.
    return (max(fits, key=lambda fit: len(fit[0]))[1] if fits else _safetensors.FORMAT).name


def _float(argument: str, dtype: DTypeLike) -> np.dtype:
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"`{argument}` must be a dtype of floats, got {dtype!r}. Pass such as np.float16.") from None
    if dtype.kind != "f" and "float" not in dtype.name:
        raise ValueError(f"`{argument}` must be a dtype of floats, got {dtype}. Pass such as np.float16.")
    return dtype
