import itertools
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import train


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\n -- ... !", []),
        ("To be, or not to be--that's", ["to", "be", "or", "not", "to", "be", "that's"]),
        ("'Tis the dogs' _day_", ["tis", "the", "dogs", "day"]),
        ("in 1984 B2B a_b", ["in", "1984", "b2b", "a", "b"]),
        ("Don\u2019t DON'T", ["don't", "don't"]),
        ("Caf\u00e9 CAFE\u0301", ["caf\u00e9", "caf\u00e9"]),
        ("\ufeffstart", ["start"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs and viramas are combining marks
        ("Привет, мир", ["привет", "мир"]),
        ("İstanbul", ["i\u0307stanbul"]),
        ("ශ්\u200dරී ලංකා ක්\u200dෂණ", ["ශ්\u200dරී", "ලංකා", "ක්\u200dෂණ"]),  # Sinhala joins letters by ZWJ
        ("র\u200d্যাব ও ব\u200cয", ["র\u200d্যাব", "ও", "ব\u200cয"]),
        ("می\u200cخواهم به خانه\u200cها", ["می\u200cخواهم", "به", "خانه\u200cها"]),  # noqa: RUF001
        ("नम\u094dस\u200dते\u200c\u200dजी", ["नम\u094dस\u200dते\u200c\u200dजी"]),
        ("\u200cمی\u200c خواهم\u200d. \u200d \u200c-\u200d", ["می", "خواهم"]),
        (
            "l\u200c'\u200dété l'\u200cété aujourd\u200d\u2019hui",
            ["l\u200c'\u200dété", "l'\u200cété", "aujourd\u200d'hui"],
        ),
        ("Donau\u00addampf\u00adschiff, Don\u00ad't", ["donaudampfschiff", "don't"]),
        ("\u00adsoft\u00ad \u00ad hy\u00ad\u00adphen\u00ad\nend", ["soft", "hyphen", "end"]),
        ("caf e\u00ad\u0301t cafe\u00ad\u0301", ["caf", "ét", "café"]),
        ("می\u00ad\u200cخواهم", ["می\u200cخواهم"]),  # noqa: RUF001
        ("👩\u200d🚀 a\u200d👩", ["a"]),
    ],
)
def test_tokenize_finds_lower_cased_words(text, words):
    assert list(train.tokenize([text])) == ([words] if words else [])


def test_tokenize_of_long_joined_text_takes_linear_time():
    # By its square, that would be minutes.
    text = ("a" + "\u200c" * 50_000 + "'" + "\u200d" * 50_000 + " ") * 2
    assert list(train.tokenize([text])) == [["a", "a"]]


def test_tokenize_ends_a_sequence_at_a_blank_line():
    text = "one\ntwo\n\n\nthree\r\n \t\r\nfour\n"
    assert list(train.tokenize([text])) == [["one", "two"], ["three"], ["four"]]


@settings(deadline=None)
@given(st.text(alphabet="ab\u00e9'\u2019 \n_", max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_tokenize_does_not_depend_on_the_parts_of_the_text(text, cuts):
    text = unicodedata.normalize("NFC", text)
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[first:last] for first, last in itertools.pairwise(ends)]
    assert list(train.tokenize(pieces)) == list(train.tokenize([text]))


@pytest.mark.parametrize("space", [" ", "\n"])
def test_tokenize_cuts_an_endless_paragraph_between_words(space):
    words = [f"word{number}" for number in range(300_000)]
    text = space.join(words)
    pieces = [text[first : first + 1000] for first in range(0, len(text), 1000)]
    sequences = list(train.tokenize(pieces))
    assert 2 <= len(sequences) <= 5
    assert [word for sequence in sequences for word in sequence] == words


def test_tokenize_does_not_hold_a_word_without_an_end():
    sequences = train.tokenize("x" * 1000 for _ in range(5000))
    assert max(len(word) for words in sequences for word in words) < 2_000_000


def test_paragraphs_are_cut_like_tokenize():
    text = "One two.\n\n***\n\nThree,\nfour.\n \nKing's"
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    words = [list(paragraph) for paragraph in train.paragraphs(pieces)]
    assert words == [["one", "two"], [], ["three", "four"], ["king's"]]
    assert [each for each in words if each] == list(train.tokenize(pieces))
