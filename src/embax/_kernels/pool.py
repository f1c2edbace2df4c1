"""pool: sum the rows of bags without an array of all the rows."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from .library import has
from .primitive import FLOATS, Outs, call, fits, primitive


def pool(
    plain: Sequence[Float[Array, "*bags_dim"]],
    table: Float[Array, "rows *dim"],
    ids: Int[Array, "*batch"],
    counted: Bool[Array, "*batch"],
    weights: Float[Array, "*batch"] | None,
    offsets: Int32[Array, " bags_and_1"] | None,
    *,
    nan: bool,
    given: Int[Array, "*batch"] | None = None,
    firsts: Sequence[int] = (0,),
) -> list[Float[Array, "*bags_dim"]]:
    """Sum the rows of bags.

    Args:
      plain: The sums by plain JAX, in one array or cut into several.
      table: The table.
      ids: Row numbers, `(*bags, length)`; flat if there are offsets.
      counted: Which ids count.
      weights: A factor for each id, in the dtype of the sums.
      offsets: The place where each bag begins, and the end of the last one.
      nan: Whether an id that counts and has no row adds NaN; else it adds nothing.
      given: As in `take`; all of them count.
      firsts: The first bag of each array of `plain`.

    Returns:
      A sum for each bag, in arrays like `plain`.
    """
    plain = list(plain)
    if not (has("pool") and table.dtype in FLOATS and fits(*plain, table, ids=ids if given is None else given)):
        return plain
    if given is None:
        skip = jnp.asarray(np.iinfo(ids.dtype).min, ids.dtype)
        # Ids that do not count are marked by `skip`. An id that is this number itself has no row either, but counts.
        read = jnp.where(counted, jnp.maximum(ids, skip + 1), skip)
    else:
        read = given
    flat = [jnp.reshape(x, (-1, *table.shape[1:])) for x in plain]
    others = [x for x in (offsets, None if weights is None else jnp.ravel(weights)) if x is not None]
    how = {"ragged": offsets is not None, "weighted": weights is not None, "nan": nan, "wrap": given is not None}
    bags = math.prod(ids.shape[:-1]) if offsets is None else offsets.shape[0] - 1
    sums = pool_p.bind(*flat, table, jnp.ravel(read), *others, **how, bags=bags, firsts=tuple(firsts))
    return [jnp.reshape(own, x.shape) for own, x in zip(sums, plain, strict=True)]


def _apart(others: Sequence[Array], ragged: bool, weighted: bool) -> tuple[Array | None, Array | None]:
    """Return the offsets and the weights."""
    return others[0] if ragged else None, others[-1] if weighted else None


def _by_kernel(
    outs: Outs,
    table: Array,
    ids: Array,
    *others: Array,
    ragged: bool,
    weighted: bool,
    nan: bool,
    wrap: bool,
    bags: int,
    firsts: tuple[int, ...],
) -> list[Array]:
    offsets, weights = _apart(others, ragged, weighted)
    offsets = jnp.zeros(0, jnp.int32) if offsets is None else offsets
    weights = jnp.zeros(0, outs[0].dtype) if weights is None else weights
    first_bags = jnp.asarray(firsts, jnp.int32)
    how = {"number": np.int64(bags), "nan": np.int32(nan), "wrap": np.int32(wrap)}
    return call("pool", outs, table, ids, offsets, weights, first_bags, **how)


def _batched(plain: Array, args: Sequence[Array], axes: Sequence[int | None], **params: Any) -> Array | None:
    table, *of_bags = args
    if axes[0] is not None or params["ragged"]:  # each lane has its own table, or bags have different lengths
        return None
    lanes = plain.shape[0]
    front = (
        jnp.broadcast_to(x, (lanes, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(of_bags, axes[1:], strict=True)
    )
    flat = jnp.reshape(plain, (-1, *table.shape[1:])), table, *map(jnp.ravel, front)
    (sums,) = pool_p.bind(*flat, **params | {"bags": lanes * params["bags"]})
    return jnp.reshape(sums, plain.shape)


pool_p = primitive("pool", _by_kernel, _batched, results="firsts")
