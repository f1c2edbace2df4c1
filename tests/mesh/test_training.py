"""Steps of training on a mesh: as off it, for each layout and optimizer, with crowded ids and every rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import LAYOUTS, everywhere, mesh_of, on_mesh, split, usual_and_rest, waiting

import embax
from embax import Table, embedding_bag, lookup

ROWS, STEPS = 601, 10  # so that each kind of batch occurs
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 3.0, "scale_grad_by_freq": True, "out_of_range": "zero"}
OPTIMIZERS = {
    "sgd": lambda: embax.optim.lift(optax.sgd(0.05)),
    "adam": lambda: embax.optim.lift(optax.adam(0.01)),
    "rowwise_adagrad": lambda: embax.optim.rowwise_adagrad(0.05),
    "clipped": lambda: embax.optim.lift(
        optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))
    ),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


BOTH = ("ids", "bags")  # that a loss may read


def batches():
    """Ids that the steps in turn spread, repeat, crowd on one device in each layout, skew, and take from no row."""
    rng = np.random.default_rng(1)
    crowd = {
        2: lambda ids: ids % 76,
        3: lambda ids: ids % 151,
        4: lambda ids: ids // 4 * 4,
        5: lambda ids: ids // 8 * 8,
    }
    for step in range(STEPS):
        ids, bags = rng.integers(0, ROWS, (512,)), rng.integers(0, ROWS, (160, 3))
        if step % 8 in crowd:
            ids, bags = crowd[step % 8](ids), crowd[step % 8](bags)
        elif step % 8 == 1:
            ids[:] = 7
        elif step % 8 == 6:
            ids = (ROWS * rng.random(512) ** 4).astype(int)
        elif step % 8 == 7:
            ids[::7] = 1000
            bags[3] = 2
        yield ids.astype(np.int32), bags.astype(np.int32)


def make_step(tx, reads):
    def loss(params, ids, bags):
        value = jnp.sum(params["dense"] ** 2)
        if "ids" in reads:
            value += jnp.mean(jnp.sin(lookup(params["table"], ids) @ params["dense"]))
        if "bags" in reads:
            value += jnp.mean(embedding_bag(params["table"], bags, mode="mean") ** 2)
        return value

    def step(params, state, ids, bags):
        value, gradient = embax.value_and_grad(loss, on_dense="error")(params, ids, bags)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state, value

    return waiting(jax.jit(step, donate_argnums=(0, 1)))


def train(params, state, tx, put, reads):
    step, losses = make_step(tx, reads), []
    for batch in batches():
        params, state, value = step(params, state, *(put(x) for x in batch))
        losses.append(value)
    assert step.__wrapped__._cache_size() <= 2  # the second one for a state as the step has returned it
    return params, state, np.asarray(losses)


def made():
    return {"table": Table(WEIGHT, **RULES), "dense": jnp.asarray(WEIGHT[:8, :4])}


@pytest.fixture(scope="module")
def off_the_mesh():
    known = {}

    def run(name, reads):
        if (name, reads) not in known:
            with jax.numpy_dtype_promotion("standard"):
                params, tx = made(), OPTIMIZERS[name]()
                known[name, reads] = train(params, tx.init(params), tx, jax.device_put, reads)
        return known[name, reads]

    return run


@pytest.mark.parametrize(
    ("layout", "optimizer", "axes", "batch", "reads"),
    usual_and_rest(
        [
            ("columns", "adam", "explicit", "split", ("bags",)),
            ("replicated", "sgd", "auto", "split", ("ids",)),
            ("rows and columns", "rowwise_adagrad", "auto", "split", ("ids",)),
        ],
        [
            (layout, *others, BOTH)
            for layout in LAYOUTS
            for others in [
                ("rowwise_adagrad", "explicit", "split"),
                ("adam", "auto", "split"),
                ("sgd", "auto", "everywhere"),
                ("clipped", "explicit", "everywhere"),
            ]
        ],
    ),
)
def test_training_steps_equal_those_without_a_mesh(layout, optimizer, axes, batch, reads, off_the_mesh):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    params = made()
    params = {"table": embax.shard(params["table"], mesh, **how, skew=1), "dense": everywhere(mesh, params["dense"])}
    put = split if batch == "split" else everywhere
    tx = OPTIMIZERS[optimizer]()
    # What optax makes for ordinary parameters is not yet on the mesh; what a step returns is.
    state = on_mesh(mesh, tx.init(params))
    params, state, losses = train(params, state, tx, lambda x: put(mesh, x), reads)
    expected, of_state, of_losses = off_the_mesh(optimizer, reads)
    table = embax.unshard(params["table"])
    np.testing.assert_allclose(losses, of_losses, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(table.weight, expected["table"].weight, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(table.weight[2], WEIGHT[2])  # padding
    np.testing.assert_allclose(params["dense"], expected["dense"], rtol=2e-5, atol=2e-5)
    for one, other in zip(jax.tree.leaves(embax.unshard(state.inner)), jax.tree.leaves(of_state.inner), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    # Only where rows are split, and not scaled but summed first, can they crowd on one device.
    may_crowd = layout not in ("columns", "replicated") and optimizer != "sgd"
    assert (int(state.dealt_out) > 0) == may_crowd


def test_distinct_ids_are_exact():
    mesh = mesh_of({"x": 4})
    ids = np.random.default_rng(2).permutation(64)[:32].astype(np.int32)
    weight = np.random.default_rng(3).normal(size=(64, 4)).astype(np.float32)
    # Where each product is exact, there is one rounding, whether the machine multiplies and adds in one go or not.
    tx = embax.optim.lift(optax.sgd(0.25))

    @waiting
    @jax.jit
    def step(table, state, ids):
        gradient = embax.grad(lambda t: (lookup(t, ids) ** 2).sum())(table)
        updates, state = tx.update(gradient, state, table)
        return embax.apply_updates(table, updates), state

    table, other = embax.shard(Table(weight), mesh, "x"), Table(weight)
    state, of_other = tx.init(table), tx.init(other)
    for _ in range(3):
        table, state = step(table, state, split(mesh, ids))
        other, of_other = step(other, of_other, jnp.asarray(ids))
    np.testing.assert_array_equal(embax.unshard(table).weight, other.weight)


def test_state_is_split_like_its_table():
    mesh = mesh_of({"x": 4, "y": 2}, "explicit")
    table = embax.shard(Table(WEIGHT), mesh, "x", columns="y")
    inner = embax.optim.lift(optax.adam(0.01)).init(table).inner[0]
    assert inner.mu.weight.sharding == inner.nu.weight.sharding == table.weight.sharding
    sums = jax.tree.leaves(embax.optim.rowwise_adagrad(0.1).init(table).inner)[0]
    assert sums.shape == (604,)
    assert sums.addressable_shards[0].data.shape == (151,)
