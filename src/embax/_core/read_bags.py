"""read_bags and add_bags: the derivative of a sum of bags, as two primitives that are each other's transpose.

All ids of a bag have the same gradient, except for their weights. These primitives keep one gradient for each bag:
`read_bags` is `read_rows` and the sum of each bag, and `add_bags` is `add_rows` of values that are repeated for each
id. For instance, for the bags [1, 3] and [3, 9] of a table of 5 rows, where 9 has no row:

    read_bags(tangent, [1, 3, 3, 9], bags=2)    -> tangent[1] + tangent[3], tangent[3]
    add_bags([u, v], [1, 3, 3, 9])              -> zeros, u added to rows 1 and 3, and v to row 3

`embax.value_and_grad` finds `add_bags` in the program of a gradient, and takes the ids and the gradients of the bags
from it. In any other program, both compile to `read_rows` and `add_rows` of single ids.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

from .._base.by_bag import ByBag
from .._base.loops import varying_alike
from .read_rows import Spec, add_rows_p, read_rows_p
from .storage import Storage


class BagSpec(NamedTuple):
    """The array that rows are read from, and how bags are given."""

    of_rows: Spec
    bags: int
    ragged: bool  # whether the bag of each id is given; else bags have one length
    weighted: bool  # whether factors are given

    def apart(self, others: PyTree) -> tuple[Array | None, Array | None]:
        """Return the bag of each id, and the factors."""
        return others[0] if self.ragged else None, others[-1] if self.weighted else None


def read_bags(
    tangent: Shaped[Array, "rows *dim"],
    ids: Int[Array, " ids"],
    bags: int,
    bag_of: Int32[Array, " ids"] | None,
    factors: Float[Array, " ids"] | None,
    storage: Storage,
    from_end: int | None = None,
) -> Shaped[Array, "bags *dim"]:
    """Sum the rows of bags of a tangent.

    Args:
      tangent: The tangent of a weight, stored in the same way, on one device or split by XLA.
      ids: Row numbers; an id without a row adds nothing.
      bags: The number of bags.
      bag_of: The bag of each id, in rising order; None for bags of one length.
      factors: The factor of each id, of the tangent's dtype; None for ones.
      storage: The table's storage.
      from_end: As in `read_rows`.

    Returns:
      The sum of each bag.
    """
    others = [x for x in (bag_of, factors) if x is not None]
    tangent, ids, *others = varying_alike(tangent, ids, *others)
    of_rows = Spec(jax.typeof(tangent), 0, storage, from_end)
    spec = BagSpec(of_rows, bags, bag_of is not None, factors is not None)
    return read_bags_p.bind(tangent, ids, *others, spec=spec)


read_bags_p, add_bags_p = Primitive("embax_read_bags"), Primitive("embax_add_bags")

# ---- What the primitives compute.


def _read(tangent: Array, ids: Array, *others: Array, spec: BagSpec) -> Array:
    rows = read_rows_p.bind(tangent, ids, spec=spec.of_rows)
    bag_of, factors = spec.apart(others)
    if factors is not None:
        rows = rows * jnp.expand_dims(factors, range(1, rows.ndim))
    if bag_of is None:
        return jnp.reshape(rows, (spec.bags, ids.size // spec.bags, *rows.shape[1:])).sum(axis=1)
    return spec.of_rows.storage.summed_by(bag_of, rows, spec.bags)


def _add(values: Array, ids: Array, *others: Array, spec: BagSpec) -> Array:
    by_bag = ByBag(values, *spec.apart(others), spec.of_rows.weight.shape[0])
    return add_rows_p.bind(by_bag.expanded(spec.of_rows.row_numbers(ids)), ids, spec=spec.of_rows)


# ---- Shapes, derivatives, transposes and vmap.


@read_bags_p.def_abstract_eval
def _(tangent: Any, ids: Any, *_: Any, spec: BagSpec) -> PyTree:
    return ids.update(shape=(spec.bags, *spec.of_rows.dim), dtype=tangent.dtype, weak_type=False)


@add_bags_p.def_abstract_eval
def _(values: Any, ids: Any, *_: Any, spec: BagSpec) -> PyTree:
    return spec.of_rows.weight.update(dtype=values.dtype, weak_type=False)


def _jvp(primitive: Primitive, plain: Any, primals: PyTree, tangents: PyTree, *, spec: BagSpec) -> PyTree:
    """Linear in the values, and in the factors. The derivative by the factors runs the plain code."""
    (values, ids, *others), (of_values, *of_others) = primals, tangents
    out = primitive.bind(values, ids, *others, spec=spec)
    moved = []
    if not isinstance(of_values, ad.Zero):
        moved.append(primitive.bind(of_values, ids, *others, spec=spec))
    if spec.weighted and not isinstance(of_others[-1], ad.Zero):
        moved.append(plain(values, ids, *others[:-1], of_others[-1], spec=spec))
    return out, functools.reduce(ad.add_tangents, moved) if moved else jnp.zeros_like(out)


def _transpose(
    transposed: Primitive, cotangent: Any, values: PyTree, ids: Any, *others: Array, spec: BagSpec
) -> list[Any]:
    none = [None] * (1 + len(others))
    if isinstance(cotangent, ad.Zero):
        return [None, *none]
    return [transposed.bind(cotangent, ids, *others, spec=spec), *none]


def _batched_read(args: PyTree, axes: Any, *, spec: BagSpec) -> tuple[Array, int]:
    tangent, *of_ids = args
    if axes[0] is not None:
        return jax.vmap(functools.partial(_read, spec=spec), axes)(*args), 0
    # One tangent for all lanes: their bags are more bags.
    lanes = next(x.shape[axis] for x, axis in zip(of_ids, axes[1:], strict=True) if axis is not None)
    ids, *others = (
        jnp.broadcast_to(x, (lanes, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(of_ids, axes[1:], strict=True)
    )
    if spec.ragged:
        others[0] = others[0] + spec.bags * jnp.arange(lanes, dtype=others[0].dtype)[:, None]
    of_lanes = spec._replace(bags=lanes * spec.bags)
    out = read_bags_p.bind(tangent, jnp.ravel(ids), *map(jnp.ravel, others), spec=of_lanes)
    return jnp.reshape(out, (lanes, spec.bags, *out.shape[1:])), 0


def _batched_add(args: PyTree, axes: Any, *, spec: BagSpec) -> tuple[Array, int]:
    return jax.vmap(functools.partial(_add, spec=spec), axes)(*args), 0


for _primitive, _transposed, _function, _batched in (
    (read_bags_p, add_bags_p, _read, _batched_read),
    (add_bags_p, read_bags_p, _add, _batched_add),
):
    _primitive.def_impl(jax.jit(_function, static_argnames="spec"))
    mlir.register_lowering(_primitive, mlir.lower_fun(_function, multiple_results=False))
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive, _function)
    ad.primitive_transposes[_primitive] = functools.partial(_transpose, _transposed)
    batching.primitive_batchers[_primitive] = _batched
