"""HeldRows: some rows of a table in place of its whole weight. The base of `RowGrad`, a gradient by rows."""

import copy
import enum
import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import PyTree


class HeldRows:
    """Some rows of a table: a pytree node that replaces the weight of a Table.

    The gradient of a Table is a Table with such a node for its weight. So a tree of labels or masks made for the
    parameters, as optax takes them, also fits gradients and updates.
    """

    __slots__ = ()
    rows: int  # of the table

    @property
    def dim(self) -> tuple[int, ...]:
        """The sizes of a row's axes."""
        raise NotImplementedError

    def label(self) -> PyTree:
        """The one label of the weight, if the leaves are labels (from a map over a gradient); else the node itself."""
        raise NotImplementedError

    def empty(self) -> Self:
        """The same node with None for its leaves."""
        raise NotImplementedError


class OfRows:
    """A base of Table: if its weight is HeldRows, attributes and arithmetic are forwarded to these rows."""

    weight: PyTree
    __array_ufunc__ = None  # so that NumPy leaves `numpy_scalar * gradient` to `__rmul__`

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> PyTree:
            weight = self.__dict__.get("weight")
            if not isinstance(weight, HeldRows) or name.startswith("__"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            value = getattr(weight, name)
            if not callable(value):
                return value
            return functools.wraps(value)(lambda *args, **options: self._around(value(*args, **options)))

    def __add__(self, other: PyTree) -> PyTree:
        return self._by_rows(operator.add, other)

    def __radd__(self, other: PyTree) -> PyTree:
        return self._by_rows(lambda rows, other: other + rows, other)

    def __sub__(self, other: PyTree) -> PyTree:
        return self._by_rows(operator.sub, other)

    def __rsub__(self, other: PyTree) -> PyTree:
        return self._by_rows(lambda rows, other: other - rows, other)

    def __neg__(self) -> PyTree:
        return self._by_rows(operator.neg)

    def __pos__(self) -> PyTree:
        return self._by_rows(operator.pos)

    def __mul__(self, factor: PyTree) -> PyTree:
        return self._by_rows(operator.mul, factor)

    def __rmul__(self, factor: PyTree) -> PyTree:
        return self._by_rows(operator.mul, factor)

    def __truediv__(self, divisor: PyTree) -> PyTree:
        return self._by_rows(operator.truediv, divisor)

    def _by_rows(self, operation: Callable[..., PyTree], *others: PyTree) -> PyTree:
        if not isinstance(self.weight, HeldRows):
            # A Table with a whole weight has no arithmetic. Unary operators cannot return NotImplemented.
            if others:
                return NotImplemented
            raise TypeError(f"bad operand type for unary operator: {type(self).__name__!r}")
        return self._around(operation(self.weight, *map(bare, others)))

    def _around(self, out: PyTree) -> PyTree:
        """A copy of this Table with `out` for its weight; `out` itself if it is not rows."""
        if not isinstance(out, HeldRows):
            return out
        table = copy.copy(self)
        object.__setattr__(table, "weight", out)
        return table


def is_label(leaf: PyTree) -> bool:
    """Whether a leaf is a label or a mask of optax. Numbers are not: JAX's own trees of axes have numbers."""
    return isinstance(leaf, str | bool | np.bool_ | enum.Enum)


def bare(node: object) -> PyTree:
    """The rows of a gradient's Table; any other node itself."""
    return node.weight if isinstance(node, OfRows) and isinstance(node.weight, HeldRows) else node


def around(like: PyTree, out: PyTree) -> PyTree:
    """`out` in the Table of `like`, if `like` is a gradient's Table; else `out` itself."""
    return like._around(out) if bare(like) is not like else out
