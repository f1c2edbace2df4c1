"""Argument checks: what passes, and the message of what does not."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest

from embax._base import check as _check


@pytest.mark.parametrize(
    "value", [3, 3.0, np.int8(3), np.uint64(3), np.float32(3), jnp.array(3), np.array(3)], ids=repr
)
def test_integer_and_size_take_whole_numbers(value):
    for check in _check.integer, _check.size:
        number = check("f(n=...)", value)
        assert number == 3
        assert type(number) is int


@pytest.mark.parametrize("value", [True, np.True_, 2.5, np.nan, np.inf, "3", None, [3], 3j, jnp.array(3.0)], ids=repr)
@pytest.mark.parametrize("check", [_check.integer, _check.size, lambda *args: _check.row(*args, rows=9)])
def test_integer_refuses_other_numbers_and_types(check, value):
    with pytest.raises(TypeError, match=r"`f\(n=\.\.\.\)` must be a whole number, got .*\. Pass an int\."):
        check("f(n=...)", value)


def test_size_refuses_negative_numbers():
    assert _check.size("f(n=...)", 0) == 0
    with pytest.raises(ValueError, match=r"`f\(n=\.\.\.\)` must not be negative, got -1\. Pass 0 or more\."):
        _check.size("f(n=...)", -1)


@pytest.mark.parametrize("value", [2, 2.0, np.float16(2), np.array(2), jnp.array(2.0)], ids=repr)
def test_positive_takes_numbers_above_zero(value):
    number = _check.positive("f(x=...)", value)
    assert number == 2.0
    assert type(number) is float


def test_positive_takes_infinity():
    assert _check.positive("f(x=...)", np.inf) == np.inf


@pytest.mark.parametrize("value", [0, -1.0, np.nan, -np.inf], ids=repr)
def test_positive_refuses_other_numbers(value):
    with pytest.raises(
        ValueError, match=r"`f\(x=\.\.\.\)` must be positive, got (0\.0|-1\.0|nan|-inf)\. Pass a number"
    ):
        _check.positive("f(x=...)", value)


@pytest.mark.parametrize("value", [None, "big", "3", b"3", True, np.True_, 1j, [1.0]], ids=repr)
def test_positive_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"`f\(x=\.\.\.\)` must be a positive number, got .*\. Pass a float\."):
        _check.positive("f(x=...)", value)


def test_flag_takes_bools():
    assert _check.flag("f(on=...)", np.True_) is True
    assert _check.flag("f(on=...)", False) is False


@pytest.mark.parametrize("value", [0, 1, None, "True", [True]], ids=repr)
def test_flag_refuses_other_types(value):
    with pytest.raises(TypeError, match=r"`f\(on=\.\.\.\)` must be a bool, got .*\. Pass True or False\."):
        _check.flag("f(on=...)", value)


def test_choice_takes_the_options_only():
    options = Literal["a", "b"]
    assert _check.choice("f(way=...)", "b", options) == "b"
    with pytest.raises(ValueError, match=r"`f\(way=\.\.\.\)` must be one of 'a', 'b', got 'c'\. Choose one of them\."):
        _check.choice("f(way=...)", "c", options)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (2, 2), (-1, 2), (-3, 0), (np.int8(-1), 2)])
def test_row_counts_from_either_end(value, expected):
    assert _check.row("f(row=...)", value, 3) == expected


@pytest.mark.parametrize(("value", "rows"), [(3, 3), (-4, 3), (0, 0), (-1, 0)])
def test_row_refuses_a_row_out_of_range(value, rows):
    message = (
        rf"`f\(row=\.\.\.\)` must be a row of the table, in \[{-rows}, {rows}\), got {value}\. Name a row that exists"
    )
    with pytest.raises(ValueError, match=message):
        _check.row("f(row=...)", value, rows)
