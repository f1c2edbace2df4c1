"""Read fastText models: .bin files, and quantised .ftz files (which cannot be written)."""

import struct

import numpy as np
from jaxtyping import Float, Float32, Int64

from ...._base.text.strings import Strings, padded, taken
from ....vocabulary import Vocabulary
from ..._io.contents import Contents, Options, contents_of, make_room, resize
from ..._io.encodings import decoded, is_utf8
from ..._io.open import Source
from ..format import Format
from ..quantized import Quantized, read_quantized
from .model import Dictionary, Header, read_dictionary, read_header, starts_like_a_model
from .subwords import Ngrams, Subwords, means_of
from .write import write_fasttext

_BLOCK = 1 << 24  # bytes
_ROWS = 1 << 14


def read_fasttext(source: Source, options: Options) -> Contents:
    """Read a model: its words, their vectors (the same as of fastText's `get_word_vector`), and its n-grams.

    Labels and the output matrix are left out.

    Args:
      source: The file.
      options: The options of the caller.

    Returns:
      The contents; `subwords` is None if the model has no n-grams of characters.

    Raises:
      FormatError: If it is no fastText model, is truncated or corrupt, or a word is invalid in the encoding and
        `options.errors` is "strict".
    """
    if options.mmap:
        raise source.error(
            "the file cannot be mapped into memory, as vectors of words are computed from the vectors of n-grams. "
            "Leave mmap=True out."
        )
    header = read_header(source)
    dictionary = read_dictionary(source, header, options.limit)
    rows, has_subwords = _read_input(source, header, dictionary)
    if options.limit is None or source.size is not None:
        _pass_output(source, header, isinstance(rows, Quantized))
    words = dictionary.words
    utf8, raw = _decoded(source, options, words)
    own, ngrams = np.arange(words.number), None
    if has_subwords:
        args = header.arguments
        ngrams = Ngrams(
            rows, words.number, args.minn, args.maxn, args.bucket, dictionary.kept, line_end=not header.version
        )
    weight = _weight(rows, words, ngrams, options)
    text, offsets = utf8.text[: utf8.offsets[-1]], utf8.offsets
    contents = contents_of(source, options._replace(is_decoded=True), text, offsets, weight, dictionary.counts)
    if ngrams is None:
        return contents
    if len(contents.vocabulary) < words.number:  # repeated words were left out
        own = np.flatnonzero(~Vocabulary.from_utf8(text, offsets, errors="escape").repeated())
        raw = raw if raw is None else taken(raw, own)
    subwords = Subwords(
        ngrams,
        contents.vocabulary,
        own,
        encoding="utf-8" if is_utf8(options.encoding) else options.encoding,
        raw=raw,
        arguments=header.arguments,
    )
    return contents._replace(subwords=subwords)


def _read_input(source: Source, header: Header, dictionary: Dictionary) -> tuple[np.ndarray | Quantized, bool]:
    """Return the rows of the wanted words, then of n-grams if the model uses them, and whether it does."""
    args, kept, wanted = header.arguments, dictionary.kept, dictionary.words.number
    is_quantized = header.version > 0 and _read_flag(source, "the input matrix")
    if kept is not None and not is_quantized:
        raise source.error("n-grams are pruned, but the input matrix is not quantised, as in no model of fastText.")
    has_subwords = header.has_subwords and (kept is None or kept[0].size > 0)
    matrix = read_quantized(source, "the input matrix") if is_quantized else None
    rows, dim = matrix.shape if matrix else struct.unpack("<qq", source.read_exactly(16, "the input matrix"))
    ngrams = args.bucket if kept is None else kept[0].size
    if dim != args.dim or (rows != dictionary.number + ngrams if has_subwords else rows < dictionary.number):
        raise source.error(
            f"the input matrix must have {dictionary.number} + {ngrams} rows of {args.dim} numbers, for words and "
            f"n-grams, got {rows} of {dim}."
        )
    if kept is not None and has_subwords and (kept[1].min() < 0 or kept[1].max() >= ngrams):
        raise source.error(f"pruned n-grams must be rows in [0, {ngrams}).")
    if matrix is not None:
        used = np.concatenate([np.arange(wanted), np.arange(dictionary.number, rows if has_subwords else 0)])
        return matrix if used.size == rows else _fewer(matrix, used), has_subwords
    plan = [(wanted, True), (dictionary.number - wanted, False), (rows - dictionary.number, has_subwords)]
    return _read_dense(source, dim, plan), has_subwords


