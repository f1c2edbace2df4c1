"""Vectors: a vocabulary and a weight, with queries by token."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, final, overload

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy.typing import ArrayLike, DTypeLike

from .. import files
from .._base import check as _check
from .._core.table import Table
from ..files._io.open import split_path
from ..vocabulary import UnknownTokenError as UnknownTokenError
from ..vocabulary._vocabulary import Errors, Vocabulary
from . import _cosmul as _multiplied
from . import _nearest as _queries
from ._directions import NotFiniteWarning as NotFiniteWarning
from ._directions import (
    Query,
    as_list,
    directions_of,
    float_dtype,
    is_mapped,
    names_of,
    of_subwords,
    read_only,
    warn_of_not_finite,
)
from ._fill import Filled as Filled
from ._fill import Missing, filled
from ._fill import MissingTokensWarning as MissingTokensWarning

if TYPE_CHECKING:
    from ..files._formats.fasttext.subwords import Subwords
    from ._approximate import Approximate


@final
class Vectors:
    """One vector for each token of a vocabulary.

    `embax.Table(vectors.weight)`, or `vectors.to_table()`, is a table of them, with the row numbers that
    `vectors.vocabulary.ids(tokens)` gives.

    A vector of zeros has a cosine of 0 to every other. One that holds NaN or infinity has none: queries leave it out.

    Args:
      tokens: A Vocabulary, or the token of each row, no two the same.
      weight: One row a token, `(rows, dim)`; an array of floats keeps its dtype, all else becomes float32.
      counts: How often each token occurred in the text that it was learned from. Default: 0 each.
      subwords: fastText's n-grams, from a file that has them: they give tokens that are not in the vocabulary a vector.

    Raises:
      TypeError: If a token is not a string.
      ValueError: If the arguments differ in their number of rows, or a token occurs twice.

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

    def __init__(
        self,
        tokens: Vocabulary | Iterable[str],
        weight: ArrayLike,
        counts: ArrayLike | None = None,
        subwords: "Subwords | None" = None,
    ):
        self.vocabulary = tokens if isinstance(tokens, Vocabulary) else Vocabulary(tokens)
        rows = len(self.vocabulary)
        self.weight: Float[np.ndarray, "rows dim"] = read_only(weight, float_dtype(weight))
        self.counts: Int64[np.ndarray, " rows"] = read_only(np.zeros(rows) if counts is None else counts, np.int64)
        self.subwords = subwords
        self._said = False
        self._path: str | None = None
        if self.weight.ndim != 2 or self.weight.shape[0] != rows or self.counts.shape != (rows,):
            raise ValueError(
                f"`embax.Vectors(weight=..., counts=...)` must have one row and one count for each of {rows} tokens, "
                f"got shapes {self.weight.shape} and {self.counts.shape}. Pass (rows, dim) and (rows,)."
            )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        format: str | None = None,
        limit: int | None = None,
        dtype: DTypeLike | None = None,
        mmap: bool | None = None,
        *,
        encoding: str = "utf-8",
        errors: Errors = "escape",
        max_expansion: float = files.MAX_EXPANSION,
    ) -> "Vectors":
        """Read vectors from a file of any format that `embax.files` knows.

        The format is told by the file's content, not by its name. Files that gzip, xz, bz2 or zstd compressed, and zip
        and tar archives, are read as they are. A tensor of a safetensors file, and a file in an archive, is named after
        a colon: `model.safetensors:embeddings.word_embeddings.weight`.

        Args:
          path: The file, or the folder of a Hugging Face model; `-` is standard input, and a pipe is read, too.
          format: The name of the format, one of `embax.files.FORMATS`. Default: that of the content.
          limit: Read the first rows only, as many.
          dtype: Convert the rows to this dtype of floats. Default: that of the file; float32 for text.
          mmap: Whether the rows are mapped into memory and read when they are used, which only files of arrays that
            need no conversion allow. Default: where they do.
          encoding: Of the tokens, where the format does not say.
          errors: What becomes of tokens that are not of the encoding, such as one cut inside a character: `"escape"`
            keeps their bytes, as `Vocabulary` says, so that the same format is written with the same bytes, `"replace"`
            puts U+FFFD for what cannot be decoded, `"strict"` raises an error. A warning counts them.
          max_expansion: How many times its size a compressed file may grow to; 16 MiB are always allowed.

        Returns:
          The vectors. Of tokens that the file has twice, the first; a warning counts the others.

        Raises:
          embax.files.FormatError: If the file is of no known format, truncated or corrupt, naming the place, or a token
            is not of the encoding and that is to be an error.
          ValueError: If an argument is not as above.
          OSError: If it cannot be opened or read.

        Example:
          See `save`.
        """
        contents = files.load(
            path,
            format=format,
            limit=limit,
            dtype=dtype,
            mmap=mmap,
            encoding=encoding,
            errors=errors,
            max_expansion=max_expansion,
        )
        vectors = cls(*contents)
        vectors._path = None if files.is_stream(split_path(path)[0]) else os.fspath(path)
        if not is_mapped(vectors.weight):  # of which nothing is read before it is used
            vectors._say_what_is_not_finite(os.fspath(path))
        return vectors

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write the vectors to a file, which takes the place of an older one when it is whole.

        Args:
          path: The destination. `-` is standard output; that, a pipe or a device is written to as it is.
          format: The name of a format, one of `embax.files.FORMATS`. Default: by the suffix: `.safetensors`, or none,
            for the package's own, which keeps all; `.txt` and `.vec` for word2vec's text, `.bin` for its binary form,
            `.npy`, `.parquet`, `.arrow`. What is no plain file and has no suffix needs one.

        Raises:
          ValueError: If the suffix is of no format, or missing where it is needed, or the format cannot hold these
            vectors.
          OSError: If the file cannot be written.

        Example:
          >>> import embax, pathlib, tempfile
          >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.safetensors")
          >>> embax.Vectors(["king", "queen"], [[1.0, 0.0], [0.0, 1.0]]).save(path)
          >>> embax.Vectors.load(path)["queen"]
          array([0., 1.], dtype=float32)
        """
        files.save(path, files.Contents(self.vocabulary, self.weight, self.counts, self.subwords), format=format)

    def most_similar(
        self, positive: Query, negative: Query = (), k: int = 10, *, approx: bool = False
    ) -> list[tuple[str, float]]:
        """Find the tokens nearest in direction to a sum of tokens.

        `cos(weight[i], sum_p unit(weight[p]) - sum_n unit(weight[n]))`

        Args:
          positive: Tokens or vectors that are added, or one.
          negative: Tokens or vectors that are subtracted, or one.
          k: How many to return, where there are as many.
          approx: Whether to ask an index instead of all rows, as in `most_similar_batch`.

        Returns:
          Tokens and their cosines, the nearest first; the tokens asked for are left out.

        Raises:
          UnknownTokenError: If there is no vector of one of the tokens; a KeyError.
          ValueError: If no token is given, `k` is negative, or a vector holds NaN or infinity.

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
          k: How many to return for each, where there are as many.
          approx: Whether to ask an index of usearch's instead of comparing with all rows: a few in a thousand of the
            nearest may be missed. It is made at first use, which takes minutes for a million rows, unless `save_index`
            has left one beside the file that the vectors were loaded from. Needs `embax[approximate]`.

        Returns:
          For each query the tokens and their cosines, as `most_similar`.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: As `most_similar`.
          ImportError: If `approx` is asked for and usearch is not installed.

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
            rows, cosines = _queries.nearest(self._unit, directions, k, asked)
        return self._named(rows, cosines)

    def save_index(self, path: str | os.PathLike[str] | None = None) -> str:
        """Save the index of `approx=True` beside the file of the vectors, where later runs find it.

        Args:
          path: The file of the vectors. Default: the one that they were loaded from.

        Returns:
          The file of the index, `<file>.usearch`.

        Raises:
          ImportError: If usearch is not installed.
          OSError: If the file cannot be written.
          ValueError: If the vectors were loaded from no file, and none is named.
        """
        path = self._path if path is None else os.fspath(path)
        if path is None or files.is_stream(path):
            raise ValueError(
                "`embax.Vectors.save_index(path=...)` must name the file of the vectors where they were loaded from "
                f"none, got {path!r}. Save them, and pass that file."
            )
        from ._approximate import beside

        self._approximate.save(path, self.weight)
        return beside(path)

    def analogy(
        self, a: str, b: str, c: str, k: int = 10, *, method: Literal["add", "mul"] = "add"
    ) -> list[tuple[str, float]]:
        """Answer "a is to b as c is to what?": man is to king as woman is to queen.

        `"add"`, 3CosAdd: `cos(x, b) - cos(x, a) + cos(x, c)`, given as the cosine to the sum of directions.
        `"mul"`, 3CosMul: `cos(x, b) cos(x, c) / (cos(x, a) + 1e-6)`, of cosines moved to `[0, 1]`.

        Args:
          a: The first token of the pair that is known.
          b: The second one.
          c: The first token of the pair whose second one is asked for.
          k: How many to return, where there are as many.
          method: How they are ranked.

        Returns:
          Tokens and what they are ranked by, the best first; the three themselves are left out.

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
            return self._named(*_queries.nearest(self._unit, directions, k, asked))[0]
        directions, asked = self._directions(call, [a, b, c])
        of_a, of_b, of_c = directions[:, None]
        return self._named(*_multiplied.best(self._unit, (of_b, of_c), of_a, k, asked.reshape(1, 3)))[0]

    def similarity(self, a: Query, b: Query) -> float:
        """Return the cosine of two tokens, or of two sums of tokens.

        Args:
          a: A token, a vector, or a list of them.
          b: The same.

        Returns:
          A number in `[-1, 1]`; 0 where one of them is zero.

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
        """Return the token that is farthest in direction from the mean of all.

        Args:
          tokens: Two or more.

        Returns:
          One of them.

        Raises:
          UnknownTokenError: As `most_similar`.
          ValueError: If there is none, or a vector holds NaN or infinity.

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
        mean = _queries.unit_rows(directions.mean(axis=0, keepdims=True))[0]
        return tokens[int(np.argmin(directions @ mean))]

    def normalized(self) -> "Vectors":
        """Return the same directions with vectors of length 1, in float32; vectors of zeros stay.

        fastText's n-grams are kept: the vectors that they give have length 1, too.
        """
        subwords = None if self.subwords is None else self.subwords.normalized()
        return Vectors(self.vocabulary, self._unit, self.counts, subwords)

    def subset(self, tokens: Iterable[str]) -> "Vectors":
        """Return the vectors of some tokens, in the order given.

        Args:
          tokens: Tokens of the vocabulary, no two the same.

        Returns:
          Their vectors.

        Raises:
          UnknownTokenError: If the vocabulary does not have one of them; a KeyError.
          ValueError: If a token is given twice.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b", "c"], [[1.0], [2.0], [3.0]]).subset(["c", "a"]).weight.tolist()
          [[3.0], [1.0]]
        """
        rows = self.vocabulary.ids(list(tokens))
        vocabulary = self.vocabulary.take(rows)
        repeated = vocabulary.repeated()
        if repeated.any():
            twice = vocabulary.tokens(int(repeated.argmax()))
            raise ValueError(f"`embax.Vectors.subset(tokens=...)` must not repeat a token, got {twice!r} twice.")
        return Vectors(vocabulary, self.weight[rows], self.counts[rows], self.subwords)

    def to_table(self, **rules: Any) -> Table:
        """Return a table of the vectors.

        Args:
          **rules: As in `embax.Table`. Where the vocabulary has a padding token, it is the padding row by default.

        Returns:
          The table; its weight is a JAX array.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b"], [[1.0], [2.0]]).to_table(freeze=True)
          Table(float32[2,1], freeze=True)
        """
        import jax.numpy as jnp

        return Table(jnp.asarray(self.weight), **{"padding_idx": self.vocabulary.special.get("padding"), **rules})

    def fill(
        self,
        tokens: Vocabulary | Iterable[str],
        missing: Missing = "mean",
        *,
        seed: int = 0,
    ) -> Filled:
        """Make a weight for another vocabulary, such as a model's own.

        Args:
          tokens: The other vocabulary, or its tokens. Its padding token, if it has one, gets zeros.
          missing: What a token gets that has no vector: the mean of all vectors, normal random numbers with the mean
            and the standard deviation of each column, zeros, or an error. Tokens that fastText's n-grams give a vector
            are not missing.
          seed: Of the random numbers.

        Returns:
          The weight, the tokens that were missing, and how many were found.

        Raises:
          UnknownTokenError: If a token is missing and that is to be an error; a KeyError.
          ValueError: If `missing` is none of these.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b"], [[1.0], [3.0]]).fill(["b", "c"])
          Filled(weight=array([[3.],
                 [2.]], dtype=float32), missing=('c',), found=1)
        """
        return filled(self, tokens, missing, seed)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __contains__(self, token: object) -> bool:
        return token in self.vocabulary

    def __iter__(self) -> Iterator[str]:
        return iter(self.vocabulary)

    @overload
    def __getitem__(self, tokens: str) -> Float[np.ndarray, " dim"]: ...
    @overload
    def __getitem__(self, tokens: Iterable[str]) -> Float[np.ndarray, "tokens dim"]: ...
    def __getitem__(self, tokens: Any) -> Any:
        names = names_of(tokens)
        rows = self.vocabulary.ids(names, unknown=-1)
        found = self.weight[np.maximum(rows, 0)] if len(self) else np.zeros((len(names), self.weight.shape[1]))
        unknown = np.flatnonzero(rows < 0)
        if unknown.size:
            found = np.array(found, self.weight.dtype)
            found[unknown] = of_subwords(self, [names[row] for row in unknown])
        return read_only(found[0] if isinstance(tokens, str) else found, found.dtype)

    def __repr__(self) -> str:
        return f"Vectors({len(self)} tokens, dim={self.weight.shape[1]})"

    def _at_most_all(self, argument: str, k: object) -> int:
        """Check how many tokens are asked for: where there are fewer, all, since memory is taken for each."""
        return min(_check.size(argument, k), len(self))

    def _named(self, rows: np.ndarray, scores: np.ndarray) -> list[list[tuple[str, float]]]:
        """Name the rows that each query found, and leave out the places left over."""
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
        return _queries.unit_rows(self.weight)

    @functools.cached_property
    def _approximate(self) -> "Approximate":
        from ._approximate import Approximate

        return Approximate.beside(self._path, self._unit, self.weight)
