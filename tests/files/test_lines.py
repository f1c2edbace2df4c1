import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embax.files import FormatError
from embax.files._lines import lines as lines

ROWS = [[1.0, 0.5], [-2.0, 0.25]]


class Nowhere:
    """A source for messages only."""

    error = staticmethod(lambda reason: FormatError("nowhere", reason))


def by_line(block, layout):
    return lines.by_line(Nowhere(), block, layout, 1)


def by_arrow(block, layout):
    table = lines._table(block, layout)
    return None if table is None else [lines._packed(batch) for batch in table.to_batches()]


FIELDS = st.one_of(
    st.floats(width=32).map(str),
    st.floats().map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
    st.from_regex(r"[+-]?[0-9]{0,3}\.?[0-9]{0,3}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        "nan NaN -nan +inf INFINITY nan(a1) nan( infin 0x1p3 1e400 1e-400 1_0 1d5 0f \t5\t + . e1".split(" ")
    ),
    st.text(" \t\r\x0b\x00\"'\\+-.0123456789eEinfa\xa0\u0663", max_size=6),
)
TOKENS = st.text(" \t\r\x00\"'\\a1.\ufeff\x85", max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(TOKENS, st.lists(FIELDS, min_size=1, max_size=3)), min_size=1, max_size=4),
    dim=st.integers(1, 3),
    delimiter=st.sampled_from([b" ", b"\t"]),
    end=st.sampled_from(["\n", "\r\n", " \n", "\t\n", "\n\n"]),
)
def test_pyarrow_reads_the_same_as_line_by_line(rows, dim, delimiter, end):
    parting = delimiter.decode()
    block = "".join(parting.join([token, *fields]) + end for token, fields in rows).encode()
    layout = lines.TextLayout(delimiter, dim)
    fast = by_arrow(block, layout)
    if fast is None:
        return
    slow = by_line(block, layout)  # it must not complain of what pyarrow takes
    assert b"".join(packed.text for packed in fast) == slow.text
    assert np.concatenate([packed.lengths for packed in fast]).tolist() == slow.lengths.tolist()
    np.testing.assert_array_equal(np.concatenate([packed.rows for packed in fast]), slow.rows)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n", b" \r\n"])
def test_pyarrow_reads_the_usual_lines(end):
    packed = by_arrow(b"a 1 0.5" + end + b"b -2 0.25" + end, lines.TextLayout(b" ", 2))
    assert packed is not None
    assert packed[0].text == b"ab"
    assert packed[0].rows.tolist() == ROWS


def test_pyarrow_takes_the_same_for_no_number():
    block, layout = b"a nan(a1)\nb -NaN\n", lines.TextLayout(b" ", 1)
    assert np.isnan(by_line(block, layout).rows).all()
    assert np.isnan(by_arrow(block, layout)[0].rows).all()


def test_a_part_of_a_batch_is_taken_out():
    (batch,) = lines._table(b"abc 1 2\nd 3 4\nef 5 6\n", lines.TextLayout(b" ", 2)).to_batches()
    text, lengths, rows = lines._packed(batch.slice(1))
    assert (text, lengths.tolist(), rows.tolist()) == (b"def", [1, 2], [[3, 4], [5, 6]])


def test_pyarrow_gets_no_lines_of_very_many_columns():
    block = b"a" + b" 1" * 10_001 + b"\n"
    assert by_arrow(block, lines.TextLayout(b" ", 10_001)) is None
    assert by_line(block, lines.TextLayout(b" ", 10_001)).rows.shape == (1, 10_001)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(0, 0x7F7FFFFF), digits=st.integers(0, 30), sign=st.sampled_from([1, -1]))
def test_numbers_halfway_are_rounded_once(bits, digits, sign):
    low, high = np.asarray([bits, bits + 1], np.uint32).view(np.float32).astype(np.float64)
    halfway = (low + min(high, 2.0**128)) / 2
    exact = f"{sign * halfway:.180f}" if halfway < 1 else f"{sign * halfway:.60f}"
    for text in (exact, exact + "0" * digits + "1"):
        layout = lines.TextLayout(b" ", 1)
        block = f"a {text}\n".encode()
        fast, slow = by_arrow(block, layout), by_line(block, layout)
        assert fast is not None
        assert fast[0].rows.tobytes() == slow.rows.tobytes()


@pytest.mark.parametrize(
    ("number", "bits"),
    [
        ("1.00000005960464477539062500000", 0x3F800000),  # halfway: to the even one
        ("1.00000005960464477539062500001", 0x3F800001),  # by way of float64: 0x3F800000
        ("1.00000017881393432617187500000", 0x3F800002),
        ("1.00000017881393432617187499999", 0x3F800001),
        ("-1.00000005960464477539062500001", 0xBF800001),
        ("340282356779733661637539395458142568447.9", 0x7F7FFFFF),
        ("340282356779733661637539395458142568448", 0x7F800000),
        ("7.006492321624085e-46", 0x00000000),
        ("7.0064923216240854e-46", 0x00000001),
        ("1e400", 0x7F800000),
        ("-1e-400", 0x80000000),
    ],
)
def test_numbers_are_rounded_to_the_nearest_float32(number, bits):
    block, layout = b"a " + number.encode() + b"\n", lines.TextLayout(b" ", 1)
    assert by_line(block, layout).rows.view(np.uint32).item() == bits
    assert by_arrow(block, layout)[0].rows.view(np.uint32).item() == bits


@settings(max_examples=150, deadline=None)
@given(
    block=st.lists(
        st.lists(st.sampled_from(["a", "b c", "7", "1.5", ",", " ", " ", "  ", "\t", ", ", "\r", "\xa0"]), max_size=9),
        min_size=1,
        max_size=3,
    ),
    dim=st.integers(1, 3),
    delimiter=st.sampled_from([b" ", b"\t", b","]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_lines_of_any_blanks_are_read_alike_fast_and_one_by_one(block, dim, delimiter, end):
    block = "".join("".join(line) + end for line in block).encode()
    layout = lines.TextLayout(delimiter, dim)
    spaced = lines._with_single_spaces(block, layout)
    for fast in (by_arrow(block, layout), None if spaced is None else by_arrow(spaced, lines.TextLayout(b" ", dim))):
        if fast:
            slow = by_line(block, layout)  # it must not complain of what pyarrow takes
            assert b"".join(packed.text for packed in fast) == slow.text
            assert np.concatenate([packed.lengths for packed in fast]).tolist() == slow.lengths.tolist()
            np.testing.assert_array_equal(np.concatenate([packed.rows for packed in fast]), slow.rows)