def _fewer(matrix: Quantized, rows: Int64[np.ndarray, " some"]) -> Quantized:
    norms = None if matrix.norms is None else matrix.norms[rows]
    return matrix._replace(shape=(rows.size, matrix.shape[1]), codes=matrix.codes[rows], norms=norms)


def _read_dense(source: Source, dim: int, plan: list[tuple[int, bool]]) -> Float32[np.ndarray, "rows dim"]:
    """Read or skip rows: `plan` is a list of numbers of rows, and whether to read them."""
    total = sum(rows for rows, _ in plan) * dim * 4
    expected = sum(rows for rows, is_wanted in plan if is_wanted)
    if source.size is None:
        expected = 1
    elif total > source.size - source.position:
        raise source.truncated("the input matrix")
    matrix, filled, at_once = np.empty((expected, dim), np.float32), 0, max(1, _BLOCK // (4 * dim))
    for rows, is_wanted in plan:
        if not is_wanted:
            source.skip_to(source.position + 4 * rows * dim)
            continue
        for start in range(0, rows, at_once):
            number = min(at_once, rows - start)
            data = source.read_exactly(4 * number * dim, "the input matrix")
            make_room(matrix, filled + number)
            matrix[filled : filled + number] = np.frombuffer(data, "<f4").reshape(number, dim)
            filled += number
    resize(matrix, filled)
    return matrix


def _pass_output(source: Source, header: Header, is_quantized: bool) -> None:
    """Skip the output matrix; check that it is complete, and that the file ends after it."""
    has_codes = header.version > 0 and _read_flag(source, "the output matrix")
    if has_codes and is_quantized:
        read_quantized(source, "the output matrix")
    else:
        rows, dim = struct.unpack("<qq", source.read_exactly(16, "the output matrix"))
        if rows < 0 or dim < 0:
            raise source.error(f"the output matrix must have at least 0 rows and columns, got {rows} and {dim}.")
        left = 4 * rows * dim
        if source.size is not None:
            if left > source.size - source.position:
                raise source.truncated("the output matrix")
            left -= source.size - source.position
            if left < 0:
                raise source.error(f"{-left:,} bytes follow the model, which ends at byte {source.size + left:,}.")
            return
        while left > 0:
            left -= len(source.read_exactly(min(left, _BLOCK), "the output matrix"))
    if source.read(1):
        raise source.error(f"bytes follow the model, which ends at byte {source.position - 1:,}.")


def _read_flag(source: Source, what: str) -> bool:
    flag = source.read_exactly(1, what)[0]
    if flag > 1:
        raise source.error(f"{what} must be quantised (1) or not (0), got {flag}, at byte {source.position - 1:,}.")
    return bool(flag)


def _weight(
    rows: np.ndarray | Quantized, words: Strings, ngrams: Ngrams | None, options: Options
) -> Float[np.ndarray, "words dim"]:
    if ngrams is None and isinstance(rows, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            return rows[: words.number].astype(options.dtype or np.float32, copy=False)
    weight = np.empty((words.number, rows.shape[1]), options.dtype or np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if ngrams is None:
            for start in range(0, words.number, _ROWS):
                block = np.arange(start, min(start + _ROWS, words.number))
                weight[block] = rows.take(block, axis=0)
        else:
            for start, stop, mean in means_of(ngrams, words, np.arange(words.number)):
                weight[start:stop] = mean
    return weight


def _decoded(source: Source, options: Options, words: Strings) -> tuple[Strings, Strings | None]:
    """Return the words in UTF-8, and the words in the encoding of the file if they differ, else None."""
    text, offsets = words.text[: words.offsets[-1]], words.offsets
    after, ends = decoded(source, text, offsets, options.encoding, options.errors)
    if after is text:
        return words, None
    return Strings(padded(np.frombuffer(after, np.uint8)), ends), words


FORMAT = Format(
    "fasttext",
    (".fasttext.bin",),
    lambda source: starts_like_a_model(source.start),
    read_fasttext,
    write_fasttext,
    keeps_subwords=True,
)
