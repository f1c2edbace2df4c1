"""lift: dtypes, dense gradients, its state as a pytree, and the wrappers of optax inside and outside of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference as reference
import pytest

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
every = pytest.mark.parametrize("name", LIFTED)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        yield


def weight(dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, DIM)), dtype)


def params_of(table=None):
    return {"table": Table(weight(), padding_idx=PADDING) if table is None else table, "bias": jnp.ones(2)}


def gradient(step, dtype="float32", bad=False):
    rng = np.random.default_rng(100 + step)
    values = jnp.asarray(rng.normal(size=(32, DIM)), dtype)
    values = values.at[5, 1].set(jnp.nan) if bad else values
    return {"table": RowGrad(rng.integers(0, ROWS + 1, 32), values, rows=ROWS), "bias": jnp.full(2, 0.1 * step)}


def take_step(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return embax.apply_updates(params, updates), state


def donated(tx):
    return jax.jit(functools.partial(take_step, tx), donate_argnums=(0, 1))


def run(step, params, state, steps):
    for i in range(steps):
        params, state = step(params, state, gradient(i))
    return params, state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_close(ours, theirs, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 10), ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tx", [optax.sgd(2.0**-12), optax.sgd(2.0**-12, 0.5)], ids=["sgd", "momentum"])
def test_4096_gradients_of_one_count_4096_times_in_low_precision(tx, dtype):
    params = {"table": Table(jnp.ones((3, 2), dtype))}
    state = lift(tx).init(params)
    of_table = RowGrad(np.ones(4096, int), jnp.ones((4096, 2), dtype), rows=3)
    updates, _ = lift(tx).update({"table": of_table}, state, params)
    assert updates["table"].dtype == dtype
    after = embax.apply_updates(params, updates)["table"].weight
    np.testing.assert_array_equal(after, jnp.array([[1, 1], [0, 0], [1, 1]], dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sgd", "bfloat16"),
        ("momentum", "float16"),
        ("adagrad", "bfloat16"),
        ("adamw", "float16"),
        ("adam", "bfloat16"),
        ("rowwise_adagrad", "float16"),
        ("rowwise_adam", "bfloat16"),
    ],
)
def test_low_precision_tables_follow_float32_ones(name, dtype):
    tx, moved = LIFTED[name], []
    for each in dtype, "float32":
        start = weight(dtype)
        params = params_of(Table(start.astype(each), padding_idx=PADDING))
        state, step = tx.init(params), donated(tx)
        for i in range(3):
            of = gradient(i, dtype)
            of["table"] = RowGrad(of["table"].ids, of["table"].values.astype(each), rows=ROWS)
            params, state = step(params, state, of)
        assert params["table"].dtype == each
        moved.append(np.asarray(params["table"].weight, np.float32))
    np.testing.assert_allclose(*moved, atol=0.06 if dtype == "bfloat16" else 0.008)  # one unit of 2.0 a step
    assert moved[0][PADDING].tobytes() == np.asarray(start[PADDING], np.float32).tobytes()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rowwise_adagrad", "rowwise_adam"])
def test_float64_tables(name):
    rule = {
        "sgd": reference.sgd(0.1),
        "adam": reference.adam(0.1),
        "adamw": reference.adam(0.1, weight_decay=0.2),
        "rowwise_adagrad": reference.rowwise_adagrad(0.1),
        "rowwise_adam": reference.rowwise_adam(0.1),
    }[name]
    with jax.enable_x64(True):
        params = params_of(Table(weight("float64"), padding_idx=PADDING))
        expected = reference.Lazy(weight("float64"), rule, PADDING)
        state, step = LIFTED[name].init(params), donated(LIFTED[name])
        for i in range(5):
            of = gradient(i, "float64")
            params, state = step(params, state, of)
            expected.step(np.asarray(of["table"].ids), of["table"].values)
        assert params["table"].dtype == "float64"
        np.testing.assert_allclose(params["table"].weight, expected.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_a_dense_gradient_of_a_table_is_that_of_an_array(name):
    def loss(params, ids):
        table = params["table"]
        return jnp.square(table.weight.sum(1)).mean() + jnp.square(embax.lookup(table, ids)).sum()

    tx, params, array = LIFTED[name], params_of(), {"table": weight(), "bias": jnp.ones(2)}
    state, array_state, ids = tx.init(params), PLAIN[name].init(array), np.array([3, 5, 3])
    for _ in range(4):
        _, of = embax.value_and_grad(loss, on_dense="allow")(params, ids)
        assert isinstance(of["table"], Table)
        params, state = take_step(tx, params, state, of)
        of_array = {"table": of["table"].weight.at[PADDING].set(0), "bias": of["bias"]}
        updates, array_state = PLAIN[name].update(of_array, array_state, array)
        array = optax.apply_updates(array, updates)
        array["table"] = array["table"].at[PADDING].set(weight()[PADDING])
    assert_close(params["table"].weight, array["table"])
    assert bits(params["table"].weight[PADDING]) == bits(weight()[PADDING])
    updates, _ = tx.update({"table": Table(weight(seed=1)), "bias": jnp.ones(2)}, state, params)
    np.testing.assert_array_equal(updates["table"].weight[PADDING], np.zeros(DIM))


@every
def test_a_dense_gradient_is_that_of_all_rows(name):
    tx, of = LIFTED[name], {"bias": jnp.ones(2)}
    dense, sparse = params_of(), params_of()
    dense_state, sparse_state = tx.init(dense), tx.init(sparse)
    for i in range(3):
        values = weight(seed=i + 1)
        dense, dense_state = take_step(tx, dense, dense_state, {"table": Table(values), **of})
        all_rows = RowGrad(np.arange(ROWS), values, rows=ROWS)
        sparse, sparse_state = take_step(tx, sparse, sparse_state, {"table": all_rows, **of})
    assert_close(dense, sparse)
    assert_close(dense_state.inner, sparse_state.inner)


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adagrad", "rowwise_adam"])
def test_a_dense_and_a_sparse_gradient_in_one_tree(name):
    tx = LIFTED[name]
    values, few = weight(seed=1), gradient(0)["table"]
    params = {"dense": Table(weight()), "sparse": Table(weight(seed=2)), "bias": jnp.ones(2)}
    both = {"dense": Table(values), "sparse": few, "bias": jnp.ones(2)}
    rows = {"dense": RowGrad(np.arange(ROWS), values, rows=ROWS), "sparse": few, "bias": jnp.ones(2)}
    state = tx.init(params)
    mixed, mixed_state = take_step(tx, params, state, both)
    expected, expected_state = take_step(tx, params, state, rows)
    assert_close(mixed, expected)
    assert_close(mixed_state.inner, expected_state.inner)


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adagrad", "rowwise_adam"])
def test_eager_jit_and_scan_give_the_same(name):
    tx, params = LIFTED[name], params_of()
    eager, eager_state = run(functools.partial(take_step, tx), params, tx.init(params), 4)
    jitted, jitted_state = run(donated(tx), params_of(), tx.init(params), 4)
    gradients = jax.tree.map(lambda *x: jnp.stack(x), *map(gradient, range(4)))

    @jax.jit
    def scanned(params, state, gradients):
        return jax.lax.scan(lambda carry, of: (take_step(tx, *carry, of), None), (params, state), gradients)[0]

    looped, looped_state = scanned(params_of(), tx.init(params), gradients)
    for ours, state in (jitted, jitted_state), (looped, looped_state):
        assert_close(ours, eager)
        assert_close(state.inner, eager_state.inner)
        assert jax.tree.structure(state) == jax.tree.structure(eager_state)


@every
def test_the_state_is_a_pytree(name):
    tx, params = LIFTED[name], params_of()
    state = tx.init(params)
    rebuilt = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    assert type(rebuilt) is embax.optim.LiftState
    assert bits(rebuilt) == bits(state)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]
    assert bits(jax.jit(tx.init)(params)) == bits(state)


@pytest.mark.parametrize("name", ["sgd", "adamw", "clip_adagrad", "rowwise_adam"])
def test_two_runs_give_the_same_bytes(name):
    def whole_run():
        tx = LIFTED[name]
        return bits(run(donated(tx), params_of(), tx.init(params_of()), 10))

    assert whole_run() == whole_run()


@every
def test_scratch_space_is_kept_only_where_duplicates_are_summed_first(name):
    (slots,) = LIFTED[name].init(params_of()).slots
    assert (slots is None) == (name == "sgd")
    assert slots is None or (slots.shape, slots.dtype) == ((ROWS,), jnp.int32)


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
    (slots,) = lift(tx).init({"table": Table(weight(dtype))}).slots
    assert (slots is not None) == kept


def test_sgd_without_scratch_space_equals_sgd_with_it():
    without, with_ = (lift(optax.chain(*more, optax.sgd(0.1))) for more in ([], [optax.clip(1e9)]))
    ours, _ = run(donated(without), params_of(), without.init(params_of()), 10)
    theirs, _ = run(donated(with_), params_of(), with_.init(params_of()), 10)
    assert_close(ours, theirs)


LABELS = {"table": "sparse", "bias": "dense"}


def test_multi_transform_outside_and_inside_are_the_same():
    inside = lift(optax.multi_transform({"sparse": optax.adam(0.1), "dense": optax.sgd(0.3)}, LABELS))
    outside = optax.multi_transform({"sparse": lift(optax.adam(0.1)), "dense": optax.sgd(0.3)}, LABELS)
    ours, _ = run(donated(outside), params_of(), outside.init(params_of()), 5)
    theirs, _ = run(donated(inside), params_of(), inside.init(params_of()), 5)
    assert_close(ours, theirs)
    alone, _ = run(donated(LIFTED["adam"]), params_of(), LIFTED["adam"].init(params_of()), 5)
    assert_close(ours["table"], alone["table"])
    np.testing.assert_allclose(ours["bias"], 1 - 0.3 * 0.1 * (0 + 1 + 2 + 3 + 4), rtol=1e-6)  # float32


@pytest.mark.parametrize("leaf", ["table", "bias"])
@pytest.mark.parametrize(
    ("name", "inside"),
    [("sgd", True), ("adam", True), ("sgd", False), ("adam", False), ("rowwise_adam", False)],
)
def test_apply_if_finite_leaves_out_a_step_with_nan(name, inside, leaf):
    tx = lift(optax.apply_if_finite(PLAIN[name], 3)) if inside else optax.apply_if_finite(LIFTED[name], 3)
    step = donated(tx)
    params, state = run(step, params_of(), tx.init(params_of()), 3)

    def seen(params, state):  # scratch space may change
        wrapper = state.inner if inside else state
        return bits((params, wrapper.inner_state if inside else wrapper.inner_state.inner)), wrapper

    before, _ = seen(params, state)
    of = gradient(3, bad=leaf == "table")
    of["bias"] = of["bias"].at[0].set(jnp.inf) if leaf == "bias" else of["bias"]
    params, state = step(params, state, of)
    after, wrapper = seen(params, state)
    assert after == before
    assert (int(wrapper.total_notfinite), bool(wrapper.last_finite)) == (1, False)
    params, state = step(params, state, gradient(4))
    assert seen(params, state)[0] != before
    assert int(seen(params, state)[1].total_notfinite) == 1


def test_a_finite_step_under_apply_if_finite_is_the_step_without_it():
    tx = optax.apply_if_finite(LIFTED["adam"], 3)
    ours, _ = run(donated(tx), params_of(), tx.init(params_of()), 3)
    theirs, _ = run(donated(LIFTED["adam"]), params_of(), LIFTED["adam"].init(params_of()), 3)
    assert_close(ours, theirs)
