"""Evaluation of word vectors: by analogies, and by the agreement of cosines with human judgement."""

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from ._base import check as _check
from .files._io.error import FormatError
from .files._io.open import opened
from .files._lines.line_ends import with_ends_normalized, without_mark
from .vectors import _cosmul as _multiplied
from .vectors import _nearest as _queries

if TYPE_CHECKING:
    from .vectors import Vectors

# As in gensim, the first of the five best answers that is none of the question's words counts.
_ANSWERS = 5


class Section(NamedTuple):
    """The result for the analogies of one kind."""

    name: str  # as in the file
    correct: int  # questions solved
    total: int  # questions whose words are all in the vocabulary


@dataclass(frozen=True)
class AnalogyReport:
    """The result of `analogies`.

    Args:
      sections: One result for each section, in the file's order.
      skipped: The number of questions with a word that is not in the vocabulary; they do not count.
    """

    sections: tuple[Section, ...]
    skipped: int

    @property
    def total(self) -> int:
        """The number of questions, without skipped ones."""
        return sum(section.total for section in self.sections)

    @property
    def correct(self) -> int:
        """The number of questions solved."""
        return sum(section.correct for section in self.sections)

    @property
    def accuracy(self) -> float:
        """The fraction of questions solved, in [0, 1]; NaN if all were skipped."""
        return self.correct / self.total if self.total else math.nan


@dataclass(frozen=True)
class PairReport:
    """The result of `word_pairs`.

    Args:
      spearman: The rank correlation, in [-1, 1]; NaN if all pairs are equally similar.
      pearson: The linear correlation, in [-1, 1]; NaN if all pairs are equally similar.
      pairs: The number of pairs compared.
      missing: The number of pairs with a word that is not in the vocabulary; they do not count.
    """

    spearman: float
    pearson: float
    pairs: int
    missing: int


def analogies(
    vectors: "Vectors",
    path: str | os.PathLike[str],
    restrict: int | None = 300_000,
    *,
    method: Literal["add", "mul"] = "add",
) -> AnalogyReport:
    r"""Solve analogies, "a is to b as c is to what?", and count the correct answers.

    `"add"`, 3CosAdd: the answer is the word with the highest `cos(x, b) - cos(x, a) + cos(x, c)`.
    `"mul"`, 3CosMul: with the highest `cos(x, b) cos(x, c) / (cos(x, a) + 1e-6)`, with cosines mapped to `[0, 1]`.

    Case is ignored: the first of several tokens that are equal in upper case represents all. The question's own words
    are not answers. For `"add"`, counts equal those of gensim's `evaluate_word_analogies`.

    Args:
      vectors: The vectors.
      path: A text file, plain or compressed, with four words on each line (a, b, c and the answer), in sections that
        begin with a line `: name`, such as word2vec's `questions-words.txt`.
      restrict: Use only the first `restrict` tokens, which are the most frequent ones in a sorted file. None: all.
      method: How answers are scored.

    Returns:
      Counts by section.

    Raises:
      embax.files.FormatError: If the file is not of this form, naming the line, or holds no question.
      OSError: If the file cannot be opened.
      TypeError: If `restrict` is not a whole number.
      ValueError: If `restrict` is negative, or the method is unknown.

    Example:
      >>> import embax, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "questions.txt")
      >>> size = path.write_text(": royals\nman king woman queen\n: fruit\napple apples pear pears\n")
      >>> vectors = embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])
      >>> report = embax.evaluate.analogies(vectors, path)
      >>> report.accuracy, report.skipped
      (1.0, 1)
      >>> report.sections[0]
      Section(name='royals', correct=1, total=1)

    References:
      Mikolov et al., Efficient Estimation of Word Representations in Vector Space, 2013,
      https://arxiv.org/abs/1301.3781; Levy & Goldberg, Linguistic Regularities in Sparse and Explicit Word
      Representations, 2014, https://aclanthology.org/W14-1618, equations 3 and 4.
    """
    _check.choice("embax.evaluate.analogies(method=...)", method, ("add", "mul"))
    restrict = _restricted("embax.evaluate.analogies(restrict=...)", restrict, vectors)
    return _solve(vectors, _read_questions(path), restrict, method)


