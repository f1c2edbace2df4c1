"""Ragged: lists of ids of different lengths, in arrays of one static shape."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Int32, Integer

from .._base import check as _check

_Numbers = Integer[Array, "*shape"] | Integer[np.ndarray, "*shape"]


class Ragged:
    """Lists of ids of different lengths: bag `b` is `values[offsets[b] : offsets[b + 1]]`.

    A pytree of arrays. Values behind the last offset belong to no bag. So batches of one capacity have one shape, and
    compile once; see `pad_to`.

    Args:
      values: The ids of all bags, one after the other, `(capacity,)`, of any integer dtype.
      offsets: Where each bag starts, and where the last one ends, `(bags + 1,)`, of any integer dtype. They begin with
        0, never fall, and end within the capacity.

    Raises:
      TypeError: If an argument is not of an integer dtype.
      ValueError: If a shape or a concrete offset is wrong. Traced offsets are not checked.

    Example:
      >>> import embax
      >>> bags = embax.Ragged([4, 7, 7, 2], [0, 3, 3, 4])  # of 3, 0 and 1 ids
      >>> bags
      Ragged(3 bags, capacity=4)
      >>> bags.lengths
      Array([3, 0, 1], dtype=int32)
    """

    __slots__ = ("offsets", "values")
    values: Int[Array, " capacity"]
    offsets: Int32[Array, " bags_and_1"]

    def __init__(self, values: Any, offsets: Any):
        values = _integers("embax.Ragged(values=...)", values)
        offsets = _integers("embax.Ragged(offsets=...)", offsets)
        if offsets.size == 0:
            raise ValueError("`embax.Ragged(offsets=...)` must have an end, got none. Pass [0] for no bags.")
        _check_offsets("embax.Ragged(offsets=...)", offsets, values.shape[0])
        if not isinstance(offsets, Tracer):
            with jax.ensure_compile_time_eval():  # concrete offsets stay concrete inside of `jit`
                offsets = jnp.asarray(np.asarray(offsets).astype(np.int32), np.int32)
        _fill(self, values, offsets.astype(jnp.int32) if isinstance(offsets, Tracer) else offsets)

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> "Ragged":
        """Make bags from lists of ids.

        Args:
          lists: The ids of each bag: sequences or 1-D arrays.

        Returns:
          The bags; their capacity is the number of ids.

        Raises:
          TypeError: If a list is not of integers.
          ValueError: If it has more than one axis.

        Example:
          >>> import embax
          >>> embax.Ragged.from_lists([[4, 7, 7], [], [2]])
          Ragged(3 bags, capacity=4)
        """
        arrays = [_integers("embax.Ragged.from_lists(lists=...)", np.asarray(x) if len(x) else []) for x in lists]
        # Empty lists are skipped: their dtype is arbitrary.
        full = [np.asarray(x) for x in arrays if len(x)]
        values = np.concatenate(full) if full else np.zeros(0, np.int32)
        return cls(values, np.cumsum([0, *(len(x) for x in arrays)]))

    @classmethod
    def from_lengths(cls, values: Any, lengths: Any) -> "Ragged":
        """Make bags from consecutive ids and the length of each bag.

        Args:
          values: The ids of all bags, one after the other, `(capacity,)`; ids beyond the last bag are unused.
          lengths: The number of ids of each bag, `(bags,)`.

        Returns:
          The bags.

        Raises:
          TypeError: If an argument is not of an integer dtype.
          ValueError: If a concrete length is negative, or the lengths add up to more than the capacity.

        Example:
          >>> import embax
          >>> embax.Ragged.from_lengths([4, 7, 7, 2], [3, 0, 1])
          Ragged(3 bags, capacity=4)
        """
        lengths = _wide(_integers("embax.Ragged.from_lengths(lengths=...)", lengths))
        if not isinstance(lengths, Tracer) and (bad := np.flatnonzero(lengths < 0)).size:
            raise ValueError(
                f"`embax.Ragged.from_lengths(lengths=...)` must not be negative, got {int(lengths[bad[0]])} at "
                f"position {bad[0]}. Pass 0 for an empty bag."
            )
        xp = jnp if isinstance(lengths, jax.Array) else np
        return cls(values, xp.concatenate([xp.zeros(1, lengths.dtype), xp.cumsum(lengths, dtype=lengths.dtype)]))

    @classmethod
    def from_offsets(cls, ids: Any, offsets: Any, include_last_offset: bool = False) -> "Ragged":
        """Make bags from consecutive ids and the start of each bag, as torch's `EmbeddingBag` takes them.

        Args:
          ids: The ids, `(capacity,)`.
          offsets: Where each bag starts, `(bags,)`, beginning with 0.
          include_last_offset: Whether a further offset marks the end of the last bag. Else it ends with the ids.

        Returns:
          The bags.

        Raises:
          TypeError: If an argument is not of an integer dtype.
          ValueError: As for `Ragged`.

        Example:
          >>> import embax
          >>> embax.Ragged.from_offsets([4, 7, 7, 2], [0, 3, 3])
          Ragged(3 bags, capacity=4)
        """
        ids, offsets = (
            _integers(f"embax.Ragged.from_offsets({n}=...)", x) for n, x in (("ids", ids), ("offsets", offsets))
        )
        if not _check.flag("embax.Ragged.from_offsets(include_last_offset=...)", include_last_offset):
            offsets = _wide(offsets)
            xp = jnp if isinstance(offsets, jax.Array) else np
            offsets = xp.concatenate([offsets, xp.full(1, ids.shape[0], offsets.dtype)])
        return cls(ids, offsets)

    @classmethod
    def from_segments(cls, values: Any, segments: Any, bags: int) -> "Ragged":
        """Make bags from ids and the number of each id's bag, as segment sums take them.

        Args:
          values: The ids, `(capacity,)`.
          segments: The bag of each id, `(capacity,)`, never falling. Ids with a number of `bags` or more are unused.
          bags: The number of bags.

        Returns:
          The bags.

        Raises:
          TypeError: If an argument is not of an integer dtype.
          ValueError: If the shapes differ, or a concrete segment is negative or below the one before.

        Example:
          >>> import embax
          >>> embax.Ragged.from_segments([4, 7, 7, 2], [0, 0, 0, 2], 3)
          Ragged(3 bags, capacity=4)
        """
        call = "embax.Ragged.from_segments"
        bags = _check.size(f"{call}(bags=...)", bags)
        values, segments = (_integers(f"{call}({n}=...)", x) for n, x in (("values", values), ("segments", segments)))
        if values.shape != segments.shape:
            raise ValueError(
                f"`{call}(segments=...)` must be one for each of {values.shape[0]} values, got {segments.shape[0]}. "
                "Pass as many."
            )
        segments = _wide(segments)
        if not isinstance(segments, Tracer):
            before = np.concatenate([[0], segments])
            if (bad := np.flatnonzero(np.diff(before) < 0)).size:
                raise ValueError(
                    f"`{call}(segments=...)` must not fall, nor be negative, got {before[bad[0] + 1]} after "
                    f"{before[bad[0]]} at position {bad[0]}. Sort the ids by segment."
                )
        xp = jnp if isinstance(segments, jax.Array) else np
        numbers = xp.arange(bags + 1, dtype=segments.dtype)
        return cls(values, xp.searchsorted(segments, numbers, side="left"))

    @classmethod
    def from_padded(cls, ids: Any, padding_idx: int | None = None, mask: Any = None) -> "Ragged":
        """Make bags from the rows of a matrix, without its padding.

        Args:
          ids: The ids, `(bags, length)`.
          padding_idx: The id that marks padding.
          mask: Instead of `padding_idx`: True where there is an id, `(bags, length)`.

        Returns:
          The bags, with the capacity `bags * length`.

        Raises:
          TypeError: If the ids are not of an integer dtype, or both or neither of `padding_idx` and `mask` are given.
          ValueError: If a shape is wrong.

        Example:
          >>> import embax
          >>> embax.Ragged.from_padded([[4, 7, 7], [0, 0, 0], [2, 0, 0]], padding_idx=0).lengths
          Array([3, 0, 1], dtype=int32)
        """
        call = "embax.Ragged.from_padded"
        if (padding_idx is None) == (mask is None):
            raise TypeError(f"`{call}` must have padding_idx or mask, got {padding_idx} and {mask}. Pass one of them.")
        ids = _integers(f"{call}(ids=...)", ids, axes=2)
        # NumPy ids stay in NumPy, since JAX may cut 64 bits to 32.
        xp = jnp if isinstance(ids, jax.Array) or isinstance(mask, jax.Array) else np
        if mask is None:
            keep = ids != _check.integer(f"{call}(padding_idx=...)", padding_idx)
        else:
            keep = xp.asarray(mask).astype(bool)
        if keep.shape != ids.shape:
            raise ValueError(
                f"`{call}(mask=...)` must be of the shape of the ids, {ids.shape}, got {keep.shape}. Pass one "
                "truth value for each id."
            )
        if xp is np:
            values = np.zeros(keep.size, ids.dtype)
            values[: np.sum(keep)] = ids[keep]
            return cls.from_lengths(values, np.sum(keep, axis=1, dtype=np.int32))
        return cls.from_lengths(*_kept(jnp.asarray(ids), keep))

    def pad_to(self, capacity: int) -> "Ragged":
        """Return the same bags with room for more ids, so that batches of different sizes have one shape.

        Args:
          capacity: The new size of `values`.

        Returns:
          The bags.

        Raises:
          TypeError: If the capacity is not a whole number.
          ValueError: If it is too small for the ids that the bags hold.

        Example:
          >>> import embax
          >>> embax.Ragged.from_lists([[4, 7, 7], [], [2]]).pad_to(8)
          Ragged(3 bags, capacity=8)
        """
        capacity = _check.size("embax.Ragged.pad_to(capacity=...)", capacity)
        used = self.used
        if capacity < used:
            raise ValueError(
                f"`embax.Ragged.pad_to(capacity=...)` must be at least {used}, the number of ids, got {capacity}. "
                "Nothing is cut off."
            )
        xp = jnp if isinstance(self.values, jax.Array) else np
        values = self.values[:capacity]
        values = xp.pad(values, (0, capacity - values.shape[0]))
        return _fill(object.__new__(Ragged), values, self.offsets)

    @property
    def bags(self) -> int:
        """The number of bags."""
        return self.offsets.shape[0] - 1

    @property
    def capacity(self) -> int:
        """The number of ids that fit."""
        return self.values.shape[0]

    @property
    def lengths(self) -> Int32[Array, " bags"]:
        """The number of ids in each bag."""
        return jnp.diff(self.offsets)

    @property
    def segments(self) -> Int32[Array, " capacity"]:
        """The number of each id's bag; `bags` for unused ids."""
        return segments_of(self.offsets, self.capacity)

    @property
    def used(self) -> int:
        """The number of ids in bags; the capacity if the offsets are traced."""
        return self.capacity if isinstance(self.offsets, Tracer) else int(np.asarray(self.offsets)[-1])

    def __repr__(self) -> str:
        shapes = [getattr(x, "shape", None) for x in (self.offsets, self.values)]
        if any(shape is None or len(shape) != 1 for shape in shapes):
            return f"Ragged(values={self.values!r}, offsets={self.offsets!r})"
        return f"Ragged({self.bags} bags, capacity={self.capacity})"


