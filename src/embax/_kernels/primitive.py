"""JAX primitives whose result comes from XLA or from a native kernel; the choice is made when a program is lowered.

The first argument of such a primitive is the result of plain JAX. The primitive returns this result, or the result that
the kernel computes from the other arguments:

    rows = table.at[ids].get(mode="fill", ...)     plain JAX
    rows = embax_take(rows, table, ids)            the same rows

If the kernel is chosen, nothing uses the first line, and XLA removes it. Before that, all transformations see it:
derivatives are those of the first line, checkify checks its ids, and vmap adds lanes to it.

A kernel needs whole arrays. It is chosen in a program for one device, and inside a `shard_map` over all axes. If XLA
splits a program over devices by itself, it would gather the whole table on each device for a kernel, so none is used. A
kernel is registered in this process only, so an exported program must not call it. In all other cases, and if the case
is not known, the result is XLA's:

    one CPU device, `shard_map` over all axes of a mesh    the kernel
    automatic or explicit sharding, export, GPU, TPU       XLA
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from .._base.axes import is_explicit
from .._base.loops import varying_alike
from . import library as _library

# The dtypes of tables that a kernel can read or write.
FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float64, jnp.bfloat16, np.float16))
INTEGERS = tuple(np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64))

Outs = Sequence[jax.ShapeDtypeStruct]


@runtime_checkable
class Batched(Protocol):
    """A function that computes all lanes of vmap in one call, for a primitive with one result.

    Its arguments are the plain result with the lanes first, and the other arguments with the positions of their lanes.
    It returns the result with the lanes first, or None to use the plain result.
    """

    def __call__(
        self, plain: Array, args: Sequence[Array], axes: Sequence[int | None], **params: Hashable
    ) -> Array | None: ...


def primitive(
    name: str,
    by_kernel: Callable[..., list[Array]],
    batched: Batched | None = None,
    *,
    results: int | str = 1,
    plain_derivative: bool = False,
) -> Primitive:
    """Make a primitive. Its arguments are the plain results, and then the arguments of the kernel.

    Args:
      name: The name of the kernel in the library.
      by_kernel: Calls the kernel by `call`, given the types of the results and then the other arguments.
      batched: Computes lanes of vmap by the kernel. Default: the plain results are used under vmap.
      results: The number of results, or the name of a parameter that is a tuple with an entry for each of them.
      plain_derivative: Whether the plain value is used when it is differentiated; needed if the kernel orders rows
        differently.

    Returns:
      The primitive.
    """
    made = Primitive(f"embax_{name}")
    made.multiple_results = True

    def plain_of(args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        return list(args[: results if isinstance(results, int) else len(params[results])])

    made.def_impl(lambda *args, **params: plain_of(args, params))
    made.def_abstract_eval(lambda *avals, **params: [aval.update(weak_type=False) for aval in plain_of(avals, params)])

    def jvp(primals: Sequence[Array], tangents: Sequence[PyTree], **params: Hashable) -> tuple[PyTree, PyTree]:
        of_plain = plain_of(tangents, params)
        moves = any(not isinstance(tangent, ad.Zero) for tangent in of_plain)
        values = plain_of(primals, params) if plain_derivative and moves else made.bind(*primals, **params)
        return values, of_plain

    def transpose(cotangents: Sequence[PyTree], *args: PyTree, **params: Hashable) -> list[PyTree]:
        return [*cotangents, *[None] * (len(args) - len(cotangents))]

    def batch(args: Sequence[Array], axes: Sequence[int | None], **params: Hashable) -> tuple[PyTree, PyTree]:
        if batched is not None and len(plain_of(args, params)) == 1 and axes[0] is not None:
            plain = jnp.moveaxis(args[0], axes[0], 0)
            out = batched(plain, args[1:], axes[1:], **params)
            if out is not None:
                return [out], [0]
        return plain_of(args, params), plain_of(axes, params)

    ad.primitive_jvps[made] = jvp
    ad.primitive_transposes[made] = transpose
    batching.primitive_batchers[made] = batch

    def called(*args: Array, **params: Hashable) -> list[Array]:
        outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in plain_of(args, params)]
        return by_kernel(outs, *args[len(outs) :], **params)

    kernel = mlir.lower_fun(called, multiple_results=True)

    def on_cpu(context: mlir.LoweringRuleContext, *args: PyTree, **params: Hashable) -> PyTree:
        return kernel(context, *args, **params) if _is_whole(context) else plain_of(args, params)

    mlir.register_lowering(made, lambda context, *args, **params: plain_of(args, params))
    mlir.register_lowering(made, on_cpu, platform="cpu")
    return made


def call(
    name: str,
    outs: Outs,
    *args: Array,
    aliases: dict[int, int] | None = None,
    **attributes: np.generic,
) -> list[Array]:
    """Call a kernel; `aliases` maps arguments that are written in place to the outputs that they become."""
    function = jax.ffi.ffi_call(_library.target(name), tuple(outs), input_output_aliases=aliases)
    return list(function(*varying_alike(*args), **attributes))


def fits(*arrays: Array, ids: Array) -> bool:
    """Return whether arrays and ids of rows are suitable for a kernel: none is empty or on explicit axes."""
    if ids.dtype not in (np.int32, np.int64):
        return False
    for array in (*arrays, ids):
        of_known_size = all(isinstance(n, int) and n > 0 for n in array.shape)  # an exported shape may have symbols
        if not of_known_size or is_explicit(jax.typeof(array).sharding.mesh):
            return False
    return math.prod(ids.shape) <= np.iinfo(np.int32).max


def _is_whole(context: mlir.LoweringRuleContext) -> bool:
    """Return whether a program that is lowered for a CPU has whole arrays here, and will run in this process.

    This is the only code that reads attributes that JAX may change. If one is missing, the answer is no.
    """
    try:
        module = context.module_context
        if module.lowering_parameters.for_export or tuple(module.platforms) != ("cpu",):
            return False
        axes = module.axis_context
        if isinstance(axes, mlir.SPMDAxisContext):
            return axes.manual_axes == frozenset(axes.mesh.axis_names)
        return isinstance(axes, mlir.ShardingContext) and axes.num_devices == 1
    except AttributeError:
        return False
