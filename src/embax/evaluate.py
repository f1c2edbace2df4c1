"""Evaluation: how well vectors solve analogies, and how well their cosines agree with people's judgement."""

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

# A compressed list of words is larger than its file by a factor of ten at most.
# Of the five best answers counts the first that is none of the question's words, as in gensim.
_ANSWERS = 5


class Section(NamedTuple):
    """The analogies of one kind."""

    name: str
    correct: int  # of those in total
    total: int  # questions whose words are all in the vocabulary


@dataclass(frozen=True)
class AnalogyReport:
    """How many analogies were solved.

    Args:
      sections: The kinds of analogies, in the file's order.
      skipped: The number of questions with a word that is not in the vocabulary; they count for nothing.
    """

    sections: tuple[Section, ...]
    skipped: int

    @property
    def total(self) -> int:
        """The number of questions, without those skipped."""
        return sum(section.total for section in self.sections)

    @property
    def correct(self) -> int:
        """The number of questions solved."""
        return sum(section.correct for section in self.sections)

    @property
    def accuracy(self) -> float:
        """The fraction of questions solved, in [0, 1]; NaN where all were skipped."""
        return self.correct / self.total if self.total else math.nan


@dataclass(frozen=True)
class PairReport:
    """How far the cosines of pairs of words agree with people's judgement.

    Args:
      spearman: The correlation of ranks, in [-1, 1]; NaN where all pairs are equally similar.
      pearson: The linear correlation, in [-1, 1]; NaN likewise.
      pairs: The number of pairs compared.
      missing: The number of pairs with a word that is not in the vocabulary; they count for nothing.
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

    `"add"`, 3CosAdd: the answer is the word of highest `cos(x, b) - cos(x, a) + cos(x, c)`.
    `"mul"`, 3CosMul: of highest `cos(x, b) cos(x, c) / (cos(x, a) + 1e-6)`, of cosines moved to `[0, 1]`.

    Case does not matter: of tokens that are equal in upper case the first one stands for all. The question's own words
    are no answers. Counts are those of gensim's `evaluate_word_analogies` for `"add"`.

    Args:
      vectors: The vectors.
      path: A text file, plain or compressed, of four words a line (a, b, c and the answer), in sections that each
        begin with a line `: name`, such as `questions-words.txt` of word2vec.
      restrict: How many tokens, the first ones, are the vocabulary; the most frequent where they are sorted so.
        None is all.
      method: How the answers are ranked.

    Returns:
      Counts by section.

    Raises:
      embax.files.FormatError: If the file is not of this form, naming the line, or holds no question.
      OSError: If it cannot be opened.
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
    names, of_section, questions = _read_questions(path)
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
    r"""Compare cosines with people's judgement of how similar two words are.

    Case does not matter, as in `analogies`. Figures are those of gensim's `evaluate_word_pairs`.

    Args:
      vectors: The vectors.
      path: A text file, plain or compressed, of two words and a number a line, between tabs or other white space;
        lines that begin with # are comments, and the first other line may be a heading. WordSim-353 and SimLex-999 are
        such files.
      restrict: How many tokens, the first ones, are the vocabulary. None is all.

    Returns:
      Correlations and counts.

    Raises:
      embax.files.FormatError: If the file is not of this form, naming the line.
      OSError: If it cannot be opened.
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
    from scipy import stats

    restrict = _restricted("embax.evaluate.word_pairs(restrict=...)", restrict, vectors)
    pairs = _read_pairs(path)
    unit = vectors.normalized().weight[:restrict]
    _, rows = _vocabulary(vectors, unit)
    known = [(rows[a], rows[b], judged) for a, b, judged in pairs if a in rows and b in rows]
    if len(known) < 2:
        raise ValueError(
            "`embax.evaluate.word_pairs(path=...)` must name at least two pairs of words in the vocabulary, got "
            f"{len(known)} of {len(pairs)} in {os.fspath(path)}. Pass pairs in the vectors' language."
        )
    left, right, judged = zip(*known, strict=True)
    cosines = _cosines(unit[list(left)], unit[list(right)])
    with warnings.catch_warnings():  # all pairs equally similar: NaN says it
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        spearman, pearson = stats.spearmanr(judged, cosines), stats.pearsonr(judged, cosines)
    return PairReport(
        float(spearman.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        float(pearson.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        len(known),
        len(pairs) - len(known),
    )


def _cosines(
    left: Float32[np.ndarray, "pairs dim"], right: Float32[np.ndarray, "pairs dim"]
) -> Float64[np.ndarray, " pairs"]:
    """Cosines in float64, with lengths that are 1 in float32 only: so any two of one direction are as similar."""
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
    """The first answer that is no word of the question; where all are such words, the last one."""
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
            raise FormatError(path, f'line {number} must be a section\'s name, as ": name", got {line[:60]!r}.')
        if words and len(words) != 4:
            raise FormatError(path, f"line {number} must be four words, got {line[:60]!r}.")
        if words:
            questions.append(words)
            of_section.append(len(names) - 1)
    if not questions:
        raise FormatError(path, "holds no question.")
    return names, of_section, questions


def _read_pairs(path: str | os.PathLike[str]) -> list[tuple[str, str, float]]:
    """Two words in upper case and the judgement of people, for each pair."""
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
