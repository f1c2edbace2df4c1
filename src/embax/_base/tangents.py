"""with_tangent: a value with a derivative of its own, whatever computed it; for derivatives of any order.

An example: clip numbers to 1, and let the gradient pass as if nothing were clipped.

    def clipped(x):
        return with_tangent(lambda tangent: tangent, jnp.minimum(lax.stop_gradient(x), 1.0), [x])

    clipped(3.0)                        -> 1.0
    jax.grad(clipped)(3.0)              -> 1.0
    jax.grad(lambda x: clipped(x) ** 2) -> 2 * clipped(x), whose derivative is 2

`jax.custom_jvp` does this, too, but loses the rule in a second derivative through `lax.scan`: if some inputs are the
same in all steps, as a table is, jax 0.10 replaces the rule by the function's own code. It then differentiates the
`minimum` above, and the result is wrong without an error. A primitive keeps its rule, and `stop_gradient` hides the
code behind it. So the rules of a table for gradients (padding rows, `max_norm`, frequency of ids) use this primitive.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree, Shaped

from .arrays import as_jax
from .loops import varying_alike


def with_tangent(
    function: Callable[..., Shaped[Array, "*shape"]],
    value: Shaped[Array, "*shape"],
    sources: Sequence[Array | np.ndarray],
    others: Sequence[Array] = (),
) -> Shaped[Array, "*shape"]:
    """Return a value, and add `function(*tangents of the sources, *others)` to its tangent.

    Args:
      function: Returns the tangent, an array of the value's type; linear in the tangents, and closes over no tracers.
        Second and higher derivatives differentiate this function.
      value: The value. It must be computed from `jax.lax.stop_gradient` of its inputs: any tangent it has is added.
      sources: Float arrays that the value depends on. The function is called if at least one of them has a tangent;
        the tangents of the others are zeros.
      others: Further arguments of the function.

    Returns:
      The value.
    """
    return with_tangent_p.bind(value, *sources, *others, function=function, sources=len(sources))


with_tangent_p = Primitive("embax_with_tangent")
with_tangent_p.def_impl(lambda value, *_, **__: value)
with_tangent_p.def_abstract_eval(lambda value, *_, **__: value)
mlir.register_lowering(with_tangent_p, lambda context, value, *_, **__: [value])


def _jvp(primals: PyTree, tangents: PyTree, *, function: Callable[..., Array], sources: int) -> tuple[Array, Any]:
    _, *operands = primals
    tangent, *of_operands = tangents
    out = with_tangent_p.bind(*primals, function=function, sources=sources)
    of_sources = of_operands[:sources]
    if all(isinstance(x, ad.Zero) for x in of_sources):
        return out, tangent
    # A constant is a NumPy array here.
    others = map(as_jax, operands[sources:])
    # In a `shard_map`, a source (a replicated table) may vary over fewer axes than the value (rows of split ids).
    more, _ = varying_alike(function(*map(ad.instantiate_zeros, of_sources), *others), out)
    return out, more if isinstance(tangent, ad.Zero) else ad.add_tangents(tangent, more)


ad.primitive_jvps[with_tangent_p] = _jvp


def _batched(
    lanes: Any, args: PyTree, axes: Sequence[int | None], *, function: Callable[..., Array], sources: int
) -> tuple[Array, int | None]:
    if all(axis is None for axis in axes):
        return with_tangent_p.bind(*args, function=function, sources=sources), None
    # Value and sources may be batched independently: one table for all lanes, but rows for each lane's own ids.
    value = batching.bdim_at_front(args[0], axes[0], lanes.size)
    of_lanes = jax.vmap(function, tuple(axes[1:]), axis_size=lanes.size, spmd_axis_name=lanes.spmd_name)
    return with_tangent_p.bind(value, *args[1:], function=of_lanes, sources=sources), 0


batching.fancy_primitive_batchers[with_tangent_p] = _batched


def straight_through(
    value: Shaped[Array, "*shape"], source: Shaped[Array | np.ndarray, "*shape"]
) -> Shaped[Array, "*shape"]:
    """Return a value with the tangent of `source`, an array of the same type."""
    return with_tangent(_itself, value, [source])


def _itself(tangent: PyTree) -> PyTree:
    return tangent
