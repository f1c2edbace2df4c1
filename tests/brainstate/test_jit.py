"""The jit that donates the states a function writes."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import embax


def counter(value=0.0):
    return brainstate.ShortTermState(jnp.full((4,), value))


def test_written_state_is_updated_in_place():
    state = counter()
    before = state.value

    @embax.brainstate.jit
    def step(x):
        state.value = state.value + x
        return state.value.sum()

    assert step(1.0) == 4
    assert before.is_deleted()
    np.testing.assert_array_equal(state.value, np.ones(4))


def test_read_state_is_not_donated():
    state, written = counter(2.0), counter()
    before = state.value

    @embax.brainstate.jit
    def step():
        written.value = written.value + state.value

    step()
    step()
    assert state.value is before
    assert not before.is_deleted()
    np.testing.assert_array_equal(written.value, np.full(4, 4.0))


def test_write_of_some_rows_aliases_the_table():
    embedding = embax.Embedding(1_000, 8, max_norm=1.0)
    analysis = embax.brainstate.jit(embedding).lower(jnp.arange(4)).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == 1_000 * 8 * 4
    assert analysis.temp_size_in_bytes < 1_000 * 8 * 4


def test_eager_call_donates_nothing():
    embedding = embax.Embedding(10, 8, embedding_init=1.0, max_norm=1.0)
    before = embedding.weight.value
    embedding(jnp.arange(4))
    assert not before.is_deleted()
    np.testing.assert_array_equal(before, np.ones((10, 8)))


def test_two_written_states_that_hold_one_array():
    shared = jnp.ones(4)
    first, second = brainstate.ShortTermState(shared), brainstate.ShortTermState(shared)

    @embax.brainstate.jit
    def step():
        first.value = first.value + 1.0
        second.value = second.value * 5.0

    step()
    np.testing.assert_array_equal(first.value, np.full(4, 2.0))
    np.testing.assert_array_equal(second.value, np.full(4, 5.0))


def test_written_state_whose_array_is_an_argument_too():
    state = counter(1.0)

    @embax.brainstate.jit
    def step(x):
        state.value = state.value + x

    x = state.value
    step(x)
    assert not x.is_deleted()
    np.testing.assert_array_equal(state.value, np.full(4, 2.0))


def test_decorator_with_static_arguments():
    state = counter()

    @embax.brainstate.jit(static_argnums=1, static_argnames="mode")
    def step(x, times, mode="add"):
        assert isinstance(times, int)
        state.value = state.value + x * times if mode == "add" else state.value - x * times

    step(jnp.ones(4), 3)
    step(jnp.ones(4), 1, mode="subtract")
    np.testing.assert_array_equal(state.value, np.full(4, 2.0))


def test_negative_static_argnums_are_refused():
    with pytest.raises(ValueError, match=r"static_argnums=...\)` must be 0 or more, got \(-1,\)"):
        embax.brainstate.jit(lambda x: x, static_argnums=-1)


def test_disabled_jit_runs_the_function():
    state = counter()
    seen = []

    @embax.brainstate.jit
    def step():
        state.value = state.value + 1.0
        seen.append(isinstance(state.value, jax.core.Tracer))

    with jax.disable_jit():
        step()
    assert seen == [False]
    np.testing.assert_array_equal(state.value, np.ones(4))


def test_random_state_advances_under_jit():
    embedding = embax.Embedding(10, 2)

    @embax.brainstate.jit
    def step():
        return brainstate.random.rand(2) + 0.0 * embedding([1]).sum()

    assert (np.asarray(step()) != np.asarray(step())).all()


def test_equals_brainstates_own_jit():
    tables = []
    for compile_ in (embax.brainstate.jit, brainstate.transform.jit):
        brainstate.random.seed(0)
        embedding = embax.Embedding(10, 2, max_norm=0.2)

        @compile_
        def step(ids, embedding=embedding):
            gradient, value = brainstate.transform.grad(
                lambda: (embedding(ids) ** 2).sum(), embedding.weight, return_value=True
            )()
            embedding.weight.value -= 0.1 * gradient
            return value

        values = [step(jnp.array([0, 3, i])) for i in range(5)]
        tables.append((embedding.weight.value, values))
    jax.tree.map(np.testing.assert_array_equal, *tables)
