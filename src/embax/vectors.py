"""Vectors: a vocabulary and a weight, with queries by word."""

import difflib
import functools
import os
from collections.abc import Iterable, Sequence
from typing import final

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import ArrayLike, DTypeLike

from . import _check, files


class UnknownTokenError(KeyError):
    """A word that the vocabulary does not have; the message offers the closest spellings.

    Args:
      token: The word.
      closest: Words of the vocabulary that are spelled alike, the closest first.
    """

    def __init__(self, token: str, closest: Sequence[str]):
        self.token = token
        self.closest = tuple(closest)
        super().__init__(token, self.closest)

    def __str__(self) -> str:
        closest = f" Closest spellings: {', '.join(map(_quoted, self.closest))}." if self.closest else ""
        return f"{_quoted(self.token)} is not in the vocabulary.{closest}"


@final
class Vectors:
    """One vector for each token of a vocabulary.

    `embax.Table(vectors.weight)` is a table of them, with the row numbers that `vectors.row(token)` gives.

    Args:
      tokens: The token of each row, no two the same.
      weight: One row a token, `(rows, dim)`, finite.
      counts: How often each token occurred in the text that it was learned from. Default: 0 each.

    Raises:
      TypeError: If a token is not a string.
      ValueError: If the arguments differ in their number of rows, a token occurs twice, or the weight is not finite.

    Example:
      >>> import embax
      >>> vectors = embax.Vectors(["king", "queen", "sword"], [[1.0, 0.2], [1.0, 0.0], [0.0, 1.0]])
      >>> vectors
      Vectors(3 tokens, dim=2)
      >>> vectors["queen"]
      array([1., 0.], dtype=float32)
      >>> [token for token, cosine in vectors.most_similar("king")]
      ['queen', 'sword']
    """

    def __init__(self, tokens: Iterable[str], weight: ArrayLike, counts: ArrayLike | None = None):
        self.tokens: list[str] = list(tokens)
        rows = len(self.tokens)
        stray = [token for token in self.tokens if not isinstance(token, str)]
        if stray:
            raise TypeError(f"`embax.Vectors(tokens=...)` must be strings, got {stray[0]!r}. Pass one str a row.")
        self.weight: Float32[np.ndarray, "rows dim"] = _read_only(weight, np.float32)
        self.counts: Int64[np.ndarray, " rows"] = _read_only(np.zeros(rows) if counts is None else counts, np.int64)
        if self.weight.ndim != 2 or self.weight.shape[0] != rows or self.counts.shape != (rows,):
            raise ValueError(
                f"`embax.Vectors(weight=..., counts=...)` must have one row and one count for each of {rows} tokens, "
                f"got shapes {self.weight.shape} and {self.counts.shape}. Pass (rows, dim) and (rows,)."
            )
        if not np.isfinite(self.weight).all():
            row = int(np.flatnonzero(~np.isfinite(self.weight).all(axis=1))[0])
            raise ValueError(
                f"`embax.Vectors(weight=...)` must be finite, got NaN or infinity in row {row}. Drop such rows first."
            )
        self._rows = {token: row for row, token in enumerate(self.tokens)}
        if len(self._rows) != rows:
            twice = next(token for row, token in enumerate(self.tokens) if self._rows[token] != row)
            raise ValueError(f"`embax.Vectors(tokens=...)` must not repeat a token, got {twice!r} twice. Drop one.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vectors":
        """Read vectors from a file that `save` or `embax train` wrote.

        Args:
          path: The file.

        Returns:
          The vectors.

        Raises:
          embax.files.FormatError: If the file is of another format, truncated or corrupt.
          OSError: If it cannot be opened or read.

        Example:
          See `save`.
        """
        tokens, weight, counts = files.read_safetensors(path)
        if not np.isfinite(weight).all():
            raise files.FormatError(path, "`weight` must be finite, got NaN or infinity.")
        return cls(tokens, weight, counts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors as one safetensors file, which `embax.files.write_safetensors` describes.

        Args:
          path: The destination; an existing file is replaced when the new one is whole.

        Raises:
          OSError: If the file cannot be written.

        Example:
          >>> import embax, pathlib, tempfile
          >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.safetensors")
          >>> embax.Vectors(["king", "queen"], [[1.0, 0.0], [0.0, 1.0]]).save(path)
          >>> embax.Vectors.load(path)["queen"]
          array([0., 1.], dtype=float32)
        """
        files.write_safetensors(path, files.Contents(list(self.tokens), self.weight, self.counts))

    def row(self, token: str) -> int:
        """Return the row number of a token.

        Args:
          token: A word of the vocabulary, in its spelling.

        Returns:
          A number in `[0, len(vectors))`.

        Raises:
          UnknownTokenError: If the vocabulary does not have it; a KeyError.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["king", "queen"], [[1.0, 0.0], [0.0, 1.0]])
          >>> vectors.row("queen")
          1
          >>> vectors.row("kings")
          Traceback (most recent call last):
          ...
          embax.vectors.UnknownTokenError: "kings" is not in the vocabulary. Closest spellings: "king".
        """
        row = self._rows.get(token)
        if row is None:
            raise UnknownTokenError(token, self._closest(token))
        return row

    def most_similar(
        self, positive: str | Iterable[str], negative: str | Iterable[str] = (), k: int = 10
    ) -> list[tuple[str, float]]:
        """Find the tokens nearest in direction to a sum of tokens.

        `cos(weight[i], sum_p unit(weight[p]) - sum_n unit(weight[n]))`

        A vector of zeros has a cosine of 0 to every other.

        Args:
          positive: Tokens that are added, or one token.
          negative: Tokens that are subtracted, or one token.
          k: How many to return, where there are as many.

        Returns:
          Tokens and their cosines, the nearest first; the tokens asked for are left out.

        Raises:
          UnknownTokenError: If the vocabulary does not have one of the tokens; a KeyError.
          ValueError: If no token is given, or `k` is negative.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
          >>> vectors.most_similar(["king", "woman"], negative=["man"], k=1)[0][0]
          'queen'
        """
        k = _check.size("embax.Vectors.most_similar(k=...)", k)
        added = [self.row(token) for token in _as_list(positive)]
        subtracted = [self.row(token) for token in _as_list(negative)]
        asked = sorted({*added, *subtracted})
        if not asked:
            raise ValueError("`embax.Vectors.most_similar(positive=...)` must name a token, got none. Pass one.")
        query = self._unit[added].sum(axis=0) - self._unit[subtracted].sum(axis=0)
        cosines = self._unit @ _unit_rows(query[None])[0]
        cosines[asked] = -np.inf
        k = min(k, len(self) - len(asked))
        nearest = np.argpartition(-cosines, k - 1)[:k] if k else np.zeros(0, np.int64)
        nearest = nearest[np.lexsort((nearest, -cosines[nearest]))]
        return [(self.tokens[row], float(cosines[row])) for row in nearest]

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._rows

    def __getitem__(self, token: str) -> Float32[np.ndarray, " dim"]:
        return self.weight[self.row(token)]

    def __repr__(self) -> str:
        return f"Vectors({len(self)} tokens, dim={self.weight.shape[1]})"

    @functools.cached_property
    def _unit(self) -> Float32[np.ndarray, "rows dim"]:
        return _unit_rows(self.weight)

    def _closest(self, token: str) -> list[str]:
        # Spellings are compared in lower case, so that "King" finds "king".
        lowered = {known.lower(): known for known in reversed(self.tokens)}
        return [lowered[match] for match in difflib.get_close_matches(token.lower(), lowered, n=5, cutoff=0.6)]


def _read_only(values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """View an array that must not change under the figures computed from it; the caller's own stays writable."""
    array = np.asarray(values, dtype).view()
    array.flags.writeable = False
    return array


def _unit_rows(rows: Float32[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """Scale rows to length 1; rows of zeros stay."""
    # The largest entry is taken out first, so that no square leaves the range of float32.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    rows = rows / np.where(largest > 0, largest, 1)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)


def _as_list(tokens: str | Iterable[str]) -> list[str]:
    return [tokens] if isinstance(tokens, str) else list(tokens)


def _quoted(token: str) -> str:
    """Quote a token for a message; control characters are spelled out, as they could rule the terminal."""
    return f'"{token}"' if token.isprintable() else repr(token)
