"""Loading and saving: which format a file is of, and what the caller wants of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import PurePath

import numpy as np
from numpy.typing import DTypeLike

from .. import _check
from ..vocabulary import Errors
from . import _arrow, _fasttext, _glove, _npy, _parquet, _refused, _safetensors, _tensor, _word2vec
from ._contents import Contents, Options
from ._format import Format
from ._open import MAX_EXPANSION, Source, opened, split_path

# In the order in which they are tried: what has a mark of its own goes before what any text could be.
_ALL: tuple[Format, ...] = (
    _safetensors.FORMAT,
    _tensor.FORMAT,
    _npy.FORMAT,
    _parquet.FORMAT,
    _arrow.FORMAT,
    _fasttext.FORMAT,
    _word2vec.BINARY,
    _word2vec.TEXT,
    _glove.FORMAT,
)
_BY_NAME = {format.name: format for format in _ALL}

# The names of the formats.
FORMATS: tuple[str, ...] = tuple(_BY_NAME)


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
    r"""Read what a file of vectors holds; `embax.Vectors.load` says how.

    Args:
      path: The file.
      format: One of `FORMATS`. Default: that of the content.
      limit: Read the first rows only, as many.
      dtype: Convert the rows to this dtype of floats.
      mmap: Whether the rows are mapped into memory.
      encoding: Of the tokens.
      errors: What becomes of tokens that are not of the encoding: `"escape"` keeps their bytes, `"replace"` puts U+FFFD
        for what cannot be decoded, `"strict"` raises an error.
      max_expansion: How many times its size a compressed file may grow to.

    Returns:
      The contents.

    Raises:
      FormatError: If the file is of no known format, truncated or corrupt, or a token is not of the encoding and that
        is to be an error.
      ValueError: If an argument is not as above.
      OSError: If it cannot be opened or read.

    Example:
      >>> import embax.files, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.txt")
      >>> size = path.write_text("2 3\nking 1 0 0\nqueen 0 1 0\n")
      >>> embax.files.load(path).weight.shape
      (2, 3)
    """
    chosen = None if format is None else _BY_NAME[_check.choice("embax.files.load(format=...)", format, FORMATS)]
    options = Options(
        None if limit is None else _check.size("embax.files.load(limit=...)", limit),
        None if dtype is None else _float("embax.files.load(dtype=...)", dtype),
        None if mmap is None else _check.flag("embax.files.load(mmap=...)", mmap),
        encoding,
        _check.choice("embax.files.load(errors=...)", errors, Errors),
    )
    max_expansion = _check.positive("embax.files.load(max_expansion=...)", max_expansion)
    with accepted(path, max_expansion) as source:
        return (chosen or recognised(source)).read(source, options)


@contextlib.contextmanager
def accepted(path: str | os.PathLike[str], max_expansion: float) -> Iterator[Source]:
    """Open a file, unless it is one that is not read here.

    Args:
      path: As for `opened`.
      max_expansion: As for `opened`.

    Yields:
      The source.

    Raises:
      FormatError: As `opened`, and if it is a pickle or the like, with the lines that convert it.
      OSError: If it cannot be opened.
    """
    if (error := _refused.explain(split_path(path)[0])) is not None:
        raise error
    with opened(path, max_expansion) as source:
        if (error := _refused.explain(source.path, source.start)) is not None:  # what came out of a compressed file
            raise error
        yield source


def recognised(source: Source) -> Format:
    """Find the format of a file by its content.

    Raises:
      FormatError: If it is of none.
    """
    for one in _ALL:
        if one.recognises(source):
            return one
    raise source.error(f"is of no format that is known here ({', '.join(FORMATS)}).")


def save(path: str | os.PathLike[str], contents: Contents, *, format: str | None = None) -> None:
    """Write what a file of vectors holds; `embax.Vectors.save` says how.

    Args:
      path: The destination.
      contents: What to write.
      format: One of `FORMATS`. Default: by the suffix, and the package's own where there is none.

    Raises:
      ValueError: If the suffix is of no format, or the format cannot hold the contents.
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
    _BY_NAME[format_to_write(path, format)].write(path, contents)


def format_to_write(path: str | os.PathLike[str], format: str | None = None) -> str:
    """Return the name of the format that `save` would write, before there is anything to write.

    Args:
      path: The destination.
      format: As in `save`.

    Returns:
      One of `FORMATS`.

    Raises:
      ValueError: If the suffix is of no format, or there is no such format.

    Example:
      >>> import embax.files
      >>> embax.files.format_to_write("vectors.bin")
      'word2vec-binary'
    """
    if format is not None:
        return _check.choice("embax.files.save(format=...)", format, FORMATS)
    name = PurePath(path).name.lower()
    fits = [(suffix, one) for one in _ALL for suffix in one.suffixes if name.endswith(suffix)]
    if not fits and "." in name:
        suffixes = ", ".join(suffix for one in _ALL for suffix in one.suffixes)
        raise ValueError(
            f"`embax.files.save(path=...)` must end in one of {suffixes}, or have no suffix, got {name!r}. "
            "Rename it, or pass format=."
        )
    # Of ".bin" and ".fasttext.bin", the longer one.
    return (max(fits, key=lambda fit: len(fit[0]))[1] if fits else _safetensors.FORMAT).name


def _float(argument: str, dtype: DTypeLike) -> np.dtype:
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ValueError(f"`{argument}` must be a dtype of floats, got {dtype!r}. Pass such as np.float16.") from None
    if dtype.kind != "f" and "float" not in dtype.name:
        raise ValueError(f"`{argument}` must be a dtype of floats, got {dtype}. Pass such as np.float16.")
    return dtype
