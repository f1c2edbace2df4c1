"""rowwise_adagrad and rowwise_adam: their formulas, in float64 NumPy, on tables and on ordinary leaves."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import embax
from embax import RowGrad, Table
from embax.optim import rowwise_adagrad, rowwise_adam

ROWS, DIM, IDS = 20, 3, 64
schedule = optax.linear_schedule(0.0, 0.5, 40)


def weight(dtype="float32", shape=(ROWS, DIM), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def stepper(tx):
    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return embax.apply_updates(params, updates), state

    return step


def loss(params, ids, targets):
    return jnp.square(embax.lookup(params["table"], ids) - targets).mean()


def loss_gradient(table, ids, targets):
    """The gradient of the loss by id, in float64."""
    return 2 * (table[ids] - targets) / targets.size


@pytest.mark.parametrize(
    ("options", "of_reference"),
    [
        ((0.1,), {}),
        ((schedule,), {}),
        ((0.1, 0.3), {"start": 0.3}),
        ((0.1, 0.0, 0.0), {"eps": 0.0}),
        ((0.1, 0.0, 1e-2), {"eps": 1e-2}),
    ],
    ids=["defaults", "schedule", "start", "no_eps", "large_eps"],
)
def test_rowwise_adagrad_equals_dense_training_over_100_steps(options, of_reference):
    tx = rowwise_adagrad(*options)
    params, targets = {"table": Table(weight())}, np.asarray(weight(seed=1), np.float64)
    # In dense training all rows take part in each step, those without a gradient with zeros.
    rule = reference.rowwise_adagrad(options[0], **of_reference)
    dense, memories = np.asarray(weight(), np.float64), [{} for _ in range(ROWS)]
    state, rng = tx.init(params), np.random.default_rng(2)

    @jax.jit
    def step(params, state, ids, targets):
        _, of = embax.value_and_grad(loss)(params, ids, targets)
        updates, state = tx.update(of, state, params)
        return embax.apply_updates(params, updates), state

    for i in range(100):
        ids = rng.integers(0, ROWS // 2 if i < 50 else ROWS, IDS)
        params, state = step(params, state, ids, jnp.asarray(targets[ids], jnp.float32))
        of_all = np.zeros_like(dense)
        np.add.at(of_all, ids, loss_gradient(dense, ids, targets[ids]))
        for row in range(ROWS):
            if of_all[row].any() or memories[row]:  # without any gradient so far the formula is 0 / 0
                dense[row] += rule(of_all[row], dense[row], memories[row], i)
    np.testing.assert_allclose(params["table"].weight, dense, rtol=1e-5, atol=5e-6)  # float32
    sums = [memory.get("sum", of_reference.get("start", 0)) for memory in memories]
    np.testing.assert_allclose(state.inner[0].sum_of_squares["table"].weight, sums, rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("tx", "rule"),
    [
        (rowwise_adam(0.1), reference.rowwise_adam(0.1)),
        (rowwise_adam(schedule), reference.rowwise_adam(schedule)),
        (rowwise_adam(0.1, b1=0.0), reference.rowwise_adam(0.1, b1=0.0)),
        (rowwise_adam(0.1, b2=0.0, eps=1e-3), reference.rowwise_adam(0.1, b2=0.0, eps=1e-3)),
        (rowwise_adam(0.1, 0.8, 0.95, 0.1), reference.rowwise_adam(0.1, 0.8, 0.95, 0.1)),
    ],
    ids=["defaults", "schedule", "no_mean", "no_mean_square", "others"],
)
@pytest.mark.parametrize("shape", [(ROWS, DIM), (ROWS, 2, 2), (ROWS,)], ids=str)
def test_rowwise_adam_equals_the_lazy_reference(tx, rule, shape):
    params, expected = (
        {"table": Table(weight(shape=shape), padding_idx=3)},
        reference.Lazy(weight(shape=shape), rule, 3),
    )
    state, step, rng = tx.init(params), stepper(tx), np.random.default_rng(3)
    for _ in range(20):
        ids = rng.integers(0, ROWS, 9)
        values = jnp.asarray(rng.normal(size=(9, *shape[1:])), jnp.float32)
        params, state = step(params, state, {"table": RowGrad(ids, values, rows=ROWS)})
        expected.step(ids, values)
    np.testing.assert_allclose(params["table"].weight, expected.weight, rtol=1e-4, atol=2e-5)  # float32


def test_the_state_of_a_table_is_a_number_a_row():
    params = {"table": Table(weight("bfloat16")), "bias": jnp.ones(3)}
    sums = rowwise_adagrad(0.1, initial_accumulator=0.5).init(params).inner[0].sum_of_squares
    assert (sums["table"].weight.shape, sums["table"].dtype, sums["bias"].shape) == ((ROWS,), jnp.float32, (3,))
    np.testing.assert_array_equal(sums["table"].weight, np.full(ROWS, 0.5))
    adam = rowwise_adam(0.1).init(params).inner[0]
    assert (adam.mean["table"].weight.shape, adam.mean["table"].weight.dtype) == ((ROWS, DIM), jnp.bfloat16)
    assert (adam.mean_square["table"].weight.shape, adam.mean_square["bias"].shape) == ((ROWS,), (3,))


@pytest.mark.parametrize("make", [rowwise_adagrad, rowwise_adam])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_zero_gradient_of_a_row_that_is_read_changes_nothing(make, eps):
    if make is rowwise_adam and eps == 0:
        pytest.skip("Adam without eps is 0 / 0 there")
    tx = make(0.1, eps=eps)
    params = {"table": Table(weight()), "bias": weight()}
    of_table = RowGrad([1, 2, 2, 3, 3], jnp.zeros((5, DIM)).at[3].set(1).at[4].set(-1), rows=ROWS)
    after, state = stepper(tx)(params, tx.init(params), {"table": of_table, "bias": jnp.zeros((ROWS, DIM))})
    np.testing.assert_array_equal(after["table"].weight, weight())
    np.testing.assert_array_equal(after["bias"], weight())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# One jitted step for all examples: the values are drawn, the shapes are fixed.
_drawn_tx = rowwise_adagrad(0.25)
_drawn_step = stepper(_drawn_tx)


@settings(max_examples=50, deadline=None)
@given(arrays(np.int32, 6, elements=st.integers(0, 4)), arrays(np.float32, (6, 2), elements=st.floats(-8, 8, width=16)))
def test_rowwise_adagrad_of_any_gradient_equals_the_formula(ids, values):
    params = {"table": Table(jnp.ones((4, 2)))}
    after, _ = _drawn_step(params, _drawn_tx.init(params), {"table": RowGrad(ids, values, rows=4)})
    for row in range(4):
        total = values[ids == row].astype(np.float64).sum(0)
        root = np.sqrt((total**2).mean())
        expected = 1 - (0.25 * total / (root + 1e-8) if root else 0)
        np.testing.assert_allclose(after["table"].weight[row], expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tx", "rule"),
    [
        (rowwise_adagrad(0.1, 0.2), reference.rowwise_adagrad(0.1, 0.2)),
        (rowwise_adagrad(schedule), reference.rowwise_adagrad(schedule)),
        (rowwise_adam(0.1), reference.rowwise_adam(0.1)),
    ],
    ids=["adagrad", "adagrad_schedule", "adam"],
)
def test_ordinary_leaves_have_a_second_moment_a_number(tx, rule, dtype):
    params = {"table": Table(weight()), "bias": weight(dtype, (5, 2))}
    # A row of one number is a number.
    expected = reference.Lazy(weight(dtype, (5, 2)).reshape(10), rule)
    state, step = tx.init(params), stepper(tx)
    for i in range(10):
        of = weight(dtype, (5, 2), seed=i + 1)
        params, state = step(params, state, {"table": RowGrad([1], jnp.ones((1, DIM)), rows=ROWS), "bias": of})
        expected.step(np.arange(10), of.reshape(10))
    assert params["bias"].dtype == dtype
    tolerance = {"float32": 2e-5, "float16": 0.01, "bfloat16": 0.1}[dtype]
    np.testing.assert_allclose(
        params["bias"].astype(jnp.float32).reshape(10), expected.weight, rtol=tolerance, atol=tolerance
    )


def test_ordinary_leaves_of_rowwise_adam_equal_those_of_optax():
    ours, theirs = {"bias": weight()}, {"bias": weight()}
    tx, plain = rowwise_adam(0.1), optax.adam(0.1)
    state, plain_state = tx.init(ours), plain.init(theirs)
    for i in range(10):
        of = {"bias": weight(seed=i + 1)}
        ours, state = stepper(tx)(ours, state, of)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            updates, plain_state = plain.update(of, plain_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["bias"], theirs["bias"], rtol=1e-5, atol=1e-6)  # float32


def test_rowwise_adagrad_of_rows_of_one_number_is_adagrad():
    values = weight(shape=(6, 1), seed=5)
    table, bias = ({"p": leaf} for leaf in (Table(weight(shape=(6, 1))), weight(shape=(6, 1))))
    tx = rowwise_adagrad(0.1)
    state, bias_state, step = tx.init(table), tx.init(bias), stepper(tx)
    for _ in range(3):
        table, state = step(table, state, {"p": RowGrad(np.arange(6), values, rows=6)})
        bias, bias_state = step(bias, bias_state, {"p": values})
    np.testing.assert_allclose(table["p"].weight, bias["p"], rtol=1e-6)  # float32


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (rowwise_adagrad, {"initial_accumulator": -1}, ValueError, "initial_accumulator"),
        (rowwise_adagrad, {"initial_accumulator": float("nan")}, ValueError, "initial_accumulator"),
        (rowwise_adagrad, {"initial_accumulator": "0"}, TypeError, "initial_accumulator"),
        (rowwise_adagrad, {"eps": -1e-8}, ValueError, "eps"),
        (rowwise_adagrad, {"eps": None}, TypeError, "eps"),
        (rowwise_adam, {"eps": -1e-8}, ValueError, "eps"),
        (rowwise_adam, {"b1": 1.0}, ValueError, r"b1=...\)` must be in \[0, 1\), got 1.0"),
        (rowwise_adam, {"b1": -0.1}, ValueError, "b1"),
        (rowwise_adam, {"b2": 1.5}, ValueError, r"b2=...\)` must be in \[0, 1\), got 1.5"),
        (rowwise_adam, {"b2": "x"}, TypeError, "b2"),
    ],
)
def test_arguments_out_of_range_are_errors(make, options, error, message):
    with pytest.raises(error, match=rf"embax.optim.{make.__name__}\(.*{message}"):
        make(0.1, **options)


def test_the_defaults_are_those_of_the_formulas():
    assert {k: v.default for k, v in list(inspect.signature(rowwise_adagrad).parameters.items())[1:]} == {
        "initial_accumulator": 0.0,
        "eps": 1e-8,
    }
    assert {k: v.default for k, v in list(inspect.signature(rowwise_adam).parameters.items())[1:]} == {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
    }
