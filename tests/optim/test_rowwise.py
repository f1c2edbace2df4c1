"""rowwise_adagrad and rowwise_adam: their formulas, in float64 NumPy, on tables and on ordinary leaves."""

import functools
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
from optim_steps import Together, take_step

import embax
from embax import RowGrad, Table
from embax.optim import rowwise_adagrad, rowwise_adam

ROWS, DIM, IDS = 20, 3, 64
schedule = optax.linear_schedule(0.0, 0.5, 40)


def weight(dtype="float32", shape=(ROWS, DIM), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def loss(params, ids, targets):
    return jnp.square(embax.lookup(params["table"], ids) - targets).mean()


def loss_gradient(table, ids, targets):
    """The gradient of the loss by id, in float64."""
    return 2 * (table[ids] - targets) / targets.size


ADAGRAD = {  # the arguments, and those of the reference
    "defaults": ((0.1,), {}),
    "schedule": ((schedule,), {}),
    "start": ((0.1, 0.3), {"start": 0.3}),
    "no_eps": ((0.1, 0.0, 0.0), {"eps": 0.0}),
    "large_eps": ((0.1, 0.0, 1e-2), {"eps": 1e-2}),
}
TARGETS = np.float64(weight(seed=1))


def ids_of_steps():
    rng = np.random.default_rng(2)
    return [rng.integers(0, ROWS // 2 if i < 50 else ROWS, IDS) for i in range(100)]


@functools.cache
def after_100_steps():
    """The parameters and states by case, with a gradient that follows from the rows."""
    txs = {name: rowwise_adagrad(*options) for name, (options, _) in ADAGRAD.items()}

    @jax.jit
    def step(carry, ids, targets):
        of = {name: embax.grad(loss)(carry[name][0], ids, targets) for name in txs}
        return {name: take_step(tx, *carry[name], of[name]) for name, tx in txs.items()}

    params = {"table": Table(weight())}
    carry = {name: (params, tx.init(params)) for name, tx in txs.items()}
    for ids in ids_of_steps():
        carry = step(carry, ids, TARGETS[ids].astype(np.float32))
    return carry


@pytest.mark.parametrize("name", ADAGRAD)
def test_rowwise_adagrad_equals_dense_training_over_100_steps(name):
    options, of_reference = ADAGRAD[name]
    params, state = after_100_steps()[name]
    # In dense training all rows take part in each step, those without a gradient with zeros.
    rule = reference.rowwise_adagrad(options[0], **of_reference)
    dense, memories = np.asarray(weight(), np.float64), [{} for _ in range(ROWS)]
    for i, ids in enumerate(ids_of_steps()):
        of_all = np.zeros_like(dense)
        np.add.at(of_all, ids, loss_gradient(dense, ids, TARGETS[ids]))
        for row in range(ROWS):
            if of_all[row].any() or memories[row]:  # without any gradient so far the formula is 0 / 0
                dense[row] += rule(of_all[row], dense[row], memories[row], i)
    np.testing.assert_allclose(params["table"].weight, dense, rtol=1e-5, atol=5e-6)  # float32
    sums = [memory.get("sum", of_reference.get("start", 0)) for memory in memories]
    np.testing.assert_allclose(state.inner[0].sum_of_squares["table"].weight, sums, rtol=1e-5)  # float32


ADAM = {
    "defaults": (rowwise_adam(0.1), reference.rowwise_adam(0.1)),
    "schedule": (rowwise_adam(schedule), reference.rowwise_adam(schedule)),
    "no_mean": (rowwise_adam(0.1, b1=0.0), reference.rowwise_adam(0.1, b1=0.0)),
    "no_mean_square": (rowwise_adam(0.1, b2=0.0, eps=1e-3), reference.rowwise_adam(0.1, b2=0.0, eps=1e-3)),
    "others": (rowwise_adam(0.1, 0.8, 0.95, 0.1), reference.rowwise_adam(0.1, 0.8, 0.95, 0.1)),
}


def test_rowwise_adam_equals_the_lazy_reference():
    shapes = {(name, (ROWS, DIM)): (ROWS, DIM) for name in ADAM}
    shapes |= {("others", shape): shape for shape in [(ROWS, 2, 2), (ROWS,)]}
    txs = Together({case: ADAM[case[0]][0] for case in shapes})
    params = {case: {"table": Table(weight(shape=shape), padding_idx=3)} for case, shape in shapes.items()}
    expected = {case: reference.Lazy(weight(shape=shape), ADAM[case[0]][1], 3) for case, shape in shapes.items()}
    rng, gradients = np.random.default_rng(3), []
    for _ in range(20):
        ids = rng.integers(0, ROWS, 9)
        values = {shape: rng.normal(size=(9, *shape[1:])).astype(np.float32) for shape in shapes.values()}
        gradients.append({case: {"table": RowGrad(ids, values[shape], rows=ROWS)} for case, shape in shapes.items()})
        for case, shape in shapes.items():
            expected[case].step(ids, values[shape])
    params, _ = txs.run(params, gradients)
    for case in shapes:
        ours, theirs = params[case]["table"].weight, expected[case].weight
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5, err_msg=str(case))  # float32


def test_the_state_of_a_table_is_a_number_a_row():
    params = {"table": Table(weight("bfloat16")), "bias": np.ones(3, np.float32)}
    sums = rowwise_adagrad(0.1, initial_accumulator=0.5).init(params).inner[0].sum_of_squares
    assert (sums["table"].weight.shape, sums["table"].dtype, sums["bias"].shape) == ((ROWS,), jnp.float32, (3,))
    np.testing.assert_array_equal(sums["table"].weight, np.full(ROWS, 0.5))
    adam = rowwise_adam(0.1).init(params).inner[0]
    assert (adam.mean["table"].weight.shape, adam.mean["table"].weight.dtype) == ((ROWS, DIM), jnp.bfloat16)
    assert (adam.mean_square["table"].weight.shape, adam.mean_square["bias"].shape) == ((ROWS,), (3,))


def test_a_zero_gradient_of_a_row_that_is_read_changes_nothing():
    # Adam without eps is 0 / 0 there.
    makes = {"adagrad": rowwise_adagrad(0.1, eps=0.0), "adagrad_eps": rowwise_adagrad(0.1, eps=1e-8)}
    txs = Together({**makes, "adam_eps": rowwise_adam(0.1, eps=1e-8)})
    values = np.zeros((5, DIM), np.float32)
    values[3], values[4] = 1, -1
    of = {"table": RowGrad([1, 2, 2, 3, 3], values, rows=ROWS), "bias": np.zeros((ROWS, DIM), np.float32)}
    params = txs.of_all(lambda: {"table": Table(weight()), "bias": weight()})
    after, states = txs.run(params, [txs.of_all(lambda: of)])
    for name in txs.txs:
        np.testing.assert_array_equal(after[name]["table"].weight, weight(), err_msg=name)
        np.testing.assert_array_equal(after[name]["bias"], weight(), err_msg=name)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[name])), name


