"""Checkpoints: what was saved on one mesh comes back on any other, whole, and training goes on as if never stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hlo import compiled
from jax.sharding import NamedSharding, PartitionSpec
from meshes import LAYOUTS, everywhere, mesh_of, on_mesh, split, waiting

import embax
from embax import Collection, Feature, Table, checkpoint, lookup
from embax._mesh import relayout as _moves
from embax.checkpoint import _save

WEIGHT = np.random.default_rng(0).normal(size=(101, 8)).astype(np.float32)

pytestmark = pytest.mark.usefixtures("users_promotion")


def made():
    tables = {"film": Table(WEIGHT, padding_idx=0), "user": Table(WEIGHT[:30] + 1)}
    features = [Feature("film", "film"), Feature("user", "user", "mean")]
    dense = jnp.asarray(np.ones((8, 2), np.float32))
    return {"words": Table(-WEIGHT, padding_idx=3), "rows": Collection(tables, features), "dense": dense}


def zeros_of(tree):
    """Zeros that are stored alike, put there by NumPy, which compiles nothing."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def marked(state, params):
    """A state of row-wise Adam with a number of its own in each row."""

    def first_column(v, x):
        return jax.device_put(np.asarray(x)[:, 0], v.sharding) if v.ndim == 1 else v

    adam = state.inner[0]
    mean_square = jax.tree.map(first_column, adam.mean_square, params)
    adam = adam._replace(steps=adam.steps + 7, mean=params, mean_square=mean_square)
    return state._replace(inner=(adam, *state.inner[1:]), dealt_out=state.dealt_out + 2)


@pytest.mark.parametrize(
    ("layout", "whole"),
    [("rows and columns", False), *[pytest.param(x, True, marks=pytest.mark.exhaustive) for x in LAYOUTS]],
)
def test_from_a_layout_to_none_to_another_number_of_devices_and_back(layout, whole, tmp_path, monkeypatch):
    """The state of training goes the whole way in the exhaustive run, and else to another number of devices."""
    monkeypatch.setattr(_save, "_PIECE", 3 * 32)  # so that blocks are filled up to a multiple of three rows
    tx = embax.optim.rowwise_adam(optax.linear_schedule(0.1, 0.01, 10))
    off = made()
    sizes, how = LAYOUTS[layout]
    on = embax.shard(off, mesh_of(sizes, "explicit"), **how)
    of_three = embax.shard(off, jax.make_mesh((3,), ("z",), devices=jax.devices()[:3]), "z", "rows-cyclic")

    checkpoint.save(tmp_path / "a", {"params": on, "state": marked(tx.init(on), on)})
    for params in (off, of_three, on) if whole else (off, of_three):
        like = {"params": params, "state": tx.init(params)}
        back = checkpoint.restore(tmp_path / "a", zeros_of(like))
        assert_same(back["params"], params)
        assert jax.tree.structure(back) == jax.tree.structure(like)
        adam, laid_out = back["state"].inner[0], like["state"].inner[0]
        assert_same(adam.mean, params)
        for table, expected in [
            (adam.mean_square["words"], -WEIGHT[:, 0]),
            (adam.mean_square["rows"]["user"], WEIGHT[:30, 0] + 1),
        ]:
            np.testing.assert_array_equal(embax.unshard(table).weight, expected)
        for a, b in zip(jax.tree.leaves(adam.mean_square), jax.tree.leaves(laid_out.mean_square), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert adam.steps == 7
        assert back["state"].dealt_out == 2
    checkpoint.save(tmp_path / "b", {"params": off})
    assert_same(checkpoint.restore(tmp_path / "b", {"params": on})["params"], on)
    words = {"params": {"words": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), of_three["words"])}}
    back = checkpoint.restore(tmp_path / "b", words, partial=True)
    assert_same(back["params"]["words"], of_three["words"])


