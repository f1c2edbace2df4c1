import numpy as np
import pytest
from corpora import ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import train
from embax.train._input import corpus as _corpus
from embax.train._input.corpus import BREAK, encode
from embax.train._parts import WHOLE, Parts


def test_encode_orders_by_count_and_then_by_spelling():
    (corpus,) = encode([["b", "a", "c", "rare"], ["c", "c", "a", "b"]], 2, WHOLE)
    assert corpus.tokens == ["c", "a", "b"]
    np.testing.assert_array_equal(corpus.counts, [3, 2, 2])
    assert ids_of(corpus) == [2, 1, 0, BREAK, 0, 0, 1, 2, BREAK]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefg"), max_size=8), max_size=8), st.integers(1, 4))
def test_encode_keeps_exactly_the_words_that_occur_often_enough(sequences, min_count):
    words = [word for sequence in sequences for word in sequence]
    kept = [[word for word in sequence if words.count(word) >= min_count] for sequence in sequences]
    if not any(kept):
        with pytest.raises(train.CorpusError):
            encode(sequences, min_count, WHOLE)
        return
    (corpus,) = encode(sequences, min_count, WHOLE)
    decoded = [[]]
    for row in ids_of(corpus):
        decoded.append([]) if row == BREAK else decoded[-1].append(corpus.tokens[row])
    assert decoded[:-1] == kept
    assert corpus.counts.tolist() == [words.count(token) for token in corpus.tokens]


def test_encode_says_why_a_corpus_is_empty():
    with pytest.raises(train.CorpusError, match=r"must have words to learn: it holds no words\."):
        encode([], 1, WHOLE)
    with pytest.raises(train.CorpusError, match=r"none of its 3 words occurs 5 times, .* 'a' with 2"):
        encode([["a", "b"], ["a"]], 5, WHOLE)


def parts_without_others(number):
    return Parts(None, number, tuple(range(number)))


def test_blocks_yields_pieces_of_a_corpus_from_any_id():
    (corpus,) = encode([["a"] * 4, ["b"] * 3, [], ["a"]], 1, WHOLE)
    whole = [0] * 4 + [BREAK] + [1] * 3 + [BREAK, BREAK, 0, BREAK]
    assert corpus.length == len(whole)
    for size, start in ((1, 0), (5, 0), (5, 3), (100, 11), (5, 12)):
        blocks = list(corpus.blocks(size, start))
        assert [x for block in blocks for x in block] == whole[start:]
        assert all(len(block) == size for block in blocks[:-1])
        assert all(block.dtype == np.int32 for block in blocks)


def test_encode_takes_integers_for_their_spelling():
    sequences = [[7, 12, "12"], np.asarray([7, 300, -1]), (np.int64(12),), iter(["7", 300])]
    (corpus,) = encode(sequences, 2, WHOLE)
    assert (corpus.tokens, corpus.counts.tolist()) == (["12", "7", "300"], [3, 3, 2])
    assert ids_of(corpus) == [1, 0, 0, BREAK, 1, 2, BREAK, 0, BREAK, 1, 2, BREAK]


@pytest.mark.parametrize(
    ("sequences", "match"),
    [
        (["to be"], "got the string 'to be'"),
        ([b"to be"], "got the string b'to be'"),
        ([["a"], 3], r"cbow\(sequences=.* must be sequences of words, got the item 3"),
        ([["a", 1.5]], "strings or integers, got the float 1.5"),
        ([["a", None]], "got the NoneType None"),
        ([[True]], "got the bool True"),
        ([[b"a"]], "got the bytes b'a'"),
        ([["a", ["b"]]], "unhashable"),
    ],
)
def test_encode_refuses_other_sequences_and_items(sequences, match):
    with pytest.raises(TypeError, match=match):
        encode(sequences, 1, WHOLE, call="embax.train.cbow")


@pytest.fixture
def small_chunks(monkeypatch):
    """Number 4 words at a time, and keep 4 in memory."""
    monkeypatch.setattr(_corpus, "_CHUNK", 4)
    monkeypatch.setattr(_corpus, "IN_MEMORY", 16)


SEQUENCES = [["a", "b", "a", "c"], ["d"], ["a", "e", "b"], [], ["f", "a", "b", "b", "g", "a"], ["c", "h", "a"]]


@pytest.mark.parametrize("number", [1, 3])
def test_encode_gives_the_same_out_of_a_temporary_file(number, small_chunks, monkeypatch):
    parts = parts_without_others(number)
    found = encode(SEQUENCES, 2, parts)
    monkeypatch.undo()
    for part, expected in zip(found, encode(SEQUENCES, 2, parts), strict=True):
        assert (
            (part.tokens, part.counts.tolist())
            == (expected.tokens, expected.counts.tolist())
            == (["a", "b", "c"], [6, 4, 2])
        )
        assert ids_of(part, 3) == ids_of(expected)


def test_encode_prunes_the_least_frequent_words(small_chunks):
    # Frequent words stay, though hundreds of others come once; each time, those that came first are dropped.
    rare = iter(range(1000))
    sequences = [["a", "b", "a", str(next(rare)), str(next(rare)), str(next(rare))] for _ in range(200)]
    (corpus,) = encode(sequences, 1, WHOLE, max_vocabulary=8)
    assert corpus.tokens[:2] == ["a", "b"]
    assert corpus.counts[:2].tolist() == [400, 200]
    assert 4 <= len(corpus.tokens) <= 8
    assert all(int(token) > 580 for token in corpus.tokens[2:])
    ids = np.asarray(ids_of(corpus))
    assert np.bincount(ids[ids != BREAK]).tolist() == corpus.counts.tolist()
    assert (ids == BREAK).sum() == 200
    assert ids[:4].tolist() == [0, 1, 0, BREAK]  # its rare words are gone


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from("aaaabbbcdefghijklmnop"), max_size=12), max_size=12),
    st.integers(1, 6),
    st.sampled_from([1, 2]),
)
def test_encode_prunes_every_part_by_the_same_rule(sequences, most, number):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_corpus, "_CHUNK", 3)
        patch.setattr(_corpus, "IN_MEMORY", 8)
        try:
            corpora = encode(sequences, 1, parts_without_others(number), max_vocabulary=most)
        except train.CorpusError:
            assert not any(sequences)
            return
    tokens = corpora[0].tokens
    assert 1 <= len(tokens) <= most
    ids = [np.asarray(ids_of(corpus), int) for corpus in corpora]
    counts = sum(np.bincount(each[each != BREAK], minlength=len(tokens)) for each in ids)
    assert counts.tolist() == corpora[0].counts.tolist()
    for part, each in enumerate(ids):
        own = sequences[part::number]
        found = [[]]
        for row in each:
            found.append([]) if row == BREAK else found[-1].append(tokens[row])
        assert len(found) - 1 == len(own)
        # What is left of a sequence stands in its order.
        for some, whole in zip(found, own, strict=False):
            rest = iter(whole)
            assert all(word in rest for word in some)


def test_encode_numbers_a_sequence_without_holding_it(small_chunks):
    (corpus,) = encode([(str(number % 5) for number in range(1000))], 1, WHOLE)
    assert corpus.counts.tolist() == [200] * 5
    assert ids_of(corpus) == [*[number % 5 for number in range(1000)], BREAK]
