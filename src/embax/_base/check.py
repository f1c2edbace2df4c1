"""Argument checks at the public boundary: each error names the call, the rule, the value seen and the fix.

Each takes `argument`, the call and its argument for the message, and `value`, which the caller gave, and returns the
value in the type that the rest of the package computes with. For instance, `size("embax.f(rows=...)", 3.0)` is 3, and
`size("embax.f(rows=...)", -1)` raises "`embax.f(rows=...)` must not be negative, got -1. Pass 0 or more."
"""

import math
import operator
from typing import Any, SupportsFloat, SupportsIndex, get_args

import numpy as np


def integer(argument: str, value: object) -> int:
    """Return `value` as a Python int; a float may be given if it is a whole number.

    Raises:
      TypeError: If `value` is not a whole number.
    """
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    if isinstance(value, SupportsIndex) and not isinstance(value, bool | np.bool_ | float | np.floating):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"`{argument}` must be a whole number, got {value!r}. Pass an int.")


def size(argument: str, value: object) -> int:
    """Return `value` as a Python int that is not negative.

    Raises:
      TypeError: If `value` is not a whole number.
      ValueError: If it is negative.
    """
    number = integer(argument, value)
    if number < 0:
        raise ValueError(f"`{argument}` must not be negative, got {number}. Pass 0 or more.")
    return number


def positive(argument: str, value: object) -> float:
    """Return `value` as a Python float above zero (infinity included).

    Raises:
      TypeError: If `value` is not a real number.
      ValueError: If it is zero, negative or NaN.
    """
    number = _real(argument, value, "a positive number")
    if math.isnan(number) or number <= 0:
        raise ValueError(f"`{argument}` must be positive, got {number}. Pass a number above 0.")
    return number


def not_negative(argument: str, value: object, most: float | None = None) -> float:
    """Return `value` as a Python float that is finite and not negative.

    Args:
      argument: The call and its argument for the message.
      value: What the caller gave.
      most: The upper limit, included. Default: none.

    Returns:
      The same number.

    Raises:
      TypeError: If `value` is not a real number, or a traced one.
      ValueError: If it is negative, NaN, infinite or above `most`.
    """
    rule = "a finite number, 0 or more" if most is None else f"a number from 0 to {most:g}"
    number = _real(argument, value, rule)
    if not math.isfinite(number) or number < 0 or (most is not None and number > most):
        raise ValueError(f"`{argument}` must be {rule}, got {number}. Pass such a number, or 0.0 for none.")
    return number


def _real(argument: str, value: object, rule: str) -> float:
    try:
        if isinstance(value, SupportsFloat | SupportsIndex) and not isinstance(value, bool | np.bool_):
            return float(value)
        raise TypeError  # although float("3") and float(True) would work
    except (TypeError, ValueError):
        raise TypeError(f"`{argument}` must be {rule}, got {value!r}. Pass a float.") from None


def flag(argument: str, value: object) -> bool:
    """Return `value` as a Python bool.

    Raises:
      TypeError: If `value` is not a bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"`{argument}` must be a bool, got {value!r}. Pass True or False.")
    return bool(value)


def choice(argument: str, value: object, options: object) -> Any:
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


def row(argument: str, value: object, rows: int) -> int:
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