def _solve(
    vectors: "Vectors", read: tuple[list[str], list[int], list[list[str]]], restrict: int, method: str
) -> AnalogyReport:
    names, of_section, questions = read
    unit = vectors.normalized().weight[:restrict]
    words, rows = _vocabulary(vectors, unit)
    asked = np.asarray([[rows.get(word, -1) for word in question] for question in questions], np.int64)
    known = np.flatnonzero((asked >= 0).all(axis=1))
    a, b, c, _ = asked[known].T
    if method == "add":
        found, _ = _queries.nearest(unit, unit[b] - unit[a] + unit[c], _ANSWERS, asked[known, :3])
    else:
        found, _ = _multiplied.best(unit, (unit[b], unit[c]), unit[a], _ANSWERS, asked[known, :3])
    correct, total = np.zeros(len(names), int), np.zeros(len(names), int)
    for place, answers in zip(known, found, strict=True):
        total[of_section[place]] += 1
        correct[of_section[place]] += _answer(answers, words, questions[place][:3]) == questions[place][3]
    sections = map(Section, names, correct.tolist(), total.tolist())
    return AnalogyReport(tuple(sections), len(questions) - known.shape[0])


def word_pairs(vectors: "Vectors", path: str | os.PathLike[str], restrict: int | None = 300_000) -> PairReport:
    r"""Compare cosines with human judgement of the similarity of two words.

    Case is ignored, as in `analogies`. The results equal those of gensim's `evaluate_word_pairs`.

    Args:
      vectors: The vectors.
      path: A text file, plain or compressed, with two words and a number on each line, separated by tabs or other white
        space, such as WordSim-353 and SimLex-999. Lines that begin with # are comments; the first other line may be a
        heading.
      restrict: Use only the first `restrict` tokens. None: all.

    Returns:
      Correlations and counts.

    Raises:
      embax.files.FormatError: If the file is not of this form, naming the line.
      OSError: If the file cannot be opened.
      TypeError: If `restrict` is not a whole number.
      ValueError: If `restrict` is negative, or fewer than two pairs are in the vocabulary.

    Example:
      >>> import embax, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.tsv")
      >>> size = path.write_text("cat\tdog\t7.5\ncat\tcar\t1.0\ndog\tcar\t2\n")
      >>> vectors = embax.Vectors(["cat", "dog", "car"], [[1.0, 0.2], [1.0, 0.3], [0.0, 1.0]])
      >>> report = embax.evaluate.word_pairs(vectors, path)
      >>> round(report.spearman, 3), report.pairs
      (1.0, 3)
    """
    restrict = _restricted("embax.evaluate.word_pairs(restrict=...)", restrict, vectors)
    pairs = _read_pairs(path)
    report = _compare(vectors, pairs, restrict)
    if report.pairs < 2:
        raise ValueError(
            "`embax.evaluate.word_pairs(path=...)` must name at least two pairs of words in the vocabulary, got "
            f"{report.pairs} of {len(pairs)} in {os.fspath(path)}. Pass pairs in the vectors' language."
        )
    return report


