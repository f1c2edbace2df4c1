import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embax import Vectors, files
from embax.files import FormatError

NUMBERS = [[0.5, -1.25, 3.0], [10.0, 0.0, -0.125], [7.0, 2.5, 1.0]]
TOKENS = ["the", "of", "and"]


def aligned(token, row):
    return token + "".join(f"{number:10.4f}" for number in row)


# A line of a token and its numbers, in the layouts that programs write.
LAYOUTS = {
    "spaces": lambda token, row: " ".join([token, *map(str, row)]),
    "tabs": lambda token, row: "\t".join([token, *map(str, row)]),
    "a tab after the token": lambda token, row: token + "\t" + " ".join(map(str, row)),
    "two spaces after the token": lambda token, row: token + "  " + " ".join(map(str, row)),
    "two spaces everywhere": lambda token, row: "  ".join([token, *map(str, row)]),
    "a space and a tab after the token": lambda token, row: token + " \t" + " ".join(map(str, row)),
    "tabs with spaces": lambda token, row: " \t ".join([token, *map(str, row)]),
    "aligned numbers": aligned,
    "aligned to the left": lambda token, row: aligned(f"{token:<12}", row),
    "aligned to the right": lambda token, row: aligned(f"{token:>12}", row),
    "commas": lambda token, row: ", ".join([token, *map(str, row)]),
    "commas with a last one": lambda token, row: ", ".join([token, *map(str, row)]) + ",",
    "commas between spaces": lambda token, row: " , ".join([token, *map(str, row)]),
    "commas between the numbers": lambda token, row: token + " " + ", ".join(map(str, row)),
    "a tab, then commas": lambda token, row: token + "\t" + ", ".join(map(str, row)),
    "a space at the end": lambda token, row: " ".join([token, *map(str, row)]) + " ",
}
HEADERS = {
    "no header": "",
    "header": "3 3",
    "wide header": "3  3",
    "header with a tab": "3\t3",
    "header with a comma": "3, 3",
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
ends = pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])


def written(folder, text):
    path = folder / "v.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def text_of(layout, tokens=TOKENS, rows=NUMBERS, header="", end="\n"):
    lines = [layout(token, row) for token, row in zip(tokens, rows, strict=True)]
    return end.join([*([header] if header else []), *lines]) + end


@ends
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@layouts
def test_every_layout_gives_the_same_vectors(tmp_path, layout, header, end):
    vectors = Vectors.load(written(tmp_path, text_of(layout, header=header, end=end)))
    assert vectors.vocabulary.tokens() == TOKENS
    np.testing.assert_array_equal(vectors.weight, np.float32(NUMBERS))


@pytest.mark.parametrize("header", ["", "3 3"], ids=["no header", "header"])
@layouts
def test_tokens_keep_other_characters_inside(tmp_path, layout, header):
    tokens = [". . .", "New York", "\xa0b\u2003c\u3000"]
    vectors = Vectors.load(written(tmp_path, text_of(layout, tokens, header=header)))
    assert vectors.vocabulary.tokens() == tokens
    np.testing.assert_array_equal(vectors.weight, np.float32(NUMBERS))


@pytest.mark.parametrize("header", ["", "3 3"], ids=["no header", "header"])
@pytest.mark.parametrize("layout", [LAYOUTS["tabs"], LAYOUTS["a tab after the token"]])
def test_tab_ends_a_token_that_ends_in_a_number(tmp_path, layout, header):
    for tokens in (["Route 66", "of", "and"], ["item 1", "item 2", "item 3"]):
        vectors = Vectors.load(written(tmp_path, text_of(layout, tokens, header=header)))
        assert vectors.vocabulary.tokens() == tokens
        np.testing.assert_array_equal(vectors.weight, np.float32(NUMBERS))


@layouts
def test_tokens_may_be_numbers_and_signs(tmp_path, layout):
    tokens = ["5", ",", "-1.5"]
    assert Vectors.load(written(tmp_path, text_of(layout, tokens))).vocabulary.tokens() == tokens


def test_comma_after_every_token_is_kept_if_blanks_separate_numbers(tmp_path):
    tokens = ["a,", "b,", ","]
    assert Vectors.load(written(tmp_path, text_of(LAYOUTS["spaces"], tokens))).vocabulary.tokens() == tokens


