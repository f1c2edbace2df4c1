import functools
import gzip
import math

import numpy as np
import pytest
import real
from damage import damages, seeds, told
from gensim.models import KeyedVectors

import embax
from embax import evaluate
from embax.files import FormatError
from embax.vectors import _cosmul as _multiplied
from embax.vectors import _nearest as _queries

DATA = real.GENSIM


@functools.cache
def glove():
    vectors = real.glove_of(20_000)
    return both(vectors.vocabulary.tokens(), vectors.weight)


def both(tokens, weight):
    theirs = KeyedVectors(weight.shape[1])
    theirs.add_vectors(tokens, weight)
    return embax.Vectors(tokens, weight), theirs


def counts(sections):
    """What gensim found, without its total."""
    return [(s["section"], len(s["correct"]), len(s["correct"]) + len(s["incorrect"])) for s in sections[:-1]]


def assert_same_analogies(ours, theirs, path, restrict):
    report = evaluate.analogies(ours, path, restrict)
    accuracy, sections = theirs.evaluate_word_analogies(str(path), restrict_vocab=restrict)
    assert [tuple(section) for section in report.sections] == counts(sections)
    if report.total:
        assert report.accuracy == accuracy
    else:
        assert math.isnan(report.accuracy)
    return report


def assert_same_pairs(ours, theirs, path, restrict):
    report = evaluate.word_pairs(ours, path, restrict)
    pearson, spearman, missing = theirs.evaluate_word_pairs(str(path), restrict_vocab=restrict)
    assert report.pearson == pytest.approx(pearson.statistic, abs=1e-6)
    assert report.spearman == pytest.approx(spearman.statistic, abs=1e-6)
    assert 100 * report.missing / (report.missing + report.pairs) == pytest.approx(missing)
    return report


def test_analogies_of_glove_equal_gensim(tmp_path):
    lines = (DATA / "questions-words.txt").read_text().splitlines()
    path = tmp_path / "some.txt"
    path.write_text("\n".join(line for place, line in enumerate(lines) if line[0] == ":" or not place % 200))
    report = assert_same_analogies(*glove(), path, 15_000)
    assert len(report.sections) == 14
    assert report.total > 50


@pytest.mark.slow  # gensim takes a minute
def test_all_analogies_of_glove_equal_gensim():
    every = both(real.glove().vocabulary.tokens(), real.glove().weight)
    report = assert_same_analogies(*every, DATA / "questions-words.txt", 300_000)
    assert (report.total, report.skipped) == (19_486, 58)
    assert report.accuracy == pytest.approx(0.4637, abs=5e-5)


@pytest.mark.parametrize(("name", "spearman", "missing"), [("wordsim353.tsv", 0.5033, 0), ("simlex999.txt", 0.2631, 1)])
def test_word_pairs_of_glove_equal_gensim(name, spearman, missing):
    words = (DATA / name).read_text().lower().split()
    rows = real.glove().vocabulary.ids(words, unknown=-1)
    rows = np.unique(rows[(rows >= 0) & (rows < 300_000)])  # the others have no part in it
    some = both(real.glove().vocabulary.tokens(rows), real.glove().weight[rows])
    report = assert_same_pairs(*some, DATA / name, 300_000)
    assert report.spearman == pytest.approx(spearman, abs=5e-5)
    assert report.missing == missing


def words_of_mixed_case(rng):
    """Tokens of which some are equal in upper case, with vectors that are nearly so."""
    tokens = list({f"{stem.upper() if rng.integers(2) else stem}{rng.integers(4)}" for stem in "abcdefgh" * 4})
    rng.shuffle(tokens)
    tokens += [token.swapcase() for token in tokens if token.swapcase() not in tokens and rng.integers(2)]
    near = {token.upper(): rng.standard_normal(3) for token in tokens}
    weight = [near[token.upper()] + 0.3 * rng.standard_normal(3) for token in tokens]
    return tokens, np.asarray(weight, np.float32)


