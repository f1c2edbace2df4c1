"""Vectors: a vector for each token of a vocabulary, with queries by token."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final, overload

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike, DTypeLike

from .. import files
from .._base.arrays import as_jax
from .._core.table import Table
from ..files._io.open import split_path
from ..files._load import Asked, read
from ..vocabulary import UnknownTokenError as UnknownTokenError
from ..vocabulary._vocabulary import Errors, Vocabulary
from ._directions import NotFiniteWarning as NotFiniteWarning
from ._directions import (
    float_dtype,
    is_mapped,
    names_of,
    of_subwords,
    read_only,
)
from ._fill import Filled as Filled
from ._fill import Missing, filled
from ._fill import MissingTokensWarning as MissingTokensWarning
from ._queries import Queries

if TYPE_CHECKING:
    from ..files._formats.fasttext.subwords import Subwords


@final
class Vectors(Queries):
    """One vector for each token of a vocabulary.

    `vectors.to_table()`, or `embax.Table(vectors.weight)`, is a table of the vectors; `vectors.vocabulary.ids(tokens)`
    are its row numbers.

    A vector of zeros has the cosine 0 to every other. A vector with NaN or infinity is left out of queries.

    Args:
      tokens: A Vocabulary, or the token of each row, without repetitions.
      weight: One row for each token, `(rows, dim)`; a float array keeps its dtype, anything else becomes float32.
      counts: How often each token occurred in the training text. Default: 0 for each.
      subwords: The n-grams of a fastText file, which give a vector to tokens that are not in the vocabulary.
      metadata: How the vectors were made, in strings by name, such as the engine that trained them. `.safetensors`
        files keep it.

    Raises:
      TypeError: If a token is not a string.
      ValueError: If the arguments have different numbers of rows, or a token occurs twice.

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
        metadata: Mapping[str, str] | None = None,
    ):
        self.vocabulary = tokens if isinstance(tokens, Vocabulary) else Vocabulary(tokens)
        rows = len(self.vocabulary)
        self.weight: Float[np.ndarray, "rows dim"] = read_only(weight, float_dtype(weight))
        self.counts: Int64[np.ndarray, " rows"] = read_only(np.zeros(rows) if counts is None else counts, np.int64)
        self.subwords = subwords
        self.metadata = dict(metadata or {})
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
        """Read vectors from a file of any format that `embax.files` supports.

        The format is recognised by the file's content, not by its name. Files compressed by gzip, xz, bz2 or zstd, and
        zip and tar archives, are read directly. Append a colon and a name to read one tensor of a safetensors file, or
        one file of an archive: `model.safetensors:embeddings.word_embeddings.weight`.

        Args:
          path: The file, or the folder of a Hugging Face model; `-` is standard input. Pipes can be read, too.
          format: The name of the format, one of `embax.files.FORMATS`. Default: recognised by content.
          limit: Read only the first `limit` rows.
          dtype: A float dtype to convert the rows to. Default: the file's; float32 for text.
          mmap: Whether to map the rows into memory, and read them when they are used. Possible only for files of arrays
            that need no conversion. Default: if possible.
          encoding: The encoding of the tokens, if the format does not define it.
          errors: How to treat tokens that are not of the encoding, such as one cut inside a character. `"escape"` keeps
            their bytes, see `Vocabulary`, so that saving writes the same bytes; `"replace"` puts U+FFFD in place of
            undecodable bytes; `"strict"` raises an error. A warning counts such tokens.
          max_expansion: How many times its size a compressed file may expand to; 16 MiB are always allowed.

        Returns:
          The vectors. If the file has a token several times, the first one; a warning counts the others.

        Raises:
          embax.files.FormatError: If the file is of no known format, truncated or corrupt, naming the position; with
            `errors="strict"`, if a token is not of the encoding.
          ValueError: If an argument is not as above.
          OSError: If the file cannot be opened or read.

        Example:
          See `save`.
        """
        asked = Asked(format, limit, dtype, mmap, encoding, errors, max_expansion)
        vectors = cls(*read(path, asked)[1])
        vectors._path = None if files.is_stream(split_path(path)[0]) else os.fspath(path)
        if not is_mapped(vectors.weight):  # a mapped file should not be read before it is used
            vectors._say_what_is_not_finite(os.fspath(path))
        return vectors

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write the vectors to a file; an older file is replaced when the new one is complete.

        Args:
          path: The destination. `-` is standard output. Standard output, pipes and devices are written to directly.
          format: The name of a format, one of `embax.files.FORMATS`. Default: by suffix. `.safetensors`, or no suffix,
            is the package's own format, which keeps everything; `.txt` and `.vec` are word2vec's text, `.bin` is its
            binary form; also `.npy`, `.parquet`, `.arrow`. Required for a pipe or device without a suffix.

        Raises:
          ValueError: If the suffix belongs to no format, or is missing for a pipe or device, or the format cannot hold
            these vectors.
          OSError: If the file cannot be written.

        Example:
          >>> import embax, pathlib, tempfile
          >>> path = pathlib.Path(tempfile.mkdtemp(), "vectors.safetensors")
          >>> embax.Vectors(["king", "queen"], [[1.0, 0.0], [0.0, 1.0]]).save(path)
          >>> embax.Vectors.load(path)["queen"]
          array([0., 1.], dtype=float32)
        """
        contents = files.Contents(self.vocabulary, self.weight, self.counts, self.subwords, self.metadata)
        files.save(path, contents, format=format)

    def normalized(self) -> "Vectors":
        """Return the vectors scaled to length 1, in float32; vectors of zeros stay zero.

        fastText's n-grams are kept; the vectors that they give have length 1, too.
        """
        subwords = None if self.subwords is None else self.subwords.normalized()
        return Vectors(self.vocabulary, self._unit, self.counts, subwords, self.metadata)

    def subset(self, tokens: Iterable[str]) -> "Vectors":
        """Return the vectors of some tokens, in the order given.

        Args:
          tokens: Tokens of the vocabulary, without repetitions.

        Returns:
          Their vectors.

        Raises:
          UnknownTokenError: If the vocabulary lacks a token; a KeyError.
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
        return Vectors(vocabulary, self.weight[rows], self.counts[rows], self.subwords, self.metadata)

    def to_table(self, **rules: Any) -> Table:
        """Return a table of the vectors.

        Args:
          **rules: As in `embax.Table`. The vocabulary's padding token, if it has one, is the default padding row.

        Returns:
          The table; its weight is a JAX array.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b"], [[1.0], [2.0]]).to_table(freeze=True)
          Table(float32[2,1], freeze=True)
        """
        return Table(as_jax(self.weight), **{"padding_idx": self.vocabulary.special.get("padding"), **rules})

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
          missing: The row of a token without a vector. `"mean"`: the mean of all vectors. `"random"`: normal random
            numbers with the mean and the standard deviation of each column. `"zero"`: zeros. `"error"`: raise an error.
            A token with a vector from fastText's n-grams is not missing.
          seed: The seed of the random numbers.

        Returns:
          The weight, the missing tokens, and the number of tokens found.

        Raises:
          UnknownTokenError: If a token is missing, with `missing="error"`; a KeyError.
          ValueError: If `missing` is none of these.

        Example:
          >>> import embax
          >>> embax.Vectors(["a", "b"], [[1.0], [3.0]]).fill(["b", "c"])
          Filled(weight=array([[3.],
                 [2.]], dtype=float32), missing=('c',), found=1)
        """
        return filled(self, tokens, missing, seed)

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
