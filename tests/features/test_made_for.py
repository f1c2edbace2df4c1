"""The state of an optimizer belongs to its tables: what is refused, and what may change."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import Collection, Feature, RowGrad, Table
from embax.optim import clip_by_global_norm, lift, rowwise_adagrad, rowwise_adam

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
TXS = {
    "sgd": lift(optax.sgd(0.1)),
    "adam": lift(optax.adam(0.1)),
    "rowwise_adagrad": rowwise_adagrad(0.1),
    "rowwise_adam": rowwise_adam(0.1),
    "joint": lift(optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.1))),
    "clip": clip_by_global_norm(1.0),
    "chain": optax.chain(clip_by_global_norm(1.0), lift(optax.adam(0.1))),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def of(rows=4, dim=3, **rules):
    return Table(np.resize(WEIGHT, (rows, dim)), **rules)


def gradient_of(params):
    """A gradient that fits the parameters."""

    def one(leaf):
        if not isinstance(leaf, Table):
            return np.ones_like(leaf)
        ids = np.arange(min(leaf.rows, 2))
        return RowGrad(ids, np.ones((len(ids), *leaf.dim), np.float32), rows=leaf.rows)

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, Table))


def collection(**tables):
    return Collection(tables, [Feature("film", "film")])


CHANGES = {
    "more rows": (
        of(4),
        of(8),
        r"params\['words'\] had 4 rows, and has 8 now. Carry it over: state = embax",
    ),
    "fewer rows": (of(4), of(2), r"params\['words'\] had 4 rows, and has 2 now"),
    "wider rows": (of(4, 3), of(4, 2), r"params\['words'\] had rows of the shape \(3,\), and has \(2,\) now"),
    "padding": (of(), of(padding_idx=1), r"params\['words'\] had padding_idx=None, and has 1 now"),
    "no padding": (of(padding_idx=(0, 2)), of(padding_idx=2), r"had padding_idx=\(0, 2\), and has 2 now"),
    "frozen": (of(), of(freeze=True), r"params\['words'\] was trained then, and is not now"),
    "unfrozen": (of(freeze=True), of(), r"params\['words'\] is trained now, and was not then"),
    "integers": (of(), Table(np.zeros((4, 3), np.int32)), r"params\['words'\] was trained then, and is not now"),
    "no table": (
        [of(), of()],
        [of(), WEIGHT],
        r"params\['words'\]\[1\] was trained then, and is not now",
    ),
    "the second": ([of(), of(5)], [of(), of(6)], r"ones: params\['words'\]\[1\] had 5 rows, and has 6 now"),
    "swapped": ([of(4), of(5)], [of(5), of(4)], r"\[0\] had 4 rows, and has 5 now; params\['words'\]\[1\] had 5 rows"),
    "in a Collection": (
        collection(film=of(4), user=of(2)),
        collection(film=of(3), user=of(3)),  # stored as one of 6 rows, as before
        r"params\['words'\]\['film'\] had 4 rows, and has 3 now; params\['words'\]\['user'\] had 2",
    ),
    "another order": (
        collection(film=of(3), user=of(3)),
        collection(user=of(3), film=of(3)),
        r"\['film'\] was stored in stack 0 of a Collection from row 0 on, and is in .* from row 3 on now",
    ),
    "out of a Collection": (
        collection(film=of(3)),
        {"film": of(3)},
        r"params\['words'\]\['film'\] was stored in stack 0 of a Collection from row 0 on, and is by itself now",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_other_tables_is_refused(change):
    before, after, message = CHANGES[change]
    for name in TXS if change == "more rows" else ("adam", "clip"):
        tx = TXS[name]
        state = jax.eval_shape(tx.init, {"words": before, "bias": np.ones(2, np.float32)})
        params = {"words": after, "bias": np.ones(2, np.float32)}
        where = r"embax.optim.clip_by_global_norm\(...\)" if name in ("clip", "chain") else r"embax.optim.lift\(tx\)"
        with pytest.raises(ValueError, match=rf"`{where}.update\(state=...\)` must belong to the tables .*{message}"):
            jax.eval_shape(tx.update, gradient_of(params), state, params)


def test_a_single_table_is_named_too():
    tx = lift(optax.adam(0.1))
    with pytest.raises(ValueError, match="ones: params had 4 rows, and has 8 now"):
        tx.update(RowGrad([7], np.ones((1, 3), np.float32), rows=8), tx.init(of(4)), of(8))


def test_clipping_without_parameters_uses_the_gradients():
    tx = clip_by_global_norm(1.0)
    update = jax.jit(tx.update)
    params = {"a": of(4), "b": of(5, freeze=True), "c": np.ones(2, np.float32)}
    state = tx.init(params)
    clipped, state = update(gradient_of(params), state)
    assert jax.eval_shape(tx.update, clipped, state)[1].made_for == state.made_for
    with pytest.raises(ValueError, match=r"clip_by_global_norm.*params\['a'\] had 4 rows, and has 6 now"):
        tx.update(gradient_of(params | {"a": of(6)}), state)


def test_a_frozen_table_may_change():
    for tx in TXS.values():
        params = {"frozen": of(4, freeze=True), "words": of()}
        state = jax.eval_shape(tx.init, params)
        params["frozen"] = of(6, 2, freeze=True, padding_idx=1)
        jax.eval_shape(tx.update, gradient_of(params), state, params)


def test_rules_that_a_state_does_not_depend_on_may_change():
    others = {"max_norm": 2.0, "norm_type": 1.0, "scale_grad_by_freq": True, "out_of_range": "clip"}
    params = {"words": of(), "film": collection(film=of(3), user=of(3))}
    changed = {"words": of(**others), "film": collection(film=of(3, **others), user=of(3, **others))}
    gradient = gradient_of(params)

    txs = {name: TXS[name] for name in ("rowwise_adam", "joint", "chain")}

    @jax.jit
    def stepped(params, states):
        return {name: tx.update(gradient, states[name], params) for name, tx in txs.items()}

    states = jax.jit(lambda params: {name: tx.init(params) for name, tx in txs.items()})(params)
    states = {name: state for name, (_, state) in stepped(params, states).items()}
    same, other = stepped(params, states), stepped(changed, states)
    for name in txs:
        for ours, theirs in zip(jax.tree.leaves(other[name][1]), jax.tree.leaves(same[name][1]), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        # So that it can be carried through a loop, and nothing compiles twice.
        assert jax.tree.structure(other[name][1]) == jax.tree.structure(states[name]), name


def test_steps_compile_once():
    traced = []
    tx = TXS["chain"]

    @jax.jit
    def step(params, state, gradient):
        traced.append(1)
        updates, state = tx.update(gradient, state, params)
        return embax.apply_updates(params, updates), state

    params = {"words": of()}
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        params, state = step(params, state, gradient_of(params))
    state = pickle.loads(pickle.dumps(state))
    step(params, jax.tree.map(jnp.asarray, state), gradient_of(params))
    assert len(traced) == 1


@pytest.mark.parametrize(
    "through",
    [
        lambda state: jax.tree.map(lambda x: x, state),
        lambda state: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)),
        lambda state: jax.eval_shape(lambda: state),
        lambda state: jax.jit(lambda x: x)(state),
        lambda state: pickle.loads(pickle.dumps(state)),
        copy.deepcopy,
    ],
    ids=["map", "flatten", "eval_shape", "jit", "pickle", "deepcopy"],
)
def test_description_of_tables_stays_with_the_state(through):
    params = {"words": of(padding_idx=(0, 2)), "film": collection(film=of(3), user=of(2))}
    for name in ("rowwise_adam", "chain"):
        tx = TXS[name]
        state = tx.init(params)
        other = through(state)
        assert jax.tree.structure(other) == jax.tree.structure(state)
        jax.eval_shape(tx.update, gradient_of(params), other, params)
        grown = params | {"words": of(6, padding_idx=(0, 2))}
        with pytest.raises(ValueError, match=r"params\['words'\] had 4 rows, and has 6 now"):
            jax.eval_shape(tx.update, gradient_of(grown), other, grown)


def without_description(state):
    kinds = embax.optim.LiftState | type(clip_by_global_norm(1.0).init({}))
    is_leaf = lambda node: isinstance(node, kinds)  # noqa: E731
    return jax.tree.map(lambda x: x._replace(made_for=None) if is_leaf(x) else x, state, is_leaf=is_leaf)


def test_state_without_description_is_refused_and_can_be_carried_over():
    params = {"words": of(), "bias": np.ones(2, np.float32)}
    for tx in TXS.values():
        state = tx.init(params)
        with pytest.raises(ValueError, match=r"must say which tables .*older checkpoint.*carry_over"):
            tx.update(gradient_of(params), without_description(state), params)
        again = embax.optim.carry_over(without_description(state), params, params, tx)
        assert jax.tree.structure(again) == jax.tree.structure(state)


def test_update_refuses_states_of_other_transformations():
    params = {"words": of(), "bias": np.ones(2, np.float32)}
    gradient = gradient_of(params)
    adam, sgd = TXS["adam"], TXS["sgd"]
    with pytest.raises(TypeError, match=r"lift\(tx\).update\(state=...\)` must be a LiftState, got tuple"):
        adam.update(gradient, (), params)
    with pytest.raises(ValueError, match=r"must fit what its `init` returns for the parameters, got 0 arrays"):
        adam.update(gradient, sgd.init(params), params)
    other = params | {"bias": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"got the shape \(2,\) instead of \(3,\) for `inner\[0\].mu\['bias'\]`. If"):
        adam.update(gradient_of(other), adam.init(params), other)


def test_repr_is_short():
    assert repr(TXS["adam"].init({"words": of()}).made_for) == "MadeFor(params['words']: 4 rows)"


def test_rules_are_read_from_the_parameters_at_each_step():
    tx, params = TXS["adam"], {"words": of(max_norm=1.0)}
    state = tx.init(params)
    params["words"] = dataclasses.replace(params["words"], max_norm=None)
    updates, _ = jax.jit(tx.update)(gradient_of(params), state, params)
    assert embax.apply_updates(params, updates)["words"].max_norm is None
