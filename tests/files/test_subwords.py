import ml_dtypes
import numpy as np
import pytest
from gensim.models.fasttext import ft_ngram_hashes
from hypothesis import given, settings
from hypothesis import strategies as st

import embax
from embax._base.text.strings import packed
from embax.files._formats.fasttext import ngrams as _ngrams
from embax.files._formats.fasttext.subwords import Ngrams, Subwords, means_of, numbered

RNG = np.random.default_rng(0)
TOKENS = ["cat", "größe", "日本語", "a", "", "</s>", "🙂🙂", "cats"]


def reference_ngrams(word, minimum, maximum, line_end=False):
    """The n-grams of the bytes of a word, one at a time."""
    if word == b"</s>" and not line_end:
        return []
    whole = b"<" + word + b">"
    characters, ngrams = [], []
    for place in range(len(whole)):
        if whole[place] & 0xC0 == 0x80:
            characters[-1] += whole[place : place + 1]
        else:
            characters.append(whole[place : place + 1])
    for start in range(len(characters)):
        for length in range(max(1, minimum), maximum + 1):
            is_edge = start == 0 or start == len(characters) - 1
            if start + length <= len(characters) and not (length == 1 and is_edge):
                ngrams.append(b"".join(characters[start : start + length]))
    return ngrams


def reference_hash(ngram):
    hashed = 2166136261
    for byte in ngram:
        hashed = ((hashed ^ (byte | (0xFFFFFF00 if byte > 127 else 0))) * 16777619) % (1 << 32)
    return hashed


def reference_mean(rows, numbers):
    total = np.zeros(rows.shape[1], np.float32)
    for number in numbers:
        total += rows[number]
    return total * np.float32(1 / max(1, len(numbers)))


def subwords(words=("cat", "dog"), dim=3, buckets=50, minimum=2, maximum=4, **options):
    rows = RNG.standard_normal((len(words) + buckets, dim)).astype(np.float32)
    ngrams = Ngrams(rows, len(words), minimum, maximum, buckets)
    return Subwords(ngrams, embax.Vocabulary(list(words)), np.arange(len(words)), **options)


# As gensim has them; its own are those of fastText.
@pytest.mark.parametrize("token", ["cat", "größe", "日本語", "a", "", "🙂🙂", "žluťoučký kůň", "x" * 300])
@pytest.mark.parametrize(("minimum", "maximum"), [(3, 6), (1, 2), (0, 3), (5, 5), (2, 64)])
def test_hashed_equals_gensim(token, minimum, maximum):
    hashes, counts = _ngrams.hashed(packed([token.encode()]), minimum, maximum)
    assert (hashes % np.uint32(2_000_000)).tolist() == ft_ngram_hashes(token, minimum, maximum, 2_000_000)
    assert counts.tolist() == [hashes.size]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(lambda t: t.encode(errors="replace")))),
    st.integers(-1, 4),
    st.integers(0, 6),
    st.booleans(),
)
def test_hashed_of_many_equals_one_at_a_time(words, minimum, maximum, line_end):
    words = [*words, b"</s>", b"</s", b"<</s>"]
    hashes, counts = _ngrams.hashed(packed(words), minimum, maximum, line_end)
    expected = [reference_ngrams(word, minimum, maximum, line_end) for word in words]
    assert counts.tolist() == [len(ngrams) for ngrams in expected]
    assert hashes.tolist() == [reference_hash(ngram) for ngrams in expected for ngram in ngrams]


@pytest.mark.parametrize(("ngrams", "numbers"), [(1, 1 << 20), (40, 1 << 20), (1 << 20, 6), (1 << 20, 1)])
def test_blocks_change_nothing(monkeypatch, ngrams, numbers):
    words = packed([token.encode() for token in TOKENS * 3])
    grams = subwords().ngrams
    [(_, _, whole)] = means_of(grams, words)
    monkeypatch.setattr(_ngrams, "_NGRAMS", ngrams)
    monkeypatch.setattr(_ngrams, "_NUMBERS", numbers)
    parts = list(means_of(grams, words))
    assert len(parts) > 1
    assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])]
    np.testing.assert_array_equal(np.concatenate([part[2] for part in parts]), whole)


