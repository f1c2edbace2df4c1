"""Compiled bags: no array of the pooled rows, memory that depends on the ids, nothing compiles twice."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import Ragged, Table, embedding_bag

BAGS, LENGTH, DIM = 1024, 16, 64
IDS = BAGS * LENGTH
ROWS_OF_IDS = IDS * DIM * 4  # bytes, were the rows gathered
# With so many rows, even one bit for each row would exceed the bounds below.
MANY = 10**9
exhaustive = pytest.mark.exhaustive

MATRIX = jax.ShapeDtypeStruct((BAGS, LENGTH), jnp.int32)
RAGGED = jax.eval_shape(lambda: Ragged(jnp.zeros(IDS, jnp.int32), np.linspace(0, IDS, BAGS + 1).astype(int)))
RULES = {"none": {}, "padding": {"padding_idx": 0}, "norm": {"max_norm": 1.0, "padding_idx": 0}}


def table(dtype="float32", **rules):
    return Table(jax.ShapeDtypeStruct((MANY, DIM), jnp.dtype(dtype)), **rules)


def temporary(function, *args, donate=()):
    """The bytes that a program needs besides its arguments and results."""
    return jax.jit(function, donate_argnums=donate).lower(*args).compile().memory_analysis().temp_size_in_bytes


def with_others(names, main, all_cases):
    """Parameters of which all but the main ones are exhaustive."""
    assert {*main} <= {*all_cases}
    return pytest.mark.parametrize(
        names, [pytest.param(*case, marks=[] if case in main else exhaustive) for case in all_cases]
    )


@with_others(
    ("mode", "rules", "weights"),
    [
        ("sum", "none", "plain"),
        ("mean", "padding", "weighted"),
        ("sqrtn", "norm", "weighted"),
    ],
    [*itertools.product(["sum", "mean", "sqrtn"], RULES, ["plain", "weighted"])],
)
def test_memory_of_bags_of_one_length_follows_the_bags(mode, rules, weights):
    pool = functools.partial(embedding_bag, mode=mode)
    weights = jax.ShapeDtypeStruct(MATRIX.shape, jnp.float32) if weights == "weighted" else None
    # Some integers an id; with a norm, two blocks of rows: one read, and one clipped.
    blocks = 2 * 4096 * DIM * 4 if rules == "norm" else 0
    assert temporary(pool, table(**RULES[rules]), MATRIX, weights) <= blocks + 4 * IDS * 4 < ROWS_OF_IDS * 0.6


@with_others("mode", [("sqrtn",)], [("sum",), ("mean",), ("sqrtn",)])
def test_memory_of_ragged_bags_follows_their_pieces(mode):
    pool = functools.partial(embedding_bag, mode=mode)
    pieces = IDS // 16 + BAGS
    # A vector for each piece; a few integers for each of its places.
    most = pieces * DIM * 4 + 8 * (16 * pieces) * 4
    assert temporary(pool, table(padding_idx=0), RAGGED) <= most < ROWS_OF_IDS / 2


@pytest.mark.parametrize("layout", ["one_bag", "long_bags"])
def test_memory_of_long_bags_does_not_grow_with_their_rows(layout):
    ids = jax.ShapeDtypeStruct((1, IDS) if layout == "one_bag" else (16, IDS // 16), jnp.int32)
    assert temporary(functools.partial(embedding_bag, mode="sum"), table(), ids) < ROWS_OF_IDS / 2


_LOW = ["bfloat16", "float16", "float8_e4m3fn"]


@with_others(
    ("dtype", "layout", "rules"),
    [
        ("bfloat16", "matrix", "none"),
        ("float16", "ragged", "norm"),
        ("float8_e4m3fn", "matrix", "none"),
    ],
    [*itertools.product(_LOW, ["matrix", "ragged"], ["none", "norm"])],
)
def test_low_precision_needs_no_copy_of_the_table(dtype, layout, rules):
    # XLA's CPU backend has float16; of the others, the rows that are pooled are in memory, up to 16 a piece.
    most = (0.8 if dtype == "float16" else 3.5) * ROWS_OF_IDS
    pool, bags = functools.partial(embedding_bag, mode="sum"), MATRIX if layout == "matrix" else RAGGED
    assert temporary(pool, table(dtype, **RULES[rules]), bags) < most


@with_others(
    ("mode", "layout"),
    [("mean", "ragged"), ("max", "matrix")],
    [*itertools.product(["mean", "max"], ["matrix", "ragged"])],
)
def test_memory_of_a_training_step_follows_the_ids(mode, layout):
    tx, params = embax.optim.lift(optax.adagrad(0.1)), table(padding_idx=0)

    def loss(params, bags):
        return jnp.square(embedding_bag(params, bags, mode=mode)).mean()

    def step(params, state, bags):
        updates, state = tx.update(embax.grad(loss, on_dense="error")(params, bags), state, params)
        return embax.apply_updates(params, updates), state

    bags = MATRIX if layout == "matrix" else RAGGED
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        memory = temporary(step, params, jax.eval_shape(tx.init, params), bags, donate=(0, 1))
    assert memory < 16 * ROWS_OF_IDS


@pytest.fixture
def compilations(caplog):
    """The names of what XLA compiles from here on."""
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]


def test_batches_of_one_capacity_compile_once(compilations):
    batches = [Ragged.from_lists(lists).pad_to(7) for lists in ([[1, 2], [3]], [[], []], [[4] * 3, [5] * 4])]
    params = Table(np.ones((11, 3), np.float32), padding_idx=0, out_of_range="nan")

    def loss(table, bags):
        return embedding_bag(table, bags, mode="mean").sum()

    step = jax.jit(embax.value_and_grad(loss))

    def run(bags):
        step(params, bags)
        embedding_bag(params, bags, mode="max")

    run(batches[0])
    before = len(compilations())
    assert before
    for bags in batches:
        run(bags)
    assert len(compilations()) == before


FORMS = {
    "matrix": (np.array([[1, 2, 0], [3, -1, 2]]), np.ones((2, 3), np.float32)),
    "ragged": (Ragged([1, 2, 0, 3, 3, 9], [0, 2, 2, 5]), np.ones(6, np.float32)),
}


@pytest.mark.parametrize("bags", FORMS)
def test_a_call_outside_of_jit_is_one_program(compilations, bags):
    """Also where rows are clipped, which is done in a loop."""
    bags, weights = FORMS[bags]
    table = Table(np.ones((11, 3), np.float32), padding_idx=0, max_norm=1.5, scale_grad_by_freq=True)
    calls = [("mean", jnp.asarray(weights)), ("max", None)]
    for _ in range(2):
        for mode, weights in calls:
            embedding_bag(table, bags, weights, mode)
        programs = [message for message in compilations() if "(stage)" not in message]  # JAX's copy of an array
        assert len(programs) == len(calls)


@pytest.mark.parametrize("by_freq", [False, pytest.param(True, marks=exhaustive)])
def test_gradients_outside_of_jit_compile_nothing_after_the_first(compilations, by_freq):
    table = Table(np.ones((11, 3), np.float32), padding_idx=0, max_norm=1.5, scale_grad_by_freq=by_freq)
    bags = FORMS["matrix"][0]
    gradient = embax.grad(lambda table: embedding_bag(table, bags, mode="max").sum())
    gradient(table)
    before = len(compilations())
    assert before
    gradient(table)
    assert len(compilations()) == before
