"""The operators of a RowGrad: a sum concatenates rows, and a factor scales their values.

For instance, with one number for each id, in a table of 9 rows:

    g              ids [4, 1, 4]       values [1, 2, 5]      row 4 is 6, row 1 is 2
    2 * g          ids [4, 1, 4]       values [2, 4, 10]
    g + 2 * g      ids [4, 1, 4, 4, 1, 4]      values [1, 2, 5, 2, 4, 10]

No operator sums duplicates: only optimizers need them summed, once for each step.
"""

from collections.abc import Callable
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from .._base import by_bag
from .._base.by_bag import ByBag, Held
from .._core.containers.held_rows import HeldRows, bare
from . import row_checks, row_sums


class RowArithmetic(HeldRows):
    """Rows with the operators `+`, `-`, `*` and `/`. Abstract; `RowGrad` is the one subclass."""

    __slots__ = ()
    __array_ufunc__ = None  # so that NumPy leaves `numpy_scalar * g` to `__rmul__`
    _keys: Key[Array, "*lanes length"]
    _held: Held  # the values, or one for each bag
    at_owners: bool  # whether each row of a sharded table is on its owner, as `Storage.combine` leaves it

    @property
    def values(self) -> PyTree:
        """One value for each id, `(*lanes, length, *dim)`."""
        raise NotImplementedError

    @property
    def lanes(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        raise NotImplementedError

    def _with(self, keys: PyTree, held: PyTree, at_owners: bool = False) -> Self:
        """Return other rows of the same table."""
        raise NotImplementedError

    def __add__(self, other: PyTree) -> Self:
        if isinstance(other, int) and other == 0:  # the start value of sum()
            return self
        other = bare(other)
        if not isinstance(other, RowArithmetic):
            row_checks.refuse_array(other)
            return NotImplemented
        if (self.rows, self.dim, self.dtype) != (other.rows, other.dim, other.dtype):
            raise ValueError(
                "`RowGrad + RowGrad` must be of tables of the same rows, dim and dtype, got "
                f"{self!r} and {other!r}. Add gradients of one table only."
            )
        if self.lanes != other.lanes:
            raise ValueError(
                f"`RowGrad + RowGrad` must have the same lanes, got {self.lanes} and {other.lanes}. Sum lanes first: "
                "g.sum(axis=0)."
            )
        held = [x._held if isinstance(x._held, ByBag) else x.values for x in (self, other)]
        if any(isinstance(x, ByBag) for x in held):  # then there are no lanes
            values = by_bag.joined([(self._keys, held[0]), (other._keys, held[1])])
            keys = jnp.concatenate([self._keys, other._keys])
        else:
            keys, values = row_sums.together((self._keys, held[0]), (other._keys, held[1]))
        return self._with(keys, values)

    __radd__ = __add__

    def __sub__(self, other: PyTree) -> Self:
        other = bare(other)
        if not isinstance(other, RowArithmetic):
            row_checks.refuse_array(other)
            return NotImplemented
        return self + -other

    __rsub__ = __sub__

    def __neg__(self) -> Self:
        return self._mapped(jnp.negative)

    def __pos__(self) -> Self:
        return self

    def __mul__(self, factor: PyTree) -> Self:
        if isinstance(bare(factor), RowArithmetic) or not row_checks.is_factor(factor, "factor * RowGrad"):
            return NotImplemented
        return self._mapped(lambda values: values * jnp.asarray(factor, self.dtype))

    __rmul__ = __mul__

    def __truediv__(self, divisor: PyTree) -> Self:
        if isinstance(bare(divisor), RowArithmetic) or not row_checks.is_factor(divisor, "RowGrad / divisor"):
            return NotImplemented
        return self._mapped(lambda values: values / jnp.asarray(divisor, self.dtype))

    def _mapped(self, function: Callable[[Array], Array]) -> Self:
        held = self._held.mapped(function) if isinstance(self._held, ByBag) else function(self._held)
        return self._with(self._keys, held, self.at_owners)
