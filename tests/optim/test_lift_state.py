"""lift: dtypes, dense gradients, its state as a pytree, and the wrappers of optax inside and outside of it."""

import functools

import closeness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference as reference
import pytest
from closeness import bits
from optim_steps import Together, take_step

import embax
from embax import RowGrad, Table
from embax.optim import lift, rowwise_adagrad, rowwise_adam

ROWS, DIM = 20, 3
PADDING = 4

PLAIN = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, 0.9),
    "adagrad": optax.adagrad(0.1),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.2),
    "clip_adagrad": optax.chain(optax.clip_by_global_norm(1.0), optax.adagrad(0.1)),
}
LIFTED = {
    **{name: lift(tx) for name, tx in PLAIN.items()},
    "rowwise_adagrad": rowwise_adagrad(0.1),
    "rowwise_adam": rowwise_adam(0.1),
}
# Momentum and Adagrad keep what Adam keeps.
ALL = Together({name: tx for name, tx in LIFTED.items() if name not in ("momentum", "adagrad")})

pytestmark = pytest.mark.usefixtures("standard_promotion")


def weight(dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(jnp.dtype(dtype))


def params_of(table=None):
    bias = np.ones(2, np.float32)
    return {"table": Table(weight(), padding_idx=PADDING) if table is None else table, "bias": bias}


def gradient(step, dtype="float32", bad=False):
    rng = np.random.default_rng(100 + step)
    values = rng.normal(size=(64, DIM))
    values[5, 1] = np.nan if bad else values[5, 1]
    of_table = RowGrad(rng.integers(0, ROWS + 1, 64), values.astype(jnp.dtype(dtype)), rows=ROWS)
    return {"table": of_table, "bias": np.full(2, 0.1 * step, np.float32)}


def run(txs, steps):
    """Return the parameters and the states after steps of all transformations."""
    gradients = [gradient(i) for i in range(steps)]
    return txs.run(txs.of_all(params_of), [txs.of_all(lambda of=of: of) for of in gradients])


assert_close = functools.partial(closeness.assert_close, atol=1e-6)


def test_4096_gradients_of_one_count_4096_times_in_low_precision():
    txs = {"sgd": lift(optax.sgd(2.0**-12)), "momentum": lift(optax.sgd(2.0**-12, 0.5))}
    cases = {(name, dtype): txs[name] for name, dtype in [("sgd", "bfloat16"), ("momentum", "float16")]}

    @jax.jit
    def stepped(params, gradients):
        out = {}
        for case, tx in cases.items():
            updates, _ = tx.update(gradients[case], tx.init(params[case]), params[case])
            out[case] = updates["table"].values, embax.apply_updates(params[case], updates)["table"].weight
        return out

    params = {case: {"table": Table(np.ones((3, 2), jnp.dtype(case[1])))} for case in cases}
    ids = np.ones(4096, int)
    of = {case: {"table": RowGrad(ids, np.ones((4096, 2), jnp.dtype(case[1])), rows=3)} for case in cases}
    for case, (update, after) in stepped(params, of).items():
        assert update.dtype == case[1]
        np.testing.assert_array_equal(after, np.array([[1, 1], [0, 0], [1, 1]]), err_msg=str(case))


RULES = {
    "sgd": reference.sgd(0.1),
    "momentum": reference.sgd(0.1, 0.9),
    "adagrad": reference.adagrad(0.1),
    "adam": reference.adam(0.1),
    "adamw": reference.adam(0.1, weight_decay=0.2),
    "rowwise_adagrad": reference.rowwise_adagrad(0.1),
    "rowwise_adam": reference.rowwise_adam(0.1),
}


def after_reference_steps(start, rule, gradients):
    """The weight after steps of the float64 reference."""
    expected = reference.Lazy(start, rule, PADDING)
    for of in gradients:
        expected.step(np.asarray(of["table"].ids), of["table"].values)
    return expected.weight


def test_low_precision_tables_follow_wide_ones():
    dtypes = {
        "sgd": "bfloat16",
        "adamw": "float16",
        "rowwise_adagrad": "float16",
        "rowwise_adam": "bfloat16",
    }
    txs = Together({name: LIFTED[name] for name in dtypes})
    gradients = [{name: gradient(i, dtype) for name, dtype in dtypes.items()} for i in range(3)]
    start = {name: weight(dtype) for name, dtype in dtypes.items()}
    params, _ = txs.run({name: params_of(Table(x, padding_idx=PADDING)) for name, x in start.items()}, gradients)
    for name, dtype in dtypes.items():
        table = params[name]["table"]
        assert table.dtype == dtype
        expected = after_reference_steps(start[name], RULES[name], [of[name] for of in gradients])
        tolerance = 0.06 if dtype == "bfloat16" else 0.008  # one unit of 2.0 a step
        np.testing.assert_allclose(np.float64(table.weight), expected, atol=tolerance, err_msg=name)
        assert bits(table.weight[PADDING]) == bits(start[name][PADDING]), name


def test_float64_tables():
    txs = Together({name: LIFTED[name] for name in ("sgd", "adamw", "rowwise_adagrad", "rowwise_adam")})
    with jax.enable_x64(True):
        gradients = [gradient(i, "float64") for i in range(5)]
        params = txs.of_all(lambda: params_of(Table(weight("float64"), padding_idx=PADDING)))
        params, _ = txs.run(params, [txs.of_all(lambda of=of: of) for of in gradients])
        for name in txs.txs:
            table, expected = params[name]["table"], after_reference_steps(weight("float64"), RULES[name], gradients)
            assert table.dtype == "float64"
            np.testing.assert_allclose(table.weight, expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_dense_gradient_of_a_table_trains_like_an_array():
    def loss(params, ids):
        table = params["table"]
        return jnp.square(table.weight.sum(1)).mean() + jnp.square(embax.lookup(table, ids)).sum()

    names = ("sgd", "adamw", "clip_adagrad")
    ids, kept = np.array([3, 5, 3]), weight()[PADDING]

    @jax.jit
    def step(carry):
        out, seen = {}, {}
        for name, (params, state, array, array_state) in carry.items():
            of = embax.grad(loss, on_dense="allow")(params, ids)
            assert isinstance(of["table"], Table)
            update, state = LIFTED[name].update(of, state, params)
            params = embax.apply_updates(params, update)
            of_array = {"table": of["table"].weight.at[PADDING].set(0), "bias": of["bias"]}
            updates, array_state = PLAIN[name].update(of_array, array_state, array)
            array = optax.apply_updates(array, updates)
            array["table"] = array["table"].at[PADDING].set(kept)
            out[name] = params, state, array, array_state
            seen[name] = of["table"].weight[PADDING], update["table"].weight[PADDING]
        return out, seen

    arrays = {"table": weight(), "bias": np.ones(2, np.float32)}
    plain_states = jax.jit(lambda: {name: PLAIN[name].init(arrays) for name in names})()
    states = ALL.start(ALL.of_all(params_of))
    carry = {name: (params_of(), states[name], arrays, plain_states[name]) for name in names}
    for _ in range(4):
        carry, seen = step(carry)
    for name, (params, _, array, _) in carry.items():
        assert_close(params["table"].weight, array["table"], name)
        assert bits(params["table"].weight[PADDING]) == bits(kept), name
        gradient_of_padding, update_of_padding = seen[name]
        assert np.all(gradient_of_padding), name
        np.testing.assert_array_equal(update_of_padding, np.zeros(DIM), err_msg=name)


def test_dense_gradient_updates_all_rows():
    def of_all_rows(i, is_dense):
        values, bias = weight(seed=i + 1), np.ones(2, np.float32)
        return {"table": Table(values) if is_dense else RowGrad(np.arange(ROWS), values, rows=ROWS), "bias": bias}

    # Others are compared with what they do to arrays.
    txs = Together({name: LIFTED[name] for name in ("rowwise_adagrad", "rowwise_adam")})

    def run(is_dense):
        gradients = [of_all_rows(i, is_dense) for i in range(3)]
        return txs.run(txs.of_all(params_of), [txs.of_all(lambda of=of: of) for of in gradients])

    dense, sparse = run(True), run(False)
    for name in txs.txs:
        assert_close(dense[0][name], sparse[0][name], name)
        assert_close(dense[1][name].inner, sparse[1][name].inner, name)


def test_a_dense_and_a_sparse_gradient_in_one_tree():
    names, values, ones = ("sgd", "clip_adagrad", "rowwise_adam"), weight(seed=1), np.ones(2, np.float32)
    few, all_rows = gradient(0)["table"], RowGrad(np.arange(ROWS), values, rows=ROWS)
    gradients = {"mixed": {"dense": Table(values), "sparse": few}, "rows": {"dense": all_rows, "sparse": few}}
    txs = Together({(name, kind): LIFTED[name] for name in names for kind in gradients})
    params = txs.of_all(lambda: {"dense": Table(weight()), "sparse": Table(weight(seed=2)), "bias": ones})
    params, states = txs.run(params, [{case: {**gradients[case[1]], "bias": ones} for case in txs.txs}])
    for name in names:
        assert_close(params[name, "mixed"], params[name, "rows"], name)
        assert_close(states[name, "mixed"].inner, states[name, "rows"].inner, name)


def test_eager_jit_and_scan_give_the_same():
    names, eager = ("sgd", "adamw", "clip_adagrad", "rowwise_adam"), "sgd"
    jitted, states = run(ALL, 4)
    gradients = jax.jit(lambda *each: jax.tree.map(lambda *x: jnp.stack(x), *each))(*map(gradient, range(4)))

    @jax.jit
    def scanned(carry, gradients):
        def body(carry, of):
            return {name: take_step(LIFTED[name], *carry[name], of) for name in carry}, None

        return jax.lax.scan(body, carry, gradients)[0]

    starts = ALL.start(ALL.of_all(params_of))
    others = scanned({name: (params_of(), starts[name]) for name in names}, gradients)
    others["eager"] = jax.tree.map(jnp.asarray, params_of()), starts[eager]
    for i in range(4):
        others["eager"] = take_step(LIFTED[eager], *others["eager"], gradient(i))
    for name, (params, state) in others.items():
        expected = eager if name == "eager" else name
        assert_close(params, jitted[expected], name)
        assert_close(state.inner, states[expected].inner, name)
        assert jax.tree.structure(state) == jax.tree.structure(states[expected]), name


def test_the_state_is_a_pytree():
    jitted, abstract = ALL.start(ALL.of_all(params_of)), jax.eval_shape(ALL.start, ALL.of_all(params_of))
    for name, tx in ALL.txs.items():
        state = tx.init(params_of())
        rebuilt = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
        assert type(rebuilt) is embax.optim.LiftState, name
        assert bits(rebuilt) == bits(state), name
        assert jax.tree.structure(abstract[name]) == jax.tree.structure(state), name
        kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(each)] for each in (abstract[name], state)]
        assert kinds[0] == kinds[1], name
        assert bits(jitted[name]) == bits(state), name


