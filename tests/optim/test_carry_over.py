"""carry_over: the state of an optimizer for tables that grow, shrink, freeze, or are stored elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_same
from optim_steps import Together, host, take_step

import embax
from embax import Collection, Feature, RowGrad, Table
from embax.optim import carry_over, clip_by_global_norm, lift, rowwise_adagrad, rowwise_adam

ROWS, GROWN, DIM, PADDING = 5, 8, 3, 1
WEIGHT = np.random.default_rng(0).normal(size=(GROWN, DIM)).astype(np.float32)

LABELS = {"words": "a", "bias": "b"}
TXS = {
    "sgd": lift(optax.sgd(0.1)),
    "adamw": lift(optax.adamw(optax.cosine_decay_schedule(0.1, 9))),
    "rowwise_adagrad": rowwise_adagrad(0.1, initial_accumulator=0.5),  # so that new rows do not begin at zero
    "rowwise_adam": rowwise_adam(0.1),
    "joint": lift(optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.1))),
    "chain": optax.chain(clip_by_global_norm(1.0), lift(optax.adam(0.1))),
    "by label": optax.multi_transform({"a": rowwise_adagrad(0.1), "b": optax.adam(0.1)}, LABELS),
    "if finite": optax.apply_if_finite(lift(optax.adam(0.1)), 3),
}


def some(*names):
    return Together({name: TXS[name] for name in names})


# Each way through the states; the others take one of these.
WAYS = some("adamw", "rowwise_adagrad", "joint", "by label", "if finite")
of_all_ways = pytest.mark.parametrize(
    "txs", [WAYS, pytest.param(some("sgd", "rowwise_adam", "chain"), marks=pytest.mark.exhaustive)], ids=["", "too"]
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params_of(rows, **rules):
    rules = {"padding_idx": PADDING, **rules}
    return {"words": Table(WEIGHT[:rows], **rules), "bias": jnp.asarray(np.ones(2, np.float32))}


def gradient(step, rows):
    """A gradient of rows that both sizes have."""
    rng = np.random.default_rng(100 + step)
    ids, values = rng.integers(0, ROWS, 16), rng.normal(size=(16, DIM)).astype(np.float32)
    return {"words": RowGrad(ids, values, rows=rows), "bias": np.full(2, 0.1 * step, np.float32)}


def gradients(txs, rows, number=2):
    return [txs.of_all(lambda i=i: gradient(i, rows)) for i in range(number)]


def without_scratch(tree):
    kinds = (embax.optim.LiftState, type(clip_by_global_norm(1.0).init({})))
    return jax.tree.map(
        lambda x: x._replace(slots=()) if isinstance(x, kinds) else x, tree, is_leaf=lambda x: isinstance(x, kinds)
    )


def assert_same_state(ours, theirs, case=""):
    assert_same(without_scratch(ours), without_scratch(theirs), case)


@of_all_ways
def test_grown_table_has_the_state_of_a_table_that_was_always_large(txs):
    _, few = txs.run(txs.of_all(lambda: params_of(ROWS)), gradients(txs, ROWS))
    params, many = host(txs.run(txs.of_all(lambda: params_of(GROWN)), gradients(txs, GROWN)))
    grown = {name: carry_over(few[name], params_of(ROWS), params_of(GROWN), tx) for name, tx in txs.txs.items()}
    fresh = jax.eval_shape(txs.start, txs.of_all(lambda: params_of(GROWN)))
    for name in txs.txs:
        assert_same_state(grown[name], many[name], name)
        assert jax.tree.structure(grown[name]) == jax.tree.structure(fresh[name]), name
    # So the next step, in which ids repeat, equals the step of a table that was large from the start.
    ids, values = np.resize([7, 0, 7, 6], 16), np.resize(WEIGHT[:4], (16, DIM))
    last = txs.of_all(lambda: {"words": RowGrad(ids, values, rows=GROWN), "bias": np.ones(2, np.float32)})
    ours = txs.step(jax.tree.map(np.copy, params), grown, last)
    assert_same_state(ours[0], txs.step(params, many, last)[0])


@of_all_ways
def test_a_table_that_is_cut_has_the_state_of_the_rows_that_are_left(txs):
    _, many = txs.run(txs.of_all(lambda: params_of(GROWN)), gradients(txs, GROWN))
    _, few = txs.run(txs.of_all(lambda: params_of(ROWS)), gradients(txs, ROWS))
    for name, tx in txs.txs.items():
        assert_same_state(carry_over(many[name], params_of(GROWN), params_of(ROWS), tx), few[name], name)


@of_all_ways
def test_the_same_tables_keep_the_state(txs):
    _, states = txs.run(txs.of_all(lambda: params_of(ROWS)), gradients(txs, ROWS))
    for name, tx in txs.txs.items():
        again = carry_over(states[name], params_of(ROWS), params_of(ROWS), tx)
        assert_same_state(again, states[name], name)
        arrays = [jax.tree.leaves(without_scratch(x)) for x in (again, states[name])]
        assert all(a is b for a, b in zip(*arrays, strict=True)), name


def test_carry_over_takes_shapes_and_donated_parameters():
    tx, params = TXS["chain"], params_of(ROWS)
    state = jax.jit(tx.init)(params)
    shapes = jax.eval_shape(lambda: params)
    expected = carry_over(state, params, params_of(GROWN), tx)
    assert_same_state(carry_over(state, shapes, params_of(GROWN), tx), expected)
    jax.jit(lambda x: x, donate_argnums=0)(params)
    assert_same_state(carry_over(state, params, params_of(GROWN), tx), expected)


def test_under_jit():
    tx, params = TXS["chain"], params_of(ROWS)
    state = jax.jit(tx.init)(params)
    jitted = jax.jit(lambda state, old, new: carry_over(state, old, new, tx))
    assert_same_state(jitted(state, params, params_of(GROWN)), carry_over(state, params, params_of(GROWN), tx))


def leaves_by_path(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.flatten_with_path(without_scratch(tree))[0]}


def test_tables_that_are_frozen_and_unfrozen():
    def params(*frozen):
        tables = {name: Table(WEIGHT, freeze=name in frozen) for name in "abc"}
        return tables | {"bias": np.ones(2, np.float32)}

    txs = some("rowwise_adagrad", "chain")
    before, after = params("a"), params("b")
    one = RowGrad([1, 2, 1], WEIGHT[:3], rows=GROWN)
    gradient = {"a": one, "b": one, "c": one, "bias": np.ones(2, np.float32)}
    _, states = txs.run(txs.of_all(lambda: params("a")), [txs.of_all(lambda: gradient)])
    fresh_states = txs.start(txs.of_all(lambda: after))
    for name, tx in txs.txs.items():
        carried = carry_over(states[name], before, after, tx)
        assert jax.tree.structure(carried) == jax.tree.structure(fresh_states[name]), name
        leaves, fresh, old = (leaves_by_path(tree) for tree in (carried, fresh_states[name], states[name]))
        assert not any("['b']" in path for path in leaves)
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, (fresh if "['a']" in path else old)[path], err_msg=path)
        jax.eval_shape(tx.update, gradient, carried, after)


def test_a_padding_row_that_changes():
    tx = TXS["adamw"]
    step = jax.jit(lambda params, state, gradient: take_step(tx, params, state, gradient))
    before, after = params_of(ROWS), params_of(ROWS, padding_idx=(0, 3))
    _, state = step(before, jax.jit(tx.init)(before), gradient(0, ROWS))
    carried = carry_over(state, before, after, tx)
    assert_same_state(carried.inner[0].mu["words"].weight, state.inner[0].mu["words"].weight)
    params, _ = step(after, carried, gradient(1, ROWS))
    moved = (np.asarray(params["words"].weight) != WEIGHT[:ROWS]).any(1)
    assert not moved[[0, 3]].any()
    assert moved[PADDING]


def collection_of(**rows):
    tables = {name: Table(WEIGHT[:number], padding_idx=0 if name == "genre" else None) for name, number in rows.items()}
    tables["wide"] = Table(np.ones((2, 4), np.float32))  # in a stack of its own
    return {"rows": Collection(tables, [Feature("film", "film")])}


def gradient_of_collection(params):
    values = {
        name: np.full((min(2, table.rows), *table.dim), i + 1.0, np.float32)
        for i, (name, table) in enumerate(params["rows"].tables.items())
    }
    stacks = []
    for number, stack in enumerate(params["rows"].stacks):
        members = [member for member in params["rows"]._members if member.stack == number]
        ids = np.concatenate([np.arange(len(values[m.name])) + m.start for m in members])
        stacks.append(RowGrad(ids, np.concatenate([values[m.name] for m in members]), rows=stack.rows))
    return jax.tree.structure(params, is_leaf=lambda x: isinstance(x, Table)).unflatten(stacks)


def test_the_tables_of_a_collection_go_by_their_names():
    txs = some("rowwise_adagrad", "chain")
    before = collection_of(film=4, genre=3)
    after = collection_of(genre=5, user=2, film=6)  # another order, other sizes, one more
    apart = embax.unstack(after)
    of = gradient_of_collection(before)
    _, states = txs.run(txs.of_all(lambda: collection_of(film=4, genre=3)), [txs.of_all(lambda: of)])
    fresh_states = txs.start(txs.of_all(lambda: after))
    fresh_apart = jax.eval_shape(txs.start, txs.of_all(lambda: apart))

    def tables(tree):
        return {path: np.asarray(leaf) for path, leaf in leaves_by_path(embax.unstack(without_scratch(tree))).items()}

    for name, tx in txs.txs.items():
        carried = carry_over(states[name], before, after, tx)
        assert jax.tree.structure(carried) == jax.tree.structure(fresh_states[name])
        jax.eval_shape(tx.update, gradient_of_collection(after), carried, after)
        ours, old, new = tables(carried), tables(states[name]), tables(fresh_states[name])
        assert ours.keys() == new.keys()
        for path, leaf in ours.items():
            expected = new[path].copy()
            if path in old and leaf.ndim:
                expected[: len(old[path])] = old[path]
            elif path in old:
                expected = old[path]
            np.testing.assert_array_equal(leaf, expected, err_msg=path)
        # The same tables by themselves, and back.
        by_itself = carry_over(carried, after, apart, tx)
        assert jax.tree.structure(by_itself) == jax.tree.structure(fresh_apart[name])
        assert_same_state(carry_over(by_itself, apart, after, tx), carried)


def test_tables_that_a_tree_gains_and_loses():
    tx = TXS["adamw"]
    before = {"a": Table(WEIGHT), "b": Table(WEIGHT)}
    one = RowGrad([1, 2], WEIGHT[:2], rows=GROWN)
    _, state = jax.jit(lambda params: tx.update({"a": one, "b": one}, tx.init(params), params))(before)
    after = {"b": before["b"], "c": Table(np.ones((2, 2), np.float32))}
    carried = carry_over(state, before, after, tx)
    assert_same_state(carried.inner[0].nu["b"].weight, state.inner[0].nu["b"].weight)
    np.testing.assert_array_equal(carried.inner[0].nu["c"].weight, np.zeros((2, 2)))
    assert int(carried.inner[0].count) == 1


def keeps_rows_by_itself():
    """A transformation whose state has an entry for each row in plain arrays, not in Tables."""

    def init(params):
        leaves = jax.tree.leaves(params)
        return {"seen": [jnp.ones(leaf.shape[:1]) for leaf in leaves], "mean": [jnp.zeros(()) for _ in leaves]}

    def update(updates, state, params=None):
        seen = [s + jnp.ones_like(s) for s in state["seen"]]
        return updates, {"seen": seen, "mean": state["mean"]}

    return lift(optax.GradientTransformation(init, update))


def test_rows_of_a_state_outside_of_its_tables():
    tx, params = keeps_rows_by_itself(), {"words": Table(WEIGHT[:ROWS])}
    gradient = {"words": RowGrad([2], WEIGHT[:1], rows=ROWS)}
    _, state = jax.jit(lambda params: tx.update(gradient, tx.init(params), params))(params)
    grown = carry_over(state, params, {"words": Table(WEIGHT)}, tx)
    np.testing.assert_array_equal(grown.inner["seen"][0], [1, 1, 2, 1, 1, 1, 1, 1])
    assert grown.inner["mean"][0].shape == ()


def test_carry_over_refuses_states_that_do_not_fit():
    tx, params = TXS["adamw"], params_of(ROWS)
    state = jax.jit(tx.init)(params)
    call = r"`embax.optim.carry_over\(old_params=...\)` must be the parameters that `tx` made the state for"
    with pytest.raises(ValueError, match=call + r", got other ones: params\['words'\] had 5 rows, and has 8 now"):
        carry_over(state, params_of(GROWN), params_of(GROWN), tx)
    with pytest.raises(ValueError, match=call + r".*\(2,\) for `state.inner\[0\].mu\['bias'\]`, which would be \(3,\)"):
        carry_over(state, params | {"bias": np.ones(3, np.float32)}, params, tx)
    with pytest.raises(ValueError, match=call + r".*\(\) for `state.inner\[0\].count`, which would be None"):
        carry_over(state, params, params, TXS["sgd"])
    call = r"`embax.optim.carry_over\(new_params=...\)` must have "
    with pytest.raises(
        ValueError, match=call + r"the ordinary .*mu\['bias'\]` is of the shape \(3,\) instead of \(2,\)"
    ):
        carry_over(state, params, params | {"bias": np.ones(3, np.float32)}, tx)
    with pytest.raises(
        ValueError, match=call + r"tables with rows .* got \(2,\) instead of \(3,\) for params\['words'\]"
    ):
        carry_over(state, params, params | {"words": Table(np.ones((5, 2), np.float32))}, tx)
    tx = TXS["rowwise_adagrad"]  # whose state does not show it
    with pytest.raises(
        ValueError, match=call + r"tables with rows .* got \(2,\) instead of \(3,\) for params\['words'\]"
    ):
        carry_over(tx.init(params), params, params | {"words": Table(np.ones((5, 2), np.float32))}, tx)