@pytest.mark.parametrize("seed", range(30))
def test_analogies_of_words_in_upper_and_lower_case_equal_gensim(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tokens, weight = words_of_mixed_case(rng)
    questions = [" ".join(rng.choice([*tokens[:12], "z"], 4)) for _ in range(80)]
    path = tmp_path / "q.txt"
    path.write_text("\n".join([": first", *questions[:30], "", ": empty", ":  second  part ", *questions[30:]]) + "\n")
    for restrict in 8, len(tokens) + 5:
        assert_same_analogies(*both(tokens, weight), path, restrict)


@pytest.mark.parametrize("last", ["ABC", "d", "e"])
def test_analogies_look_at_five_answers_like_gensim(tmp_path, last):
    # Besides "abc" itself, all that is near is "abc" in other cases, then one other word or one more of these.
    variants = ["abc", "abC", "aBc", "aBC", "Abc"]
    tokens = [*variants, last, "x", "y", "d", "e"] if last == "ABC" else [*variants, last, "x", "y"]
    weight = np.zeros((len(tokens), 6), np.float32)
    weight[:, 0], weight[:, 1] = 1, 0.1 * np.arange(len(tokens))
    weight[tokens.index("x")] = weight[tokens.index("y")] = [0, 0, 1, 0, 0, 0]
    path = tmp_path / "q.txt"
    path.write_text(": a\nx y abc abc\n: b\nx y abc d\n: c\nx y abc e\n")
    report = assert_same_analogies(*both(tokens, weight), path, 100)
    assert report.correct == 1


@pytest.mark.parametrize("seed", range(10))
def test_word_pairs_of_words_in_upper_and_lower_case_equal_gensim(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tokens, weight = words_of_mixed_case(rng)
    pairs = [rng.choice([*tokens, "z"], 2) for _ in range(60)]
    # A word's cosine to itself is 1 or a little less in gensim, which gives it another rank than its equals.
    lines = [f"{a}\t{b}\t{rng.integers(8)}" for a, b in pairs if a.upper() != b.upper()]
    path = tmp_path / "p.txt"
    path.write_text("# a comment\n\n" + "\n".join(lines))
    for restrict in 12, len(tokens) + 5:
        assert_same_pairs(*both(tokens, weight), path, restrict)


def vectors():
    return embax.Vectors(["man", "woman", "king", "queen"], [[1, 0, 0], [0, 1, 0], [1, 0, 2], [0, 1, 2]])


def written(tmp_path, text):
    path = tmp_path / "file.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("method", ["add", "mul"])
def test_analogies_count_by_section(tmp_path, method):
    text = "\ufeff: royal\r\nMan king WOMAN queen\r\nman woman king man\r\n\r\n: none\r\nman woman king prince\r\n"
    report = evaluate.analogies(vectors(), written(tmp_path, text), method=method)
    assert report == evaluate.AnalogyReport((evaluate.Section("royal", 1, 2), evaluate.Section("none", 0, 0)), 1)
    assert (report.correct, report.total, report.accuracy) == (1, 2, 0.5)


def test_files_may_be_compressed(tmp_path):
    path = tmp_path / "q.gz"
    path.write_bytes(gzip.compress(b": a\nman king woman queen\n"))
    assert evaluate.analogies(vectors(), path, None).accuracy == 1


def test_word_pairs_of_one_direction_are_equally_similar(tmp_path):
    weight = np.random.default_rng(0).standard_normal((50, 20))
    some = embax.Vectors([f"t{row}" for row in range(100)], np.concatenate([weight, weight * 3]))
    lines = [f"t{row} t{row + 50} 1\n" for row in range(50)]
    report = evaluate.word_pairs(some, written(tmp_path, "".join(lines) + "t0 t1 0\n"))
    assert report.spearman == pytest.approx(1, abs=1e-12)


@pytest.mark.filterwarnings("ignore::embax.vectors.NotFiniteWarning")
def test_words_without_a_finite_vector_count_as_missing(tmp_path):
    weight = np.asarray([[1, 0], [0, 1], [np.nan, 1], [1, 1], [1, 0.5]])
    some = embax.Vectors(list("abcde"), weight)
    report = evaluate.analogies(some, written(tmp_path, ": x\na b c d\na b d e\n"))
    assert (report.total, report.skipped) == (1, 1)
    report = evaluate.word_pairs(some, written(tmp_path, "a\tc\t1\na\tb\t2\na\td\t3\na\te\t4\n"))
    assert (report.pairs, report.missing) == (3, 1)
    assert report.spearman == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"file\.txt: holds no question\."),
        (": a\n", r"holds no question\."),
        ("\na b c d\n", r'line 2 must be a section\'s name, such as ": name", got \'a b c d\'\.'),
        (": a\na b c d\na b c\n", r"line 3 must be four words, got 'a b c'\."),
        (": a\na b c d e\n", r"line 2 must be four words, got 'a b c d e'\."),
        (b": a\na b c \xff\n", r"line 2 is not UTF-8: b'a b c \\xff'\."),
    ],
)
def test_analogies_of_another_form_are_a_format_error(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        evaluate.analogies(vectors(), written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\n", r"file\.txt: line 1 must be two words and a number, got 'a b'\."),
        ("word 1\tword 2\tmean\na\tb\tc\n", r"line 2 must be two words and a number, got 'a\\tb\\tc'\."),
        ("a b 1\na b 1 2\n", r"line 2 must be two words and a number"),
        ("a b 1\na b nan\n", r"line 2 must be two words and a number"),
        ("a b 1\na b inf\n", r"line 2 must be two words and a number"),
        (b"a b 1\n\xff\n", r"line 2 is not UTF-8"),
    ],
)
def test_word_pairs_of_another_form_are_a_format_error(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        evaluate.word_pairs(vectors(), written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "# nothing\n", "man\tking\t1\n", "man king 1\nx y 2\n"])
def test_word_pairs_need_two(tmp_path, text):
    with pytest.raises(
        ValueError, match=r"must name at least two pairs of words in the vocabulary, got [01] of [012] in"
    ):
        evaluate.word_pairs(vectors(), written(tmp_path, text))