def test_two_runs_give_the_same_bytes():
    def whole_run():
        params, states = run(ALL, 10)
        return {name: bits((params[name], states[name])) for name in ALL.txs}

    assert whole_run() == whole_run()


def test_scratch_space_is_kept_only_if_duplicates_are_summed_first():
    for name, state in ALL.start(ALL.of_all(params_of)).items():
        (slots,) = state.slots
        assert (slots is None) == (name == "sgd"), name
        assert slots is None or (slots.shape, slots.dtype) == ((ROWS,), jnp.int32), name


@pytest.mark.parametrize(
    ("tx", "dtype", "kept"),
    [
        (optax.sgd(optax.linear_schedule(0.0, 1.0, 9)), "float32", False),
        (optax.chain(optax.scale(0.5), optax.sgd(0.2)), "float32", False),
        (optax.sgd(0.1), "bfloat16", True),
        (optax.chain(optax.clip(9.0), optax.sgd(0.1)), "float32", True),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), "float32", True),
        (optax.sign_sgd(0.1), "float32", True),
    ],
    ids=["schedule", "scale", "bfloat16", "clip", "decay", "sign"],
)
def test_scratch_space_by_transformation(tx, dtype, kept):
    (slots,) = jax.eval_shape(lift(tx).init, {"table": Table(weight(dtype))}).slots
    assert (slots is not None) == kept