@pytest.mark.parametrize("has_own", [False, True])
def test_means_are_summed_in_order_to_the_last_bit(has_own):
    words = packed([token.encode() for token in TOKENS])
    grams = subwords(TOKENS, dim=7).ngrams
    own = np.arange(len(TOKENS)) if has_own else None
    [(start, stop, means)] = means_of(grams, words, own)
    assert (start, stop, means.dtype) == (0, len(TOKENS), np.float32)
    for row, token in enumerate(TOKENS):
        numbers = [grams.first + reference_hash(n) % 50 for n in reference_ngrams(token.encode(), 2, 4)]
        expected = reference_mean(grams.rows, [row] * has_own + numbers)
        np.testing.assert_array_equal(means[row], expected)


def test_numbered_leaves_out_pruned_ngrams():
    grams = subwords(buckets=1000).ngrams
    words = packed([token.encode() for token in TOKENS])
    rows, counts = numbered(grams, words)
    known = np.unique(rows - grams.first)[::3].astype(np.int32)
    places = RNG.permutation(known.size).astype(np.int32)
    found, fewer = numbered(grams._replace(kept=(known, places)), words)
    place_of = dict(zip(known.tolist(), places.tolist(), strict=True))
    expected = [place_of[row] + grams.first for row in (rows - grams.first).tolist() if row in place_of]
    assert found.tolist() == expected
    ends = np.cumsum(counts)
    is_kept = np.isin(rows - grams.first, known)
    assert fewer.tolist() == [
        int(is_kept[end - count : end].sum()) for end, count in zip(ends.tolist(), counts.tolist(), strict=True)
    ]


def test_subwords_give_any_token_a_vector():
    whole = subwords(minimum=3, maximum=3)
    vectors = whole.vectors(TOKENS)
    assert vectors.shape == (len(TOKENS), 3)
    for token, vector in zip(TOKENS, vectors, strict=True):
        np.testing.assert_array_equal(whole.vector(token), vector)
    assert whole.covers(TOKENS).tolist() == [token not in ("", "</s>") for token in TOKENS]
    assert (vectors[~whole.covers(TOKENS)] == 0).all()


def test_normalized_subwords_give_the_same_directions_with_length_1():
    whole = subwords(minimum=3, maximum=3)
    vectors, unit = whole.vectors(TOKENS).astype(np.float64), whole.normalized().vectors(TOKENS)
    covered = whole.covers(TOKENS)
    expected = vectors[covered] / np.linalg.norm(vectors[covered], axis=1, keepdims=True)
    np.testing.assert_allclose(unit[covered], expected, atol=1e-6)  # float32
    assert (unit[~covered] == 0).all()
    np.testing.assert_array_equal(whole.normalized().covers(TOKENS), covered)
    np.testing.assert_array_equal(whole.vectors(TOKENS), vectors.astype(np.float32))  # which stay


def test_normalized_vectors_keep_the_ngrams(tmp_path):
    whole = subwords(("cat", "dog"))
    weight = np.concatenate([mean for _, _, mean in means_of(whole.ngrams, packed([b"cat", b"dog"]), np.arange(2))])
    vectors = embax.Vectors(whole.vocabulary, weight, subwords=whole)
    for unit in (vectors.normalized(), vectors.normalized().normalized(), vectors.normalized().subset(["dog"])):
        np.testing.assert_allclose(np.linalg.norm(unit[["dog", "cats", "größe"]], axis=1), 1, atol=1e-6)  # float32
        for token in ("dog", "cats"):
            expected = vectors[token] / np.linalg.norm(vectors[token])
            np.testing.assert_allclose(unit[token], expected, atol=1e-6)  # float32
    assert vectors.normalized().most_similar("cats") == vectors.most_similar("cats")
    vectors.normalized().save(tmp_path / "v.fasttext.bin")
    loaded = embax.Vectors.load(tmp_path / "v.fasttext.bin")
    np.testing.assert_allclose(np.linalg.norm(loaded.weight, axis=1), 1, atol=1e-6)  # float32
    np.testing.assert_array_equal(loaded["cats"], vectors["cats"])


def test_subwords_of_no_tokens_are_empty():
    assert subwords().vectors([]).shape == (0, 3)
    assert subwords().covers([]).tolist() == []


