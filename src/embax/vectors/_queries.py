"""Queries: the methods of Vectors that compare directions, by exact or approximate search."""

import functools
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Float32

from .. import files
from .._base import check as _check
from ..vocabulary._vocabulary import Vocabulary
from . import _cosmul, _nearest
from ._directions import Query, as_list, directions_of, warn_of_not_finite

if TYPE_CHECKING:
    from ..files._formats.fasttext.subwords import Subwords
    from ._approximate import Approximate


class Queries:
    """The methods of `Vectors` that compare directions."""

    vocabulary: Vocabulary
    weight: Float[np.ndarray, "rows dim"]
    subwords: "Subwords | None"
    _path: str | None  # the file that the vectors were loaded from
    _said: bool  # whether the warning about rows that are not finite was given

    def __len__(self) -> int:
        return len(self.vocabulary)

    def most_similar(
        self, positive: Query, negative: Query = (), k: int = 10, *, approx: bool = False
    ) -> list[tuple[str, float]]:
        """Find the tokens whose direction is nearest to a sum of tokens.

        `cos(weight[i], sum_p unit(weight[p]) - sum_n unit(weight[n]))`

        Args:
          positive: One or more tokens or vectors to add.
          negative: One or more tokens or vectors to subtract.
          k: The number of answers, as far as there are enough tokens.
          approx: Whether to search an index instead of all rows, as in `most_similar_batch`.

        Returns:
          Tokens and their cosines, the nearest first, without the tokens of the query.

        Raises:
          UnknownTokenError: If a token has no vector; a KeyError.
          ValueError: If no token is given, `k` is negative, or a vector has NaN or infinity.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
          >>> vectors.most_similar(["king", "woman"], negative=["man"], k=1)[0][0]
          'queen'
        """
        return self.most_similar_batch([(as_list(positive), as_list(negative))], k, approx=approx)[0]

    def most_similar_batch(
        self, queries: Iterable[Query], k: int = 10, *, approx: bool = False
    ) -> list[list[tuple[str, float]]]:
        """Answer many queries of `most_similar` at once, exactly, in blocks of rows and queries.

        Args:
          queries: For each query a token, a vector, a list of them, or a pair of lists `(positive, negative)`.
          k: The number of answers for each query, as far as there are enough tokens.
          approx: Whether to search an index of usearch instead of comparing with all rows; a few in a thousand of the
            nearest rows may be missed. The index is made at first use, which takes minutes for a million rows, or
            loaded if `save_index` has saved it beside the file of the vectors. Requires `embax[approximate]`.

        Returns:
          For each query the tokens and their cosines, as in `most_similar`.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: As `most_similar`.
          ImportError: With `approx`, if usearch is not installed.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
          >>> [found[0][0] for found in vectors.most_similar_batch(["king", (["king", "woman"], ["man"])], k=1)]
          ['queen', 'queen']
        """
        k = self._at_most_all("embax.Vectors.most_similar(k=...)", k)
        directions, asked = self._directions("embax.Vectors.most_similar(positive=...)", list(queries))
        if approx:
            rows, cosines = self._approximate.search(self._unit, directions, k, asked)
        else:
            rows, cosines = _nearest.nearest(self._unit, directions, k, asked)
        return self._named(rows, cosines)

    def save_index(self, path: str | os.PathLike[str] | None = None) -> str:
        """Save the index of `approx=True` beside the file of the vectors, where later runs find it.

        Args:
          path: The file of the vectors. Default: the file that they were loaded from.

        Returns:
          The file of the index, `<file>.usearch`.

        Raises:
          ImportError: If usearch is not installed.
          OSError: If the file cannot be written.
          ValueError: If the vectors were not loaded from a file, and no file is given.
        """
        path = self._path if path is None else os.fspath(path)
        if path is None or files.is_stream(path):
            raise ValueError(
                "`embax.Vectors.save_index(path=...)` must name the file of the vectors if they were not loaded from "
                f"one, got {path!r}. Save the vectors, and pass their file."
            )
        from ._approximate import beside

        self._approximate.save(path, self.weight)
        return beside(path)

    def analogy(
        self, a: str, b: str, c: str, k: int = 10, *, method: Literal["add", "mul"] = "add"
    ) -> list[tuple[str, float]]:
        """Answer "a is to b as c is to what?": man is to king as woman is to queen.

        `"add"`, 3CosAdd: `cos(x, b) - cos(x, a) + cos(x, c)`; the score is the cosine to the sum of directions.
        `"mul"`, 3CosMul: `cos(x, b) cos(x, c) / (cos(x, a) + 1e-6)`, with cosines mapped to `[0, 1]`.

        Args:
          a: The first token of the known pair.
          b: The second token of the known pair.
          c: The first token of the other pair, whose second one is wanted.
          k: The number of answers, as far as there are enough tokens.
          method: How answers are scored.

        Returns:
          Tokens and their scores, the best first, without `a`, `b` and `c`.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: As `most_similar`, and if the method is unknown.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
          >>> vectors.analogy("man", "king", "woman", k=1)[0][0]
          'queen'

        References:
          Levy & Goldberg, Linguistic Regularities in Sparse and Explicit Word Representations, 2014,
          https://aclanthology.org/W14-1618, equations 3 and 4.
        """
        call = "embax.Vectors.analogy(a=..., b=..., c=...)"
        method = _check.choice("embax.Vectors.analogy(method=...)", method, ("add", "mul"))
        k = self._at_most_all("embax.Vectors.analogy(k=...)", k)
        if method == "add":
            directions, asked = self._directions(call, [([b, c], [a])])
            return self._named(*_nearest.nearest(self._unit, directions, k, asked))[0]
        directions, asked = self._directions(call, [a, b, c])
        of_a, of_b, of_c = directions[:, None]
        return self._named(*_cosmul.best(self._unit, (of_b, of_c), of_a, k, asked.reshape(1, 3)))[0]

    def similarity(self, a: Query, b: Query) -> float:
        """Return the cosine of two tokens, or of two sums of tokens.

        Args:
          a: A token, a vector, or a list of them.
          b: The same.

        Returns:
          A number in `[-1, 1]`; 0 if one of the vectors is zero.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: As `most_similar`.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b"], [[1.0, 0.0], [3.0, 4.0]]).similarity("a", "b")
          0.6000000238418579
        """
        (left, right), _ = self._directions("embax.Vectors.similarity(a=..., b=...)", [a, b])
        return float(left @ right)

    def doesnt_match(self, tokens: Iterable[str]) -> str:
        """Return the token whose direction is farthest from the mean of all.

        Args:
          tokens: Two or more tokens.

        Returns:
          One of the tokens.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: If no token is given, or a vector has NaN or infinity.

        Example:
          >>> import embax
          >>> vectors = embax.Vectors(["king", "queen", "fish"], [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
          >>> vectors.doesnt_match(["king", "fish", "queen"])
          'fish'
        """
        tokens = as_list(tokens)
        if not tokens:
            raise ValueError("`embax.Vectors.doesnt_match(tokens=...)` must name tokens, got none. Pass some.")
        directions, _ = self._directions("embax.Vectors.doesnt_match(tokens=...)", tokens)
        mean = _nearest.unit_rows(directions.mean(axis=0, keepdims=True))[0]
        return tokens[int(np.argmin(directions @ mean))]

    def _at_most_all(self, argument: str, k: object) -> int:
        """Check `k`, and limit it to the number of tokens, since memory is allocated for each answer."""
        return min(_check.size(argument, k), len(self))

    def _named(self, rows: np.ndarray, scores: np.ndarray) -> list[list[tuple[str, float]]]:
        """Convert the rows that each query found to tokens, without unused places."""
        return [
            list(zip(self.vocabulary.tokens(found[found >= 0]), of_found[found >= 0].tolist(), strict=True))
            for found, of_found in zip(rows, scores, strict=True)
        ]

    def _directions(self, call: str, queries: Sequence[Query]) -> tuple[np.ndarray, np.ndarray]:
        return directions_of(call, self, self._unit, queries)

    def _say_what_is_not_finite(self, name: str) -> None:
        if not self._said:
            self._said = True
            warn_of_not_finite(name, self.weight)

    @functools.cached_property
    def _unit(self) -> Float32[np.ndarray, "rows dim"]:
        self._say_what_is_not_finite("embax.Vectors")
        return _nearest.unit_rows(self.weight)

    @functools.cached_property
    def _approximate(self) -> "Approximate":
        from ._approximate import Approximate

        return Approximate.beside(self._path, self._unit, self.weight)
