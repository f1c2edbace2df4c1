"""optax's combinators around lift and inside of it: labels and masks of every form, and what has to go inside."""

import dataclasses
import enum
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import FrozenDict

import embax
from embax import RowGrad, Table
from embax.optim import lift, rowwise_adagrad

ROWS, DIM = 20, 3
IDS = np.array([[1, 5, 1], [7, 2, -1]])  # two of them the same, and one the padding row of a table

pytestmark = pytest.mark.usefixtures("users_promotion")


def weight(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


class Model(eqx.Module):
    embedding: embax.equinox.Embedding
    words: Table
    dense: jax.Array


def params_of(form):
    words, more = Table(weight(ROWS, DIM), padding_idx=2, max_norm=9.0), Table(weight(ROWS + 1, DIM, seed=1))
    dense = {"kernel": weight(DIM, 2), "bias": weight(2)}
    if form == "module":
        embedding = embax.equinox.Embedding(weight=weight(ROWS + 1, DIM, seed=1), padding_idx=2)
        return Model(embedding, words, weight(DIM, 2))
    if form == "flax":
        layers = {"Embed_0": {"embedding": words}, "Embed_1": {"embedding": more}, "Dense_0": dense}
        return FrozenDict({"params": layers})
    return {"words": words, "more": [{"embedding": more}], "dense": dense}


def is_table(node):
    return isinstance(node, Table)


def plain(tree):
    """The same tree with arrays for Tables."""
    return jax.tree.map(lambda node: node.weight if is_table(node) else node, tree, is_leaf=is_table)


def loss(tree):
    leaves = jax.tree.leaves(tree, is_leaf=is_table)
    return sum(((embax.lookup(x, IDS) if is_table(x) else x) ** 2).sum() for x in leaves)


@jax.jit
def gradient_of(params):
    return embax.grad(loss, on_dense="error")(params)


@jax.jit
def gradients_of(params):
    """The gradient with a RowGrad for each Table, and the dense gradient."""
    return embax.grad(loss, on_dense="error")(params), jax.grad(loss)(params)


class Kind(enum.IntEnum):
    TABLE, OTHER = 1, 2


def by_path(tree, table="tables", other="others"):
    def of_table(path, _):
        name = jax.tree_util.keystr(path)
        return table if "words" in name or "embedding" in name.lower() else other

    return jax.tree_util.tree_map_with_path(of_table, tree)


def by_shape(tree):
    return jax.tree.map(lambda x: "tables" if x.ndim == 2 and x.shape[-1] == DIM else "others", tree)


def by_end_of_path(tree):
    """Labels by the last name in the path: a Table has a weight there; an array in place of a Table has no name."""

    def of_table(path, x):
        is_weight = getattr(path[-1], "name", "") == "weight" and jax.tree_util.keystr(path).endswith("].weight")
        return "tables" if is_weight or x.shape[0] >= ROWS else "others"

    return jax.tree_util.tree_map_with_path(of_table, tree)


def of_each(tree):
    return jax.tree.map(lambda node: "tables" if is_table(node) else "others", tree, is_leaf=is_table)


is_masked = functools.partial(by_path, table=True, other=False)
is_other = functools.partial(by_path, table=False, other=True)
by_kind = functools.partial(by_path, table=Kind.TABLE, other=Kind.OTHER)
OTHERS = optax.sgd(0.1, momentum=0.9)


def kinds(labels, lifted):
    of_tables = lift(optax.adagrad(0.1)) if lifted else optax.adagrad(0.1)
    return optax.multi_transform({"tables": of_tables, "others": OTHERS}, labels)


def by_masks(mask, rest, lifted):
    of_tables = lift(optax.adagrad(0.1)) if lifted else optax.adagrad(0.1)
    return optax.chain(optax.masked(of_tables, mask), optax.masked(OTHERS, rest))


def enums(labels, lifted):
    of_tables = lift(optax.adagrad(0.1)) if lifted else optax.adagrad(0.1)
    return optax.multi_transform({Kind.TABLE: of_tables, Kind.OTHER: OTHERS}, labels)


# From the parameters, and the gradients, a transformation; the second flag says whether tables are lifted.
CASES = {
    "labels from the parameters": lambda p, g, lifted: kinds(by_path(p), lifted),
    "labels from the gradients": lambda p, g, lifted: kinds(by_path(g), lifted),
    "labels for each table": lambda p, g, lifted: kinds(of_each(p) if lifted else by_path(p), lifted),
    "enums": lambda p, g, lifted: enums(by_kind, lifted),
    "a function by paths": lambda p, g, lifted: kinds(by_path, lifted),
    "a function by shapes": lambda p, g, lifted: kinds(by_shape, lifted),
    "a function by the end of paths": lambda p, g, lifted: kinds(by_end_of_path, lifted),
    "masks from the parameters": lambda p, g, lifted: by_masks(is_masked(p), is_other(p), lifted),
    "masks from the gradients": lambda p, g, lifted: by_masks(is_masked(g), is_other(g), lifted),
    "functions for masks": lambda p, g, lifted: by_masks(is_masked, is_other, lifted),
    "inside": lambda p, g, lifted: (lift if lifted else lambda tx: tx)(kinds(by_path(p), False)),
    "inside and outside": lambda p, g, lifted: optax.multi_transform(
        {"tables": (lift if lifted else lambda tx: tx)(kinds(by_path, False)), "others": OTHERS}, by_path(p)
    ),
    "frozen": lambda p, g, lifted: optax.chain(
        lift(optax.adagrad(0.1)) if lifted else optax.adagrad(0.1), optax.freeze(is_masked(p))
    ),
    "selected": lambda p, g, lifted: optax.selective_transform(
        lift(optax.adagrad(0.1)) if lifted else optax.adagrad(0.1), freeze_mask=is_other(p)
    ),
    "injected": lambda p, g, lifted: optax.inject_hyperparams(
        lambda learning_rate: lift(optax.adagrad(learning_rate)) if lifted else optax.adagrad(learning_rate)
    )(learning_rate=0.1),
}
IN_EVERY_FORM = ["labels from the parameters", "a function by paths", "masks from the parameters"]
STEPS = 2


def after_steps(tx, params, gradient, apply_updates):
    """The parameters after steps by one gradient."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(gradient)
        return (apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return params


@functools.cache
def trained(form):
    """The parameters after steps of every transformation: of Tables by rows, and of plain arrays."""
    params = params_of(form)
    names = CASES if form == "dict" else IN_EVERY_FORM
    gradient, dense_gradient = gradients_of(params)
    lifted = {name: CASES[name](params, gradient, True) for name in names}
    dense = {name: CASES[name](plain(params), plain(params), False) for name in names}

    @jax.jit
    def run(params, gradient, dense_gradient):
        ours = {name: after_steps(tx, params, gradient, embax.apply_updates) for name, tx in lifted.items()}
        arrays = plain(params), plain(dense_gradient)
        return ours, {name: after_steps(tx, *arrays, optax.apply_updates) for name, tx in dense.items()}

    return run(params, gradient, dense_gradient)


@pytest.mark.parametrize(
    ("form", "name"),
    [(form, name) for form in ("dict", "flax", "module") for name in CASES if form == "dict" or name in IN_EVERY_FORM],
)
def test_labels_and_masks_choose_like_for_plain_arrays(form, name):
    ours, theirs = (jax.tree.leaves(tree[name]) for tree in trained(form))
    start = jax.tree.leaves(params_of(form))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # float32
    moved = [not np.array_equal(one, before) for one, before in zip(ours, start, strict=True)]
    assert any(moved)
    assert name != "frozen" or sum(moved) == 2  # kernel and bias


def test_a_gradient_has_the_structure_of_the_parameters():
    params = params_of("dict")
    gradient = jax.eval_shape(embax.grad(loss), params)
    found = jax.tree.structure(params).flatten_up_to(gradient)
    assert [isinstance(node, RowGrad) for node in found] == [False, False, True, True]
    assert by_path(gradient) is not None
    labels = by_path(gradient)
    assert jax.tree.structure(labels) == jax.tree.structure(by_path(params)) == jax.tree.structure(params)
    assert jax.tree.leaves(labels) == jax.tree.leaves(by_path(params))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradient["words"])]
    assert paths == [".weight", ".ids"]


def test_a_gradient_of_a_table_counts_as_a_row_grad():
    table = Table(weight(ROWS, DIM), padding_idx=2)
    gradient = jax.jit(embax.grad(lambda table: embax.lookup(table, [1, 5]).sum()))(table)
    assert isinstance(gradient, RowGrad)
    assert isinstance(gradient.weight, RowGrad)
    assert not isinstance(table, RowGrad)
    assert repr(gradient) == repr(gradient.weight) == "RowGrad(2 ids of 20 rows, float32[2,3])"
    assert (gradient.rows, gradient.dim, gradient.dtype, gradient.lanes) == (ROWS, (DIM,), jnp.float32, ())
    by_hand = RowGrad([1, 5], np.ones((2, DIM), np.float32), rows=ROWS)

    @jax.jit
    def computed(gradient, by_hand):
        twice = gradient + by_hand, by_hand + gradient, sum([gradient, gradient]), gradient - -by_hand, 2 * gradient
        others = gradient.deduplicated(), -gradient, gradient / 2, np.float32(2) * gradient, jnp.float32(2) * gradient
        return [one.to_dense() for one in twice], others

    twice, others = computed(gradient, by_hand)
    expected = np.zeros((ROWS, DIM))
    expected[[1, 5]] = 2
    for one in twice:
        np.testing.assert_array_equal(one, expected)
    for one in others:
        assert jax.tree.structure(one) == jax.tree.structure(gradient)
    again = dataclasses.replace(table, weight=by_hand)
    assert jax.tree.structure(again) == jax.tree.structure(gradient)
    for wrong in (
        lambda: table + table,
        lambda: -table,
        lambda: 2 * table,
        lambda: gradient + table,
        lambda: gradient + 1,
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError, match="'Table' object has no attribute 'ids'"):
        _ = table.ids


def test_equinox_partition_and_combine_keep_a_gradient():
    table = Table(weight(ROWS, DIM), padding_idx=2)
    of = jax.jit(lambda i: embax.grad(lambda table: embax.lookup(table, i).sum())(table))
    ids = np.array([[1, 5], [5, 5]])
    gradient, other = of(ids[0]), of(ids[1])
    for which in (eqx.is_array, eqx.is_inexact_array, lambda _: False):
        again = eqx.combine(*eqx.partition(gradient, which))
        assert jax.tree.structure(again) == jax.tree.structure(gradient)
    lanes = eqx.filter_vmap(of)(jnp.asarray(ids))
    np.testing.assert_array_equal(lanes.to_dense(), [gradient.to_dense(), other.to_dense()])


def test_gradients_of_scan_steps_sum_to_the_gradient_of_the_batch():
    params = {"words": Table(weight(ROWS, DIM), padding_idx=2), "dense": weight(DIM)}
    tx = optax.multi_transform({"tables": rowwise_adagrad(0.1), "others": optax.adam(0.1)}, by_path(params))
    ids = np.random.default_rng(0).integers(0, ROWS, (4, 6))

    def of_ids(params, ids):
        return (embax.lookup(params["words"], ids) @ params["dense"]).sum()

    @jax.jit
    def steps(params, ids):
        state = tx.init(params)
        _, lanes = jax.lax.scan(lambda _, ids: (None, embax.grad(of_ids)(params, ids)), None, ids)
        total = jax.tree.map(lambda g: g.sum(axis=0), lanes, is_leaf=lambda g: isinstance(g, RowGrad))
        out = []
        for gradient in (total, embax.grad(of_ids)(params, ids)):
            updates, _ = tx.update(gradient, state, params)
            out.append(embax.apply_updates(params, updates))
        return out

    by_steps, at_once = steps(params, ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), by_steps, at_once)


@pytest.mark.parametrize("labels", [by_path(params_of("dict")), by_path], ids=["tree", "function"])
def test_a_state_with_labels_is_stored_and_carried_over(labels, tmp_path):
    params = params_of("dict")
    tx = kinds(labels, True)
    fresh = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(gradient_of(params), fresh, params)
    embax.checkpoint.save(tmp_path / "checkpoint", state)
    restored = embax.checkpoint.restore(tmp_path / "checkpoint", like=fresh)
    read = serialization.from_bytes(fresh, serialization.to_bytes(state))
    for again in (restored, read, embax.optim.carry_over(state, params, params, tx)):
        assert jax.tree.structure(again) == jax.tree.structure(state)
        sums = [x.inner_states["tables"].inner_state.inner[0].sum_of_squares["words"].weight for x in (again, state)]
        np.testing.assert_array_equal(*sums)
    grown = params | {"words": embax.resize(params["words"], ROWS + 5, jax.random.key(0))}
    carried = embax.optim.carry_over(state, params, grown, tx)
    jax.eval_shape(lambda state, params: tx.update(embax.grad(loss)(params), state, params), carried, grown)


COMPUTES = {
    "clip": lambda: optax.chain(optax.clip(1.0), lift(optax.sgd(0.1))),
    "clip after": lambda: optax.chain(lift(optax.sgd(0.1)), optax.clip(1.0)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), lift(optax.sgd(0.1))),
    "scale": lambda: optax.chain(lift(optax.trace(0.9)), optax.scale(-0.1)),
    "schedule": lambda: optax.chain(lift(optax.trace(0.9)), optax.scale_by_schedule(optax.constant_schedule(-1.0))),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), lift(optax.sgd(0.1))),
    "MultiSteps": lambda: optax.MultiSteps(lift(optax.sgd(0.1)), 2),
    "ema": lambda: optax.chain(optax.ema(0.9), lift(optax.sgd(0.1))),
    "keep_params_nonnegative": lambda: optax.chain(lift(optax.sgd(0.1)), optax.keep_params_nonnegative()),
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adam of a kind": lambda: kinds("others", True),
}


@pytest.mark.parametrize("compiled", [True, False], ids=["traced", "eager"])
@pytest.mark.parametrize("name", COMPUTES)
def test_transformations_that_compute_with_gradients_outside_of_lift_raise(name, compiled):
    params = {"words": Table(weight(ROWS, DIM))}
    tx = COMPUTES[name]()
    gradient = gradient_of(params)
    update = functools.partial(jax.eval_shape, tx.update) if compiled else tx.update
    if name == "clip_by_global_norm" and not compiled:  # whose arithmetic of concrete keys JAX has no words for
        with pytest.raises(NotImplementedError):
            update(gradient, tx.init(params), params)
        return
    with pytest.raises((TypeError, ValueError), match=r"inside of embax\.optim\.lift"):
        update(gradient, tx.init(params), params)


def test_updates_are_not_applied_by_optax():
    params = {"words": Table(weight(ROWS, DIM))}
    with pytest.raises(TypeError, match=r"Apply updates with embax\.apply_updates"):
        optax.apply_updates(params, gradient_of(params))


def test_lift_refuses_lifted_transformations():
    with pytest.raises(ValueError, match=r"got a transformation with a lifted one in it\. Lift it once"):
        lift(optax.chain(lift(optax.adam(0.1)))).init({"words": Table(weight(ROWS, DIM))})
