"""combine: sum the values of each row; the order of the rows may differ from that of `_base.distinct`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._base import distinct as _distinct
from .._base.by_bag import ByBag, expanded, for_kernel
from .._base.distinct import Distinct, Slots
from .library import has
from .primitive import FLOATS, Outs, call, fits, primitive


def combine(slots: Slots, ids: Int[Array, " ids"], values: PyTree, rows: int) -> tuple[Slots, Distinct]:
    """Sum the values of each row, see `_base.distinct.combine`, by a kernel if there is one for the values.

    A kernel needs no slots and does not change them, so that a state with slots has the same structure in both cases.
    It is not used without slots, because callers then rely on the rising order of a sort.

    Args:
      slots: See `_base.distinct.combine`.
      ids: See `_base.distinct.combine`.
      values: An array `(ids, *dim)`, a pair of it and an array `(ids,)`, or a `ByBag`.
      rows: See `_base.distinct.combine`.

    Returns:
      See `_base.distinct.combine`. The order of the distinct ids does not depend on threads or instruction set.
    """
    expanded_values = values if isinstance(values, tuple) else expanded(ids, values)
    if slots is None or not _has_kernel(ids, values):
        return _distinct.combine(slots, ids, expanded_values, rows)
    if isinstance(values, tuple):  # the second array as one more column, so that duplicates are found only once
        numbers, column = values
        wide = jnp.concatenate([jnp.reshape(numbers, (ids.size, -1)), column[:, None]], axis=1)
        slots, (ids, sums, number) = combine(slots, ids, wide, rows)
        return slots, Distinct(ids, (jnp.reshape(sums[:, :-1], numbers.shape), sums[:, -1]), number)
    new, plain = _distinct.combine(slots, ids, expanded_values, rows)
    *of_ids, length = for_kernel(ids, values)
    # Slots are scratch memory without a meaning between calls, so the kernel need not change them.
    slots, ids, sums, number = combine_p.bind(new, *plain, slots, ids, *of_ids, rows=rows, length=length)
    return slots, Distinct(ids, sums, number)


def _has_kernel(ids: Array, values: PyTree) -> bool:
    arrays = values if isinstance(values, tuple) else (values.values if isinstance(values, ByBag) else values,)
    if not has("combine") or len(arrays) not in (1, 2):
        return False
    dtypes = {x.dtype for x in arrays}
    return len(dtypes) == 1 and dtypes <= set(FLOATS) and fits(*arrays, ids=ids)


def _by_kernel(outs: Outs, slots: Array, *of_ids: Array, rows: int, length: int) -> list[Array]:
    return [slots, *call("combine", outs[1:], *of_ids, rows=np.int64(rows), length=np.int64(length))]


# XLA's order of rows differs, so a value and its derivative must both come from XLA.
combine_p = primitive("combine", _by_kernel, results=4, plain_derivative=True)