def test_tables_are_saved_under_their_own_names_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_save, "_PIECE", 8 * 32)
    off = made()
    on = embax.shard(off, mesh_of({"x": 4, "y": 2}), "x", columns="y")
    pieces = {}
    for name, params in {"off": off, "on": on}.items():
        checkpoint.save(tmp_path / name, {"params": params}, step=4)
        tree = ocp.PyTreeCheckpointer().metadata(tmp_path / name / "4" / "arrays").item_metadata.tree
        assert set(tree["params"]) == {"words", "rows", "dense"}
        assert set(tree["params"]["rows"]) == {"film", "user"}
        pieces[name] = [
            (x.shape, x.storage.chunk_shape) for x in (tree["params"]["words"], tree["params"]["rows"]["user"])
        ]
    assert pieces["off"] == [((101, 8), (1, 8)), ((30, 8), (6, 8))]  # 101 is a prime
    assert pieces["on"] == [((8 * 16, 8), (8, 8)), ((8 * 4, 8), (4, 8))]


@pytest.mark.parametrize("layout", ["rows-cyclic", pytest.param("columns", marks=pytest.mark.exhaustive)])
def test_no_device_holds_a_whole_copy(layout, tmp_path, monkeypatch):
    table = embax.shard(Table(np.arange(400_000, dtype=np.float32).reshape(50_000, 8)), mesh_of({"x": 4}), "x", layout)
    part, move, write = table.weight.nbytes / 4, _moves.moved, ocp.args.PyTreeSave
    moves, written = [], []

    def moved(*args):
        program = compiled(move, *args)
        memory = program.memory_analysis()
        moves.append(memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)
        return program(args[1])

    def watched(item, *rest):
        written.extend(shard.data.nbytes for x in jax.tree.leaves(item) for shard in x.addressable_shards)
        return write(item, *rest)

    monkeypatch.setattr(_moves, "moved", moved)
    monkeypatch.setattr(ocp.args, "PyTreeSave", watched)
    checkpoint.save(tmp_path, table)
    assert_same(checkpoint.restore(tmp_path, zeros_of(table)), table)
    assert written == [part] * 4
    assert len(moves) == 2
    assert max(moves) < 3 * part


def step_of(tx):
    def loss(params, ids):
        rows = lookup(params["table"], ids)
        # The dense parameter has no part in the gradient of the table, which sums nothing over the batch then.
        return jnp.sum(jnp.sin(rows)) + jnp.mean(jnp.sin(jax.lax.stop_gradient(rows) @ params["dense"]))

    @waiting
    @jax.jit
    def step(params, state, ids):
        updates, state = tx.update(embax.grad(loss)(params, ids), state, params)
        return embax.apply_updates(params, updates), state

    return step


def test_training_saved_on_eight_devices_continues_on_three(tmp_path):
    tx = embax.optim.rowwise_adagrad(optax.cosine_decay_schedule(0.1, 8))
    step = step_of(tx)
    batches = [np.random.default_rng(k).permutation(101)[:24].astype(np.int32) for k in range(4)]  # distinct ids

    def placed(mesh, layout):
        params = {"table": embax.shard(Table(WEIGHT), mesh, "x", layout), "dense": np.ones((8, 2), np.float32)}
        params["dense"] = everywhere(mesh, params["dense"])
        return params, on_mesh(mesh, tx.init(params))

    mesh = mesh_of({"x": 8}, "explicit")
    params, state = placed(mesh, "columns")
    for ids in batches[:2]:
        params, state = step(params, state, split(mesh, ids))
    checkpoint.save(tmp_path, (params, state))
    for ids in batches[2:]:
        params, state = step(params, state, split(mesh, ids))

    three = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3])
    again, of_again = checkpoint.restore(tmp_path, placed(three, "rows"))
    for ids in batches[2:]:
        again, of_again = step(again, of_again, split(three, ids))
    # So that the number of devices does not even matter for the last digit.
    np.testing.assert_array_equal(embax.unshard(again["table"]).weight, embax.unshard(params["table"]).weight)
    np.testing.assert_allclose(again["dense"], params["dense"], rtol=1e-5, atol=1e-6)
    counts = [[int(x) for x in jax.tree.leaves(s.inner) if x.ndim == 0] for s in (of_again, state)]
    assert counts[0] == counts[1] == [4]