def _compare(vectors: "Vectors", pairs: list[tuple[str, str, float]], restrict: int) -> PairReport:
    from scipy import stats

    unit = vectors.normalized().weight[:restrict]
    _, rows = _vocabulary(vectors, unit)
    known = [(rows[a], rows[b], judged) for a, b, judged in pairs if a in rows and b in rows]
    if len(known) < 2:
        return PairReport(math.nan, math.nan, len(known), len(pairs) - len(known))
    left, right, judged = zip(*known, strict=True)
    cosines = _cosines(unit[list(left)], unit[list(right)])
    with warnings.catch_warnings():  # if all pairs are equally similar, the result is NaN
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        spearman, pearson = stats.spearmanr(judged, cosines), stats.pearsonr(judged, cosines)
    return PairReport(
        float(spearman.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        float(pearson.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        len(known),
        len(pairs) - len(known),
    )


class Questions:
    r"""Analogies or word pairs that are read once, and evaluate several vectors, such as those of each epoch.

    Args:
      path: A file for `analogies`, whose first line begins with a colon, or for `word_pairs`.

    Raises:
      embax.files.FormatError: If the file has neither form, naming the line.
      OSError: If the file cannot be opened.

    Example:
      >>> import embax, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "pairs.tsv")
      >>> size = path.write_text("cat\tdog\t7.5\ncat\tcar\t1.0\ndog\tcar\t2\n")
      >>> vectors = embax.Vectors(["cat", "dog", "car"], [[1.0, 0.2], [1.0, 0.3], [0.0, 1.0]])
      >>> questions = embax.evaluate.Questions(path)
      >>> round(questions(vectors).spearman, 3)
      1.0
    """

    def __init__(self, path: str | os.PathLike[str]):
        lines = (line.strip() for _, line in _lines(path))
        first = next((line for line in lines if line and not line.startswith("#")), "")
        self.path = os.fspath(path)
        self._analogies = _read_questions(path) if first.startswith(":") else None
        self._pairs = _read_pairs(path) if self._analogies is None else []
        if self._analogies is None and not self._pairs:
            raise FormatError(path, "holds no analogies and no word pairs.")

    def __call__(self, vectors: "Vectors", restrict: int | None = 300_000) -> AnalogyReport | PairReport:
        """Evaluate vectors.

        Args:
          vectors: The vectors.
          restrict: Use only the first `restrict` tokens. None: all.

        Returns:
          The report of `analogies` or of `word_pairs`. Without two known pairs, correlations are NaN.
        """
        restrict = _restricted("embax.evaluate.Questions(path)(restrict=...)", restrict, vectors)
        if self._analogies is not None:
            return _solve(vectors, self._analogies, restrict, "add")
        return _compare(vectors, self._pairs, restrict)


def _cosines(
    left: Float32[np.ndarray, "pairs dim"], right: Float32[np.ndarray, "pairs dim"]
) -> Float64[np.ndarray, " pairs"]:
    """Cosines in float64. Rows have length 1 only in float32, so they are divided by their lengths again."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)


def _restricted(argument: str, restrict: int | None, vectors: "Vectors") -> int:
    return (
        len(vectors.vocabulary) if restrict is None else min(_check.size(argument, restrict), len(vectors.vocabulary))
    )


def _vocabulary(vectors: "Vectors", unit: np.ndarray) -> tuple[list[str], dict[str, int]]:
    """The tokens in upper case, and the first row of each that has a vector."""
    words = [token.upper() for token in vectors.vocabulary.tokens(np.arange(unit.shape[0]))]
    finite = np.flatnonzero(np.isfinite(unit).all(axis=1))
    return words, {words[row]: row for row in reversed(finite.tolist())}


def _answer(rows: Int64[np.ndarray, " answers"], words: list[str], question: list[str]) -> str | None:
    """The first answer that is not a word of the question; the last one if all are."""
    answers = [words[row] for row in rows if row >= 0]
    return next((word for word in answers if word not in question), answers[-1] if answers else None)


def _read_questions(path: str | os.PathLike[str]) -> tuple[list[str], list[int], list[list[str]]]:
    """The names of sections, and for each question its section and its four words in upper case."""
    names: list[str] = []
    of_section: list[int] = []
    questions: list[list[str]] = []
    for number, line in _lines(path):
        if line.startswith(":"):
            names.append(line.lstrip(": ").strip())
            continue
        words = line.upper().split()
        if words and not names:
            raise FormatError(path, f'line {number} must be a section\'s name, such as ": name", got {line[:60]!r}.')
        if words and len(words) != 4:
            raise FormatError(path, f"line {number} must be four words, got {line[:60]!r}.")
        if words:
            questions.append(words)
            of_section.append(len(names) - 1)
    if not questions:
        raise FormatError(path, "holds no question.")
    return names, of_section, questions


def _read_pairs(path: str | os.PathLike[str]) -> list[tuple[str, str, float]]:
    """Two words in upper case and the human judgement, for each pair."""
    pairs: list[tuple[str, str, float]] = []
    may_be_heading = True
    for number, line in _lines(path):
        if line.startswith("#") or not line.strip():
            continue
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        try:
            a, b, judged = fields[0].upper(), fields[1].upper(), float(fields[2])
            if len(fields) != 3 or not math.isfinite(judged):
                raise ValueError
            pairs.append((a, b, judged))
        except (ValueError, IndexError):
            if not may_be_heading or len(fields) < 3:
                raise FormatError(path, f"line {number} must be two words and a number, got {line[:60]!r}.") from None
        may_be_heading = False
    return pairs


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """The lines of a text file and their numbers from 1."""
    with opened(path) as source:
        data = with_ends_normalized(without_mark(source.read_all()))
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise FormatError(path, f"line {number} is not UTF-8: {line[:60]!r}.") from None
