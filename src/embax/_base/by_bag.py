"""ByBag: the gradients of ids in bags, held as one value for each bag.

All ids of a bag have the same gradient, except for their weights. For instance, the bags [4, 1, 4] and [2, 2, 7] with
the gradients u and v, and with weights of 1 except for the last id:

    ids        [4, 1, 4, 2, 2, 7]
    values     [u, v]
    bag_of     [0, 0, 0, 1, 1, 1], or None: bags of one length, here 3
    factors    [1, 1, 1, 1, 1, 0.5]
    expanded   [u, u, u, v, v, 0.5 v]

The native step of an optimizer reads `values`. Any other code expands them, on demand.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int, Int32, Shaped


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "bag_of", "factors"], meta_fields=["rows"])
@dataclasses.dataclass(frozen=True)
class ByBag:
    """Values of ids, one for each bag. Leading axes are groups; each group has its own bags and ids."""

    # JAX also rebuilds pytrees with None or shapes in place of arrays, so comments give the types.
    values: Any  # (*groups, bags, *dim)
    bag_of: Any  # int32 (*groups, ids), the bag of each id; None for bags of one length
    factors: Any  # (*groups, ids), the factor of each id, which multiplies the value of its bag; None for ones
    rows: int  # ids outside of [0, rows) have no row

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    def expanded(self, ids: Int[Array, "*groups ids"]) -> Inexact[Array, "*groups_ids_dim"]:
        """Return a value for each id; zero for an id without a row."""
        return _expanded(self, ids)

    def mapped(self, function: Callable[[Array], Array]) -> "ByBag":
        """Map the values by a linear function of single numbers, such as `jnp.negative`."""
        return dataclasses.replace(self, values=function(self.values))

    def flat(self, ids: Shaped[Array, "*groups ids"]) -> "ByBag":
        """Merge all groups into one, for ids, or their keys, that are raveled."""
        axis = ids.ndim - 1
        bags = self.values.shape[axis]
        values = jnp.reshape(self.values, (-1, *self.values.shape[axis + 1 :]))
        bag_of = self.bag_of
        if bag_of is not None:
            groups = jnp.reshape(bag_of, (-1, bag_of.shape[-1]))
            first = bags * jnp.arange(groups.shape[0], dtype=groups.dtype)
            bag_of = jnp.ravel(groups + first[:, None])
        return ByBag(values, bag_of, None if self.factors is None else jnp.ravel(self.factors), self.rows)


Held = Any  # the values of ids: an array, or a ByBag


def expanded(ids: Int[Array, "*groups ids"], held: Held) -> Inexact[Array, "*groups_ids_dim"]:
    """Return one value for each id."""
    return held.expanded(ids) if isinstance(held, ByBag) else held


class ForKernel(NamedTuple):
    """The gradients of ids as kernels take them."""

    values: Inexact[Array, "bags *dim"]
    bag_of: Int32[Array, " ids_or_0"]  # empty for bags of one length
    factors: Float[Array, " ids_or_0"]  # empty for ones
    length: int  # of the bags; 0 if `bag_of` has the bag of each id


def for_kernel(ids: Int[Array, " ids"], held: Held) -> ForKernel:
    """Return the gradients of ids without groups as kernels take them; an array has bags of one id."""
    of_bags = held if isinstance(held, ByBag) else ByBag(held, None, None, 0)
    values, bag_of, factors = of_bags.values, of_bags.bag_of, of_bags.factors
    length = 0 if bag_of is not None or not values.shape[0] else ids.shape[0] // values.shape[0]
    bag_of = jnp.zeros(0, jnp.int32) if bag_of is None else bag_of
    return ForKernel(values, bag_of, jnp.zeros(0, jnp.float32) if factors is None else factors, length)


@functools.partial(jax.jit, inline=True)
def _expanded(by_bag: ByBag, ids: Int[Array, "*groups ids"]) -> Inexact[Array, "*groups_ids_dim"]:
    axis, values = ids.ndim - 1, by_bag.values
    if by_bag.bag_of is None:
        length = ids.shape[-1] // values.shape[axis]
        shape = (*values.shape[: axis + 1], length, *values.shape[axis + 1 :])
        out = jnp.broadcast_to(jnp.expand_dims(values, axis + 1), shape)
        out = jnp.reshape(out, (*ids.shape, *values.shape[axis + 1 :]))
    else:
        take: Callable[..., Array] = _taken
        for _ in range(axis):
            take = jax.vmap(take)
        out = take(values, by_bag.bag_of)
    trailing = tuple(range(ids.ndim, out.ndim))
    if by_bag.factors is not None:
        out = out * jnp.expand_dims(by_bag.factors.astype(out.dtype), trailing)
    has_row = (ids >= 0) & (ids < by_bag.rows)
    return jnp.where(jnp.expand_dims(has_row, trailing), out, jnp.zeros((), out.dtype))


def _taken(values: Array, bag_of: Array) -> Array:
    return values.at[bag_of].get(mode="promise_in_bounds", wrap_negative_indices=False)


def joined(parts: Sequence[tuple[Shaped[Array, " _ids"], Held]]) -> Held:
    """Concatenate the values of several arrays of ids, of which at least one is held by bag.

    Args:
      parts: Ids, or their keys, and their values, without groups.

    Returns:
      The values of the concatenated ids, one for each bag; ids whose values are an array are bags of one id.
    """
    held = [x if isinstance(x, ByBag) else ByBag(x, None, None, 0) for _, x in parts]
    rows = max(x.rows for x in held)
    sizes = [ids.size for ids, _ in parts]
    used = [(x, size) for x, size in zip(held, sizes, strict=True) if size]
    values = jnp.concatenate([x.values for x, _ in used])
    lengths = {size // x.values.shape[0] if x.bag_of is None else None for x, size in used}
    bag_of = None
    if len(lengths) > 1 or None in lengths:
        firsts = [sum(x.values.shape[0] for x, _ in used[:k]) for k in range(len(used))]
        bag_of = jnp.concatenate([_bag_of(x, size) + first for (x, size), first in zip(used, firsts, strict=True)])
    factors = None
    if any(x.factors is not None for x, _ in used):
        dtype = jnp.result_type(*(x.factors for x, _ in used if x.factors is not None))
        factors = jnp.concatenate([jnp.ones(n, dtype) if x.factors is None else x.factors for x, n in used])
    return ByBag(values, bag_of, factors, rows)


def _bag_of(by_bag: ByBag, size: int) -> Int32[Array, " ids"]:
    if by_bag.bag_of is not None:
        return by_bag.bag_of
    return jnp.arange(size, dtype=jnp.int32) // (size // by_bag.values.shape[0])
