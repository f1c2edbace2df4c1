"""What compiled bags hold: no array of the pooled rows, memory that follows the ids, no needless compilation."""

import functools
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
FEW, MANY = 10**4, 10**6
MODES = ["sum", "mean", "sqrtn"]

MATRIX = jax.ShapeDtypeStruct((BAGS, LENGTH), jnp.int32)
RAGGED = jax.eval_shape(lambda: Ragged(jnp.zeros(IDS, jnp.int32), np.linspace(0, IDS, BAGS + 1).astype(int)))
RULES = {"none": {}, "padding": {"padding_idx": 0}, "norm": {"max_norm": 1.0, "padding_idx": 0}}


def table(rows, dtype="float32", **rules):
    return Table(jax.ShapeDtypeStruct((rows, DIM), jnp.dtype(dtype)), **rules)


# Memory is assigned before machine code is made, which need not be good.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def temporary(function, *args, donate=()):
    program = jax.jit(function, donate_argnums=donate).lower(*args).compile(compiler_options=_QUICK)
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("mode", MODES)
def test_memory_of_bags_of_one_length_is_that_of_the_bags(mode, rules, weighted):
    pool = functools.partial(embedding_bag, mode=mode)
    weights = jax.ShapeDtypeStruct(MATRIX.shape, jnp.float32) if weighted else None
    few, many = (temporary(pool, table(rows, **rules), MATRIX, weights) for rows in (FEW, MANY))
    # Some integers an id; with a norm, two blocks of rows: one read, and one clipped.
    blocks = 2 * 4096 * DIM * 4 if "max_norm" in rules else 0
    assert few == many <= blocks + 4 * IDS * 4 < ROWS_OF_IDS * 0.6


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_ragged_bags_is_that_of_their_pieces(mode):
    pool = functools.partial(embedding_bag, mode=mode)
    few, many = (temporary(pool, table(rows, padding_idx=0), RAGGED) for rows in (FEW, MANY))
    pieces = IDS // 16 + BAGS
    # A vector for each piece; a few integers for each of its places.
    assert few == many <= pieces * DIM * 4 + 8 * (16 * pieces) * 4 < ROWS_OF_IDS / 2


@pytest.mark.parametrize("layout", ["one_bag", "long_bags"])
def test_memory_of_long_bags_does_not_grow_with_their_rows(layout):
    shape = (1, IDS) if layout == "one_bag" else (16, IDS // 16)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    assert temporary(embedding_bag, table(FEW), ids) == temporary(embedding_bag, table(MANY), ids) < ROWS_OF_IDS / 2


@pytest.mark.parametrize("rules", [{}, RULES["norm"]], ids=["none", "norm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision_needs_no_copy_of_the_table(dtype, rules):
    for bags in MATRIX, RAGGED:
        few, many = (temporary(embedding_bag, table(rows, dtype, **rules), bags) for rows in (FEW, MANY))
        # XLA's CPU backend has float16; of the others, the rows that are pooled are in memory, up to 16 a piece.
        assert few == many < (0.8 if dtype == "float16" else 3.5) * ROWS_OF_IDS


@pytest.mark.parametrize("bags", [MATRIX, RAGGED], ids=["matrix", "ragged"])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_memory_of_a_training_step_follows_the_ids(mode, bags):
    tx = embax.optim.lift(optax.adagrad(0.1))

    def loss(params, bags):
        return jnp.square(embedding_bag(params, bags, mode=mode)).mean()

    def step(params, state, bags):
        updates, state = tx.update(embax.grad(loss, on_dense="error")(params, bags), state, params)
        return embax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        memory = []
        for rows in FEW, MANY:
            params = table(rows, padding_idx=0)
            state = jax.eval_shape(tx.init, params)
            memory.append(temporary(step, params, state, bags, donate=(0, 1)))
    assert memory[0] == memory[1] < 16 * ROWS_OF_IDS


@pytest.fixture
def compilations(caplog):
    """The names of what XLA compiles from here on."""
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_batches_of_one_capacity_compile_once(compilations, mode):
    batches = [Ragged.from_lists(lists).pad_to(7) for lists in ([[1, 2], [3]], [[], []], [[4] * 3, [5] * 4])]
    params = Table(jnp.ones((11, 3)), padding_idx=0, out_of_range="nan")

    def loss(table, bags):
        return embedding_bag(table, bags, mode=mode).sum()

    step = jax.jit(embax.value_and_grad(loss))
    step(params, batches[0]), embedding_bag(params, batches[0], mode=mode)
    before = len(compilations())
    assert before
    for bags in batches:
        step(params, bags), embedding_bag(params, bags, mode=mode)
    assert len(compilations()) == before