# One jitted step for all examples: the values are drawn, the shapes are fixed.
_drawn_tx = rowwise_adagrad(0.25)
_drawn_state = _drawn_tx.init({"table": Table(np.ones((4, 2), np.float32))})
_drawn_step = jax.jit(functools.partial(take_step, _drawn_tx))


@settings(max_examples=50, deadline=None)
@given(arrays(np.int32, 6, elements=st.integers(0, 4)), arrays(np.float32, (6, 2), elements=st.floats(-8, 8, width=16)))
def test_rowwise_adagrad_of_any_gradient_equals_the_formula(ids, values):
    params = {"table": Table(np.ones((4, 2), np.float32))}
    after, _ = _drawn_step(params, _drawn_state, {"table": RowGrad(ids, values, rows=4)})
    weight = np.asarray(after["table"].weight)
    for row in range(4):
        total = values[ids == row].astype(np.float64).sum(0)
        root = np.sqrt((total**2).mean())
        expected = 1 - (0.25 * total / (root + 1e-8) if root else 0)
        np.testing.assert_allclose(weight[row], expected, rtol=1e-5, atol=1e-6)  # float32


LEAVES = {
    "adagrad": (rowwise_adagrad(0.1, 0.2), reference.rowwise_adagrad(0.1, 0.2)),
    "adagrad_schedule": (rowwise_adagrad(schedule), reference.rowwise_adagrad(schedule)),
    "adam": (rowwise_adam(0.1), reference.rowwise_adam(0.1)),
}


