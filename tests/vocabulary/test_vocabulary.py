import pickle

import numpy as np
import pytest
import traced
from hypothesis import given, settings
from hypothesis import strategies as st

import embax
from embax import Vocabulary
from embax._base.text import strings as _strings
from embax.vocabulary import UnknownTokenError

WORDS = [
    "",
    "a",
    "king",
    "kings",
    "königin",
    "日本語",
    "a" * 7,
    "a" * 8,
    "a" * 9,
    "a" * 16,
    "a" * 300,
    "x y",
    "\0",
    "\u2028",
]


@pytest.fixture(params=["searched", "indexed"])
def words(request):
    vocabulary = Vocabulary.from_utf8("".join(WORDS).encode(), offsets(WORDS))
    if request.param == "indexed":
        vocabulary.repeated()
    return vocabulary


def offsets(tokens):
    return np.concatenate([[0], np.cumsum([len(token.encode()) for token in tokens])])


def test_ids_and_tokens_are_each_others_inverse(words):
    assert len(words) == len(WORDS)
    assert [words.ids(word) for word in WORDS[:5]] == [0, 1, 2, 3, 4]
    assert words.ids(WORDS).tolist() == list(range(len(WORDS)))
    assert words.tokens() == list(words) == WORDS
    assert words.tokens([4, 0, 4]) == ["königin", "", "königin"]
    assert words.tokens(5) == words.tokens(np.int32(5)) == "日本語"
    assert words.tokens([]) == []
    assert words.ids([]).tolist() == []
    assert words.ids([]).dtype == np.int64


@pytest.mark.parametrize("absent", ["kin", "ingk", "aking", "a" * 299, "a" * 301, "y", "\ud800", " "])
def test_parts_of_tokens_are_not_found(words, absent):
    assert absent not in words
    assert words.ids(absent, unknown=-1) == -1


def test_unknown_tokens_are_an_error_or_skipped_or_get_an_id(words):
    with pytest.raises(
        UnknownTokenError, match=r'^"kinga" is not in the vocabulary. Closest spellings: "king", "kings"'
    ):
        words.ids(["a", "kinga"])
    assert words.ids(["a", "no", "king"], unknown="skip").tolist() == [1, 2]
    assert words.ids(["a", "no", "king"], unknown=7).tolist() == [1, 7, 2]
    assert words.ids("no", unknown=np.int64(3)) == 3
    for unknown, tokens in (("skip", "a"), ("drop", ["a"]), (True, ["a"]), (1.0, ["a"])):
        with pytest.raises(ValueError, match=r'unknown=\.\.\.\)` must be "error", "skip"'):
            words.ids(tokens, unknown=unknown)


def test_membership_is_of_strings(words):
    assert "king" in words
    assert 2 not in words
    assert None not in words


def test_tokens_refuses_other_ids(words):
    for ids in ([0, len(WORDS)], [-1], 99):
        with pytest.raises(IndexError, match=r"must be in \[0, 14\), got (14|-1|99)\. Leave it out"):
            words.tokens(ids)
    for ids in (0.5, [True], [[0]], ["a"]):
        with pytest.raises(TypeError, match=r"ids=\.\.\.\)` must be integers"):
            words.tokens(ids)


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        (["a", "b", "a"], ValueError, "must not repeat a token, got 'a' twice"),
        (["a", 1], TypeError, "must be strings, got 1 at position 1"),
        (["a\ud800"], ValueError, "must be valid Unicode, got 'a.ud800'"),
    ],
)
def test_vocabulary_refuses_other_tokens(tokens, error, match):
    with pytest.raises(error, match=match):
        Vocabulary(tokens)


@pytest.mark.parametrize(
    ("text", "ends", "match"),
    [
        (b"ab", [0, 1], "must rise from 0 to the length of the text, 2 bytes"),
        (b"ab", [1, 2], "must rise from 0"),
        (b"ab", [0, 2, 1, 2], "must rise from 0"),
        (b"ab", [], "must rise from 0"),
        (b"a\xff", [0, 1, 2], r"token 1 is not UTF-8: b'\\xff'"),
        ("ö".encode(), [0, 1, 2], r"token 1 is not UTF-8: b'\\xb6'"),
    ],
)
def test_from_utf8_refuses_malformed_buffers(text, ends, match):
    with pytest.raises(ValueError, match=match):
        Vocabulary.from_utf8(text, ends)


def test_an_empty_vocabulary_holds_nothing():
    for vocabulary in (Vocabulary([]), Vocabulary.from_utf8(b"", [0])):
        assert len(vocabulary) == 0
        assert "" not in vocabulary
        assert vocabulary.tokens() == []
        assert vocabulary.ids(["a"] * 20, unknown=-1).tolist() == [-1] * 20
        assert not vocabulary.repeated().any()


