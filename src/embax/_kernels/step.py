"""step: a whole step of an optimizer on the rows of a gradient, in one pass over them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int, Int32

from .._base.by_bag import Held, for_kernel
from .._base.distinct import accumulator
from .library import has
from .primitive import FLOATS, Outs, call, fits, primitive

Optimizer = Literal["step_sgd", "step_adagrad", "step_rowwise_adagrad", "step_adam", "step_rowwise_adam"]


class Step(NamedTuple):
    """The optimizer of a step and its numbers, such as the learning rate, in the order of the library."""

    optimizer: Optimizer
    scalars: Float[Array, " scalars"]
    decays: bool  # whether there is a weight decay

    def after(self, zero: Int32[Array, ""]) -> "Step":
        """The same step, after what computes the zero."""
        return self._replace(scalars=self.scalars + zero.astype(self.scalars.dtype))


def step(
    plain: Sequence[Array],
    arrays: Sequence[Array],
    ids: Int[Array, " ids"],
    values: Held,
    how: Step,
    *,
    wrap: bool = False,
) -> list[Array]:
    """Sum the gradients of each row, and update the row and its state.

    Args:
      plain: The arrays after the step by plain JAX.
      arrays: The table, and the arrays of its state in the order of the library.
      ids: Row numbers; a number outside of `[0, rows)` stands for no row.
      values: The gradient of each id, or a `ByBag`, whose gradients the kernel reads once for each bag.
      how: The optimizer and its numbers.
      wrap: Whether ids in `[-rows, 0)` count from the end.

    Returns:
      The arrays after the step, updated in place if the old ones are not used afterwards.
    """
    *of_ids, length = for_kernel(ids, values)
    if not _has_kernel(arrays, ids, of_ids[0], how):
        return list(plain)
    scalars = how.scalars.astype(accumulator(arrays[0].dtype))
    attributes = {"length": length, "decays": how.decays, "wrap": wrap}
    return STEPS[how.optimizer].bind(*plain, *arrays, ids, *of_ids, scalars, **attributes)


def _has_kernel(arrays: Sequence[Array], ids: Array, values: Array, how: Step) -> bool:
    table = arrays[0]
    return (
        has(how.optimizer)
        and all(x.dtype in FLOATS for x in arrays)
        and values.dtype == table.dtype
        and values.shape[1:] == table.shape[1:]
        and fits(*arrays, values, ids=ids)
    )


def _primitive(name: Optimizer, arrays: int) -> Primitive:
    def by_kernel(outs: Outs, *args: Array, length: int, decays: bool, wrap: bool) -> list[Array]:
        attributes = {"length": np.int64(length), "decay": np.int32(2 if decays else 0), "wrap": np.int32(wrap)}
        if name == "step_adam":
            attributes["nesterov"] = np.int32(0)
        aliases = {i: i for i in range(arrays)}
        return call(name, outs, *args, aliases=aliases, **attributes)

    return primitive(name, by_kernel, results=arrays, plain_derivative=True)


_ARRAYS: dict[Optimizer, int] = {
    "step_sgd": 1,
    "step_adagrad": 2,
    "step_rowwise_adagrad": 2,
    "step_adam": 3,
    "step_rowwise_adam": 3,
}
STEPS = {name: _primitive(name, arrays) for name, arrays in _ARRAYS.items()}