def test_ordinary_leaves_have_a_second_moment_a_number():
    tolerances = {"float32": 2e-5, "float16": 0.01, "bfloat16": 0.1}
    cases = [("adagrad", "float32"), ("adagrad_schedule", "float16"), ("adagrad", "bfloat16"), ("adam", "float32")]
    cases += [("adam", "float16"), ("adam", "bfloat16")]
    txs = Together({case: LEAVES[case[0]][0] for case in cases})
    of_table = RowGrad([1], np.ones((1, DIM), np.float32), rows=ROWS)
    biases = [{case: weight(case[1], (5, 2), seed=i + 1) for case in cases} for i in range(10)]
    params = {case: {"table": Table(weight()), "bias": weight(case[1], (5, 2))} for case in cases}
    gradients = [{case: {"table": of_table, "bias": x} for case, x in of.items()} for of in biases]
    params, _ = txs.run(params, gradients)
    for name, dtype in cases:
        # A row of one number is a number.
        expected = reference.Lazy(weight(dtype, (5, 2)).reshape(10), LEAVES[name][1])
        for of in biases:
            expected.step(np.arange(10), of[name, dtype].reshape(10))
        bias = params[name, dtype]["bias"]
        assert bias.dtype == dtype
        tolerance = tolerances[dtype]
        np.testing.assert_allclose(
            np.float64(bias).reshape(10), expected.weight, rtol=tolerance, atol=tolerance, err_msg=f"{name} {dtype}"
        )


def test_rowwise_adam_equals_optax_at_ordinary_leaves():
    ours, theirs = {"bias": weight()}, {"bias": weight()}
    tx, plain = rowwise_adam(0.1), optax.adam(0.1)

    @jax.jit
    def step(ours, state, theirs, plain_state, of):
        updates, plain_state = plain.update(of, plain_state, theirs)
        return *take_step(tx, ours, state, of), optax.apply_updates(theirs, updates), plain_state

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        state, plain_state = tx.init(ours), plain.init(theirs)
        for i in range(10):
            ours, state, theirs, plain_state = step(ours, state, theirs, plain_state, {"bias": weight(seed=i + 1)})
    np.testing.assert_allclose(ours["bias"], theirs["bias"], rtol=1e-5, atol=1e-6)  # float32


def test_rowwise_adagrad_of_rows_of_one_number_is_adagrad():
    values, leaf = weight(shape=(6, 1), seed=5), weight(shape=(6, 1))
    txs = Together({"table": rowwise_adagrad(0.1), "bias": rowwise_adagrad(0.1)})
    of = {"table": {"p": RowGrad(np.arange(6), values, rows=6)}, "bias": {"p": values}}
    params, _ = txs.run({"table": {"p": Table(leaf)}, "bias": {"p": leaf}}, [of] * 3)
    np.testing.assert_allclose(params["table"]["p"].weight, params["bias"]["p"], rtol=1e-6)  # float32


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


def test_defaults_equal_the_formulas():
    assert {k: v.default for k, v in list(inspect.signature(rowwise_adagrad).parameters.items())[1:]} == {
        "initial_accumulator": 0.0,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "tables": None,
    }
    assert {k: v.default for k, v in list(inspect.signature(rowwise_adam).parameters.items())[1:]} == {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "tables": None,
    }
