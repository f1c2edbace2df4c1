"""Checkpoints: what was saved on one mesh comes back on any other, whole, and training goes on as if never stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import LAYOUTS, everywhere, mesh_of, split

import embax
from embax import Collection, Feature, Table, checkpoint, lookup

WEIGHT = np.random.default_rng(0).normal(size=(101, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which Orbax and optax rely on
        yield


def made():
    tables = {"film": Table(WEIGHT, padding_idx=0), "user": Table(WEIGHT[:30] + 1)}
    features = [Feature("film", "film"), Feature("user", "user", "mean")]
    return {"words": Table(-WEIGHT, padding_idx=3), "rows": Collection(tables, features), "dense": jnp.ones((8, 2))}


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_a_layout_to_none_to_another_number_of_devices_and_back(layout, tmp_path):
    tx = embax.optim.rowwise_adam(optax.linear_schedule(0.1, 0.01, 10))
    off = made()
    sizes, how = LAYOUTS[layout]
    on = embax.shard(off, mesh_of(sizes, "explicit"), **how)
    of_three = embax.shard(off, jax.make_mesh((3,), ("z",), devices=jax.devices()[:3]), "z", "rows-cyclic")

    def marked(params):
        """A state with a number of its own in each row."""
        state = tx.init(params)
        inner = jax.tree.map(lambda leaf: leaf, state.inner)
        adam = inner[0]._replace(steps=inner[0].steps + 7, mean=params)
        return state._replace(inner=(adam, *inner[1:]), dealt_out=state.dealt_out + 2)

    checkpoint.save(tmp_path / "a", {"params": on, "state": marked(on)})
    for params in off, of_three, on:
        like = {"params": params, "state": tx.init(params)}
        back = checkpoint.restore(tmp_path / "a", jax.tree.map(jnp.zeros_like, like))
        assert_same(back["params"], params)
        assert_same(back["state"].inner[0].mean, params)
        assert back["state"].inner[0].steps == 7
        assert back["state"].dealt_out == 2
        assert jax.tree.structure(back) == jax.tree.structure(like)
    checkpoint.save(tmp_path / "b", {"params": off})
    assert_same(checkpoint.restore(tmp_path / "b", {"params": on})["params"], on)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), of_three["words"])
    assert_same(
        checkpoint.restore(tmp_path / "b", {"params": {"words": abstract}})["params"]["words"], of_three["words"]
    )


def test_tables_are_saved_under_their_own_names(tmp_path):
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path, {"params": made()}, step=4)
    tree = ocp.PyTreeCheckpointer().metadata(tmp_path / "4" / "tree").item_metadata.tree
    assert set(tree["params"]) == {"words", "rows", "dense"}
    assert tree["params"]["rows"]["film"].shape == (101, 8)


def step_of(tx):
    def loss(params, ids):
        return jnp.mean(jnp.sin(lookup(params["table"], ids) @ params["dense"]))

    @jax.jit
    def step(params, state, ids):
        updates, state = tx.update(embax.grad(loss)(params, ids), state, params)
        return embax.apply_updates(params, updates), state

    return step


def test_saved_on_eight_devices_and_restored_on_three_training_goes_on_as_if_never_stopped(tmp_path):
    tx = embax.optim.lift(optax.adam(optax.cosine_decay_schedule(0.1, 8)))
    step = step_of(tx)
    batches = [np.random.default_rng(k).permutation(101)[:24].astype(np.int32) for k in range(6)]  # distinct ids
    start = {"table": Table(WEIGHT), "dense": jnp.ones((8, 2))}

    def placed(mesh, layout):
        return {"table": embax.shard(start["table"], mesh, "x", layout), "dense": everywhere(mesh, start["dense"])}

    mesh = mesh_of({"x": 8}, "explicit")
    params = placed(mesh, "rows-cyclic")
    state = tx.init(params)
    for ids in batches[:3]:
        params, state = step(params, state, split(mesh, ids))
    checkpoint.save(tmp_path, (params, state))
    for ids in batches[3:]:
        params, state = step(params, state, split(mesh, ids))

    three = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])
    again = placed(three, "rows")
    again, of_again = checkpoint.restore(tmp_path, (again, tx.init(again)))
    for ids in batches[3:]:
        again, of_again = step(again, of_again, split(three, ids))
    np.testing.assert_allclose(
        embax.unshard(again["table"]).weight, embax.unshard(params["table"]).weight, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(again["dense"], params["dense"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_again.inner[0].count, state.inner[0].count)


def test_keys_numbers_and_low_precision(tmp_path):
    tree = {
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(1), 3),
        "epoch": 3,
        "rate": 0.1,
        "done": True,
        "host": np.arange(3),
        "half": Table(jnp.asarray(WEIGHT, jnp.bfloat16)),
        "scalar": jnp.int32(4),
    }
    checkpoint.save(tmp_path, tree)
    back = checkpoint.restore(tmp_path, tree | {"epoch": 0, "rate": 0.0, "done": False, "key": jax.random.key(0)})
    assert (back["epoch"], back["rate"], back["done"], type(back["done"])) == (3, 0.1, True, bool)
    assert isinstance(back["host"], np.ndarray)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    np.testing.assert_array_equal(jax.random.key_data(back["keys"]), jax.random.key_data(tree["keys"]))
    np.testing.assert_array_equal(back["half"].weight, tree["half"].weight)
    assert back["scalar"] == 4


def test_steps_are_kept_and_named(tmp_path):
    for value in range(4):
        checkpoint.save(tmp_path, {"a": jnp.full(2, value)}, step=10 * value, keep=2)
    like = {"a": jnp.zeros(2, jnp.int32)}
    assert checkpoint.restore(tmp_path, like)["a"][0] == 3
    assert checkpoint.restore(tmp_path, like, step=20)["a"][0] == 2
    checkpoint.save(tmp_path, {"a": jnp.full(2, 9)})
    assert sorted(os.listdir(tmp_path)) == ["31"]
    with pytest.raises(ValueError, match=r"`embax.checkpoint.save\(step=...\)` must be new in .*got 31"):
        checkpoint.save(tmp_path, like, step=31)
    with pytest.raises(FileNotFoundError, match=r"a whole checkpoint of step 30, got .* with the steps \[31\]"):
        checkpoint.restore(tmp_path, like, step=30)


def test_what_does_not_fit_is_refused(tmp_path):
    table = Table(WEIGHT)
    checkpoint.save(tmp_path / "a", {"table": table})
    with pytest.raises(FileNotFoundError, match="must be a directory with checkpoints"):
        checkpoint.restore(tmp_path / "none", {"table": table})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must have a whole checkpoint, got"):
        checkpoint.restore(tmp_path / "empty", {"table": table})
    with pytest.raises(ValueError, match="got 'other', which it lacks"):
        checkpoint.restore(tmp_path / "a", {"table": table, "other": table})
    for other in Table(WEIGHT[:100]), Table(WEIGHT[:, :4]), Table(jnp.asarray(WEIGHT, jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"got \w+\[\d+, \d\] for 'table', which is float32\[101, 8\]"):
            checkpoint.restore(tmp_path / "a", {"table": other})
    mesh = mesh_of({"x": 8})
    with pytest.raises(ValueError, match=r"got float32\[104, 8\] for 'table'"):  # as many as are stored of 101
        checkpoint.restore(tmp_path / "a", {"table": embax.shard(np.zeros((104, 8), np.float32), mesh, "x")})
    with pytest.raises(TypeError, match="got str for 'name'"):
        checkpoint.save(tmp_path / "b", {"name": "x"})
    with pytest.raises(ValueError, match="must have a name of its own for each leaf, got 'a/b'"):
        checkpoint.save(tmp_path / "b", {"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="must be at least 1"):
        checkpoint.save(tmp_path / "b", {"a": 1}, keep=0)


_SAVES = """
    import sys
    import jax.numpy as jnp
    from embax import Table, checkpoint
    print("ready", flush=True)
    for value in range(1000):
        tree = {name: Table(jnp.full((20_000, 16), float(value))) for name in "abc"}
        checkpoint.save(sys.argv[1], {"value": value, **tree}, step=value)
        print(value, flush=True)
"""


def test_a_process_killed_while_saving_leaves_the_last_whole_one(tmp_path):
    like = {"value": 0, **{name: Table(jnp.zeros((20_000, 16))) for name in "abc"}}
    for attempt, wait in enumerate((0.0, 0.013, 0.031, 0.057)):
        path = tmp_path / str(attempt)
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_SAVES), path], stdout=subprocess.PIPE, text=True
        )
        saved = [child.stdout.readline() for _ in range(4)]  # ready, and three steps
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        rest = child.communicate(timeout=60)[0].split()
        last = int(rest[-1]) if rest else int(saved[-1])
        back = checkpoint.restore(path, like)
        assert back["value"] in (last, last + 1)
        for name in "abc":
            np.testing.assert_array_equal(back[name].weight, np.full((20_000, 16), float(back["value"])))
        checkpoint.save(path, like)  # what is left of the other one is not in the way
        assert checkpoint.restore(path, like)["value"] == 0
