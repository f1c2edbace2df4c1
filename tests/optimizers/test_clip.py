"""clip_by_global_norm: the norm of all gradients with their duplicates summed, and what is scaled by it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import RowGrad, Table
from embax.optim import clip_by_global_norm, lift

ROWS, DIM = 20, 3


def weight(dtype="float32", seed=0, shape=(ROWS, DIM)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def rows(seed=1, dtype="float32", length=64):
    rng = np.random.default_rng(seed)
    return RowGrad(rng.integers(0, ROWS + 1, length), weight(dtype, seed, (length, DIM)), rows=ROWS)


def norm(*arrays):
    return np.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in arrays))


def dense(gradient):
    """The gradient of all rows in float64."""
    out = np.zeros((gradient.rows + 1, *gradient.dim))
    np.add.at(out, np.asarray(gradient.ids), np.asarray(gradient.values, np.float64))
    return out[:-1]


def clip(max_norm, params, gradients, wrap=lambda f: f):
    tx = clip_by_global_norm(max_norm)
    return wrap(tx.update)(gradients, tx.init(params), params)[0]


@pytest.mark.parametrize(
    ("part", "wrap"),
    [(0.5, lambda f: f), (2.0, lambda f: f), *((part, jax.jit) for part in (0.01, 0.5, 0.999, 1.001, 10.0, np.inf))],
    ids=["eager", "eager_under", "far", "half", "just_over", "just_under", "under", "no_limit"],
)
def test_scales_by_the_norm_of_the_whole_tree(part, wrap):
    params = {"a": Table(weight()), "b": [Table(weight()), jnp.ones((2, 2)), jnp.ones(())]}
    of = {"a": rows(1), "b": [rows(2), weight(seed=3, shape=(2, 2)), jnp.full((), 2.0)]}
    total = norm(dense(of["a"]), dense(of["b"][0]), *of["b"][1:])
    np.testing.assert_allclose(jax.jit(embax.global_norm)(of), total, rtol=1e-6)  # float32
    out = clip(part * total, params, of, wrap)
    assert jax.tree.structure(out) == jax.tree.structure(of)
    factor = min(1, part)
    np.testing.assert_array_equal(out["a"].ids, of["a"].ids)
    pairs = [(out["a"].values, of["a"].values), (out["b"][0].values, of["b"][0].values)]
    for ours, before in [*pairs, *zip(out["b"][1:], of["b"][1:], strict=True)]:
        np.testing.assert_allclose(ours, factor * np.asarray(before), rtol=1e-5)  # float32
        if part > 1:
            assert np.asarray(ours).tobytes() == np.asarray(before).tobytes()


def test_duplicates_that_cancel_have_no_norm():
    params = {"table": Table(weight())}
    of = {"table": RowGrad([3, 3], jnp.array([[100.0] * 3, [-100.0] * 3]), rows=ROWS)}
    np.testing.assert_array_equal(clip(1.0, params, of)["table"].values, of["table"].values)


def test_duplicates_that_add_up_count_with_their_sum():
    params = {"table": Table(weight())}
    of = {"table": RowGrad([3] * 4, jnp.ones((4, DIM)), rows=ROWS)}
    expected = np.full((4, DIM), 1 / norm(np.full(DIM, 4.0)))
    np.testing.assert_allclose(clip(1.0, params, of)["table"].values, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("tx", [optax.sgd(0.5), optax.adagrad(0.1)], ids=["sgd", "adagrad"])
def test_before_a_lifted_transformation_equals_dense_training(tx):
    def loss(params, ids, targets):
        table = params["table"]
        read = embax.lookup(table, ids) if isinstance(table, Table) else table[ids]
        return jnp.square(read * params["scale"] - targets).sum()

    def run(tx, table, value_and_grad, apply):
        params = {"table": table, "scale": jnp.ones((1, DIM))}
        state = tx.init(params)

        @jax.jit
        def step(params, state, ids, targets):
            _, of = value_and_grad(loss)(params, ids, targets)
            updates, state = tx.update(of, state, params)
            return apply(params, updates), state

        rng, targets = np.random.default_rng(1), weight(seed=2)
        for _ in range(50):
            ids = rng.integers(0, rng.integers(2, ROWS), 64)
            params, state = step(params, state, ids, targets[ids])
        return params

    ours = run(
        optax.chain(clip_by_global_norm(0.3), lift(tx)), Table(weight()), embax.value_and_grad, embax.apply_updates
    )
    theirs = run(optax.chain(optax.clip_by_global_norm(0.3), tx), weight(), jax.value_and_grad, optax.apply_updates)
    np.testing.assert_allclose(ours["table"].weight, theirs["table"], rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(ours["scale"], theirs["scale"], rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("order", ["frozen_first", "frozen_last"])
@pytest.mark.parametrize("other", [{"freeze": True}, "integers"], ids=["frozen", "integers"])
def test_tables_without_a_gradient_have_no_part(order, other):
    table = Table(jnp.ones((ROWS, DIM), jnp.int32)) if other == "integers" else Table(weight(), **other)
    names = ("a", "b") if order == "frozen_first" else ("b", "a")
    params = dict(zip(names, (table, Table(weight())), strict=True))

    def loss(params):
        return sum(embax.lookup(table, [1, 2, 2]).astype(jnp.float32).sum() for table in params.values())

    _, of = embax.value_and_grad(loss)(params)
    out = clip(1.0, params, of, jax.jit)
    assert out[names[0]].values.shape == (0, DIM)
    expected = np.ones((3, DIM)) / norm(np.full(DIM, 1.0), np.full(DIM, 2.0))
    np.testing.assert_allclose(out[names[1]].values, expected, rtol=1e-6)  # float32


def test_dense_gradients_of_tables_count_once_a_number():
    params = {"dense": Table(weight()), "rows": Table(weight()), "bias": jnp.ones(2)}
    of = {"dense": Table(weight(seed=4)), "rows": rows(), "bias": jnp.ones(2)}
    total = norm(of["dense"].weight, dense(of["rows"]), of["bias"])
    out = clip(1.0, params, of)
    np.testing.assert_allclose(out["dense"].weight, of["dense"].weight / total, rtol=1e-5)  # float32
    np.testing.assert_allclose(out["rows"].values, of["rows"].values / total, rtol=1e-5)  # float32
    np.testing.assert_allclose(out["bias"], of["bias"] / total, rtol=1e-5)  # float32


@pytest.mark.parametrize("ids", [[], [ROWS, ROWS]], ids=str)
def test_a_gradient_without_rows_has_no_norm(ids):
    params = {"table": Table(weight()), "bias": jnp.ones(2)}
    of = {"table": RowGrad(ids, jnp.full((len(ids), DIM), 7.0), rows=ROWS), "bias": jnp.array([3.0, 4.0])}
    out = clip(1.0, params, of)
    np.testing.assert_allclose(out["bias"], [0.6, 0.8], rtol=1e-6)  # float32
    assert out["table"].values.shape == (len(ids), DIM)


def test_zero_gradients_stay_zero():
    params = {"table": Table(weight()), "bias": jnp.ones(2)}
    of = jax.tree.map(lambda leaf: leaf, {"table": 0.0 * rows(), "bias": jnp.zeros(2)})
    out = clip(1.0, params, of)
    np.testing.assert_array_equal(out["table"].values, np.zeros((64, DIM)))
    np.testing.assert_array_equal(out["bias"], np.zeros(2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_norm_of_low_precision_gradients_is_taken_in_float32(dtype):
    params = {"table": Table(weight(dtype))}
    of = {"table": RowGrad(np.ones(4096, int), jnp.ones((4096, DIM), dtype), rows=ROWS)}
    np.testing.assert_allclose(jax.jit(embax.global_norm)(of), 4096 * np.sqrt(3), rtol=1e-5)
    out = clip(4096 * np.sqrt(3) / 2, params, of, jax.jit)["table"]
    assert out.dtype == dtype
    np.testing.assert_allclose(out.values.astype(jnp.float32), np.full((4096, DIM), 0.5), rtol=0.01)  # one unit


def test_the_state_goes_through_jit_donation_and_scan():
    tx = optax.chain(clip_by_global_norm(0.5), lift(optax.sgd(0.1)))

    def take_step(params, state, of):
        updates, state = tx.update(of, state, params)
        return embax.apply_updates(params, updates), state

    def fresh():
        return {"table": Table(weight())}

    params, state = fresh(), tx.init(fresh())
    for i in range(3):
        params, state = jax.jit(take_step, donate_argnums=(0, 1))(params, state, {"table": rows(i)})
    several = jax.tree.map(lambda *x: jnp.stack(x), *({"table": rows(i)} for i in range(3)))
    looped, _ = jax.lax.scan(lambda carry, of: (take_step(*carry, of), None), (fresh(), tx.init(fresh())), several)[0]
    np.testing.assert_allclose(params["table"].weight, looped["table"].weight, rtol=1e-6)  # float32
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(fresh()))


@pytest.mark.parametrize(
    ("max_norm", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_limit_that_is_not_positive_is_an_error(max_norm, error):
    with pytest.raises(error, match=r"embax.optim.clip_by_global_norm\(max_norm=...\)` must be"):
        clip_by_global_norm(max_norm)
