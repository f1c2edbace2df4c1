"""with_tangent: a value whose derivative is said apart from how it is computed, in derivatives of any order.

An example: numbers clipped to 1, through which the gradient is to pass as if they were not.

    def clipped(x):
        return with_tangent(lambda tangent: tangent, jnp.minimum(lax.stop_gradient(x), 1.0), [x])

    clipped(3.0)                        -> 1.0
    jax.grad(clipped)(3.0)              -> 1.0
    jax.grad(lambda x: clipped(x) ** 2) -> 2 * clipped(x), whose derivative is 2

`jax.custom_jvp` says so, too, but only until JAX takes a program apart: in a derivative of a derivative through
`lax.scan`, jax 0.10 puts the function in the place of the rule wherever some inputs are the same in all steps, as a
table is. Then it differentiates the `minimum` above, and the result is wrong without an error. A primitive is never
taken apart, and behind `stop_gradient` there is nothing else to be differentiated. So all rules of a table for
gradients are stated by this primitive: its padding row, `max_norm`, the frequency of ids.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree, Shaped

from .loops import varying_alike


def with_tangent(
    function: Callable[..., Shaped[Array, "*shape"]],
    value: Shaped[Array, "*shape"],
    sources: Sequence[Array | np.ndarray],
    others: Sequence[Array] = (),
) -> Shaped[Array, "*shape"]:
    """Return a value, and add `function(*tangents of the sources, *others)` to its tangent.

    Args:
      function: A function of arrays, linear in the tangents together, that returns an array of the value's type. It
        closes over no tracers. Its own derivatives are those of the result of second and higher order.
      value: The value. What it is computed from has to be behind `jax.lax.stop_gradient`, or has a tangent besides.
      sources: Arrays of floats that the value depends on. The function is called if one of them has a tangent; that of
        another one is then zeros.
      others: What else the function needs.

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
    # A source may be the same on all devices of a `shard_map` where the value is not: the clipped rows of other ids.
    more, _ = varying_alike(function(*map(ad.instantiate_zeros, of_sources), *operands[sources:]), out)
    return out, more if isinstance(tangent, ad.Zero) else ad.add_tangents(tangent, more)


ad.primitive_jvps[with_tangent_p] = _jvp


def _batched(
    lanes: Any, args: PyTree, axes: Sequence[int | None], *, function: Callable[..., Array], sources: int
) -> tuple[Array, int | None]:
    if all(axis is None for axis in axes):
        return with_tangent_p.bind(*args, function=function, sources=sources), None
    # Either may be the same in all lanes where the other one is not: the clipped rows of one table, other ids a lane.
    value = batching.bdim_at_front(args[0], axes[0], lanes.size)
    of_lanes = jax.vmap(function, tuple(axes[1:]), axis_size=lanes.size, spmd_axis_name=lanes.spmd_name)
    return with_tangent_p.bind(value, *args[1:], function=of_lanes, sources=sources), 0


batching.fancy_primitive_batchers[with_tangent_p] = _batched


def straight_through(
    value: Shaped[Array, "*shape"], source: Shaped[Array | np.ndarray, "*shape"]
) -> Shaped[Array, "*shape"]:
    """Return a value whose tangent is that of another array of its type."""
    return with_tangent(_itself, value, [source])


def _itself(tangent: PyTree) -> PyTree:
    return tangent
