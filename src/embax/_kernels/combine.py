"""combine: sum the values of each row, in some order of rows."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._base import distinct as _distinct
from .._base.distinct import Distinct, Slots
from .library import has
from .primitive import FLOATS, Outs, call, fits, primitive


def combine(slots: Slots, ids: Int[Array, " ids"], values: PyTree, rows: int) -> tuple[Slots, Distinct]:
    """As `_base.distinct.combine`, which it is where no kernel knows the values.

    A kernel needs no slots, and leaves them as they are; so a state that has some is the same with and without one.
    Without slots, callers rely on the rising order of a sort.

    Args:
      slots: As there.
      ids: As there.
      values: An array `(ids, *dim)`, or a pair of it and one `(ids,)`.
      rows: As there.

    Returns:
      As there. The distinct ids are in the same order for any number of threads and any instruction set.
    """
    if slots is None or not _has_kernel(ids, values):
        return _distinct.combine(slots, ids, values, rows)
    if isinstance(values, tuple):  # as one more column, so that duplicates are found once
        numbers, column = values
        wide = jnp.concatenate([jnp.reshape(numbers, (ids.size, -1)), column[:, None]], axis=1)
        slots, (ids, sums, number) = combine(slots, ids, wide, rows)
        return slots, Distinct(ids, (jnp.reshape(sums[:, :-1], numbers.shape), sums[:, -1]), number)
    new, plain = _distinct.combine(slots, ids, values, rows)
    # The slots are scratch that nothing reads, so that they may stay as they were.
    slots, ids, sums, number = combine_p.bind(new, *plain, slots, ids, values, rows=rows)
    return slots, Distinct(ids, sums, number)


def _has_kernel(ids: Array, values: PyTree) -> bool:
    arrays = values if isinstance(values, tuple) else (values,)
    if not has("combine") or len(arrays) not in (1, 2) or ids.size > np.iinfo(np.int32).max:
        return False
    dtypes = {x.dtype for x in arrays}
    return len(dtypes) == 1 and dtypes <= set(FLOATS) and fits(*arrays, ids=ids)


def _by_kernel(outs: Outs, slots: Array, ids: Array, values: Array, *, rows: int) -> list[Array]:
    no_bags, no_factors = jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.float32)
    args = ids, values, no_bags, no_factors
    return [slots, *call("combine", outs[1:], *args, rows=np.int64(rows), length=np.int64(1))]


# XLA's order is another one, so a value and its derivative have to come from the same of the two.
combine_p = primitive("combine", _by_kernel, results=4, plain_derivative=True)
