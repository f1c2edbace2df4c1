"""A table in NumPy's .npy format, with its vocabulary in a file beside it."""

import io
import json
import os
import posixpath
import tokenize
import warnings

import numpy as np

from .._io.atomic import replacing
from .._io.contents import Contents, Options, contents_of
from .._io.open import Source
from .._io.streams import is_named_pipe, is_stream
from .array import table_of
from .format import Format
from .vocabularies import Listed, read_vocabulary

_MAGIC = b"\x93NUMPY"
# Larger than the header of any table, and small enough to parse safely as Python literals.
_HEADER = 10_000
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst", ".zip", ".tar", ".tgz")
# The vocabulary of "vectors.npy" is the first of "vectors.json", "vectors.txt" and so on that exists.
_BESIDE = (".json", ".txt", ".vocab.txt", ".vocab", ".parquet")


def _recognises(source: Source) -> bool:
    return source.start.startswith(_MAGIC)


def _read(source: Source, options: Options) -> Contents:
    dtype, shape, by_column, begin = _header(source)
    end = begin + shape[0] * shape[1] * dtype.itemsize
    if source.size is not None and source.size != end:
        if source.size < end:
            raise source.truncated(f"a table of {dtype} {shape}")
        raise source.error(f"the table ends at byte {end:,}, the file at byte {source.size:,}.")
    listed = read_vocabulary(_beside(source), options)
    if len(listed.ids) != shape[0] or (listed.ids.size and listed.ids[-1] != shape[0] - 1):
        raise source.error(f"has {shape[0]:,} rows, and {listed.path} {len(listed.ids):,} tokens for {_rows(listed)}.")
    if options.limit is not None:
        listed = listed.first(options.limit)
    weight = table_of(source, options, dtype, shape, begin, by_column)
    return contents_of(
        source, options._replace(is_decoded=True), listed.text, listed.offsets, weight, special=listed.special
    )


def _header(source: Source) -> tuple[np.dtype, tuple[int, int], bool, int]:
    """Return the dtype, the shape, whether the table is stored by column, and the byte at which it begins."""
    file = io.BytesIO(source.start[: len(_MAGIC) + 6 + _HEADER])
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version} of the format is for records only")
        with warnings.catch_warnings():  # NumPy warns of headers that Python 2 wrote
            warnings.simplefilter("ignore")
            shape, by_column, dtype = read(file, max_header_size=_HEADER)
    except (
        ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError, OverflowError,
        tokenize.TokenError,
    ) as error:  # fmt: skip
        raise source.error(f"the header of the .npy file is damaged ({str(error)[:200].rstrip('.')}).") from None
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or len(shape) != 2 or min(shape) < 0:
        raise source.error(
            f"must hold a table of 16, 32 or 64 bit floats, got {dtype} {shape}. Save it as such by numpy.save."
        )
    return dtype, (int(shape[0]), int(shape[1])), bool(by_column), file.tell()


def _beside(source: Source) -> str:
    """Find the file of the vocabulary: the one that the caller names, or the one with the name of the table."""
    if source.member is not None:
        # Standard input has no folder: then the member is the path of the file.
        path = source.beside(source.member) if source.has_folder else source.member
        if path is None or not (source.has_folder or os.path.isfile(path)):
            raise source.error(f"there is no file {source.member!r} in the folder of the table.")
        return path
    stems = []
    for name in filter(None, (source.inner, os.path.basename(source.path))):
        stem, suffix = os.path.splitext(posixpath.basename(name))
        stems.append(os.path.splitext(stem)[0] if suffix.lower() in _COMPRESSED else stem)
    for name in (stem + ending for stem in stems for ending in _BESIDE):
        if (path := source.beside(name)) is not None:
            return path
    if not source.has_folder:
        raise source.error(f"has no vocabulary beside it. Name the file of the tokens, as {source.whole_name}:FILE.")
    others = [name for name in source.names_beside() if name.endswith((".json", ".txt", ".parquet"))]
    raise source.error(
        f"has no vocabulary beside it. Put the tokens, one a line, into {stems[0]}.txt, or name their file, as "
        f"{source.whole_name}:FILE. The folder has {', '.join(others[:10]) or 'none'}."
    )


def _rows(listed: Listed) -> str:
    return f"rows up to {int(listed.ids[-1]):,}" if listed.ids.size else "no row"


def write_npy(path: str | os.PathLike[str], contents: Contents) -> None:
    r"""Write a table as .npy, and its tokens as a JSON list into a file of the same name with .json at its end.

    Counts and the roles of special tokens are not saved. NumPy has no bfloat16; such vectors are saved as float32.
    Bytes of tokens that are not UTF-8 become `\xNN`, as JSON holds text only.

    Args:
      path: The destination of the table.
      contents: The contents to write.

    Raises:
      ValueError: If the destination ends in .json, or is a stream, which has no folder for the tokens.
      OSError: If a file cannot be written.
    """
    _check(path)
    dtype = contents.weight.dtype
    weight = np.ascontiguousarray(contents.weight, dtype.newbyteorder("=") if dtype.kind == "f" else np.float32)
    tokens = json.dumps(contents.vocabulary.escaped().tokens(), ensure_ascii=False, indent=0).encode()
    beside = _tokens_beside(path)
    # Both files are complete before either replaces an old one.
    with replacing(path) as table, replacing(beside) as vocabulary:
        np.lib.format.write_array(table, weight, allow_pickle=False)
        vocabulary.write(tokens)


def _tokens_beside(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(os.fspath(path))[0] + ".json"


def _check(path: str | os.PathLike[str]) -> None:
    path = os.fspath(path)
    if is_stream(path) and not is_named_pipe(path):
        raise ValueError(
            "`embax.files.save(path=...)` must have a folder for the format 'npy', as the tokens go into a file beside "
            f"the table, got {path!r}, a stream. Name a file, or take a format that holds the tokens, such as "
            "'safetensors'."
        )
    if _tokens_beside(path) == path:
        raise ValueError(
            f"`embax.files.save(path=...)` must not end in .json, got {path!r}. That is for the tokens: write .npy."
        )


FORMAT = Format("npy", (".npy",), _recognises, _read, write_npy, _check)
