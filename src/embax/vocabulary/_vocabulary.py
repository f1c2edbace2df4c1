"""Vocabulary: convert tokens to row numbers and back; tokens are kept in one buffer, not as Python objects."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, final, overload

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from numpy.typing import ArrayLike

from .._base import check as _check
from .._base.text import escapes as _escapes
from .._base.text import strings as _strings

# The first look-ups search the whole text. After about this many, making the index would have been cheaper.
_SEARCHES = 8
# `closest` compares the spelling of this many tokens, the first ones.
_COMPARED = 50_000

Unknown = Literal["error", "skip"] | int
Errors = Literal["strict", "replace", "escape"]


class UnknownTokenError(KeyError):
    """A token is not in the vocabulary; the message offers the closest spellings.

    Args:
      token: The token.
      closest: Tokens of the vocabulary with a similar spelling, the closest first.
    """

    def __init__(self, token: str, closest: Iterable[str] = ()):
        self.token = token
        self.closest = tuple(closest)
        super().__init__(token, self.closest)

    def __str__(self) -> str:
        closest = f" Closest spellings: {', '.join(map(quoted, self.closest))}." if self.closest else ""
        return f"{quoted(self.token)} is not in the vocabulary.{closest}"


@final
class Vocabulary:
    r"""Tokens, numbered from 0 in the order given.

    They are kept in one buffer of UTF-8, and found by hash: a million tokens take about 30 MB.

    A token from a file may have bytes that are not UTF-8, such as half a character. Its str has a surrogate for each of
    these bytes, ``\udcc3`` for 0xC3 (PEP 383); `token.encode(errors="surrogateescape")` returns the bytes. The formats
    of word2vec, GloVe and fastText are written with these bytes. All other files and the terminal get ``\xc3``, see
    `escaped`.

    Args:
      tokens: Any strings, without repetitions.
      special: Some of the tokens by their role, such as `{"padding": "[PAD]", "unknown": "[UNK]"}`.

    Raises:
      TypeError: If a token is not a string.
      ValueError: If a token occurs twice or is not valid Unicode, or a special token is not among the tokens.

    Example:
      >>> import embax
      >>> vocabulary = embax.Vocabulary(["[PAD]", "king", "queen"], special={"padding": "[PAD]"})
      >>> vocabulary
      Vocabulary(3 tokens, padding='[PAD]')
      >>> vocabulary.ids(["queen", "king"])
      array([2, 1])
      >>> vocabulary.tokens([1, 0])
      ['king', '[PAD]']
      >>> "queens" in vocabulary
      False
      >>> vocabulary.special["padding"]
      0
    """

    def __init__(self, tokens: Iterable[str], *, special: Mapping[str, str] | None = None):
        tokens = list(tokens)
        for row, token in enumerate(tokens):
            if not isinstance(token, str):
                raise TypeError(
                    f"`embax.Vocabulary(tokens=...)` must be strings, got {token!r} at position {row}. "
                    "Pass one str a token."
                )
        try:
            strings = _strings.packed([_escapes.encoded(token) for token in tokens])
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`embax.Vocabulary(tokens=...)` must be valid Unicode, got {error.object!r}. Replace surrogates."
            ) from None
        self._fill(strings, {})
        repeated = self.repeated()
        if repeated.any():
            twice = strings.decoded(int(repeated.argmax()))
            raise ValueError(f"`embax.Vocabulary(tokens=...)` must not repeat a token, got {twice!r} twice. Drop one.")
        for role, token in (special or {}).items():
            if token not in self:
                raise ValueError(
                    f"`embax.Vocabulary(special=...)` must name tokens of the vocabulary, got {token!r} for {role!r}. "
                    "Put it among the tokens."
                )
            self._special[role] = self.ids(token)

    @classmethod
    def from_utf8(
        cls,
        text: "bytes | UInt8[np.ndarray, ' bytes']",
        offsets: ArrayLike,
        *,
        special: Mapping[str, int] | None = None,
        errors: Errors = "strict",
    ) -> "Vocabulary":
        """Make a vocabulary from a buffer, without making Python objects of tokens.

        Tokens may occur several times; `ids` then finds the first one, and `repeated` marks the others.

        Args:
          text: The tokens in UTF-8, one after the other: bytes, or a uint8 array.
          offsets: Where each token begins, and where the last one ends, in bytes.
          special: The ids of special tokens, by role.
          errors: How to treat a token that is not UTF-8: `"strict"` raises an error, `"escape"` keeps its bytes,
            `"replace"` puts U+FFFD in place of undecodable bytes.

        Returns:
          The vocabulary.

        Raises:
          ValueError: If the offsets do not rise from 0 to the length of the text, or a special id has no token; with
            `errors="strict"`, if a token is not UTF-8.

        Example:
          >>> import embax
          >>> embax.Vocabulary.from_utf8(b"kingqueen", [0, 4, 9]).tokens()
          ['king', 'queen']
        """
        text = np.frombuffer(text, np.uint8)
        ends = np.asarray(offsets, np.int64)
        if ends.ndim != 1 or not ends.size or ends[0] or ends[-1] != text.size or (ends[1:] < ends[:-1]).any():
            raise ValueError(
                "`embax.Vocabulary.from_utf8(offsets=...)` must rise from 0 to the length of the text, "
                f"{text.size} bytes, got {ends}. Pass one a token, and the end."
            )
        _check.choice("embax.Vocabulary.from_utf8(errors=...)", errors, Errors)
        if errors != "escape" and (wrong := _escapes.rows_not_utf8(text, ends)).size:
            if errors == "strict":
                raise ValueError(_not_utf8(text, ends, wrong))
            data, ends = _escapes.respelled(text, ends, wrong, lambda token: token.decode(errors="replace"))
            text = np.frombuffer(data, np.uint8)
        vocabulary = object.__new__(cls)
        for role, row in (special or {}).items():
            if not 0 <= row < ends.size - 1:
                raise ValueError(
                    f"`embax.Vocabulary.from_utf8(special=...)` must be ids in [0, {ends.size - 1}), got {row} for "
                    f"{role!r}. Leave it out."
                )
        vocabulary._fill(_strings.Strings(_strings.padded(text), ends), dict(special or {}))
        return vocabulary

    def _fill(self, strings: _strings.Strings, special: dict[str, int]) -> None:
        self._strings, self._special = strings, special
        self._made_index: _strings.Index | None = None
        self._searches = 0

    @property
    def special(self) -> dict[str, int]:
        """The ids of special tokens, by role."""
        return dict(self._special)

    @property
    def utf8(self) -> tuple[UInt8[np.ndarray, " bytes"], Int64[np.ndarray, " number_and_1"]]:
        """The text and the offsets, as `from_utf8` takes them; do not write to them."""
        return self._strings.text[: self._strings.offsets[-1]], self._strings.offsets

    @overload
    def ids(self, tokens: str, unknown: Unknown = "error") -> int: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def ids(self, tokens: Iterable[str], unknown: Unknown = "error") -> Int64[np.ndarray, " tokens"]: ...
    def ids(self, tokens: str | Iterable[str], unknown: Unknown = "error") -> int | np.ndarray:
        """Return the ids of tokens.

        Args:
          tokens: One or more tokens.
          unknown: How to treat a token that is not in the vocabulary: `"error"`, `"skip"` to leave it out, or an id for
            it, such as -1.

        Returns:
          One id for each token, int64; an int for one token.

        Raises:
          UnknownTokenError: If a token is unknown, with `unknown="error"`; a KeyError.
          ValueError: If `unknown` is none of these, or is `"skip"` for a single token.
        """
        is_id = isinstance(unknown, int | np.integer) and not isinstance(unknown, bool)
        if not (is_id or unknown in ("error", "skip")) or (unknown == "skip" and isinstance(tokens, str)):
            raise ValueError(
                '`embax.Vocabulary.ids(unknown=...)` must be "error", "skip" (for several tokens) or an id, got '
                f"{unknown!r}. Pass one of these."
            )
        wanted = [tokens] if isinstance(tokens, str) else list(tokens)
        found = self._find(wanted)
        missing = found < 0
        if missing.any():
            if unknown == "error":
                token = wanted[int(missing.argmax())]
                raise UnknownTokenError(token, self.closest(token))
            found = found[~missing] if unknown == "skip" else np.where(missing, int(unknown), found)
        return int(found[0]) if isinstance(tokens, str) else found

    @overload
    def tokens(self, ids: int) -> str: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def tokens(self, ids: ArrayLike | None = None) -> list[str]: ...
    def tokens(self, ids: ArrayLike | None = None) -> str | list[str]:
        """Return the tokens of ids.

        Args:
          ids: One or more ids in `[0, len(vocabulary))`. Default: all of them in order.

        Returns:
          One token for each id; a str for one id.

        Raises:
          TypeError: If the ids are not integers.
          IndexError: If an id is out of range.
        """
        text, offsets = self._strings.text.data, self._strings.offsets
        if ids is None:
            ends = offsets.tolist()
            return [str(text[ends[row] : ends[row + 1]], "utf-8", "surrogateescape") for row in range(len(self))]
        rows = np.asarray(ids) if np.size(ids) else np.zeros(0, np.int64)
        if not np.issubdtype(rows.dtype, np.integer) or rows.ndim > 1:
            raise TypeError(
                f"`embax.Vocabulary.tokens(ids=...)` must be integers, one or along one axis, got {rows.dtype} of "
                f"shape {rows.shape}. Flatten and cast them."
            )
        bad = (rows < 0) | (rows >= len(self))
        if bad.any():
            raise IndexError(
                f"`embax.Vocabulary.tokens(ids=...)` must be in [0, {len(self)}), got {rows[bad].flat[0]}. "
                "Leave it out."
            )
        if rows.ndim == 0:
            return self._strings.decoded(int(rows))
        starts, ends = offsets[rows].tolist(), offsets[rows + 1].tolist()
        return [str(text[start:end], "utf-8", "surrogateescape") for start, end in zip(starts, ends, strict=True)]

    def repeated(self) -> Bool[np.ndarray, " number"]:
        """Which tokens occurred before, which only `from_utf8` allows."""
        return ~_strings.first_of_each(self._index, self._strings)

    def take(self, ids: Int64[np.ndarray, " some"]) -> "Vocabulary":
        """Make a vocabulary of some of the tokens, in the order of the ids; special tokens stay special."""
        vocabulary = object.__new__(Vocabulary)
        numbers = {int(old): new for new, old in enumerate(ids)} if self._special else {}
        special = {role: numbers[old] for role, old in self._special.items() if old in numbers}
        vocabulary._fill(_strings.taken(self._strings, np.asarray(ids, np.int64)), special)
        return vocabulary

    def escaped(self) -> "Vocabulary":
        r"""Return the same tokens as text: with ``\xNN`` in place of each byte that is not UTF-8.

        Returns:
          The vocabulary; itself if all tokens are UTF-8.

        Raises:
          ValueError: If another token already has such a spelling.

        Example:
          >>> import embax
          >>> vocabulary = embax.Vocabulary.from_utf8(b"cafecaf\xc3", [0, 4, 8], errors="escape")
          >>> vocabulary.tokens()
          ['cafe', 'caf\udcc3']
          >>> print(*vocabulary.escaped().tokens())
          cafe caf\xc3
        """
        text, offsets = self.utf8
        wrong = _escapes.rows_not_utf8(text, offsets)
        if not wrong.size:
            return self
        data, ends = _escapes.respelled(
            text, offsets, wrong, lambda token: _escapes.spelled_out(_escapes.decoded(token))
        )
        vocabulary = Vocabulary.from_utf8(data, ends, special=self._special)
        alike = np.flatnonzero(vocabulary.repeated() & ~self.repeated())
        if alike.size:
            raise ValueError(
                "`embax.Vocabulary` must have no token that is spelled as another one with bytes that are not UTF-8, "
                f"got {vocabulary.tokens(int(alike[0]))!r} twice. Leave one out, or load with errors='replace'."
            )
        return vocabulary

    def closest(self, token: str, k: int = 5) -> list[str]:
        """Return tokens with a similar spelling, the closest first, among the first 50,000.

        Case does not matter: "King" finds "king".
        """
        lengths = np.diff(self._strings.offsets[: _COMPARED + 1])
        size = len(token.encode(errors="replace"))
        # A token whose length is outside this range cannot reach the similarity of 0.6.
        alike = np.flatnonzero((lengths * 7 >= size * 3) & (lengths * 3 <= size * 7))
        lowered = {known.lower(): known for known in reversed(self.tokens(alike))}
        return [lowered[match] for match in difflib.get_close_matches(token.lower(), lowered, n=k, cutoff=0.6)]

    def __len__(self) -> int:
        return self._strings.number

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str) and bool(self._find([token])[0] >= 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tokens())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._special == other._special and all(map(np.array_equal, self.utf8, other.utf8))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        special = "".join(f", {role}={self.tokens(row)!r}" for role, row in self._special.items())
        return f"Vocabulary({len(self)} tokens{special})"

    @property
    def _index(self) -> _strings.Index:
        if self._made_index is None:
            self._made_index = _strings.indexed(self._strings)
        return self._made_index

    def _find(self, tokens: list[str]) -> Int64[np.ndarray, " tokens"]:
        try:
            encoded = [token.encode() for token in tokens]
        except UnicodeEncodeError:
            return self._find_escaped(tokens)
        return self._find_encoded(encoded)

    def _find_escaped(self, tokens: list[str]) -> Int64[np.ndarray, " tokens"]:
        """Find tokens, some with surrogates; a surrogate that stands for no byte is in no token."""
        encoded: list[bytes] = []
        exists = np.ones(len(tokens), bool)
        for place, token in enumerate(tokens):
            try:
                encoded.append(_escapes.encoded(token))
            except UnicodeEncodeError:
                encoded.append(b"")
                exists[place] = False
        return np.where(exists, self._find_encoded(encoded), -1)

    def _find_encoded(self, encoded: list[bytes]) -> Int64[np.ndarray, " tokens"]:
        if self._made_index is None and self._searches + len(encoded) <= _SEARCHES:
            self._searches += len(encoded)
            return np.asarray([self._search(token) for token in encoded], np.int64)
        return _strings.find(self._index, self._strings, _strings.packed(encoded))

    def _search(self, token: bytes) -> int:
        """Find one token by searching the text: for a few tokens, this is faster than making an index."""
        text, offsets = self._strings.text.tobytes(), self._strings.offsets
        if not token:
            empty = np.flatnonzero(offsets[1:] == offsets[:-1])
            return int(empty[0]) if empty.size else -1
        place = text.find(token)
        while place >= 0:
            row = int(np.searchsorted(offsets, place, side="right")) - 1
            if row < len(self) and offsets[row] == place and offsets[row + 1] - place == len(token):
                return row
            place = text.find(token, place + 1)
        return -1


def _not_utf8(text: np.ndarray, offsets: np.ndarray, rows: Int64[np.ndarray, " some"]) -> str:
    """An error message that names a token that is not UTF-8; best one that begins inside a character."""
    inside = rows[(text[offsets[rows]] & 0xC0) == 0x80]
    row = int((inside if inside.size else rows)[0])
    return f"token {row} is not UTF-8: {text[offsets[row] : offsets[row + 1]].tobytes()[:40]!r}"


def printable(token: str) -> str:
    r"""Escape control characters: terminals obey some of them, fonts lack them, and some reverse the text's direction.

    A byte that is not UTF-8 becomes `\xNN`.
    """
    token = _escapes.spelled_out(token)
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in token)


def quoted(token: str) -> str:
    """Quote a token for a message, with control characters escaped, since a terminal would obey them."""
    shown = _escapes.spelled_out(token)
    return f'"{shown}"' if shown.isprintable() else repr(token)
