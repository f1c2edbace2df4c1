"""Tokens and rows of numbers into lines of a text file."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float32

from .._io.contents import Contents

# So many numbers are written at once.
_BLOCK = 1 << 19


def check_tokens(contents: Contents, name: str, parting: bytes = b" \t\n") -> None:
    """Check that tokens can be told from what follows them.

    Args:
      contents: What is to be written.
      name: Of the format.
      parting: What ends a token or a line in this format.

    Raises:
      ValueError: If a token has one of these in it, or there is nothing else in a row.
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
    """Yield the tokens and the rows, converted, in blocks."""
    text, offsets = contents.vocabulary.utf8
    at_once = max(1, _BLOCK // contents.weight.shape[1])
    for begin in range(0, len(contents.weight), at_once):
        rows = np.ascontiguousarray(contents.weight[begin : begin + at_once], dtype)
        ends = offsets[begin : begin + at_once + 1].tolist()
        block = text[ends[0] : ends[-1]].tobytes()
        yield [block[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)], rows


def lines_of(contents: Contents, with_points: bool = False) -> Iterator[bytes]:
    """Yield the lines, in blocks.

    Args:
      contents: What is to be written; its tokens are checked.
      with_points: Whether 1 is written as 1.0, so that it is not taken for something else.

    Yields:
      Some lines. Numbers are as short as float32 allows.
    """
    for tokens, rows in blocks_of(contents):
        lines = None if with_points else _by_arrow(tokens, rows)
        if lines is None:
            lines = [
                b"%b %b" % (token, " ".join(map(str, row)).encode()) for token, row in zip(tokens, rows, strict=True)
            ]
        yield b"\n".join(lines) + b"\n"


def _by_arrow(tokens: list[bytes], rows: Float32[np.ndarray, "rows dim"]) -> list[bytes] | None:
    """Write lines by pyarrow, about twice as fast, or return None where it is missing."""
    try:
        import pyarrow as pa
        from pyarrow import compute
    except ImportError:
        return None
    columns = [pa.array(column).cast(pa.string()).cast(pa.binary()) for column in rows.T.copy()]
    return compute.binary_join_element_wise(pa.array(tokens, pa.binary()), *columns, b" ").to_pylist()  # pyright: ignore
