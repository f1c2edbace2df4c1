"""clip_by_global_norm: the norm of all gradients with their duplicates summed, and what is scaled by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_steps import take_step

import embax
from embax import RowGrad, Table
from embax.optim import clip_by_global_norm, lift

ROWS, DIM = 20, 3


def weight(dtype="float32", seed=0, shape=(ROWS, DIM)):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


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


def clip(max_norm, params, gradients, wrap=jax.jit):
    tx = clip_by_global_norm(max_norm)
    return wrap(tx.update)(gradients, tx.init(params), params)[0]


PARTS = {"far": 0.01, "half": 0.5, "just_over": 0.999, "just_under": 1.001, "under": 10.0, "no_limit": np.inf}


@functools.cache
def clipped_tree():
    """A tree of gradients, its norm in float64 and by embax, and the clipped tree."""
    params = {"a": Table(weight()), "b": [Table(weight()), np.ones((2, 2), np.float32), np.float32(1)]}
    of = {"a": rows(1), "b": [rows(2), weight(seed=3, shape=(2, 2)), np.float32(2)]}
    total = norm(dense(of["a"]), dense(of["b"][0]), *of["b"][1:])

    @jax.jit
    def clipped(params, of):
        return embax.global_norm(of), {name: clip(x * total, params, of, lambda f: f) for name, x in PARTS.items()}

    return of, total, *clipped(params, of)


def test_global_norm_counts_the_whole_tree():
    _, total, found, _ = clipped_tree()
    np.testing.assert_allclose(found, total, rtol=1e-6)  # float32


@pytest.mark.parametrize("name", PARTS)
def test_scales_by_the_norm_of_the_whole_tree(name):
    of, _, _, outs = clipped_tree()
    out, part = outs[name], PARTS[name]
    assert jax.tree.structure(out) == jax.tree.structure(of)
    np.testing.assert_array_equal(out["a"].ids, of["a"].ids)
    pairs = [(out["a"].values, of["a"].values), (out["b"][0].values, of["b"][0].values)]
    for ours, before in [*pairs, *zip(out["b"][1:], of["b"][1:], strict=True)]:
        np.testing.assert_allclose(ours, min(1, part) * np.asarray(before), rtol=1e-5)  # float32
        if part > 1:
            assert np.asarray(ours).tobytes() == np.asarray(before).tobytes()


def test_duplicates_that_cancel_have_no_norm():
    params = {"table": Table(weight())}
    values = np.array([[100.0] * DIM, [-100.0] * DIM, [0.0] * DIM, [0.0] * DIM], np.float32)
    of = {"table": RowGrad([3] * 4, values, rows=ROWS)}
    np.testing.assert_array_equal(clip(1.0, params, of)["table"].values, values)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_duplicates_that_add_up_count_with_their_sum(wrap):
    params = {"table": Table(weight())}
    of = {"table": RowGrad([3] * 4, np.ones((4, DIM), np.float32), rows=ROWS)}
    expected = np.full((4, DIM), 1 / norm(np.full(DIM, 4.0)))
    np.testing.assert_allclose(clip(1.0, params, of, wrap)["table"].values, expected, rtol=1e-6)  # float32


def test_before_a_lifted_transformation_equals_dense_training():
    def loss(params, ids, targets):
        table = params["table"]
        read = embax.lookup(table, ids) if isinstance(table, Table) else table[ids]
        return jnp.square(read * params["scale"] - targets).sum()

    plain = {"sgd": optax.sgd(0.5), "adagrad": optax.adagrad(0.1)}
    runs = {name: (optax.chain(clip_by_global_norm(0.3), lift(tx)), embax.grad) for name, tx in plain.items()}
    runs |= {f"dense {x}": (optax.chain(optax.clip_by_global_norm(0.3), tx), jax.grad) for x, tx in plain.items()}

    @jax.jit
    def start(params):
        return {name: (params[name], tx.init(params[name])) for name, (tx, _) in runs.items()}

    @jax.jit
    def step(carry, ids, targets):
        of = {name: grad(loss)(carry[name][0], ids, targets) for name, (_, grad) in runs.items()}
        return {name: take_step(tx, *carry[name], of[name]) for name, (tx, _) in runs.items()}

    scale = np.ones((1, DIM), np.float32)
    tables = {name: weight() if name.startswith("dense") else Table(weight()) for name in runs}
    carry = start({name: {"table": table, "scale": scale} for name, table in tables.items()})
    rng, targets = np.random.default_rng(1), weight(seed=2)
    for _ in range(50):
        ids = rng.integers(0, rng.integers(2, ROWS), 64)
        carry = step(carry, ids, targets[ids])
    for name in plain:
        (ours, _), (theirs, _) = carry[name], carry[f"dense {name}"]
        np.testing.assert_allclose(ours["table"].weight, theirs["table"], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours["scale"], theirs["scale"], rtol=1e-4, atol=1e-5, err_msg=name)  # float32


@pytest.mark.parametrize("order", ["untrained_first", "untrained_last"])
def test_tables_without_a_gradient_have_no_part(order):
    others = [Table(np.ones((ROWS, DIM), np.int32)), Table(weight(), freeze=True)]

    def loss(params):
        return sum(embax.lookup(table, [1, 2, 2]).astype(jnp.float32).sum() for table in params)

    tables = [*others, Table(weight())] if order == "untrained_first" else [Table(weight()), *others]
    out = clip(1.0, tables, jax.jit(embax.grad(loss))(tables))
    (of_table,) = (x for x, table in zip(out, tables, strict=True) if table not in others)
    assert [x.values.shape for x in out if x is not of_table] == [(0, DIM)] * 2
    expected = np.ones((3, DIM)) / norm(np.full(DIM, 1.0), np.full(DIM, 2.0))
    np.testing.assert_allclose(of_table.values, expected, rtol=1e-6)  # float32


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


def test_the_norm_of_low_precision_gradients_is_taken_in_float32():
    dtypes = ("bfloat16", "float16")
    params = {dtype: Table(weight(dtype)) for dtype in dtypes}
    of = {x: RowGrad(np.ones(4096, int), np.ones((4096, DIM), jnp.dtype(x)), rows=ROWS) for x in dtypes}

    @jax.jit
    def clipped(params, of):
        norms = {x: embax.global_norm(of[x]) for x in dtypes}
        return norms, {x: clip(4096 * np.sqrt(3) / 2, params[x], of[x], lambda f: f) for x in dtypes}

    norms, out = clipped(params, of)
    for dtype in dtypes:
        np.testing.assert_allclose(norms[dtype], 4096 * np.sqrt(3), rtol=1e-5, err_msg=dtype)
        assert out[dtype].dtype == dtype
        values = np.float32(out[dtype].values)
        np.testing.assert_allclose(values, np.full((4096, DIM), 0.5), rtol=0.01, err_msg=dtype)  # one unit


def test_state_passes_through_jit_donation_and_scan():
    tx = optax.chain(clip_by_global_norm(0.5), lift(optax.sgd(0.1)))

    step_of_tx = functools.partial(take_step, tx)

    def fresh():
        return {"table": Table(weight())}

    params, state = fresh(), tx.init(fresh())
    step = jax.jit(step_of_tx, donate_argnums=(0, 1))
    for i in range(3):
        params, state = step(params, state, {"table": rows(i)})
    several = jax.tree.map(lambda *x: jnp.stack(x), *({"table": rows(i)} for i in range(3)))
    looped, _ = jax.lax.scan(lambda carry, of: (step_of_tx(*carry, of), None), (fresh(), tx.init(fresh())), several)[0]
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
