"""Write tokens and rows of numbers as lines of text."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

from .._io.contents import Contents

# The number of numbers that are written at once.
_BLOCK = 1 << 19


def check_tokens(contents: Contents, name: str, parting: bytes = b" \t\n") -> None:
    """Check that a reader will find where each token ends.

    Args:
      contents: The contents to write.
      name: The name of the format.
      parting: The bytes that end a token or a line in this format.

    Raises:
      ValueError: If a token has one of these bytes in it, or the rows have no numbers.
    """
    text, offsets = contents.vocabulary.utf8
    found = np.flatnonzero(np.isin(text, np.frombuffer(parting, np.uint8)))
    if found.size:
        row = int(np.searchsorted(offsets, found[0], side="right")) - 1
        rule = "tab" if text[found[0]] == ord("\t") else "space or newline"
        raise ValueError(
            f"`embax.files.save(contents=...)` must have no {rule} in a token for the format {name!r}, got "
            f"{contents.vocabulary.tokens(row)!r}. Save it as .safetensors."
        )
    if not contents.weight.shape[1]:
        raise ValueError(
            f"`embax.files.save(contents=...)` must have a number in each row for the format {name!r}, got "
            f"{contents.weight.shape}. Save it as .safetensors."
        )


def blocks_of(contents: Contents, dtype: str = "<f4") -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Yield tokens and rows in blocks, the rows converted to `dtype`."""
    text, offsets = contents.vocabulary.utf8
    at_once = max(1, _BLOCK // contents.weight.shape[1])
    for begin in range(0, len(contents.weight), at_once):
        rows = np.ascontiguousarray(contents.weight[begin : begin + at_once], dtype)
        ends = offsets[begin : begin + at_once + 1].tolist()
        block = text[ends[0] : ends[-1]].tobytes()
        yield [block[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)], rows


def lines_of(contents: Contents, with_points: bool = False) -> Iterator[bytes]:
    """Yield lines in blocks. Each number has the fewest digits that give back the same float32.

    Args:
      contents: The contents to write; `check_tokens` has checked them.
      with_points: Whether 1 is written as 1.0, so that "7 1.0" is not read as a header of word2vec's.

    Yields:
      A block of lines.
    """
    for tokens, rows in blocks_of(contents):
        lines = None if with_points else _by_arrow(tokens, rows)
        if lines is None:
            lines = [
                b"%b %b" % (token, " ".join(map(str, row)).encode()) for token, row in zip(tokens, rows, strict=True)
            ]
        yield b"\n".join(lines) + b"\n"


def _by_arrow(tokens: list[bytes], rows: Float32[np.ndarray, "rows dim"]) -> list[bytes] | None:
    """Write lines by pyarrow, which is about twice as fast; return None if it is not installed."""
    try:
        import pyarrow as pa
        from pyarrow import compute
    except ImportError:
        return None
    columns = [pa.array(column).cast(pa.string()).cast(pa.binary()) for column in rows.T.copy()]
    return compute.binary_join_element_wise(pa.array(tokens, pa.binary()), *columns, b" ").to_pylist()  # pyright: ignore