def test_word_pairs_may_have_a_heading_and_blanks_between(tmp_path):
    text = "Word1 Word2 Score\nman  king 3\nwoman king 1\n"
    report = evaluate.word_pairs(vectors(), written(tmp_path, text))
    assert (report.pairs, report.missing, round(report.spearman, 6)) == (2, 0, 1.0)


def test_equal_word_pairs_have_no_correlation(tmp_path):
    report = evaluate.word_pairs(vectors(), written(tmp_path, "man king 1\nwoman queen 2\nking man 3\n"))
    assert math.isnan(report.spearman)
    assert math.isnan(report.pearson)


@pytest.mark.parametrize("call", [evaluate.analogies, evaluate.word_pairs])
def test_restrict_is_checked(call):
    with pytest.raises(
        ValueError, match=rf"`embax\.evaluate\.{call.__name__}\(restrict=\.\.\.\)` must not be negative"
    ):
        call(vectors(), "nowhere", -1)
    with pytest.raises(
        TypeError, match=rf"`embax\.evaluate\.{call.__name__}\(restrict=\.\.\.\)` must be a whole number"
    ):
        call(vectors(), "nowhere", 1.5)
    with pytest.raises(FileNotFoundError):
        call(vectors(), "nowhere")


def test_method_is_checked():
    with pytest.raises(ValueError, match=r"`embax\.evaluate\.analogies\(method=\.\.\.\)` must be one of 'add', 'mul'"):
        evaluate.analogies(vectors(), "nowhere", method="multiply")  # pyright: ignore[reportArgumentType]


ANALOGIES = b": a\nman king woman queen\nman woman king queen\n"
PAIRS = b"# x\nman\tking\t1\nking\tqueen\t2.5\nman\tqueen\t0\n"


@seeds
@pytest.mark.parametrize(
    ("call", "whole", "error"), [(evaluate.analogies, ANALOGIES, FormatError), (evaluate.word_pairs, PAIRS, ValueError)]
)
def test_any_damage_gives_a_report_or_a_format_error(tmp_path, call, whole, error, seed):
    some, pieces = vectors(), [b"\n", b"\t", b" ", b":", b"#", b"9" * 400]
    for name, data in damages(whole, 200, seed, pieces=pieces):
        path = written(tmp_path, data)
        with told(name):
            try:
                assert call(some, path)
            except error as raised:
                if not isinstance(raised, FormatError) and "at least two pairs" not in str(raised):
                    raise