def test_keys_numbers_and_low_precision(tmp_path):
    mesh = mesh_of({"x": 8})
    tree = {
        "key": jax.random.key(5),
        "keys": split(mesh, np.arange(8)),
        "epoch": 3,
        "rate": 0.1,
        "done": True,
        "host": np.arange(3),
        "number": np.float32(0.5),
        "half": Table(jnp.asarray(WEIGHT, jnp.bfloat16)),
        "scalar": jnp.int32(4),
        "bound": jax.device_put(jnp.ones(3), jax.devices()[3]),
    }
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="rbg"))(jnp.arange(8))
    tree["keys"] = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("x")))
    checkpoint.save(tmp_path, tree)
    others = {"key": jax.eval_shape(lambda: jax.random.key(0)), "epoch": 0, "rate": 0.0, "done": False}
    back = checkpoint.restore(tmp_path, tree | others)
    assert {name: type(value) for name, value in back.items()} == {name: type(value) for name, value in tree.items()}
    assert (back["epoch"], back["rate"], back["done"], back["number"], back["scalar"]) == (3, 0.1, True, 0.5, 4)
    np.testing.assert_array_equal(back["host"], tree["host"])
    np.testing.assert_array_equal(back["half"].weight, tree["half"].weight)
    for name in "key", "keys":
        assert back[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(back[name]), jax.random.key_data(tree[name]))
    assert back["keys"].sharding == tree["keys"].sharding
    assert back["bound"].sharding == tree["bound"].sharding
    assert not back["scalar"].committed


def test_restore_of_empty_trees_and_tables(tmp_path):
    mesh = mesh_of({"x": 8})
    empty = Table(jnp.zeros((0, 4)))
    collection = Collection({"none": empty, "some": Table(jnp.ones((3, 4)))}, [Feature("some", "some")])
    trees = [
        {},
        {"left": None, "table": empty, "narrow": Table(jnp.zeros((3, 0))), "host": np.zeros((0, 2))},
        embax.shard({"table": empty, "rows": collection, "frozen": Table(jnp.ones((3, 4)), freeze=True)}, mesh, "x"),
    ]
    trees[2]["state"] = embax.optim.lift(optax.adam(0.1)).init(trees[2])  # without an entry for the frozen table
    for number, tree in enumerate(trees):
        checkpoint.save(tmp_path / str(number), tree)
        back = checkpoint.restore(tmp_path / str(number), tree)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            np.testing.assert_array_equal(a, b)


def test_steps_are_kept_and_named(tmp_path):
    for value in range(4):
        checkpoint.save(tmp_path, {"a": jnp.full(2, value)}, step=10 * value, keep=2)
    like = {"a": jnp.zeros(2, jnp.int32)}
    assert checkpoint.restore(tmp_path, like)["a"][0] == 3
    assert checkpoint.restore(tmp_path, like, step=20)["a"][0] == 2
    checkpoint.save(tmp_path, {"a": jnp.full(2, 9)})
    assert sorted(os.listdir(tmp_path)) == ["31"]
    for step in 31, 25:
        with pytest.raises(ValueError, match=rf"`embax.checkpoint.save\(step=...\)` must be above 31, .*got {step}"):
            checkpoint.save(tmp_path, like, step=step)
    with pytest.raises(FileNotFoundError, match=r"a whole checkpoint of step 30, got .* with the steps \[31\]"):
        checkpoint.restore(tmp_path, like, step=30)


def test_restore_refuses_leaves_that_the_checkpoint_lacks(tmp_path):
    table = Table(WEIGHT)
    checkpoint.save(tmp_path, {"table": table, "user": table})
    with pytest.raises(ValueError, match=r"got 'film', 'other', which it lacks. It has 'table', 'user'"):
        checkpoint.restore(tmp_path, {"film": table, "other": table, "table": table})
    with pytest.raises(
        ValueError, match=r"must have all arrays of the checkpoint, got nothing for 'user'. Add them, or"
    ):
        checkpoint.restore(tmp_path, {"table": table})
    assert set(checkpoint.restore(tmp_path, {"table": table}, partial=True)) == {"table"}
    for other in Table(WEIGHT[:100]), Table(WEIGHT[:, :4]), Table(jnp.asarray(WEIGHT, jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"got \w+\[\d+, \d\] for 'table', which is float32\[101, 8\]"):
            checkpoint.restore(tmp_path, {"table": other, "user": table})
    longer = embax.shard(np.zeros((104, 8), np.float32), mesh_of({"x": 8}), "x")
    with pytest.raises(ValueError, match=r"got float32\[104, 8\] for 'table'"):  # as many as are stored of 101
        checkpoint.restore(tmp_path, {"table": longer}, partial=True)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "x"}, "must have a tree of arrays, random keys and numbers, got str for 'name'"),
        ({"number": 2**70}, "got a number of 71 bits for 'number'"),
        ({"text": np.array(["x"])}, "got an array of <U1 for 'text'"),
        ({"small": np.zeros(2, jnp.uint4)}, "got an array of uint4 for 'small'"),
        ({"shape": jax.ShapeDtypeStruct((2,), jnp.float32)}, "must have values to write, got the shape .* for 'shape'"),
    ],
)
def test_save_refuses_leaves_that_it_cannot_write(tree, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path, tree)


