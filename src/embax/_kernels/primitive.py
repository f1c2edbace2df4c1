"""Primitives of JAX that have their result from XLA or from a kernel, as each program chooses when it is lowered.

Such a primitive is given what plain JAX computes, and returns it, or what the kernel makes of the other arguments:

    rows = table.at[ids].get(mode="fill", ...)     plain JAX
    rows = embax_take(rows, table, ids)            the same rows

Where the kernel is chosen, nothing needs the first line, and XLA leaves it out. Until then it is there for all that
looks at a program: derivatives are those of the first line, checkify checks its ids, vmap has the lanes of it.

A kernel sees whole arrays, so it is chosen only where these are whole: in a program for one device, or in one device's
part of a `shard_map`. Where XLA splits a program over devices by itself, it would gather a table on all of them for a
call that it does not know. A kernel is found only in this process, so an exported program has none. In all other cases,
and whenever that cannot be told, the result is XLA's:

    one CPU device, `shard_map` over all axes of a mesh    the kernel
    automatic or explicit sharding, export, GPU, TPU       XLA
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

from .._base.axes import is_explicit
from .._base.loops import varying_alike
from . import library as _library

# Of the numbers in a table that a kernel reads or writes.
FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float64, jnp.bfloat16, np.float16))
INTEGERS = tuple(np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64))

Outs = Sequence[jax.ShapeDtypeStruct]


@runtime_checkable
class Batched(Protocol):
    """How a primitive of one result takes lanes of vmap in one call.

    It is given the plain result with the lanes first, and the other arguments with the axes of theirs, and returns the
    result with the lanes first, or None where the plain one is to be taken.
    """

    def __call__(
        self, plain: Array, args: Sequence[Array], axes: Sequence[int | None], **params: Hashable
    ) -> Array | None: ...


def primitive(
    name: str,
    by_kernel: Callable[..., list[Array]],
    batched: Batched | None = None,
    *,
    results: int = 1,
    plain_derivative: bool = False,
) -> Primitive:
    """Make a primitive of `results` plain results, and of the arguments of the kernel.

    Args:
      name: That of the kernel in the library.
      by_kernel: Calls the kernel, see `call`, with the types of the results and then the other arguments.
      batched: How lanes are taken. Default: as they are in the plain results.
      results: How many results there are.
      plain_derivative: Whether a value that has a derivative is the plain one: if the kernel has another order.

    Returns:
      The primitive.
    """
    made = Primitive(f"embax_{name}")
    made.multiple_results = True
    made.def_impl(lambda *args, **_: list(args[:results]))
    made.def_abstract_eval(lambda *avals, **_: [aval.update(weak_type=False) for aval in avals[:results]])

    def jvp(primals: Sequence[Array], tangents: Sequence[PyTree], **params: Hashable) -> tuple[PyTree, PyTree]:
        of_plain = list(tangents[:results])
        moves = any(not isinstance(tangent, ad.Zero) for tangent in of_plain)
        values = list(primals[:results]) if plain_derivative and moves else made.bind(*primals, **params)
        return values, of_plain

    def transpose(cotangents: Sequence[PyTree], *args: PyTree, **_: Hashable) -> list[PyTree]:
        return [*cotangents, *[None] * (len(args) - results)]

    def batch(args: Sequence[Array], axes: Sequence[int | None], **params: Hashable) -> tuple[PyTree, PyTree]:
        if batched is not None and axes[0] is not None:
            plain = jnp.moveaxis(args[0], axes[0], 0)
            out = batched(plain, args[1:], axes[1:], **params)
            if out is not None:
                return [out], [0]
        return list(args[:results]), list(axes[:results])

    ad.primitive_jvps[made] = jvp
    ad.primitive_transposes[made] = transpose
    batching.primitive_batchers[made] = batch

    def called(*args: Array, **params: Hashable) -> list[Array]:
        outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args[:results]]
        return by_kernel(outs, *args[results:], **params)

    kernel = mlir.lower_fun(called, multiple_results=True)

    def on_cpu(context: mlir.LoweringRuleContext, *args: PyTree, **params: Hashable) -> PyTree:
        return kernel(context, *args, **params) if _is_whole(context) else args[:results]

    mlir.register_lowering(made, lambda context, *args, **_: args[:results])
    mlir.register_lowering(made, on_cpu, platform="cpu")
    return made


def call(
    name: str,
    outs: Outs,
    *args: Array,
    aliases: dict[int, int] | None = None,
    **attributes: np.generic,
) -> list[Array]:
    """Call a kernel; `aliases` maps the arguments that it writes to the outputs that they become."""
    function = jax.ffi.ffi_call(_library.target(name), tuple(outs), input_output_aliases=aliases)
    return list(function(*varying_alike(*args), **attributes))


def fits(*arrays: Array, ids: Array) -> bool:
    """Say whether a kernel may see arrays, and the ids of rows: none may be empty, or on explicit axes."""
    if ids.dtype not in (np.int32, np.int64):
        return False
    for array in (*arrays, ids):
        of_known_size = all(isinstance(n, int) and n > 0 for n in array.shape)  # in an export it may be a symbol
        if not of_known_size or is_explicit(jax.typeof(array).sharding.mesh):
            return False
    return math.prod(ids.shape) <= np.iinfo(np.int32).max


def _is_whole(context: mlir.LoweringRuleContext) -> bool:
    """Say whether a program that is lowered for a CPU has whole arrays here, and stays in this process.

    The one place that looks at what JAX does not promise to keep. What is not found counts as no.
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
