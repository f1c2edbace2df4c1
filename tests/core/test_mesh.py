"""Lookup, gradient and renormalize over a mesh of Auto or Explicit axes: as on one device, and sharded as the ids."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import RULES, cotangent
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from embax import Table, lookup, renormalize

WEIGHT = np.random.default_rng(4).normal(scale=2, size=(8, 4)).astype(np.float32)
IDS = np.array([[0, 1, 1, -1], [2, 2, 2, 0], [-8, 7, 3, 2], [5, 5, 2, 1]])
TOLERANCE = {"rtol": 2e-6, "atol": 1e-6}  # float32

with_axes = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def mesh_of(axis_type):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def assert_sharded_as(array, mesh, *spec):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), array.ndim)


def check(mesh, rules, ids_spec, weight_spec):
    """Everything of one table and its ids against the reference."""
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec(*weight_spec))), **rules)
    ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec(*ids_spec)))
    cotangents = jax.device_put(cotangent(IDS, WEIGHT), NamedSharding(mesh, PartitionSpec(*ids_spec)))
    expected = reference.lookup(WEIGHT, IDS, **rules)

    @jax.jit
    def read_and_pull_back(table, ids, cotangents):
        out, pull = jax.vjp(lambda table: lookup(table, ids), table)
        return out, pull(cotangents)[0].weight, jax.jvp(lambda table: lookup(table, ids), (table,), (table,))[1]

    out, gradient, tangent = read_and_pull_back(table, ids, cotangents)
    for rows in out, lookup(table, ids):
        np.testing.assert_allclose(rows, expected, **TOLERANCE)
        # Over Auto axes XLA chooses, and may follow the table's own trailing axes.
        if AxisType.Explicit in mesh.axis_types or len(weight_spec) < 2:
            assert_sharded_as(rows, mesh, *ids_spec)
    np.testing.assert_allclose(gradient, reference.gradient(WEIGHT, IDS, cotangents, **rules), **TOLERANCE)
    pushed = np.tensordot(reference.jacobian(WEIGHT, IDS, **rules), WEIGHT.astype(np.float64), 2)
    np.testing.assert_allclose(tangent, pushed, **TOLERANCE)
    stored = renormalize(table, ids).weight
    np.testing.assert_allclose(stored, reference.renormalize(WEIGHT, IDS, **rules), **TOLERANCE)
    assert_sharded_as(stored, mesh, *weight_spec)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def rest(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("axis_type", "rules"),
    [(AUTO, RULES["all"]), (EXPLICIT, {}), rest(AUTO, {}), rest(EXPLICIT, RULES["all"])],
    ids=str,
)
def test_without_and_with_rules_on_a_mesh(axis_type, rules):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        check(mesh, rules, ("x", "y"), ())


LAYOUTS = [((), ("x",)), ((None, "x"), (None, "y")), ((("x", "y"),), ("y", "x"))]
UNCOUNTED = {"padding_idx": 2, "max_norm": 1.5}  # a count of ids takes long to compile


@pytest.mark.parametrize(
    ("axis_type", "ids_spec", "weight_spec", "rules"),
    [
        (EXPLICIT, *LAYOUTS[0], UNCOUNTED),
        (EXPLICIT, *LAYOUTS[1], RULES["all"]),
        (EXPLICIT, *LAYOUTS[2], UNCOUNTED),
        *(rest(AUTO, *layout, RULES["all"]) for layout in LAYOUTS),
        *(rest(EXPLICIT, *layout, RULES["all"]) for layout in (LAYOUTS[0], LAYOUTS[2])),
    ],
    ids=str,
)
def test_each_layout_of_ids_and_rows(axis_type, ids_spec, weight_spec, rules):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        check(mesh, rules, ids_spec, weight_spec)


@pytest.mark.parametrize(
    ("axis_type", "weight_spec", "rules"),
    [
        (AUTO, ("x",), UNCOUNTED),
        (EXPLICIT, (), RULES["all"]),
        *(rest(axis_type, spec, RULES["all"]) for axis_type, spec in [(AUTO, ("x",)), (AUTO, ()), (EXPLICIT, ("x",))]),
    ],
    ids=str,
)
def test_arrays_bring_their_mesh_along(axis_type, weight_spec, rules):
    """No `jax.set_mesh` is needed."""
    mesh = mesh_of(axis_type)
    check(mesh, rules, ("x",), weight_spec)


@with_axes
def test_ids_from_the_host_are_read_on_every_device(axis_type):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec("x"))), **RULES["all"])
        out = lookup(table, IDS)
        np.testing.assert_allclose(out, reference.lookup(WEIGHT, IDS, **RULES["all"]), **TOLERANCE)
        assert_sharded_as(out, mesh)


@with_axes
@pytest.mark.parametrize("policy", ["clip", "nan", "zero"])
def test_bad_ids_on_a_mesh(axis_type, policy):
    mesh, ids = mesh_of(axis_type), np.array([0, 8, -9, 7])
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext():
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        out = lookup(Table(jax.device_put(WEIGHT, sharding), out_of_range=policy), jax.device_put(ids, sharding))
    np.testing.assert_array_equal(out, reference.lookup(WEIGHT, ids, out_of_range=policy))


def test_a_concrete_bad_id_on_a_mesh_is_an_index_error():
    mesh = mesh_of(AxisType.Explicit)
    ids = jax.device_put(jnp.array([0, 1, 2, 8]), NamedSharding(mesh, PartitionSpec("x")))
    with pytest.raises(IndexError, match=r"got 8 at position \(3,\)"):
        lookup(Table(WEIGHT), ids)