def test_lines_of_several_layouts_are_read_if_all_have_one_dimension(tmp_path):
    text = "a 1 2\nb\t3 4\nc  5   6\nd\t7\t8\nNew York   9 10\n"
    for header in ("", "5 2\n"):
        vectors = Vectors.load(written(tmp_path, header + text))
        assert vectors.vocabulary.tokens() == ["a", "b", "c", "d", "New York"]
        assert vectors.weight.ravel().tolist() == list(range(1, 11))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Never a dimension that the header denies.
        ("2 3\na\t1 2\nb\t3 4\n", "line 2 has 2 numbers after the token, not 3"),
        ("2 2\na  1 2 3\nb  4 5 6\n", "line 2 has more than 2 numbers after the token"),
        ("2 2\na, 1, 2, 3\nb, 4, 5, 6\n", "line 2 has .* where a number should be"),
        ("2 3\na, 1, 2\nb, 4, 5\n", "line 2 has"),
        ("2 1\na, 1, 2\nb, 4, 5\n", "line 2 has more than 1 numbers after the token"),
        ("a; 1; 2\nb; 4; 5\n", "line 1 has more than 1 numbers after the token"),
        ("2 3\r\na\t1\t2\r\nb\t3\t4\r\n", "line 2 has 2 numbers after the token, not 3"),
        ("2 3\ra 1 2 3\rb 4 5\r", "line 3 has 2 numbers after the token, not 3"),
        ("2 3\na 1 2 3\nitem 1\t4 5\n", "line 3 has a tab between its last 3 numbers, and none between them and the"),
        # Without a header, that of most lines.
        ("a  1  2\nb  3  4\nc  5\n", "line 3 has 1 numbers after the token, not 2"),
        ("a   1.0   2.0\nb   3.0   4.0   5.0\nc   6.0   7.0\n", "line 2 has more than 2 numbers"),
        ("a, 1, 2\nb, 3, 4\nc, 5, x\n", "line 3 has b'x' where a number should be"),
        ("a\t1 2\nb\t3 4\nc\tx\t5 6\n", "line 3 has a tab within the token b'c.tx'"),
        ("a\t1\t2\nb\t\t4\nc\t5\t6\n", "line 2 has 1 numbers after the token, not 2"),
        ("a 0.1\t0.2\t0.3\nb 0.4\t0.5\t0.6\n", "line 1 has a tab between its last 3 numbers"),
        ("a 0.1000-0.2000\nb 0.3000 -0.4000\nc 0.5000 -0.6000\n", "line 1 has 1 numbers after the token, not 2"),
        ("a 1,5 2,5\nb 3,5 4,5\n", "is of no format"),
        ("old\tnew\t1.5\nhard\teasy\t0.9\n", "is of no format"),
    ],
)
def test_ambiguous_layouts_are_refused_with_their_line(tmp_path, text, message):
    with pytest.raises(FormatError, match=message):
        Vectors.load(written(tmp_path, text))


def test_header_aligned_to_the_right_is_recognised(tmp_path):
    text = f"{3:8d}{3:8d}\n" + text_of(LAYOUTS["aligned to the right"])
    assert Vectors.load(written(tmp_path, text)).vocabulary.tokens() == TOKENS


def test_carriage_return_inside_a_token_is_kept(tmp_path):
    for header in ("", "2 2\n"):
        vectors = Vectors.load(written(tmp_path, header + "\ra\r 1 2\nb\r  3 4\n"))
        assert vectors.vocabulary.tokens() == ["\ra\r", "b\r"]


@pytest.mark.parametrize("header", ["", "3 2\n"], ids=["no header", "header"])
def test_an_empty_token_is_one_blank(tmp_path, header):
    for parting in " \t":
        text = header + "".join(f"{token}{parting}1{parting}2\n" for token in ("a", "", "b"))
        vectors = Vectors.load(written(tmp_path, text))
        assert vectors.vocabulary.tokens() == ["a", "", "b"]
        assert vectors.weight.tolist() == [[1, 2]] * 3


def test_numeric_tokens_after_one_blank_are_kept(tmp_path):
    vectors = Vectors.load(written(tmp_path, " 1 0.5 0.25\n 2 1.5 1.25\n"))
    assert vectors.vocabulary.tokens() == ["1", "2"]
    assert vectors.weight.tolist() == [[0.5, 0.25], [1.5, 1.25]]


@layouts
def test_the_line_is_named_far_into_a_file(tmp_path, layout):
    rows = np.arange(12_000, dtype=np.float64).reshape(-1, 3) / 4
    tokens = [f"token{row}" for row in range(len(rows))]
    tokens[2_800] = "New York"
    text = text_of(layout, tokens, rows.tolist())
    vectors = Vectors.load(written(tmp_path, text))
    assert vectors.vocabulary.tokens() == tokens
    np.testing.assert_array_equal(vectors.weight, rows)
    with pytest.raises(FormatError, match=r"line 3,601 has"):
        Vectors.load(written(tmp_path, text.replace("2700.25", "270o.25", 1)))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.text("ab5,.\xa0\u2003", min_size=1, max_size=4), min_size=1, max_size=5, unique=True),
    dim=st.integers(2, 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    has_header=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_token_is_read_in_any_layout(tmp_path_factory, tokens, dim, layout, has_header, end):
    if "commas" in layout:  # one of its own could not be told from one that parts
        tokens = list(dict.fromkeys(token.replace(",", "c") for token in tokens))
    rows = [[0.5 + row + column for column in range(dim)] for row in range(len(tokens))]
    text = text_of(LAYOUTS[layout], tokens, rows, f"{len(tokens)} {dim}" if has_header else "", end)
    contents = files.load(written(tmp_path_factory.getbasetemp(), text), format="word2vec" if has_header else "glove")
    assert contents.vocabulary.tokens() == tokens
    assert contents.weight.tolist() == rows