LABELS = {"table": "sparse", "bias": "dense"}
WRAPPED = Together(
    {
        "sgd with scratch space": lift(optax.chain(optax.clip(1e9), optax.sgd(0.1))),
        "inside": lift(optax.multi_transform({"sparse": optax.adam(0.1), "dense": optax.sgd(0.3)}, LABELS)),
        "outside": optax.multi_transform({"sparse": lift(optax.adam(0.1)), "dense": optax.sgd(0.3)}, LABELS),
        "adam if finite": optax.apply_if_finite(LIFTED["adam"], 3),
    }
)


@functools.cache
def after_5_steps():
    return run(ALL, 5)[0] | run(WRAPPED, 5)[0]


def test_sgd_with_and_without_scratch_space_are_equal():
    assert_close(after_5_steps()["sgd"], after_5_steps()["sgd with scratch space"])


def test_multi_transform_outside_and_inside_are_the_same():
    inside, outside, alone = (after_5_steps()[name] for name in ("inside", "outside", "adam"))
    assert_close(outside, inside)
    assert_close(outside["table"], alone["table"])
    np.testing.assert_allclose(outside["bias"], 1 - 0.3 * 0.1 * (0 + 1 + 2 + 3 + 4), rtol=1e-6)  # float32


def test_apply_if_finite_keeps_a_finite_step():
    assert_close(after_5_steps()["adam if finite"], after_5_steps()["adam"])


