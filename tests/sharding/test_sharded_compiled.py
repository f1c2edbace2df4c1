"""What a compiled step on a mesh sends and holds: read from its HLO on 2, 4 and 8 devices, without a clock."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import arrays, collectives
from meshes import everywhere, mesh_of, split

import embax
from embax import embedding_bag, lookup

BATCH, DIM = 4096, 32
OPTIMIZERS = {
    "sgd": lambda: embax.optim.lift(optax.sgd(0.1)),
    "adam": lambda: embax.optim.lift(optax.adam(0.1)),
    "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(0.1),
}


def compiled_step(devices, rows, layout, optimizer, axes="auto", read=lookup):
    mesh = mesh_of({"x": devices}, axes)
    params = {"table": embax.shard(np.zeros((rows, DIM), np.float32), mesh, "x", layout), "dense": jnp.ones((DIM, 4))}
    params["dense"] = everywhere(mesh, params["dense"])
    tx = OPTIMIZERS[optimizer]()

    def loss(params, ids):
        return jnp.sum(jnp.sin(read(params["table"], ids) @ params["dense"]))

    def step(params, state, ids):
        value, gradient = embax.value_and_grad(loss, on_dense="error")(params, ids)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state, value

    ids = split(mesh, np.zeros((BATCH // 8, 8) if read is embedding_bag else BATCH, np.int32))
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), ids).compile()


# Every layout, kind of axes and optimizer, though not all together.
PROGRAMS = [
    ("rows", "explicit", "adam"),
    ("rows", "explicit", "rowwise_adagrad"),
    ("rows-cyclic", "auto", "sgd"),
    ("rows-cyclic", "auto", "adam"),
    ("rows-cyclic", "auto", "rowwise_adagrad"),
    ("columns", "auto", "sgd"),
    ("columns", "auto", "adam"),
]


@pytest.mark.parametrize(("layout", "axes", "optimizer"), PROGRAMS)
def test_traffic_and_memory_fall_with_the_devices_and_do_not_know_the_rows(layout, axes, optimizer):
    sent, held = {}, {}
    for devices in 2, 4, 8:
        compiled = compiled_step(devices, 8_000, layout, optimizer, axes)
        sent[devices] = sum(x.numbers for x in collectives(compiled))
        held[devices] = compiled.memory_analysis().temp_size_in_bytes
        larger = compiled_step(devices, 64_000, layout, optimizer, axes) if devices == 8 else compiled
        assert [(x.kind, x.arrays) for x in collectives(larger)] == [(x.kind, x.arrays) for x in collectives(compiled)]
        assert larger.memory_analysis().temp_size_in_bytes <= 1.01 * held[devices]
        # Nothing of the table's size travels on any path, and no rows of the whole batch are on one device.
        for each in collectives(larger, usual=False):
            assert each.numbers < 64_000 // devices * DIM
            assert each.numbers <= 4 * BATCH * DIM // devices, each
            if each.kind == "all-gather":
                assert each.numbers <= BATCH  # ids
    floor = 256  # scalars, and the gradient of the dense parameter
    for devices in 4, 8:
        # With two devices, the capacity is that of all ids: twice the mean.
        assert sent[devices] <= (1 / 2 + 0.05) * sent[devices // 2] + (BATCH if layout == "columns" else 0) + floor
        assert held[devices] <= (1 / 2 + 0.1) * held[devices // 2]


@pytest.mark.parametrize("read", [lookup, embedding_bag], ids=["lookup", "embedding_bag"])
def test_no_array_has_the_rows_of_the_whole_batch(read):
    devices, rows = 8, 64_000
    compiled = compiled_step(devices, rows, "rows-cyclic", "adam", read=read)
    block = rows // devices * DIM
    for _, shape in arrays(compiled.as_text()):
        assert len(shape) < 2 or math.prod(shape) == block or math.prod(shape) < BATCH * DIM


def test_a_step_works_in_the_memory_of_its_arguments():
    compiled = compiled_step(8, 64_000, "rows", "adam")
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * 8_000 * DIM * 4  # the weight and both moments
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


def test_bags_split_by_columns_are_pooled_before_they_travel():
    mesh = mesh_of({"x": 8})
    table = embax.shard(np.zeros((1_000, DIM), np.float32), mesh, "x", "columns")
    ids = split(mesh, np.zeros((BATCH // 8, 8), np.int32))
    compiled = jax.jit(embedding_bag).lower(table, ids).compile()
    sent = {x.kind: x.numbers for x in collectives(compiled)}
    assert sent["all-to-all"] == BATCH // 8 * DIM // 8  # the columns of each bag, not of each id
    assert sent["all-gather"] == BATCH