def test_subwords_take_tokens_that_are_not_utf8():
    assert subwords().covers(["\ud800", "a\0b"]).all()


def test_subwords_hash_the_bytes_of_the_files_encoding():
    whole = subwords(encoding="cp852", buckets=10_000)
    [(_, _, expected)] = means_of(whole.ngrams, packed(["kůň".encode("cp852")]))
    np.testing.assert_array_equal(whole.vectors(["kůň"]), expected)
    [(_, _, other)] = means_of(whole.ngrams, packed(["kůň".encode()]))
    assert (expected != other).any()
    # Japanese is not in that encoding.
    [(_, _, expected)] = means_of(whole.ngrams, packed(["日本".encode()]))
    np.testing.assert_array_equal(whole.vectors(["日本"]), expected)


def test_subwords_keep_token_names_of_the_file():
    raw = packed([b"caf\xe9", b"tea"])
    whole = subwords(["caf\\xe9", "tea"], raw=raw)
    assert whole.encoded(whole.vocabulary) is raw
    found = whole.encoded(embax.Vocabulary(["new", "tea", "caf\\xe9"]))
    assert found.text[: found.offsets[-1]].tobytes() == b"newteacaf\xe9"


def owned(whole, vocabulary=None, weight=None):
    vocabulary = whole.vocabulary if vocabulary is None else vocabulary
    return np.concatenate(list(whole.own_rows(vocabulary, weight)))


@pytest.fixture
def read():
    """Sub-words with the weight that a reader makes of them."""
    whole = subwords(TOKENS, minimum=3, maximum=5)
    [(_, _, weight)] = means_of(whole.ngrams, whole.encoded(whole.vocabulary), whole.own)
    return whole, weight


def test_own_rows_equal_the_rows_in_the_file(read):
    whole, weight = read
    np.testing.assert_array_equal(owned(whole, weight=weight), whole.ngrams.rows[: len(TOKENS)])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_own_rows_equal_the_rows_in_the_file_after_a_cast(read, dtype):
    whole, weight = read
    np.testing.assert_array_equal(owned(whole, weight=weight.astype(dtype)), whole.ngrams.rows[: len(TOKENS)])


def test_own_rows_equal_the_rows_in_the_file_with_nans(read):
    whole, _ = read
    whole.ngrams.rows[1, 1] = np.nan
    [(_, _, weight)] = means_of(whole.ngrams, whole.encoded(whole.vocabulary), whole.own)
    np.testing.assert_array_equal(owned(whole, weight=weight), whole.ngrams.rows[: len(TOKENS)])


def test_own_rows_follow_tokens(read):
    whole, weight = read
    some = np.asarray([5, 0, 2])
    found = owned(whole, whole.vocabulary.take(some), weight[some])
    np.testing.assert_array_equal(found, whole.ngrams.rows[some])


def test_own_rows_give_changed_vectors_and_new_tokens(read):
    whole, weight = read
    vocabulary = embax.Vocabulary([*TOKENS[:-1], "newcomer"])
    changed = weight.copy()
    changed[[0, 4, 5, 7]] = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [-1, 0, 1]]
    rows = owned(whole, vocabulary, changed)
    grams = whole.ngrams._replace(rows=np.concatenate([rows, whole.ngrams.rows[whole.ngrams.first :]]))
    [(_, _, found)] = means_of(grams, whole.encoded(vocabulary), np.arange(len(TOKENS)))
    np.testing.assert_allclose(found, changed, rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_array_equal(rows[[1, 2, 3, 6]], whole.ngrams.rows[[1, 2, 3, 6]])


def test_own_row_of_the_line_end_takes_its_ngrams_over():
    whole = subwords(["</s>"])
    whole.ngrams = whole.ngrams._replace(line_end=True)
    [(_, _, weight)] = means_of(whole.ngrams, packed([b"</s>"]), whole.own)
    assert (weight != whole.ngrams.rows[:1]).any()
    np.testing.assert_array_equal(owned(whole, weight=weight), weight)


def test_repr_of_subwords():
    assert repr(subwords()) == "Subwords(50 rows of n-grams of 2 to 4 characters, dim=3)"
