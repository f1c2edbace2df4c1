"""Arrays of other layers that a predicate makes tables: gradients by rows, and lifted optimizers for only these."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import RowGrad, Table

WEIGHT = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
IDS = np.array([[3, 5, 3], [7, 3, 0]])
PARAMS = {"embed": {"w": jnp.asarray(WEIGHT)}, "out": jnp.ones((4, 2)), "bias": jnp.zeros(2)}


def is_embedding(path, leaf):
    return path[0].key == "embed"


def loss(params, ids):
    def of_example(ids):
        return jnp.sin(params["embed"]["w"][ids].mean(0, keepdims=True) @ params["out"] + params["bias"][None])

    return jax.vmap(of_example)(ids).sum() * jnp.take(params["embed"]["w"], ids, axis=0).sum()


pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_gradients_of_chosen_arrays_are_rows():
    gradient = jax.jit(embax.grad(loss, on_dense="error", tables=is_embedding))(PARAMS, IDS)
    expected = jax.jit(jax.grad(loss))(PARAMS, IDS)
    assert isinstance(gradient["embed"]["w"], RowGrad)
    assert len(gradient["embed"]["w"].ids) == 12
    np.testing.assert_allclose(gradient["embed"]["w"].to_dense(), expected["embed"]["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient["out"], expected["out"], rtol=1e-5)
    with pytest.warns(embax.DenseGradientWarning, match=r"argument 0\['out'\].* is dense"):
        gradient = jax.jit(embax.grad(loss, tables=lambda path, leaf: leaf.ndim == 2))(PARAMS, IDS)
    np.testing.assert_allclose(gradient["out"], expected["out"], rtol=1e-5)


@pytest.mark.parametrize("make", [optax.adamw, embax.optim.rowwise_adagrad], ids=["adamw", "rowwise_adagrad"])
def test_rows_that_are_not_read_stay_with_their_state(make):
    tx = make(0.1) if make is optax.adamw else make(0.1, tables=is_embedding)
    tx = embax.optim.lift(tx, tables=is_embedding) if make is optax.adamw else tx
    tables = {"embed": {"w": Table(WEIGHT)}, "out": PARAMS["out"], "bias": PARAMS["bias"]}
    of_tables = embax.optim.lift(optax.adamw(0.1)) if make is optax.adamw else make(0.1)

    def by_table(params, ids):
        return loss({**params, "embed": {"w": params["embed"]["w"].weight}}, ids)

    def steps(loss, tx, params, **options):
        @jax.jit
        def step(params, state, ids):
            gradient = embax.grad(loss, on_dense="error", **options)(params, ids)
            updates, state = tx.update(gradient, state, params)
            return embax.apply_updates(params, updates), state

        state = tx.init(params)
        for ids in (IDS, IDS + 1):
            params, state = step(params, state, ids)
        return params, state

    ours, state = steps(loss, tx, PARAMS, tables=is_embedding)
    theirs, their_state = steps(by_table, of_tables, tables)
    touched = np.unique([IDS, IDS + 1])
    weight = np.asarray(ours["embed"]["w"])
    rest = np.setdiff1d(np.arange(50), touched)
    np.testing.assert_array_equal(weight[rest], WEIGHT[rest])
    assert (weight[touched] != WEIGHT[touched]).any(axis=1).all()
    np.testing.assert_array_equal(weight, theirs["embed"]["w"].weight)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(their_state), strict=True):
        np.testing.assert_array_equal(one, other)


def by_path(params):
    return jax.tree.map_with_path(lambda path, _: "tables" if is_embedding(path, None) else "others", params)


def lifted(tx):
    return embax.optim.lift(tx, tables=is_embedding)


TREE = {"embed": {"w": True}, "out": False, "bias": False}
KINDS = {"tables": embax.optim.rowwise_adagrad(0.1, tables=is_embedding), "others": optax.adamw(0.1)}
INSIDE = {"tables": optax.adagrad(0.1), "others": optax.adamw(0.1)}
# What may be around `lift` or inside of it, and whether the table is trained.
COMBINED = {
    "multi_transform": (optax.multi_transform(KINDS, by_path), True),
    "multi_transform, labels": (optax.multi_transform(KINDS, by_path(PARAMS)), True),
    "multi_transform inside": (lifted(optax.multi_transform(INSIDE, by_path)), True),
    "freeze": (optax.chain(lifted(optax.adam(0.1)), optax.freeze(TREE)), False),
    "freeze inside": (lifted(optax.chain(optax.adam(0.1), optax.freeze(TREE))), False),
    "apply_if_finite": (optax.apply_if_finite(lifted(optax.adam(0.1)), 3), True),
    "clip": (optax.chain(embax.optim.clip_by_global_norm(0.1), lifted(optax.sgd(0.1, 0.9))), True),
}


def test_other_transformations_may_be_around_and_inside_and_tables_grow(tmp_path):
    @jax.jit
    def step(params, states, ids):
        gradient = embax.grad(lambda params: sum(loss(x, ids) for x in params.values()), tables=in_any)(params)
        for name, (tx, _) in COMBINED.items():
            updates, states[name] = tx.update(gradient[name], states[name], params[name])
            params[name] = embax.apply_updates(params[name], updates)
        return params, states

    def in_any(path, leaf):
        return is_embedding(path[1:], leaf)

    params = dict.fromkeys(COMBINED, PARAMS)
    states = {name: tx.init(PARAMS) for name, (tx, _) in COMBINED.items()}
    new, new_states = step(params, dict(states), IDS)
    for name, (_, trained) in COMBINED.items():
        changed = np.flatnonzero((new[name]["embed"]["w"] != WEIGHT).any(axis=1))
        np.testing.assert_array_equal(changed, np.unique(IDS) if trained else [], err_msg=name)
    moved = jax.tree.map(lambda one, other: np.subtract(one, other).ravel(), new["clip"], PARAMS)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(jax.tree.leaves(moved))), 0.1 * 0.1, rtol=1e-4)  # float32
    embax.checkpoint.save(tmp_path, {"params": new, "states": new_states})
    restored = embax.checkpoint.restore(tmp_path, {"params": params, "states": states})
    grown = {}
    for name, (tx, _) in COMBINED.items():
        more = jnp.asarray(np.concatenate([restored["params"][name]["embed"]["w"], np.ones((10, 4), np.float32)]))
        grown[name] = restored["params"][name] | {"embed": {"w": more}}
        state = embax.optim.carry_over(restored["states"][name], new[name], grown[name], tx)
        for old, now in zip(jax.tree.leaves(new_states[name]), jax.tree.leaves(state), strict=True):
            if old.dtype != jnp.int32:  # slots, of no meaning
                np.testing.assert_array_equal(now[: len(old)] if old.ndim else now, old)
                assert now.shape[:1] in (old.shape[:1], (60,))
    gradient = jax.eval_shape(embax.grad(loss, tables=is_embedding), grown["freeze"], IDS)
    with pytest.raises(ValueError, match=r"params\['embed'\]\['w'\] had 50 rows, and has 60 now.*carry_over"):
        jax.eval_shape(COMBINED["freeze"][0].update, gradient, new_states["freeze"], grown["freeze"])


@pytest.mark.parametrize("with_params", [True, False])
def test_clipping_of_chosen_arrays_beside_tables(with_params):
    params = {"a": jnp.zeros((9, 1)), "b": Table(jnp.zeros((5, 1)))}
    rows = {
        name: embax.RowGrad([1, 1], jnp.full((2, 1), size), rows=n) for name, size, n in (("a", 3.0, 9), ("b", 4.0, 5))
    }
    tx = embax.optim.clip_by_global_norm(1.0)
    clipped, _ = jax.jit(tx.update)(rows, tx.init(params), params if with_params else None)
    np.testing.assert_allclose(clipped["a"].values, np.full((2, 1), 0.3), rtol=1e-6)  # float32
    np.testing.assert_allclose(clipped["b"].values, np.full((2, 1), 0.4), rtol=1e-6)


def test_memory_of_a_step_follows_the_ids():
    rows, tx = 10**6, lifted(optax.adamw(0.1))
    params = PARAMS | {"embed": {"w": jax.ShapeDtypeStruct((rows, 4), jnp.float32)}}

    def step(params, state, ids):
        updates, state = tx.update(embax.grad(loss, tables=is_embedding)(params, ids), state, params)
        return embax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, IDS).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100_000 < rows
    assert memory.alias_size_in_bytes >= 3 * rows * 4 * 4  # the weight and both moments
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 10_000


def test_filters_of_equinox_keep_the_rows():
    model = [eqx.nn.Embedding(5, 2, key=jax.random.key(0)), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Dropout(0.5)]
    model = eqx.nn.Sequential(model)  # with leaves that are no arrays

    @eqx.filter_jit
    def gradient(model, ids):
        loss = lambda model: jax.vmap(model.layers[0])(ids).sum()  # noqa: E731
        return embax.grad(loss, tables=lambda path, leaf: leaf.ndim == 2)(model)

    rows = gradient(model, jnp.array([1, 3]))
    again = eqx.combine(*eqx.partition(rows, eqx.is_array))
    for one in (rows, again, eqx.filter(rows, eqx.is_array)):
        dense = one.layers[0].weight.to_dense()
        np.testing.assert_array_equal(dense, np.array([[0], [1], [0], [1], [0]]) * np.ones((1, 2)))


def test_rows_at_a_leaf_that_was_not_chosen_are_refused_by_name():
    gradient = jax.eval_shape(embax.grad(loss, tables=is_embedding), PARAMS, IDS)
    tx = embax.optim.lift(optax.adam(0.1))
    with pytest.raises(ValueError, match=r"got one at params\['embed'\]\['w'\], which is none"):
        jax.eval_shape(tx.update, gradient, jax.eval_shape(tx.init, PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"must choose arrays of floats with an axis of rows, got 3 at \"\['n'\]\""):
        embax.grad(lambda p: p["w"].sum(), tables=lambda *_: True)({"w": jnp.ones((3, 2)), "n": 3})
    with pytest.raises(TypeError, match=r"tables=.*must be a function of a path and a leaf, got 'embed'"):
        embax.grad(loss, tables="embed")
