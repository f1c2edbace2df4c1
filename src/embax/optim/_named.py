"""SGD, Adagrad and Adam, already lifted, for which `step` can run in one pass over the rows."""

import optax
from jaxtyping import PyTree

from .._gradients.chosen import Chooser
from ._fused import fusable
from ._moments import Numbers, check_decays, not_negative, of_moments


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, tables: Chooser | None = None
) -> optax.GradientTransformationExtraArgs:
    """Plain gradient descent, already lifted: `w[r] -= learning_rate * (g[r] + weight_decay * w[r])`.

    The same as `lift(optax.sgd(learning_rate))`, but `step` can run it in one pass over the rows that were read.

    Args:
      learning_rate: The step size, or a schedule of it.
      weight_decay: The part of a weight that is added to its gradient; in a table, for the rows that were read.
      tables: As in `lift`.

    Returns:
      A transformation over trees with Tables, like that of `lift`.

    Raises:
      ValueError: If the weight decay is negative.

    Example:
      >>> import embax
      >>> tx = embax.optim.sgd(0.1)
    """
    (decay,) = not_negative("embax.optim.sgd", weight_decay=weight_decay)
    return fusable(optax.identity(), "step_sgd", (), lambda _: (), learning_rate, decay, tables)


def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    initial_accumulator: float = 0.1,
    eps: float = 1e-7,
    *,
    weight_decay: float = 0.0,
    tables: Chooser | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adagrad, already lifted: `s += g**2; w -= learning_rate * (g / sqrt(s + eps) + weight_decay * w)`.

    The same as `lift(optax.adagrad(learning_rate))`, but `step` can run it in one pass over the rows that were read.

    Args:
      learning_rate: The step size, or a schedule of it.
      initial_accumulator: The start value of the sums of squares, 0 or more.
      eps: The number added under the root, 0 or more.
      weight_decay: As in `sgd`, added to the scaled gradient.
      tables: As in `lift`.

    Returns:
      A transformation over trees with Tables, like that of `lift`.

    Raises:
      ValueError: If an argument is negative.

    Example:
      >>> import embax
      >>> tx = embax.optim.adagrad(0.1)
    """
    numbers = {"initial_accumulator": initial_accumulator, "eps": eps, "weight_decay": weight_decay}
    start, eps, decay = not_negative("embax.optim.adagrad", **numbers)
    scaling = optax.scale_by_rss(start, eps)
    return fusable(scaling, "step_adagrad", ("sum_of_squares",), lambda _: (eps,), learning_rate, decay, tables)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    tables: Chooser | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam, or AdamW with a weight decay, already lifted.

    The same as `lift(optax.adam(learning_rate))`, or `lift(optax.adamw(learning_rate))`, but `step` can run it in one
    pass over the rows that were read. See `lift` for the differences from dense training.

    Args:
      learning_rate: The step size, or a schedule of it.
      b1: The decay of the first moment, in [0, 1).
      b2: The decay of the second moment, in [0, 1).
      eps: The number added to the root, 0 or more.
      weight_decay: As in `sgd`, added to the scaled gradient.
      tables: As in `lift`.

    Returns:
      A transformation over trees with Tables, like that of `lift`.

    Raises:
      ValueError: If an argument is outside of its range.

    Example:
      >>> import embax
      >>> tx = embax.optim.adam(1e-3, weight_decay=1e-4)
    """
    call = "embax.optim.adam"
    eps, decay = not_negative(call, eps=eps, weight_decay=weight_decay)
    check_decays(call, b1, b2)

    def scalars(state: PyTree) -> Numbers:
        return eps, 0.0, *of_moments(b1, b2, state.count)

    return fusable(optax.scale_by_adam(b1, b2, eps), "step_adam", ("mu", "nu"), scalars, learning_rate, decay, tables)