def test_values_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must have a name of its own for each leaf, got 'a/b'"):
        checkpoint.save(tmp_path, {"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="must have a name of its own for each leaf, got 'a'"):
        checkpoint.save(tmp_path, {"a/b": {"c": 1}, "a": 2})
    with pytest.raises(ValueError, match="must be at least 1"):
        checkpoint.save(tmp_path, {"a": 1}, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a directory, got '.*file', a file"):
        checkpoint.save(tmp_path / "file", {"a": 1})


def test_restore_refuses_other_folders(tmp_path):
    like = {"table": Table(WEIGHT)}
    for name in "none", "file":
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match="must be a directory with checkpoints"):
            checkpoint.restore(tmp_path / name, like)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must have a whole checkpoint, got .* with the steps \[\]"):
        checkpoint.restore(tmp_path / "empty", like)
    with ocp.CheckpointManager(tmp_path / "orbax") as manager:
        manager.save(3, args=ocp.args.StandardSave({"table": WEIGHT}))
    with pytest.raises(ValueError, match=r"must be of embax.checkpoint.save, got .*, whose step 3 is not"):
        checkpoint.restore(tmp_path / "orbax", like)
    checkpoint.save(tmp_path / "new", like)
    about = tmp_path / "new" / "0" / "embax" / "metadata"
    about.write_text(about.read_text().replace('"format":1', '"format":2').replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"must be of the format 1, got 2"):
        checkpoint.restore(tmp_path / "new", like)


def test_damaged_files_are_refused(tmp_path):
    like = {"table": Table(WEIGHT)}
    checkpoint.save(tmp_path / "whole", like)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    refused = 0
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        content = (tmp_path / "cut" / file).read_bytes()
        (tmp_path / "cut" / file).write_bytes(content[: len(content) // 2])
        try:  # some of them only repeat what stands in others
            back = checkpoint.restore(tmp_path / "cut", like)
            np.testing.assert_array_equal(back["table"].weight, WEIGHT)
        except ValueError as error:
            assert "`embax.checkpoint.restore(path=...)` must have whole files, got" in str(error)  # noqa: PT017
            refused += 1
        shutil.rmtree(tmp_path / "cut")
    assert refused >= 4  # what describes the arrays, how they are named, their index and their numbers


def test_import_without_orbax_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith("embax.checkpoint.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(embax, "checkpoint")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    message = 'embax.checkpoint needs Orbax, which is not installed: pip install "embax[checkpoint]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        _ = embax.checkpoint


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


@pytest.mark.parametrize("wait", [0.031, pytest.param(0.0, marks=pytest.mark.exhaustive)])
def test_process_killed_while_saving_leaves_the_last_complete_checkpoint(wait, tmp_path):
    like = {"value": 0, **{name: Table(jnp.zeros((20_000, 16))) for name in "abc"}}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SAVES), tmp_path], stdout=subprocess.PIPE, text=True
    )
    saved = [child.stdout.readline() for _ in range(4)]  # ready, and three steps
    time.sleep(wait)
    child.send_signal(signal.SIGKILL)
    rest = child.communicate(timeout=60)[0].split()
    last = int(rest[-1]) if rest else int(saved[-1])
    back = checkpoint.restore(tmp_path, like)
    assert back["value"] in (last, last + 1)
    for name in "abc":
        np.testing.assert_array_equal(back[name].weight, np.full((20_000, 16), float(back["value"])))
    checkpoint.save(tmp_path, like)  # what is left of the other one is not in the way
    assert checkpoint.restore(tmp_path, like)["value"] == 0
