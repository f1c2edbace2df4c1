"""What layers of sharded tables save is in the order of rows: it loads into layers in any layout, and off the mesh."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, serialization
from frameworks import LAYERS
from meshes import mesh_of

import embax
import embax.equinox
import embax.nnx
from embax import Table, checkpoint

WEIGHT = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)  # as many rows as are stored, in each layout
LONGER = np.random.default_rng(1).normal(size=(11, 4)).astype(np.float32)
TX = embax.optim.lift(optax.adam(0.1))
MESH = mesh_of({"x": 2})

pytestmark = pytest.mark.usefixtures("standard_promotion")


def table_of(weight, layout):
    table = Table(weight, padding_idx=1)
    return table if layout is None else embax.shard(table, MESH, "x", layout)


class Trained:
    """A layer and its optimizer, and what is saved of them, in each framework."""

    def __init__(self, name, weight, layout):
        self.name, self.layer = name, LAYERS[name].Embedding.from_table(table_of(weight, layout))
        if name == "brainstate":
            self.weights = {"w": self.layer.weight}
            self.optimizer = embax.brainstate.Optimizer(TX).register_trainable_weights(self.weights)
        elif name == "nnx":
            self.optimizer = embax.nnx.Optimizer(self.layer, TX)
        else:
            self.state = TX.init(self.layer)

    def step(self):
        ids = jnp.array([3, 5, 3])
        if self.name == "brainstate":
            gradient = embax.brainstate.grad(lambda: (self.layer(ids) ** 2).sum(), self.weights)
            embax.brainstate.jit(lambda: self.optimizer.update(gradient()))()
        elif self.name == "nnx":
            gradient = embax.nnx.grad(lambda layer: (layer(ids) ** 2).sum())
            nnx.jit(lambda layer, optimizer: optimizer.update(layer, gradient(layer)) and None)(
                self.layer, self.optimizer
            )
        else:
            gradient = embax.grad(lambda layer: (layer(ids) ** 2).sum())

            @jax.jit
            def step(layer, state):
                updates, state = TX.update(gradient(layer), state, layer)
                return embax.apply_updates(layer, updates), state

            self.layer, self.state = step(self.layer, self.state)
        return self

    @property
    def tree(self):
        if self.name == "brainstate":
            return {"w": self.layer.weight.value, "state": self.optimizer.opt_state.value}
        if self.name == "nnx":
            return {"model": nnx.state(self.layer), "optimizer": nnx.state(self.optimizer)}
        return {"layer": self.layer, "state": self.state}

    @tree.setter
    def tree(self, tree):
        if self.name == "brainstate":
            self.layer.weight.value, self.optimizer.opt_state.value = tree["w"], tree["state"]
        elif self.name == "nnx":
            nnx.update(self.layer, tree["model"])
            nnx.update(self.optimizer, tree["optimizer"])
        else:
            self.layer, self.state = tree["layer"], tree["state"]

    @property
    def rows(self):
        return embax.to_state_dict(self.layer)["weight"]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "equinox" else pytest.mark.exhaustive) for x in LAYERS]
)
def test_training_continues_in_any_layout(name, tmp_path):
    layouts = None, "rows-cyclic", "columns"
    for layout in layouts[:2]:
        checkpoint.save(tmp_path / str(layout), Trained(name, LONGER, layout).step().tree)
    expected = Trained(name, LONGER, None).step().step().rows
    assert (expected[3] != LONGER[3]).any()
    for saved, layout in [(None, "rows-cyclic"), ("rows-cyclic", None), ("rows-cyclic", "columns")]:
        other = Trained(name, np.zeros_like(LONGER), layout)
        storage = other.layer.table.storage
        other.tree = checkpoint.restore(tmp_path / str(saved), other.tree)
        assert other.layer.table.storage == storage
        np.testing.assert_allclose(other.step().rows, expected, rtol=1e-6, atol=1e-6)


def test_flax_states_do_not_depend_on_the_layout():
    layers = {x: embax.nnx.Embedding.from_table(table_of(WEIGHT, x)) for x in (None, "rows-cyclic", "columns")}
    saved = {x: serialization.to_bytes(nnx.to_pure_dict(nnx.state(layer))) for x, layer in layers.items()}
    assert saved[None] == saved["rows-cyclic"] == saved["columns"]
    for layout in layers:
        like = embax.nnx.Embedding.from_table(table_of(WEIGHT * 0, layout))
        state = nnx.state(like)
        nnx.replace_by_pure_dict(state, serialization.from_bytes(nnx.to_pure_dict(state), saved[None]))
        nnx.update(like, state)
        assert like.table.storage == layers[layout].table.storage
        np.testing.assert_array_equal(embax.to_state_dict(like)["weight"], WEIGHT)
    with pytest.raises(ValueError, match=r"from_state_dict\(target=...\)` must have tables .* got StoredRows\(float32"):
        serialization.from_state_dict(nnx.to_pure_dict(nnx.state(layers["columns"])), {"embedding": LONGER})


@pytest.mark.parametrize("layout", [pytest.param("rows-cyclic", marks=pytest.mark.exhaustive), "rows"])
def test_update_with_a_state_of_another_layout_changes_the_layout(layout):
    """A plain array is taken for what it is: rows in the order of their ids."""
    off, on = (embax.nnx.Embedding.from_table(table_of(w, x)) for w, x in [(WEIGHT, None), (2 * WEIGHT, layout)])
    states = [nnx.state(nnx.clone(layer)) for layer in (on, off)]
    nnx.update(off, states[0])
    nnx.update(on, states[1])
    assert off.table.placement.layout == layout
    np.testing.assert_array_equal(off(jnp.arange(8)), 2 * WEIGHT)
    np.testing.assert_array_equal(on(jnp.arange(8)), WEIGHT)
    optimizer = embax.nnx.Optimizer(off, TX)
    nnx.update(optimizer, nnx.state(embax.nnx.Optimizer(on, TX), lambda path, _: "slots" not in path))
    with pytest.raises(ValueError, match=r"must have a state that is laid out as the tables .* got no mesh for Placem"):
        optimizer.update(off, embax.nnx.grad(lambda layer: layer([1]).sum())(off))
    off, on = (embax.Embedding.from_table(table_of(w, x)) for w, x in [(WEIGHT, None), (2 * WEIGHT, layout)])
    values = off.weight.value, on.weight.value
    on.weight.value, off.weight.value = values
    np.testing.assert_array_equal(off(jnp.arange(8)), 2 * WEIGHT)
    np.testing.assert_array_equal(on(jnp.arange(8)), WEIGHT)
    with pytest.raises(ValueError, match="does not match with the origin tree structure"):
        on.weight.restore_value(off.weight.value)


def test_a_gradient_of_another_layout_is_refused():
    off, on = (embax.nnx.Embedding.from_table(table_of(WEIGHT, layout)) for layout in (None, "rows-cyclic"))
    gradient = nnx.grad(lambda layer: layer([1]).sum())(off)
    with pytest.raises(
        ValueError, match=r"grads=...\)` must have gradients of all rows laid out as .* got no mesh for"
    ):
        embax.nnx.Optimizer(on, TX).update(on, gradient)


def test_equinox_files_do_not_depend_on_the_layout(tmp_path):
    modules = {x: embax.equinox.Embedding.from_table(table_of(WEIGHT, x)) for x in (None, "rows-cyclic", "columns")}
    for layout, module in modules.items():
        model = {"layer": module, "scale": jnp.ones(2), "frozen": eqx.filter(module, lambda leaf: False)}
        embax.equinox.tree_serialise_leaves(tmp_path / f"{layout}.eqx", model)
    files = [(tmp_path / f"{layout}.eqx").read_bytes() for layout in modules]
    assert files[0] == files[1] == files[2]
    for layout in modules:
        zeros = embax.equinox.Embedding.from_table(table_of(WEIGHT * 0, layout))
        like = {"layer": zeros, "scale": jnp.zeros(2), "frozen": eqx.filter(zeros, lambda leaf: False)}
        loaded = embax.equinox.tree_deserialise_leaves(tmp_path / "rows-cyclic.eqx", like)
        assert loaded["layer"].table.storage == modules[layout].table.storage
        np.testing.assert_array_equal(embax.to_state_dict(loaded["layer"])["weight"], WEIGHT)
        np.testing.assert_array_equal(loaded["scale"], np.ones(2))
        assert loaded["layer"].table.weight.sharding == modules[layout].table.weight.sharding
    eqx.tree_serialise_leaves(tmp_path / "theirs.eqx", modules[None])
    loaded = embax.equinox.tree_deserialise_leaves(tmp_path / "theirs.eqx", modules["rows-cyclic"])
    np.testing.assert_array_equal(embax.to_state_dict(loaded)["weight"], WEIGHT)
    longer = embax.equinox.Embedding.from_table(table_of(LONGER, "columns"))
    with pytest.raises(RuntimeError, match="Error at leaf") as error:
        embax.equinox.tree_deserialise_leaves(tmp_path / "theirs.eqx", longer)
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert "must have the tables of the file, got Table(float32[11,4]" in str(cause)


def test_orbax_alone_keeps_the_layout_and_refuses_another(tmp_path):
    on, off = (embax.nnx.Embedding.from_table(table_of(WEIGHT, layout)) for layout in ("rows-cyclic", None))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", nnx.state(on))
        checkpointer.wait_until_finished()
        nnx.update(on, checkpointer.restore(tmp_path / "a", jax.tree.map(jnp.zeros_like, nnx.state(on))))
        np.testing.assert_array_equal(embax.to_state_dict(on)["weight"], WEIGHT)
        with pytest.raises(ValueError, match="tree structures do not match"):
            checkpointer.restore(tmp_path / "a", nnx.state(off))


def test_brainstates_values_travel_with_their_layout(tmp_path):
    linear = brainstate.nn.Linear(4, 1, w_init=LONGER[:4, :1])
    model = brainstate.nn.Sequential(embax.Embedding.from_table(table_of(LONGER, None)), linear)
    sharded = embax.shard(model, MESH, "x", "rows-cyclic")
    values = [x.states().to_dict_values() for x in (model, sharded)]
    checkpoint.save(tmp_path / "on", values[1])
    back = checkpoint.restore(tmp_path / "on", jax.tree.map(jnp.zeros_like, values[0]))
    assert jax.tree.structure(back) == jax.tree.structure(values[0])
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(values[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    graphdef, states = brainstate.graph.treefy_split(sharded)
    merged = brainstate.graph.treefy_merge(graphdef, states)
    np.testing.assert_array_equal(embax.to_state_dict(merged.layers[0])["weight"], LONGER)