@functools.partial(jax.jit, inline=True)  # one program for an eager call
def _kept(
    ids: Int[Array, "bags length"], keep: Bool[Array, "bags length"]
) -> tuple[Int[Array, " capacity"], Int32[Array, " bags"]]:
    """The kept ids in their order, then zeros, and the number of kept ids of each bag."""
    flat, keeps = jnp.ravel(ids), jnp.ravel(keep)
    places = jnp.where(keeps, jnp.cumsum(keeps, dtype=jnp.int32) - 1, flat.shape[0])  # the others are dropped
    return jnp.zeros_like(flat).at[places].set(flat, mode="drop"), jnp.sum(keep, axis=1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def segments_of(offsets: Int32[Array, " bags_and_1"], capacity: int) -> Int32[Array, " capacity"]:
    """The number of the bag of each place; the number of bags for unused places."""
    # A place's bag is the number of bags that end at or before it.
    ends = jnp.zeros(capacity + 1, jnp.int32).at[offsets[1:]].add(1, mode="drop")
    return jnp.cumsum(ends[:capacity], dtype=jnp.int32)


def _fill(bags: Ragged, values: Any, offsets: Any) -> Ragged:
    bags.values, bags.offsets = values, offsets
    return bags


jax.tree_util.register_pytree_with_keys(
    Ragged,
    lambda bags: (
        tuple((jax.tree_util.GetAttrKey(name), getattr(bags, name)) for name in ("values", "offsets")),
        None,
    ),
    lambda _, leaves: _fill(object.__new__(Ragged), *leaves),
    lambda bags: ((bags.values, bags.offsets), None),
)


def _integers(argument: str, value: Any, axes: int = 1) -> _Numbers:
    if not isinstance(value, jax.Array | np.ndarray):
        value = np.asarray(value)
        value = value.astype(np.int32) if value.size == 0 else value
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"`{argument}` must be of an integer dtype, got {value.dtype}. Cast it.")
    if value.ndim != axes:
        raise ValueError(f"`{argument}` must have {axes} axes, got shape {value.shape}. Reshape it.")
    return value


def _wide(numbers: _Numbers) -> _Numbers:
    """Make numbers wide enough to be summed; concrete ones in NumPy, where they are checked."""
    if not isinstance(numbers, Tracer):
        return np.asarray(numbers).astype(np.int64)
    return numbers.astype(jnp.int32) if jnp.iinfo(numbers.dtype).bits < 32 else numbers


def _check_offsets(argument: str, offsets: _Numbers, capacity: int) -> None:
    if isinstance(offsets, Tracer):
        return
    numbers = np.asarray(offsets).astype(np.int64)
    wrong = None
    if numbers[0] != 0:
        wrong = 0, "start at 0"
    elif (falls := np.flatnonzero(np.diff(numbers) < 0)).size:
        wrong = int(falls[0]) + 1, f"not fall below the one before, {numbers[falls[0]]}"
    elif numbers[-1] > capacity:
        first = int(np.flatnonzero(numbers > capacity)[0])
        wrong = first, f"not lie beyond the {capacity} ids"
    if wrong is not None:
        position, rule = wrong
        raise ValueError(f"`{argument}` must {rule}, got {numbers[position]} at position {position}. Correct it.")