@pytest.mark.parametrize(("rows", "number"), [(5, 3), (700, 130), (5000, 10)])
def test_multiplied_equals_float64(rows, number):
    rng = np.random.default_rng(0)
    unit = _queries.unit_rows(rng.standard_normal((rows, 10)))
    unit[3] = np.nan
    asked = np.asarray([rng.choice(np.delete(np.arange(rows), 3), 3, replace=False) for _ in range(number)])
    b, c, a = (unit[asked[:, column]] for column in range(3))
    found, ranked_by = _multiplied.best(unit, (b, c), a, 4, asked)
    near_b, near_c, near_a = (0.5 + 0.5 * (part.astype(np.float64) @ unit.T.astype(np.float64)) for part in (b, c, a))
    scores = near_b * near_c / (near_a + 1e-6)
    scores[:, 3] = -np.inf
    np.put_along_axis(scores, asked, -np.inf, axis=1)
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    wanted[~np.isfinite(np.take_along_axis(scores, wanted, axis=1))] = -1
    np.testing.assert_array_equal(found, wanted)
    expected = np.where(wanted < 0, np.nan, np.take_along_axis(scores, wanted, axis=1))
    np.testing.assert_allclose(ranked_by, expected, rtol=1e-6)  # float32


@pytest.mark.filterwarnings("ignore:Call to deprecated `init_sims`:DeprecationWarning")
def test_multiplied_equals_gensim():
    rng = np.random.default_rng(1)
    tokens, weight = [f"t{row}" for row in range(500)], rng.standard_normal((500, 20)).astype(np.float32)
    _, theirs = both(tokens, weight)
    unit = _queries.unit_rows(weight)
    asked = np.asarray([rng.choice(500, 3, replace=False) for _ in range(40)])
    found, _ = _multiplied.best(unit, (unit[asked[:, 0]], unit[asked[:, 1]]), unit[asked[:, 2]], 5, asked)
    for rows, (b, c, a) in zip(found, asked, strict=True):
        wanted = theirs.most_similar_cosmul(positive=[tokens[b], tokens[c]], negative=[tokens[a]], topn=5)
        assert [tokens[row] for row in rows] == [token for token, _ in wanted]


def test_multiplied_of_no_rows():
    none = np.zeros((2, 3), np.float32)
    rows, scores = _multiplied.best(none[:0], (none, none), none, 2, np.zeros((2, 3), np.int64))
    np.testing.assert_array_equal(rows, -1)
    np.testing.assert_array_equal(scores, np.nan)


def test_nearest_of_glove_equals_gensim():
    ours, theirs = glove()
    unit = ours.normalized().weight
    asked = np.arange(0, 20_000, 1000)
    rows, products = _queries.nearest(unit, unit[asked], 10, asked[:, None])
    for place, row in enumerate(asked):
        wanted = theirs.most_similar(theirs.index_to_key[row], topn=10)
        assert ours.vocabulary.tokens(rows[place]) == [token for token, _ in wanted]
        np.testing.assert_allclose(products[place], [cosine for _, cosine in wanted], rtol=0, atol=2e-6)


def test_questions_are_analogies_or_pairs_by_their_content(tmp_path):
    known, unknown = vectors(), embax.Vectors(["x"], [[1.0, 0, 0]])
    analogies = evaluate.Questions(written(tmp_path, "\n" + ANALOGIES.decode()))
    pairs = evaluate.Questions(written(tmp_path, PAIRS.decode()))
    (tmp_path / "file.txt").unlink()  # they were read once
    assert analogies(known) == evaluate.analogies(known, written(tmp_path, ANALOGIES.decode()))
    assert pairs(known) == evaluate.word_pairs(known, written(tmp_path, PAIRS.decode()))
    assert analogies(known, restrict=2).total == 0
    assert np.isnan(analogies(unknown).accuracy)
    assert np.isnan(pairs(unknown).spearman)
    assert (pairs(unknown).pairs, pairs(unknown).missing) == (0, 3)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds no analogies and no word pairs"),
        ("# only\n", "holds no analogies and no word pairs"),
        (": a\nb c\n", "line 2 must be four words"),
        ("x y z\na b c d\n", "line 2 must be two words and a number"),
    ],
)
def test_questions_of_neither_form_are_a_format_error(tmp_path, text, match):
    with pytest.raises(FormatError, match=match):
        evaluate.Questions(written(tmp_path, text))
