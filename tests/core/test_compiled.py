"""What the compiled program holds: one gather without rules, memory that follows the ids, no needless compilation."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import compiled_as_for_users

from embax import Table, lookup, renormalize
from embax._kernels.library import has

IDS = jax.ShapeDtypeStruct((128,), jnp.int32)
DIM = 64
FEW, MANY = 10**4, 10**6
ALL = {"padding_idx": 0, "max_norm": 1.0, "scale_grad_by_freq": True}
READ = "custom-call" if has("take") else "gather"


def abstract(rows, dtype="float32", **rules):
    return Table(jax.ShapeDtypeStruct((rows, DIM), jnp.dtype(dtype)), **rules)


def operations(program):
    """The names of the operations of an optimised program; those outside of fusions whose result has many rows."""

    def of(text):
        return re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(?\w+\[.*?) ([\w-]+)\(", text, re.MULTILINE)

    text = program.as_text()
    entry = of(text[text.index("\nENTRY ") :])
    large = [name for shape, name in entry if f"[{MANY}," in shape and name != "parameter"]
    return [name for _, name in of(text)], large


def program_text(program):
    """The program without what only says where it came from."""
    text = program.as_text()
    text = text[re.search("^(%|ENTRY )", text, re.MULTILINE).start() :]
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def lookup_jvp(table, tangent, ids):
    return jax.jvp(lambda table: lookup(table, ids), (table,), (tangent,))


def renormalize_jvp(table, tangent, ids):
    return jax.jvp(lambda table: renormalize(table, ids), (table,), (tangent,))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_lookup_without_rules_is_one_gather_in_one_fusion(dtype):
    """A kernel is alone in its program, which XLA then runs without handing it to a thread of its own."""
    names, large = operations(compiled_as_for_users(lookup, abstract(MANY, dtype), IDS))
    assert names.count(READ) == 1
    assert names.count("fusion") == (READ == "gather")
    others = {"gather", "custom-call"} - {READ}
    assert not {"scatter", "sort", "while", "call", "copy", "dot", "conditional", *others} & set(names)
    assert not large


@pytest.mark.parametrize(
    "rules",
    [
        {"padding_idx": 3},
        {"norm_type": 1.0},
        {"scale_grad_by_freq": True},
        {"freeze": True},
        {"out_of_range": "nan"},
        {"padding_idx": -1, "norm_type": 3.0, "scale_grad_by_freq": True, "freeze": True},
    ],
    ids=str,
)
def test_a_rule_that_a_lookup_does_not_use_compiles_to_nothing(rules):
    assert lookup_text(**rules) == lookup_text()


def test_a_rule_that_a_lookup_uses_is_seen_in_its_program():
    assert f"{READ}(" in lookup_text()
    assert lookup_text(max_norm=1.0) != lookup_text()


@functools.cache
def lookup_text(**rules):
    return program_text(compiled_as_for_users(lookup, abstract(FEW, **rules), IDS))


def test_an_unused_rule_of_the_gradient_compiles_to_nothing():
    def gradient(table, ids):
        return jax.grad(lambda table: lookup(table, ids).sum())(table)

    plain = compiled_as_for_users(gradient, abstract(FEW), IDS)
    assert "sort" not in operations(plain)[0]
    assert program_text(compiled_as_for_users(gradient, abstract(FEW, norm_type=3.0), IDS)) == program_text(plain)
    assert "sort" in operations(compiled_as_for_users(gradient, abstract(FEW, scale_grad_by_freq=True), IDS))[0]


def rest(*case):
    return pytest.param(*case, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("function", "dtype", "rules"),
    [
        (lookup_jvp, "float32", {}),
        (lookup_jvp, "float16", ALL),
        (lookup, "bfloat16", {}),
        (lookup, "float32", ALL),
        rest(lookup_jvp, "bfloat16", {}),
        rest(lookup_jvp, "bfloat16", ALL),
        rest(lookup_jvp, "float32", ALL),
        rest(lookup, "float32", {}),
        rest(lookup, "float16", ALL),
        rest(lookup, "bfloat16", ALL),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_memory_of_lookup_follows_the_ids(function, dtype, rules):
    # Of so many rows that a byte for each is more than the program may use.
    table = abstract(MANY, dtype, **rules)
    program = compiled_as_for_users(function, *((table, table, IDS) if function is lookup_jvp else (table, IDS)))
    memory = program.memory_analysis()
    assert not operations(program)[1]
    assert memory.temp_size_in_bytes <= 2 * 128 * DIM * 4
    assert memory.output_size_in_bytes <= 2 * 128 * DIM * 4 + 64


@pytest.mark.parametrize(
    ("function", "dtype"), [(renormalize, "float16"), (renormalize_jvp, "float32"), rest(renormalize, "float32")]
)
def test_memory_of_renormalize_follows_the_ids(function, dtype):
    table = abstract(MANY, dtype, **ALL)
    tables = [table] * (2 if function is renormalize_jvp else 1)
    memory = compiled_as_for_users(function, *tables, IDS, donate=range(len(tables))).memory_analysis()
    assert memory.alias_size_in_bytes == len(tables) * MANY * DIM * table.dtype.itemsize
    assert memory.temp_size_in_bytes <= 4 * 128 * DIM * 4


@pytest.mark.parametrize("dtype", ["bfloat16", rest("float8_e4m3fn"), rest("float32")])
def test_memory_of_renormalize_grows_with_rows_only_if_a_scatter_does(dtype):
    """On jax 0.10's CPU backend a bfloat16 scatter converts the whole table; renormalize adds nothing to that.

    A kernel converts no table of a dtype that it knows.
    """

    def scatter(weight, ids, rows):
        return weight.at[ids].set(rows, mode="drop")

    def growth(function, *args_of):
        few, many = (
            compiled_as_for_users(function, *(arg(rows) for arg in args_of), donate=0).memory_analysis()
            for rows in (FEW, MANY)
        )
        return many.temp_size_in_bytes - few.temp_size_in_bytes

    updates = jax.ShapeDtypeStruct((128, DIM), jnp.dtype(dtype))
    of_scatter = growth(scatter, lambda rows: abstract(rows, dtype).weight, lambda _: IDS, lambda _: updates)
    of_renormalize = growth(renormalize, lambda rows: abstract(rows, dtype, **ALL), lambda _: IDS)
    by_kernel = has("put") and dtype != "float8_e4m3fn"
    assert of_renormalize == (0 if by_kernel else of_scatter)
    if dtype == "float32":
        assert of_scatter == 0


@pytest.mark.parametrize(("stored", "read"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("int8", "float32")])
def test_dtype_casts_the_rows_and_never_the_table(stored, read):
    program = compiled_as_for_users(lambda table, ids: lookup(table, ids, dtype=read), abstract(MANY, stored), IDS)
    assert program.memory_analysis().temp_size_in_bytes <= 128 * DIM * 4
    assert not operations(program)[1]


def test_memory_of_a_lookup_under_vmap_follows_the_ids():
    lanes = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    read = jax.vmap(lookup, in_axes=(None, 0))
    memory = compiled_as_for_users(read, abstract(MANY, **ALL), lanes).memory_analysis()
    assert memory.temp_size_in_bytes <= 2 * 128 * DIM * 4


@pytest.fixture
def compilations(caplog):
    """The names of what XLA compiles from here on."""
    with jax.log_compiles(True), caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()]


@pytest.mark.parametrize("rules", [{}, {"out_of_range": "nan"}, ALL], ids=["none", "nan", "all"])
def test_repeated_lookups_compile_once(compilations, rules):
    ids = np.arange(11)
    for _ in range(4):
        lookup(Table(jnp.ones((13, 3)), **rules), ids)
    reads = [message for message in compilations() if "(read)" in message]
    assert len(reads) == 1


def test_a_loop_of_lookups_and_gradients_compiles_nothing_after_its_first_turn(compilations):
    table = Table(jnp.ones((17, 3)), **ALL)
    step = jax.jit(jax.grad(lambda table, ids: lookup(table, ids).sum()))
    ids = [np.arange(i, i + 5) for i in range(4)]
    step(table, ids[0]), lookup(table, ids[0]), renormalize(table, ids[0])
    before = len(compilations())
    assert before
    for i in ids:
        step(table, i), lookup(table, i), renormalize(table, i)
    assert len(compilations()) == before