def test_the_first_of_equal_tokens_is_found():
    tokens = ["b", "a", "b", "", "a", "", "c", "b"]
    vocabulary = Vocabulary.from_utf8("".join(tokens).encode(), offsets(tokens))
    assert vocabulary.ids("b") == 0
    assert vocabulary.repeated().tolist() == [False, False, True, False, True, True, False, True]
    assert vocabulary.ids(tokens).tolist() == [0, 1, 0, 3, 1, 3, 6, 0]


def test_special_tokens_are_known_by_their_role():
    vocabulary = Vocabulary(["[PAD]", "a", "[UNK]"], special={"padding": "[PAD]", "unknown": "[UNK]"})
    assert vocabulary.special == {"padding": 0, "unknown": 2}
    assert vocabulary.take(np.array([2, 1])).special == {"unknown": 0}
    assert repr(vocabulary) == "Vocabulary(3 tokens, padding='[PAD]', unknown='[UNK]')"
    with pytest.raises(
        ValueError, match=r"special=\.\.\.\)` must name tokens of the vocabulary, got '\[CLS\]' for 'class'"
    ):
        Vocabulary(["a"], special={"class": "[CLS]"})


def test_equality_is_by_content():
    assert Vocabulary(["a", "b"]) == Vocabulary.from_utf8(b"ab", [0, 1, 2])
    assert Vocabulary(["ab"]) != Vocabulary(["a", "b"])
    assert Vocabulary(["a"], special={"padding": "a"}) != Vocabulary(["a"])
    assert Vocabulary(["a"]) != ["a"]


def test_a_vocabulary_can_be_pickled():
    copy = pickle.loads(pickle.dumps(Vocabulary(WORDS)))
    assert copy == Vocabulary(WORDS)
    assert copy.ids("日本語") == 5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab\0é", max_size=20), max_size=40), st.lists(st.text(alphabet="ab\0é", max_size=20)))
def test_ids_equal_a_dictionary(tokens, wanted):
    first = {}
    for row, token in enumerate(tokens):
        first.setdefault(token, row)
    for seek in (True, False):
        vocabulary = Vocabulary.from_utf8("".join(tokens).encode(), offsets(tokens))
        if not seek:
            assert vocabulary.repeated().tolist() == [first[token] != row for row, token in enumerate(tokens)]
        found = [vocabulary.ids(token, unknown=-1) for token in wanted]
        assert found == [first.get(token, -1) for token in wanted]
        assert vocabulary.ids(tokens + wanted, unknown=-1).tolist() == [first.get(t, -1) for t in tokens + wanted]


def test_strings_of_one_hash_stay_distinct(monkeypatch):
    monkeypatch.setattr(_strings, "_hashes", lambda strings: np.zeros(strings.number, np.uint64))
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.ids(WORDS).tolist() == list(range(len(WORDS)))
    assert vocabulary.ids([*WORDS, "no"], unknown=-1)[-1] == -1
    with pytest.raises(ValueError, match="must not repeat"):
        Vocabulary([*WORDS, "kings"])


def test_memory_follows_the_text_and_not_objects_a_token():
    held, size, row = traced.traced("""
        import numpy as np
        from embax.vocabulary import Vocabulary

        tokens = [f"token{row}" for row in range(100_000)]
        text, ends = "".join(tokens).encode(), np.cumsum([0, *map(len, tokens)])

        def make():
            vocabulary = Vocabulary.from_utf8(text, ends)
            vocabulary.repeated()
            return vocabulary

        found = held(make), len(text), make().ids("token77777")
    """)
    assert held < size + 2.5 * 8 * 100_000  # the offsets are the caller's; hashes and rows of the index are ours
    assert row == 77777


def test_long_tokens_do_not_take_long():
    tokens = ["a" * 100_000, *(f"t{row}" for row in range(20_000))]
    vocabulary = Vocabulary(tokens)
    assert vocabulary.ids(["a" * 100_000, "t7"]).tolist() == [0, 8]


def test_closest_spellings_do_not_mind_the_case():
    vocabulary = embax.Vocabulary(["King", "ring", "sword", "a" * 50])
    assert vocabulary.closest("king") == ["King", "ring"]
    assert vocabulary.closest("xyz") == []


@pytest.mark.parametrize("row", [-1, 2])
def test_from_utf8_refuses_special_ids_out_of_range(row):
    assert Vocabulary.from_utf8(b"ab", [0, 1, 2], special={"padding": 1}).special == {"padding": 1}
    with pytest.raises(ValueError, match=rf"special=...\)` must be ids in \[0, 2\), got {row} for 'padding'"):
        Vocabulary.from_utf8(b"ab", [0, 1, 2], special={"padding": row})
