"""Files of tokens that lie beside a table of vectors: lists, JSON, parquet and Hugging Face tokenizers."""

import contextlib
import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from ..._base.text.escapes import encoded
from ..._base.text.strings import offsets_of
from .._io.contents import Options
from .._io.encodings import decoded, is_utf8
from .._io.open import Source, opened
from .._lines.line_ends import with_ends_normalized, without_mark
from .parquet import read_tokens

# The vocabulary of a safetensors file is the first of these in its folder.
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")
# Hugging Face's names of special tokens, and embax's names of their roles.
ROLES = {
    "pad_token": "padding",
    "unk_token": "unknown",
    "cls_token": "classification",
    "sep_token": "separator",
    "mask_token": "mask",
    "bos_token": "beginning",
    "eos_token": "end",
}


class Listed(NamedTuple):
    """The tokens of a vocabulary file."""

    path: str
    text: bytes  # the tokens, one after the other, in UTF-8 except tokens that were invalid in the encoding
    offsets: Int64[np.ndarray, " tokens_and_1"]  # where each token begins, and where the last one ends
    ids: Int64[np.ndarray, " tokens"]  # the row of each token, rising
    special: dict[str, int]  # the rows of special tokens by role, such as "padding"

    def first(self, number: int) -> "Listed":
        """Return the first tokens only."""
        ids, offsets = self.ids[:number], self.offsets[: number + 1]
        special = {role: row for role, row in self.special.items() if row in ids}
        return Listed(self.path, self.text[: offsets[-1]], offsets, ids, special)


def tokenizer_beside(source: Source, options: Options) -> Listed | None:
    """Read the vocabulary of the tokenizer in the folder of a file.

    The roles of special tokens ("padding", "unknown", "classification", "separator", "mask", "beginning" and "end") are
    read from `special_tokens_map.json` and `tokenizer_config.json`, if these exist. A tokenizer.json alone has only the
    roles "padding" and "unknown".

    Args:
      source: The file.
      options: The options of the caller; a vocab.txt is in their encoding.

    Returns:
      The vocabulary, or None if there is no such file.

    Raises:
      FormatError: If one of the files is damaged.
    """
    beside = next(filter(None, map(source.beside, TOKENIZERS)), None)
    if beside is None:
        return None
    listed = read_vocabulary(beside, options)
    tokens = _tokens_of_roles(source)
    rows = {token: int(row) for token, row in zip(_split(listed), listed.ids, strict=True) if token in tokens}
    return listed._replace(special=listed.special | {tokens[token]: row for token, row in rows.items()})


def read_vocabulary(path: str, options: Options) -> Listed:
    """Read a file of tokens.

    Args:
      path: The file. By its suffix: `.json` (a list of tokens, an object of tokens and their rows, or a Hugging Face
        tokenizer) or `.parquet` (the column named token, word or index, or else the only one of strings). All other
        files are text with one token in each line.
      options: The options of the caller; text is in their encoding.

    Returns:
      The tokens.

    Raises:
      FormatError: If the file is damaged.
      OSError: If it cannot be opened.
    """
    with opened(path) as source:
        if path.lower().endswith(".json"):
            listed = _of_json(source)
            text, offsets = decoded(source, listed.text, listed.offsets, "utf-8", options.errors)
            return listed._replace(text=text, offsets=offsets)
        if path.lower().endswith(".parquet"):
            text, offsets = read_tokens(source)
            return Listed(path, text, offsets, np.arange(len(offsets) - 1), {})
        return _of_lines(source, options)


