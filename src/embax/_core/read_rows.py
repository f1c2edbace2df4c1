"""read_rows and add_rows: the derivative of a lookup, as two primitives that are each other's transpose.

A gradient that is a sum of rows stays sparse only while the ids of these rows can be seen. The transpose of a gather
hides them: padding is masked out of the values, and a sharded table exchanges rows between devices. So the derivative
of a lookup binds primitives of its own. Their ids are final (`rows`, or any number outside, stands for no row), or, by
`Spec.from_end`, those of a caller, of which negative ones count from the end:

    read_rows(tangent, [1, 3, 9]) of 5 rows    -> tangent[1], tangent[3], 0
    add_rows([u, v, w], [1, 3, 9]) to 5 rows   -> zeros, u added to row 1 and v to row 3

`embax.value_and_grad` finds `add_rows` in the program of a gradient and takes its two operands instead of its output
(see `_gradients/_analysis/`). In any other program, both compile to a gather and a scatter-add, or to the exchange of a
sharded table.

Leading axes that `jax.vmap` adds to the tangent are lanes: each has rows and ids of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Int, PyTree, Shaped

from .._base.axes import is_explicit
from .._base.loops import varying_alike, zeros_as
from . import ids as _ids
from .storage import Storage


class Spec(NamedTuple):
    """The array that rows are read from."""

    weight: PyTree  # abstract value of the tangent, lanes first
    lanes: int  # how many leading axes of the tangent and of the ids are lanes
    storage: Storage
    from_end: int | None = None  # the number of rows, if ids in [-rows, 0) count from the end

    def row_numbers(self, ids: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The ids as row numbers; one outside of `[0, rows)` stands for no row."""
        return _ids.row_numbers(ids, self.from_end)

    @property
    def dim(self) -> tuple[int, ...]:
        """The sizes of a row's axes."""
        return self.weight.shape[self.lanes + 1 :]


def read_rows(
    tangent: Shaped[Array, "rows *dim"], ids: Int[Array, "*batch"], storage: Storage, from_end: int | None = None
) -> Shaped[Array, "*batch_dim"]:
    """Read the rows of a tangent.

    Args:
      tangent: The tangent of a weight, stored in the same way.
      ids: Row numbers; an id without a row reads zero.
      storage: The table's storage.
      from_end: The number of rows, if ids in `[-rows, 0)` count from the end.

    Returns:
      The rows.
    """
    # As JAX does for its own operations: the transpose of this cast sums over the devices of a `shard_map`.
    tangent, ids = varying_alike(tangent, ids)
    return read_rows_p.bind(tangent, ids, spec=Spec(jax.typeof(tangent), 0, storage, from_end))


read_rows_p, add_rows_p = Primitive("embax_read_rows"), Primitive("embax_add_rows")

# ---- What the primitives compute.


def _read(tangent: Array, ids: Array, *, spec: Spec) -> Array:
    def lane(tangent: Array, ids: Array) -> Array:
        return spec.storage.take(tangent, spec.row_numbers(ids), 0, linear=True)

    return _of_lanes(lane, spec)(tangent, ids)


def _add(values: Array, ids: Array, *, spec: Spec) -> Array:
    weight = spec.weight

    def lane(values: Array, ids: Array) -> Array:
        # Zeros that vary as the values do: JAX would else cast them, and the transpose of its cast sums over devices.
        zeros = zeros_as(values, weight.shape[spec.lanes :], values.dtype)
        values = jnp.reshape(values, (*ids.shape, *spec.dim))
        return spec.storage.put(zeros, spec.row_numbers(ids), values, "add")

    if spec.storage.is_local and not is_explicit(weight.sharding.mesh):
        return _of_lanes(lane, spec)(values, ids)
    like = _struct(weight, values.dtype)
    return jax.linear_transpose(lambda weight: _read(weight, ids, spec=spec), like)(values)[0]


def _of_lanes(function: Any, spec: Spec) -> PyTree:
    for _ in range(spec.lanes):
        function = jax.vmap(function)
    return function


def _struct(aval: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    sharding = aval.sharding if is_explicit(aval.sharding.mesh) else None
    return jax.ShapeDtypeStruct(aval.shape, dtype or aval.dtype, sharding=sharding)


# ---- Shapes, derivatives, transposes and vmap.


@read_rows_p.def_abstract_eval
def _(tangent: Any, ids: Any, *, spec: Spec) -> PyTree:
    if is_explicit(ids.sharding.mesh) or spec.storage.on_explicit_axes:
        return jax.make_jaxpr(functools.partial(_read, spec=spec))(_struct(tangent), _struct(ids)).out_avals[0]
    return ids.update(shape=(*ids.shape, *spec.dim), dtype=tangent.dtype, weak_type=False)


@add_rows_p.def_abstract_eval
def _(values: PyTree, ids: Any, *, spec: Spec) -> PyTree:
    return spec.weight.update(dtype=values.dtype, weak_type=False)


def _jvp(primitive: Primitive, tangent: Array, values: Array, ids: Array, *, spec: Spec) -> Array:
    return primitive.bind(tangent, ids, spec=spec)


def _transpose(transposed: Primitive, cotangent: Any, values: PyTree, ids: Any, *, spec: Spec) -> tuple[Any, None]:
    if isinstance(cotangent, ad.Zero):
        return None, None
    return transposed.bind(cotangent, ids, spec=spec), None


def _batched(primitive: Primitive, args: PyTree, axes: Any, *, spec: Spec) -> tuple[Array, int]:
    (values, ids), (of_values, of_ids) = args, axes
    if primitive is read_rows_p and of_values is None:  # one tangent for all: the ids have one more axis
        return primitive.bind(values, jnp.moveaxis(ids, of_ids, spec.lanes), spec=spec), spec.lanes
    if not spec.storage.is_local or is_explicit(spec.weight.sharding.mesh):
        plain = _read if primitive is read_rows_p else _add
        return jax.vmap(functools.partial(plain, spec=spec), axes)(values, ids), 0
    size = ids.shape[of_ids] if of_values is None else values.shape[of_values]
    values, ids = (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in ((values, of_values), (ids, of_ids))
    )
    weight = spec.weight.update(shape=(size, *spec.weight.shape), weak_type=False)
    return primitive.bind(values, ids, spec=spec._replace(weight=weight, lanes=spec.lanes + 1)), 0


# ---- Gradients that have all rows by nature.

all_rows_p = Primitive("embax_all_rows")


def all_rows(tangent: Shaped[Array, "rows *dim"]) -> Shaped[Array, "rows *dim"]:
    """Return the tangent, and mark its gradient as dense by nature, as a full softmax's is: no warning is due."""
    return all_rows_p.bind(tangent)


all_rows_p.def_impl(lambda tangent: tangent)
all_rows_p.def_abstract_eval(lambda tangent: tangent)
mlir.register_lowering(all_rows_p, lambda context, tangent: [tangent])
ad.deflinear2(all_rows_p, lambda cotangent, _: [cotangent if isinstance(cotangent, ad.Zero) else all_rows(cotangent)])
batching.primitive_batchers[all_rows_p] = lambda args, axes: (all_rows(*args), axes[0])


for _primitive, _transposed, _function in ((read_rows_p, add_rows_p, _read), (add_rows_p, read_rows_p, _add)):
    _primitive.def_impl(jax.jit(_function, static_argnames="spec"))
    mlir.register_lowering(_primitive, mlir.lower_fun(_function, multiple_results=False))
    ad.defjvp(_primitive, functools.partial(_jvp, _primitive), None)
    ad.primitive_transposes[_primitive] = functools.partial(_transpose, _transposed)
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive)
