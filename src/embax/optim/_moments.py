"""Code that optimizers with moments share: the checks of their arguments, and the numbers of a step."""

from typing import TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from .._base import check as _check

Numbers: TypeAlias = tuple[float | Array, ...]


def of_moments(b1: float, b2: float, steps: Int32[Array, ""]) -> Numbers:
    """Return the decays of two moments, one minus each of them, and the bias corrections of the next step.

    Args:
      b1: The decay of the first moment.
      b2: The decay of the second moment.
      steps: The number of steps so far.

    Returns:
      `b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1**t), 1 / (1 - b2**t)` with `t = steps + 1`.
    """
    count = jnp.asarray(optax.safe_increment(steps)).astype(jnp.result_type(float))
    return b1, 1 - b1, b2, 1 - b2, 1 / (1 - b1**count), 1 / (1 - b2**count)


def check_decays(call: str, b1: float, b2: float) -> None:
    """Raise a ValueError if a decay is outside of [0, 1)."""
    for name, value in zip(("b1", "b2"), not_negative(call, b1=b1, b2=b2), strict=True):
        if value >= 1:
            raise ValueError(f"`{call}({name}=...)` must be in [0, 1), got {value}. Pass a number below 1.")


def not_negative(call: str, **numbers: object) -> list[float]:
    """Return finite numbers, 0 or more; an error for anything else names the argument."""
    return [_check.not_negative(f"{call}({name}=...)", value) for name, value in numbers.items()]
