"""Traffic and memory of a compiled step on a mesh, read from its HLO for several numbers of devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import arrays, collectives, compiled
from meshes import everywhere, mesh_of, split

import embax
from embax import embedding_bag, lookup

BATCH, DIM = 4096, 32
FEW, MANY = 8_000, 64_000  # rows
OPTIMIZERS = {
    "sgd": lambda: embax.optim.lift(optax.sgd(0.1)),
    "adam": lambda: embax.optim.lift(optax.adam(0.1)),
    "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(0.1),
}
summed = functools.partial(embedding_bag, mode="sum")


@functools.cache
def compiled_step(devices, rows, layout, optimizer, axes="auto", read=lookup):
    mesh = mesh_of({"x": devices}, axes)
    params = {
        "table": embax.shard(np.zeros((rows, DIM), np.float32), mesh, "x", layout),
        "dense": np.ones((DIM, 4), np.float32),
    }
    params["dense"] = everywhere(mesh, params["dense"])
    tx = OPTIMIZERS[optimizer]()

    def loss(params, ids):
        return jnp.sum(jnp.sin(read(params["table"], ids) @ params["dense"]))

    def step(params, state, ids):
        value, gradient = embax.value_and_grad(loss, on_dense="error")(params, ids)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state, value

    ids = split(mesh, np.zeros((BATCH // 8, 8) if read is summed else BATCH, np.int32))
    with jax.numpy_dtype_promotion("standard"):
        return compiled(jax.jit(step, donate_argnums=(0, 1)), params, tx.init(params), ids)


def case(layout, axes, optimizer, programs):
    """The numbers of devices and of rows of the programs that are compared; all of them in the exhaustive run."""
    return pytest.param(layout, axes, optimizer, programs, id=f"{layout}-{axes}-{optimizer}-{len(programs)}")


def whole_case(*names):
    programs = [(2, FEW), (4, FEW), (8, FEW), (8, MANY)]
    return pytest.param(*names, programs, marks=pytest.mark.exhaustive, id="-".join(names))


@pytest.mark.parametrize(
    ("layout", "axes", "optimizer", "programs"),
    [
        case("rows-cyclic", "auto", "sgd", [(4, FEW), (4, MANY)]),
        case("columns", "auto", "adam", [(2, FEW), (4, MANY)]),
        whole_case("rows", "explicit", "adam"),
        whole_case("rows", "explicit", "rowwise_adagrad"),
        whole_case("rows-cyclic", "auto", "sgd"),
        whole_case("rows-cyclic", "auto", "adam"),
        whole_case("rows-cyclic", "auto", "rowwise_adagrad"),
        whole_case("columns", "auto", "sgd"),
        whole_case("columns", "auto", "adam"),
    ],
)
def test_traffic_and_memory_fall_with_the_devices_and_do_not_know_the_rows(layout, axes, optimizer, programs):
    sent, held, known = {}, {}, {}
    for devices, rows in programs:
        program = compiled_step(devices, rows, layout, optimizer, axes)
        found = [(x.kind, x.arrays) for x in collectives(program)]
        memory = program.memory_analysis().temp_size_in_bytes
        assert known.setdefault(devices, found) == found, rows
        sent[devices] = sum(x.numbers for x in collectives(program))
        assert memory <= 1.01 * held.setdefault(devices, memory), rows
        # Nothing of the table's size travels on any path, and no rows of the whole batch are on one device.
        for each in collectives(program, usual=False):
            assert each.numbers < MANY // devices * DIM
            assert each.numbers <= 4 * BATCH * DIM // devices, each
            if each.kind == "all-gather":
                assert each.numbers <= BATCH  # ids
    floor = 256  # scalars, and the gradient of the dense parameter
    for devices in sorted(sent)[1:]:
        # With two devices, the capacity is that of all ids: twice the mean.
        assert sent[devices] <= (1 / 2 + 0.05) * sent[devices // 2] + (BATCH if layout == "columns" else 0) + floor
        assert held[devices] <= (1 / 2 + 0.1) * held[devices // 2]


@pytest.mark.parametrize(
    "program",
    [(8, MANY, "rows", "rowwise_adagrad", "explicit"), (4, MANY, "rows-cyclic", "sgd", "auto", summed)],
    ids=["lookup", "embedding_bag"],
)
def test_no_array_has_the_rows_of_the_whole_batch(program):
    devices, rows = program[:2]
    block = rows // devices * DIM
    for _, shape in arrays(compiled_step(*program).as_text()):
        assert len(shape) < 2 or math.prod(shape) == block or math.prod(shape) < BATCH * DIM


def test_a_step_works_in_the_memory_of_its_arguments():
    memory = compiled_step(8, MANY, "rows", "rowwise_adagrad", "explicit").memory_analysis()
    assert memory.alias_size_in_bytes >= MANY // 8 * (DIM + 1) * 4  # the weight, and the sum of each row
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024


def test_bags_split_by_columns_are_pooled_before_they_travel():
    mesh = mesh_of({"x": 4})
    table = embax.shard(np.zeros((1_000, DIM), np.float32), mesh, "x", "columns")
    ids = split(mesh, np.zeros((BATCH // 8, 8), np.int32))
    program = compiled(jax.jit(summed), table, ids)
    sent = {x.kind: x.numbers for x in collectives(program)}
    assert sent["all-to-all"] == BATCH // 8 * DIM // 4  # the columns of each bag, not of each id
    assert sent["all-gather"] == BATCH
