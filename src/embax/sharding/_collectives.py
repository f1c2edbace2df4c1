"""The collectives of a step of one table, found in the programs of the step, which JAX traces without devices.

For instance, a lookup of 2,048 ids on the mesh `{"x": 2, "y": 2}`, with rows split over `x` and 32 columns over `y`:

    all_gather[y]    int32[1024]          2 devices, 4,096 bytes: a device's own 512 ids and the other's
    all_to_all[x]    int32[2,648]         2 devices, 5,184 bytes: the capacity is 648
    all_to_all[x]    float32[2,648,16]    2 devices, 82,944 bytes
    all_to_all[y]    float32[512,32]      2 devices, 65,536 bytes
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array, PyTree

from .._bags.embedding_bag import embedding_bag
from .._base.typing import PyTreeDef
from .._core.lookup import lookup
from .._core.table import Table
from .._gradients.apply import apply_updates
from .._gradients.value_and_grad import grad
from ._results import Collective

# "add": the optimizer adds each gradient to its row (SGD). "sum": it needs the sum of the gradients of each row.
Update = Literal["add", "sum"]

_COUNTED: dict[str, Collective] = {name: name for name in get_args(Collective)}
_OTHERS = ("psum", "psum_invariant", "pmax", "pmin", "ppermute", "reduce_scatter", "all_gather_invariant")


class Sent(NamedTuple):
    """A collective, as one device takes part in it."""

    collective: Collective
    devices: int  # the number of devices that exchange with each other
    numbers: int  # the size of its result
    dtype: np.dtype


class Step(NamedTuple):
    """The collectives of a step, in order, except those that run only if more ids than the capacity go to an owner."""

    forward: tuple[tuple[Sent, ...], ...]  # for each lookup
    backward: tuple[Sent, ...]


def collectives_of_step(table: Table, lookups: Sequence[int], bag_length: int | None, update: Update | None) -> Step:
    """Trace the lookups of a table and the update of its rows.

    Args:
      table: A table on a mesh, which may be abstract. Its weight is a shape, with the padding that sharding adds.
      lookups: The number of ids of each lookup.
      bag_length: The number of ids of a bag; None if ids are looked up one by one.
      update: How the optimizer uses gradients; None for a table that is not trained.

    Returns:
      The collectives.
    """
    weight, structure = jax.tree.flatten(table)
    # Row numbers that do not fit into 32 bits need 64-bit integers, which JAX has to enable.
    with jax.enable_x64(True) if table.rows > np.iinfo(np.int32).max else contextlib.nullcontext():
        return _of_step(structure, weight[0], tuple(lookups), bag_length, update)


@functools.lru_cache(maxsize=256)
def _of_step(
    structure: PyTreeDef,
    weight: jax.ShapeDtypeStruct,
    lookups: tuple[int, ...],
    bag_length: int | None,
    update: Update | None,
) -> Step:
    table: Table = structure.unflatten([weight])
    sizes = table.storage.placement.mesh.shape
    index = np.int64 if table.rows > np.iinfo(np.int32).max else np.int32
    shapes = [(number,) if bag_length is None else (number // bag_length, bag_length) for number in lookups]
    ids = [jax.ShapeDtypeStruct(shape, index) for shape in shapes]

    def read(table: Table, ids: Array) -> Array:
        return lookup(table, ids) if bag_length is None else embedding_bag(table, ids, mode="sum")

    def updated(weight: Array, ids: Sequence[Array]) -> PyTree:
        table: Table = structure.unflatten([weight])
        gradient = grad(lambda table: sum(read(table, x).sum() for x in ids), on_dense="error")(table)
        if update == "add":
            return apply_updates(table, gradient)
        return table.storage.combine(None, gradient.ids, gradient.values, table.rows, table.dim)[1:]

    forward = tuple(
        _collectives(jax.make_jaxpr(lambda weight, x: read(structure.unflatten([weight]), x))(weight, x), sizes)
        for x in ids
    )
    if update is None or not lookups:
        return Step(forward, ())
    before = [x for of_lookup in forward for x in of_lookup]
    whole = _collectives(jax.make_jaxpr(updated)(weight, ids), sizes)
    assert list(whole[: len(before)]) == before
    return Step(forward, whole[len(before) :])


def _collectives(program: ClosedJaxpr, sizes: Mapping[str, int]) -> tuple[Sent, ...]:
    return tuple(x for x in _walk(program.jaxpr, sizes) if x.devices > 1)


def _walk(jaxpr: Jaxpr, sizes: Mapping[str, int]) -> Iterator[Sent]:
    for eqn in jaxpr.eqns:
        name, types = eqn.primitive.name, _types(eqn)
        if name in _COUNTED:
            axes = eqn.params["axis_name"]
            devices = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
            yield from (Sent(_COUNTED[name], devices, math.prod(x.shape), np.dtype(x.dtype)) for x in types)
        elif name in _OTHERS:  # these exchange only flags, which are not counted
            assert all(x.shape == () for x in types), eqn
        # All conditions of the exchange test for the rare case, so the usual path is the branch for False.
        inner: Sequence[Any] = eqn.params["branches"][:1] if name == "cond" else list(eqn.params.values())
        for program in inner:
            if isinstance(program, Jaxpr | ClosedJaxpr):
                found = list(_walk(program.jaxpr if isinstance(program, ClosedJaxpr) else program, sizes))
                assert name != "while" or not found, eqn  # the number of iterations is not known
                yield from found * (eqn.params["length"] if name == "scan" else 1)


def _types(eqn: JaxprEqn) -> list[Any]:
    return [v.aval for v in eqn.outvars]
