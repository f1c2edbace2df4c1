"""The programs that softmax_cross_entropy compiles to: their memory, and their steps."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from embax import Table, softmax_cross_entropy

TOKENS, DIM, CHUNK = 256, 64, 512
# With so many rows, anything stored for each row, or for each block of rows, shows in the memory.
MANY = 2**30
REST = MANY + 77  # with a last block that is not full
RULES = {"none": {}, "all": {"padding_idx": 3, "max_norm": 1.0}, "freeze": {"freeze": True}}


def forward(table, x, labels):
    return softmax_cross_entropy(table, x, labels, chunk=CHUNK)


def with_gradient(table, x, labels):
    return jax.value_and_grad(lambda table, x: forward(table, x, labels).sum(), argnums=(0, 1))(table, x)


def with_terms(table, x, labels):
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "mask_padding": True, "reduction": "mean"}
    return jax.value_and_grad(
        lambda table, x: softmax_cross_entropy(table, x, labels, chunk=CHUNK, **options), argnums=(0, 1)
    )(table, x)


@functools.cache
def compiled(function, rows, dtype, rules):
    table = Table(jax.ShapeDtypeStruct((rows, DIM), dtype), **RULES[rules])
    x, labels = jax.ShapeDtypeStruct((TOKENS, DIM), dtype), jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    return jax.jit(function).lower(table, x, labels).compile()


PROGRAMS = [
    (forward, REST, "float8_e4m3fn", "all"),
    (with_gradient, MANY, "float32", "none"),
    (with_gradient, REST, "bfloat16", "all"),
    (with_terms, REST, "float32", "all"),
]
OTHERS = [
    program
    for function in (forward, with_gradient, with_terms)
    for rows in (MANY, REST)
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn")
    for rules in ("none", "all")
    if (program := (function, rows, dtype, rules)) not in PROGRAMS
]


@pytest.mark.parametrize(
    ("function", "rows", "dtype", "rules"),
    [*PROGRAMS, *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in OTHERS)],
)
def test_temporary_memory_follows_the_block_and_not_the_rows(function, rows, dtype, rules):
    memory = compiled(function, rows, dtype, rules).memory_analysis()
    # Three blocks of logits; one byte for each block of rows would be as much as four.
    assert memory.temp_size_in_bytes < 3 * CHUNK * TOKENS * 4


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(with_terms, "float32"), (with_gradient, "bfloat16"), (forward, "float8_e4m3fn")],
)
def test_no_step_copies_the_table(function, dtype):
    text, shape = compiled(function, REST, dtype, "all").as_text(), rf"[{REST},{DIM}]"
    assert shape in text
    steps = r"(?:copy|convert|bitcast-convert|concatenate|pad)\("
    assert not re.findall(re.escape(shape) + r"[^ ]* " + steps, outside_fusions(text))


def outside_fusions(text):
    """The computations of a program that hold what is written to memory."""
    parts = re.split(r"\n(?=%|ENTRY )", text)
    return "\n".join(part for part in parts if "fused_computation" not in part.split("(")[0])


def test_the_gradient_of_a_frozen_table_costs_nothing():
    frozen, trained = (compiled(with_gradient, MANY, "float32", rules).as_text() for rules in ("freeze", "none"))
    assert frozen.count(" dot(") == trained.count(" dot(") - 1 == 3