def _of_lines(source: Source, options: Options) -> Listed:
    data, encoding = source.read_all(), options.encoding
    if not is_utf8(encoding):
        try:
            data, encoding = data.decode(encoding).encode(), "utf-8"
        except UnicodeError:  # `decoded` will decode the tokens one by one
            pass
        except LookupError:
            raise source.error(
                f"cannot be decoded, as {encoding!r} is no encoding. Pass one such as 'latin-1'."
            ) from None
    # Only line feeds end a line: other separators, such as U+2028, occur in tokens.
    text = without_mark(data).replace(b"\r\n", b"\n")
    text = with_ends_normalized(text)
    letters = np.frombuffer(text if text.endswith(b"\n") or not text else text + b"\n", np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    # In the text without line feeds, each end moves forward by the number of line feeds before it.
    offsets = np.concatenate([np.zeros(1, np.int64), ends - np.arange(len(ends))])
    text, offsets = decoded(source, text.replace(b"\n", b""), offsets, encoding, options.errors)
    return Listed(source.name, text, offsets, np.arange(len(ends)), {})


def _of_json(source: Source) -> Listed:
    found = _loaded(source)
    special: dict[str, str] = {}
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        pairs, special = _of_tokenizer(source, found)
    elif isinstance(found, dict):
        pairs = [(row, token) for token, row in found.items()]
    elif isinstance(found, list):
        return _of_list(source, found)
    else:
        raise source.error("holds neither a list of tokens, nor an object of tokens and their rows, nor a tokenizer.")
    rows = {token: row for row, token in pairs if isinstance(token, str)}
    roles = {role: rows[token] for role, token in special.items() if token in rows}
    return _listed(source, pairs)._replace(special=roles)


def _of_list(source: Source, tokens: list[Any]) -> Listed:
    stray = next((row for row, token in enumerate(tokens) if not isinstance(token, str)), None)
    if stray is not None:
        raise source.error(f"token {stray} must be a string, got {tokens[stray]!r:.60}.")
    return _joined(source, np.arange(len(tokens)), [_encoded(source, row, token) for row, token in enumerate(tokens)])


def _of_tokenizer(source: Source, found: dict[str, Any]) -> tuple[list[tuple[Any, Any]], dict[str, str]]:
    """Return the rows and tokens of a tokenizer.json, and its tokens by role."""
    model, added = found["model"], found.get("added_tokens") or []
    vocabulary = model.get("vocab")
    try:
        if isinstance(vocabulary, dict):
            pairs = [(row, token) for token, row in vocabulary.items()]
        else:  # a Unigram model: a list of tokens with their scores
            pairs = [(row, token) for row, (token, _) in enumerate(vocabulary)]
        pairs += [(token["id"], token["content"]) for token in added]
        special = {"unknown": model.get("unk_token"), "padding": (found.get("padding") or {}).get("pad_token")}
        if special["unknown"] is None and type(model.get("unk_id")) is int and isinstance(vocabulary, list):
            special["unknown"] = vocabulary[model["unk_id"]][0]
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        raise source.error("is no tokenizer: `model.vocab` or `added_tokens` are not as they should be.") from None
    return pairs, {role: token for role, token in special.items() if isinstance(token, str)}


def _tokens_of_roles(table: Source) -> dict[bytes, str]:
    """Return the roles of tokens, from the tokenizer's two files in the folder of the table."""
    found: dict[bytes, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second one overrides the first
        path = table.beside(name)
        if path is None:
            continue
        with opened(path) as source:
            entries = _loaded(source)
            if not isinstance(entries, dict):
                raise source.error("must hold a JSON object.")
        for key, role in ROLES.items():
            entry = entries.get(key)
            token = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(token, str):
                with contextlib.suppress(UnicodeEncodeError):  # text that cannot be encoded is no token
                    found[encoded(token)] = role
    return found


def _listed(source: Source, pairs: Iterable[tuple[Any, Any]]) -> Listed:
    """Check rows and tokens, and sort them by row."""
    tokens: dict[int, bytes] = {}
    for row, token in pairs:
        if type(row) is not int or not 0 <= row < 1 << 62 or not isinstance(token, str):
            raise source.error(f"must give tokens row numbers, got {token!r:.60} and {row!r:.60}.")
        text = _encoded(source, row, token)
        if tokens.setdefault(row, text) != text:
            raise source.error(
                f"gives row {row} to two tokens, {tokens[row].decode(errors='replace')!r:.60} and {token!r:.60}."
            )
    rows = sorted(tokens)
    return _joined(source, np.asarray(rows, np.int64), [tokens[row] for row in rows])


def _joined(source: Source, ids: np.ndarray, texts: list[bytes]) -> Listed:
    return Listed(source.name, b"".join(texts), offsets_of(texts), ids, {})


def _encoded(source: Source, row: int, token: str) -> bytes:
    try:
        return encoded(token)
    except UnicodeEncodeError:
        raise source.error(f"token {row} is not valid Unicode: {token!r:.60}.") from None


def _split(listed: Listed) -> list[bytes]:
    ends = listed.offsets.tolist()
    return [listed.text[begin:end] for begin, end in itertools.pairwise(ends)]


def _loaded(source: Source) -> Any:
    try:
        # A byte that is not UTF-8 is kept as a surrogate; `encoded` turns it back into the byte.
        return json.loads(without_mark(source.read_all()).decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise source.error(f"is no JSON ({str(error).rstrip('.')}).") from None
