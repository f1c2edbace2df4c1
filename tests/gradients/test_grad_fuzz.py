"""Random programs of nested transformations: value and gradients are those of JAX, and rows where nothing else is read.

12 programs by `make test`, 1,000 by `make fuzz-programs`.
"""

import functools
import os

import jax
import jax.numpy as jnp
from cases import dense
from closeness import assert_close_to_largest
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st
from programs import DENSE, HEADS, ROWS, UNROLLED, built, leaves_of, nodes_of, on_two_devices, programs, tables

import embax
from embax import RowGrad

NUMBER = int(os.environ.get("PROGRAMS", "12"))


@settings(
    max_examples=NUMBER,
    deadline=None,
    database=None,
    derandomize=NUMBER <= 30,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(program=programs(), sharded=st.integers(0, 9), ids=st.lists(st.integers(0, 99), min_size=4, max_size=4))
@example(("inner value_and_grad", ("inner gradient", ("map", ("cross entropy", 0)))), 1, [0, 0, 2, 0])  # far from 0
@example(("switch", ("slice", 0), ("attend", 0)), 0, [0, 0, 0, 0])
def test_random_programs(program, sharded, ids):
    check(program, sharded == 0, ids)


def check(program, sharded, ids):
    """Compare the gradients of a program with those of JAX."""
    loss = expected = built(program)
    # JAX forgets a custom_jvp of the program itself in second derivatives through a scan, but in no loop of Python.
    if any(node.startswith("inner") for node in nodes_of(program)) and "custom_jvp" not in nodes_of(program):
        expected = built(program, UNROLLED)
    names, of_tables = [name for name, _ in leaves_of(program)], tables()
    followed = not DENSE.keys() & set(names)
    # Inside of a shard_map, an inner gradient is summed over devices.
    if sharded and not any(node.startswith("inner") for node in nodes_of(program)):
        chooses = bool({"cond", "switch"} & set(nodes_of(program)))
        loss, expected = on_two_devices(loss, chooses)
        followed &= not (chooses and "slice" in names)  # a slice of an array that varies over devices stays dense
    args = of_tables, jnp.asarray(ids), jnp.float32(0.7)
    # Compiled functions, which JAX traces once for what it can do, and for the comparison.
    of_jax = {function: jax.jit(jax.value_and_grad(function, (0, 2))) for function in {loss, expected}}
    assume(all(jax_can(function, args) for function in of_jax.values()))
    ours = embax.value_and_grad(loss, (0, 2), on_dense="error" if followed else "allow")

    @jax.jit
    def both(t, ids, x):
        value, (gradients, of_x) = ours(t, ids, x)
        return (value, of_x, dense(gradients)), dense(of_jax[expected](t, ids, x)), gradients

    (value, of_x, gradients), (theirs, (their_gradients, their_x)), rows = both(*args)
    close(value, theirs)
    close(of_x, their_x)
    for one, other in zip(gradients, their_gradients, strict=True):
        close(one, other)
    note(f"{nodes_of(program)}: {rows}")
    if followed and not HEADS.keys() & set(names) and reads_of(program) < STACKED:
        assert all(isinstance(one, RowGrad) for one in rows)


def jax_can(gradient, args):
    """Whether JAX itself can differentiate a program: branches may differ in their types."""
    try:
        jax.eval_shape(gradient, *args)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


STACKED = ROWS * 3 * 4 // (3 * 4 + 4)  # ids whose rows take as much as a gradient


def reads_of(program):
    """More ids than a scan of a program stacks: each node runs what is in it three times at most."""
    return 8 * 3 ** len(nodes_of(program))


# Sums in another order, of up to a few hundred float32 numbers around 1, which may cancel.
close = functools.partial(assert_close_to_largest, tolerance=1e-5, rtol=1e-4)