@functools.cache
def wrapped_in_apply_if_finite():
    return Together(
        {
            ("sgd", "inside"): lift(optax.apply_if_finite(PLAIN["sgd"], 3)),
            ("adam", "inside"): lift(optax.apply_if_finite(PLAIN["adam"], 3)),
            ("sgd", "outside"): optax.apply_if_finite(LIFTED["sgd"], 3),
            ("rowwise_adam", "outside"): optax.apply_if_finite(LIFTED["rowwise_adam"], 3),
        }
    )


@pytest.mark.parametrize("leaf", ["table", "bias"])
def test_apply_if_finite_leaves_out_a_step_with_nan(leaf):
    txs = wrapped_in_apply_if_finite()

    def seen(params, states):
        """What a step changes but for scratch space, and what the wrapper counts, by case."""
        out = {}
        for name, where in txs.txs:
            state = states[name, where]
            wrapper = state.inner if where == "inside" else state
            inner = wrapper.inner_state if where == "inside" else wrapper.inner_state.inner
            kept = bits((params[name, where], inner))
            out[name, where] = kept, int(wrapper.total_notfinite), bool(wrapper.last_finite)
        return out

    params, states, after = txs.of_all(params_of), txs.start(txs.of_all(params_of)), []
    for step in range(5):
        of = gradient(step, bad=step == 3 and leaf == "table")
        if step == 3 and leaf == "bias":
            of["bias"][0] = np.inf
        params, states = txs.step(params, states, txs.of_all(lambda of=of: of))
        after.append(seen(params, states))
    for case in txs.txs:
        (before, *_), (left_out, *counts), (later, *counts_later) = (each[case] for each in after[2:])
        assert left_out == before, case
        assert counts == [1, False], case
        assert later != before, case
        assert counts_later[0] == 1, case
