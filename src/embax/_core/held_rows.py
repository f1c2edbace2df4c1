"""HeldRows: what stands in the place of a table's weight where only some of its rows are there, as in a gradient."""

import copy
import enum
import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import PyTree


class HeldRows:
    """Some rows of a table, held otherwise than as an array of all of them: a pytree node below the Table's own.

    So the gradient of a Table has the nodes of the Table itself, with rows for its leaf, and a tree of labels or masks
    for the parameters, as optax takes it, is one for the gradients and the updates, too.
    """

    __slots__ = ()
    rows: int  # of the table

    @property
    def dim(self) -> tuple[int, ...]:
        """The sizes of a row's axes."""
        raise NotImplementedError

    def label(self) -> PyTree:
        """The label of the weight, if the leaves are labels, as a map over a gradient gives them; else itself."""
        raise NotImplementedError

    def empty(self) -> Self:
        """The same node with None for its leaves."""
        raise NotImplementedError


class OfRows:
    """Attributes and arithmetic of a Table whose weight is HeldRows: those of the rows, with a Table around them."""

    weight: PyTree
    __array_ufunc__ = None  # so that a NumPy scalar leaves `c * gradient` to us

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
            # A Table has no arithmetic, and its unary operators no NotImplemented to give.
            if others:
                return NotImplemented
            raise TypeError(f"bad operand type for unary operator: {type(self).__name__!r}")
        return self._around(operation(self.weight, *map(bare, others)))

    def _around(self, out: PyTree) -> PyTree:
        """Put this Table around rows; anything else is as it is."""
        if not isinstance(out, HeldRows):
            return out
        table = copy.copy(self)
        object.__setattr__(table, "weight", out)
        return table


def is_label(leaf: PyTree) -> bool:
    """Whether a leaf is a label or a mask of optax. A number is none, since JAX maps trees to numbers of axes."""
    return isinstance(leaf, str | bool | np.bool_ | enum.Enum)


def bare(node: object) -> PyTree:
    """The rows of a Table that has rows for its weight; anything else is as it is."""
    return node.weight if isinstance(node, OfRows) and isinstance(node.weight, HeldRows) else node


def around(like: PyTree, out: PyTree) -> PyTree:
    """Put the Table that is around some rows around others, if there is one."""
    return like._around(out) if bare(like) is not like else out
