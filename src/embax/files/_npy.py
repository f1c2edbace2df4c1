"""A table in NumPy's .npy format, with its vocabulary in a file beside it."""

import io
import json
import os
import tokenize
import warnings

import numpy as np

from ._array import table_of
from ._atomic import replacing
from ._contents import Contents, Options, contents_of
from ._format import Format
from ._open import Source
from ._vocabularies import Listed, read_vocabulary

_MAGIC = b"\x93NUMPY"
# More than any header of a table needs, and few enough for the literals in it to be parsed.
_HEADER = 10_000
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst", ".zip")
# What follows the name of the table, without .npy, in that of its vocabulary: the first one that is there.
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
    """Return the dtype, the shape, whether it lies column by column, and the byte at which it begins."""
    file = io.BytesIO(source.start[: len(_MAGIC) + 6 + _HEADER])
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version} of the format is for records only")
        with warnings.catch_warnings():  # of headers that Python 2 wrote
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
    """Find the file of the vocabulary: the one that the caller names, or the one named like the table."""
    folder, name = os.path.split(source.path)
    # In an archive, the table itself is what has been named.
    if source.member is not None and not source.member.endswith(".npy"):
        path = os.path.join(folder, source.member)
        if not os.path.isfile(path):
            raise source.error(f"there is no file {source.member!r} in the folder of the table.")
        return path
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in _COMPRESSED:
        stem = os.path.splitext(stem)[0]
    for ending in _BESIDE:
        path = os.path.join(folder, stem + ending)
        if os.path.isfile(path):
            return path
    others = [file for file in sorted(os.listdir(folder or ".")) if file.endswith((".json", ".txt", ".parquet"))]
    raise source.error(
        f"has no vocabulary beside it. Put the tokens, one a line, into {stem}.txt, or name their file, as "
        f"{source.path}:FILE. The folder has {', '.join(others[:10]) or 'none'}."
    )


def _rows(listed: Listed) -> str:
    return f"rows up to {int(listed.ids[-1]):,}" if listed.ids.size else "no row"


def write_npy(path: str | os.PathLike[str], contents: Contents) -> None:
    r"""Write a table as .npy, and its tokens as a JSON list into a file of the same name with .json at its end.

    Counts, and what special tokens stand for, are not kept. bfloat16, which NumPy does not know, becomes float32. Bytes
    of tokens that are not UTF-8 become `\xNN`, as JSON holds text only.

    Args:
      path: The destination of the table.
      contents: What to write.

    Raises:
      ValueError: If the destination itself ends in .json.
      OSError: If a file cannot be written.
    """
    beside = os.path.splitext(os.fspath(path))[0] + ".json"
    if beside == os.fspath(path):
        raise ValueError(
            f"`embax.files.save(path=...)` must not end in .json, got {beside!r}. That is for the tokens: write .npy."
        )
    weight = np.ascontiguousarray(contents.weight)
    if weight.dtype.kind != "f":
        weight = weight.astype(np.float32)
    tokens = json.dumps(contents.vocabulary.escaped().tokens(), ensure_ascii=False, indent=0).encode()
    # Both are whole before the first of them takes its place.
    with replacing(path) as table, replacing(beside) as vocabulary:
        np.lib.format.write_array(table, weight, allow_pickle=False)
        vocabulary.write(tokens)


FORMAT = Format("npy", (".npy",), _recognises, _read, write_npy)
