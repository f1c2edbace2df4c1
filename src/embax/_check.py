"""Argument checks at the public boundary: each error names the call, the rule, the value seen and the fix."""

import math
import operator
from typing import Any, get_args

import numpy as np


def integer(argument: str, value: Any) -> int:
    """Return `value` as a Python int; a float that is a whole number is one too.

    Args:
      argument: The call and its argument for the message, as in `embax.f(size=...)`.
      value: What the caller gave.

    Returns:
      The same number.

    Raises:
      TypeError: If `value` is not a whole number.
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    if not isinstance(value, bool | np.bool_ | float | np.floating):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"`{argument}` must be a whole number, got {value!r}. Pass an int.")


def size(argument: str, value: Any) -> int:
    """Return `value` as a Python int that is not negative.

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave.

    Returns:
      The same number.

    Raises:
      TypeError: If `value` is not a whole number.
      ValueError: If it is negative.
    """
    number = integer(argument, value)
    if number < 0:
        raise ValueError(f"`{argument}` must not be negative, got {number}. Pass 0 or more.")
    return number


def positive(argument: str, value: Any) -> float:
    """Return `value` as a Python float above zero (infinity included).

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave.

    Returns:
      The same number.

    Raises:
      TypeError: If `value` is not a real number.
      ValueError: If it is zero, negative or NaN.
    """
    try:
        if isinstance(value, str | bytes | bool | np.bool_):  # float("3") and float(True) are numbers, too
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{argument}` must be a positive number, got {value!r}. Pass a float.") from None
    if math.isnan(number) or number <= 0:
        raise ValueError(f"`{argument}` must be positive, got {number}. Pass a number above 0.")
    return number


def flag(argument: str, value: Any) -> bool:
    """Return `value` as a Python bool.

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave.

    Returns:
      The same truth value.

    Raises:
      TypeError: If `value` is not a bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{argument}` must be a bool, got {value!r}. Pass True or False.")
    return bool(value)


def choice(argument: str, value: Any, options: Any) -> Any:
    """Return `value` if it is one of some options.

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave.
      options: A `typing.Literal`, or a tuple.

    Returns:
      The same value.

    Raises:
      ValueError: If it is none of them.
    """
    known = options if isinstance(options, tuple) else get_args(options)
    if value not in known:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, known))}, got {value!r}. Choose one of them."
        )
    return value


def row(argument: str, value: Any, rows: int) -> int:
    """Return the number in `[0, rows)` of a row that may be counted from the end.

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave, in `[-rows, rows)`.
      rows: The number of rows of the table.

    Returns:
      The row's number from the start.

    Raises:
      TypeError: If `value` is not a whole number.
      ValueError: If the table has no such row.
    """
    number = integer(argument, value)
    if not -rows <= number < rows:
        raise ValueError(
            f"`{argument}` must be a row of the table, in [{-rows}, {rows}), got {number}. Name a row that exists."
        )
    return number % rows
