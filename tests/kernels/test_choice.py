"""Where a kernel is chosen: for one CPU device and inside of a full `shard_map`; elsewhere it is XLA."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax import export
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P
from kernels_used import calls, in_program
from meshes import everywhere, mesh_of, split

import embax
from embax._kernels import primitive as _primitive
from embax._kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="kernels are not installed, or switched off")

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(64, 4)).astype(np.float32)
IDS = RANDOM.integers(0, 64, 32).astype(np.int32)


def read(weight, ids):
    return embax.lookup(embax.Table(weight), ids)


def test_any_one_device():
    device = jax.devices()[1]
    found, kernels = calls(jax.jit(read), jax.device_put(WEIGHT, device), jax.device_put(IDS, device))
    assert kernels == 1
    assert found.devices() == {device}


@pytest.mark.parametrize("layout", ["ids", "rows", "columns"])
def test_automatic_sharding_is_left_to_xla_and_gathers_no_table(layout):
    mesh = mesh_of({"x": 2})
    spec = {"ids": P(), "rows": P("x"), "columns": P(None, "x")}[layout]
    weight = jax.device_put(WEIGHT, jax.NamedSharding(mesh, spec))
    ids = split(mesh, IDS) if layout == "ids" else everywhere(mesh, IDS)
    program = jax.jit(read).lower(weight, ids).compile()
    assert "embax" not in "".join(line for line in program.as_text().splitlines() if "custom-call(" in line)
    assert all(WEIGHT.shape not in [shape for _, shape in found.arrays] for found in collectives(program))
    np.testing.assert_array_equal(program(weight, ids), WEIGHT[IDS])


def test_explicit_axes_are_left_to_xla():
    mesh = mesh_of({"x": 2}, "explicit")
    found, kernels = calls(jax.jit(read), everywhere(mesh, WEIGHT), split(mesh, IDS))
    assert kernels == 0
    np.testing.assert_array_equal(found, WEIGHT[IDS])


def on_devices(function, mesh, **options):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), **options))


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_each_device_of_a_shard_map_calls_kernels(check):
    mesh = mesh_of({"x": 2})

    def loss(weight):
        return (on_devices(read, mesh, check_vma=check)(weight, IDS) ** 2).sum()

    (value, gradient), kernels = calls(jax.jit(jax.value_and_grad(loss)), WEIGHT)
    assert kernels >= 4  # two on each: take, and put for the gradient
    rows = WEIGHT[IDS]
    np.testing.assert_allclose(value, (rows**2).sum(), rtol=1e-6)
    expected = np.zeros_like(WEIGHT)
    np.add.at(expected, IDS, 2 * rows)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_a_whole_step_in_a_shard_map():
    """Also what has no axis of its own: a table that is the same on all devices, and bags."""
    tx = embax.optim.rowwise_adagrad(0.1)

    def step(weight, ids):
        table = embax.Table(weight)
        gradient = embax.grad(lambda t: (embax.embedding_bag(t, ids[:, None], mode="sum") ** 2).sum())(table)
        updates, _ = tx.update(gradient, tx.init(table), table)
        return embax.apply_updates(table, updates).weight[None]

    found, kernels = calls(on_devices(step, mesh_of({"x": 2})), WEIGHT, IDS)
    assert kernels >= 8
    for device in range(2):
        expected = jax.jit(step)(WEIGHT, IDS[16 * device :][:16])[0]
        np.testing.assert_array_equal(found[device], expected)


def test_a_shard_map_over_some_axes_is_left_to_xla():
    mesh = mesh_of({"x": 2, "y": 1})
    found, kernels = calls(on_devices(read, mesh, axis_names={"x"}), WEIGHT, IDS)
    assert kernels == 0
    np.testing.assert_array_equal(found, WEIGHT[IDS])


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")], ids=len)
def test_an_exported_program_has_no_kernel(platforms):
    (size,) = export.symbolic_shape("size")
    exported = export.export(jax.jit(read), platforms=platforms)(WEIGHT, jax.ShapeDtypeStruct((size - 1,), np.int32))
    assert "@embax_" not in exported.mlir_module()
    of_known_size = export.export(jax.jit(read), platforms=platforms)(WEIGHT, IDS)
    assert "@embax_" not in of_known_size.mlir_module()
    for program in (exported, of_known_size):
        np.testing.assert_array_equal(jax.jit(program.call)(WEIGHT, IDS), WEIGHT[IDS])


@pytest.mark.parametrize("platforms", [("tpu",), ("cuda",), ("cpu", "tpu")], ids=str)
def test_program_for_another_platform_has_no_kernel(platforms):
    assert "@embax_" not in jax.jit(read).trace(WEIGHT, IDS).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("dtype", ["complex64", "bool", "float8_e4m3fn", "int4"])
def test_other_dtypes_are_left_to_xla(dtype):
    weight = jnp.asarray(WEIGHT > 0).astype(dtype)
    table = embax.Table(weight, out_of_range="zero")
    assert in_program(embax.lookup, table, IDS) == []
    np.testing.assert_array_equal(jax.jit(embax.lookup)(table, IDS), weight[IDS])


@pytest.mark.parametrize(("rows", "dim", "ids"), [(0, 3, 4), (4, 0, 4), (4, 3, 0)])
def test_empty_arrays_are_left_to_xla(rows, dim, ids):
    table = embax.Table(jnp.ones((rows, dim)), out_of_range="zero")
    assert in_program(embax.lookup, table, jnp.zeros(ids, jnp.int32)) == []
    assert jax.jit(embax.lookup)(table, jnp.zeros(ids, jnp.int32)).shape == (ids, dim)


def test_unknown_lowering_contexts_are_left_to_xla():
    """As in a later version that has moved it."""
    assert not _primitive._is_whole(object())
    module = types.SimpleNamespace(
        lowering_parameters=types.SimpleNamespace(for_export=False), platforms=("cpu",), axis_context=None
    )
    assert not _primitive._is_whole(types.SimpleNamespace(module_context=module, platforms=None))


def test_a_program_from_the_persistent_cache_calls_kernels(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    hits = []
    jax.monitoring.register_event_listener(count := lambda event, **_: hits.append(event) if "hit" in event else None)
    try:
        for _ in range(2):
            jax.clear_caches()
            found, kernels = calls(jax.jit(read), WEIGHT, IDS)
            assert kernels == 1
            np.testing.assert_array_equal(found, WEIGHT[IDS])
    finally:
        jax.monitoring.unregister_event_listener(count)
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)
    assert hits


def test_threads_may_call_one_program_at_once():
    weight = jnp.asarray(RANDOM.normal(size=(5_000, 32)), jnp.float32)
    batches = RANDOM.integers(0, 5_000, (4, 2_000)).astype(np.int32)
    table = embax.Table(weight)
    program = jax.jit(lambda ids: (embax.lookup(table, ids), embax.embedding_bag(table, ids[:, None], mode="sum")))
    program(batches[0])
    wrong = []

    def work(start):
        for turn in range(20):
            ids = batches[(start + turn) % 4]
            expected = np.asarray(weight)[ids]
            wrong.extend(out for out in program(ids) if not np.array_equal(out, expected))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
