"""Uses of a weight that are no reads of rows: the gradient is dense, whole, and announced."""

import functools
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WEIGHT, assert_same_gradient
from closeness import FLOAT32
from leaks import checking_leaks

import embax
from embax import DenseGradientWarning, RowGrad, Table, lookup, renormalize

IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


def energy(table, ids=IDS):
    return jnp.sin(lookup(table, ids)).sum()


# ---- Functions made once, so that JAX finds what it has traced and compiled of them in its caches the second time.


jitted = jax.jit(energy)
rematerialized = jax.checkpoint(energy)
lanes_of_tables = jax.vmap(energy)


def twice(weight):
    return jnp.stack([weight, 2 * weight])


def shrinking(table):
    def step(table, ids):
        return jax.tree.map(lambda weight: 0.5 * weight, table), energy(table, ids)

    return jax.lax.scan(step, table, IDS)[1].sum()


def penalty_in_scan(table):
    return jax.lax.scan(lambda sum_, ids: (sum_ + energy(table, ids) * table.weight.sum(), None), 0.0, IDS)[0]


@jax.custom_vjp
def with_gradient_of_its_own(table):
    return energy(table)


with_gradient_of_its_own.defvjp(lambda table: (energy(table), table), lambda table, _: (table,))


def scaled_in_a_branch(table):
    halved = jax.lax.cond(
        IDS[0, 0] > 0, lambda table: jax.tree.map(lambda w: 0.5 * w, table), lambda table: table, table
    )
    return energy(halved)


# Name: a loss; and what the warning says.
USES = {
    "vmap_tables": (lambda t: lanes_of_tables(jax.tree.map(twice, t), IDS[:2]).sum(), "with all rows of its weight"),
    "arithmetic": (lambda t: (t.weight**2).sum(), "computes with all rows of its weight"),
    "sum": (lambda t: energy(t) * t.weight.sum(), "sums over all rows of its weight"),
    "product": (lambda t: (jnp.ones((1, 3)) @ t.weight.T).sum(), "with all rows of its weight|by its whole weight"),
    "attend": (lambda t: (lookup(t, [1, 2]) @ t.weight.T).max(), "with all rows of its weight|by its whole weight"),
    "columns": (lambda t: t.weight[:, 1].sum(), "takes a part of its weight that is no list of rows"),
    "scan_changes_it": (shrinking, "changes its weight from step to step of a loop"),
    "penalty_in_scan": (penalty_in_scan, "sums over all rows"),
    "cond_changes_it": (scaled_in_a_branch, "changes its weight in a branch"),
    "renormalized_and_used": (lambda t: renormalize(t, [1, 2]).weight.sum() + energy(t), "sums over all rows"),
    "residual": (with_gradient_of_its_own, "computes with all rows of its weight"),
    "checkpoint": (jax.checkpoint(lambda t: energy(t) * t.weight.sum()), "sums over all rows"),
    "lookup_and_penalty": (lambda t: energy(t, [1, 1, 2]) + 0.1 * (t.weight**2).sum(), "computes with all rows"),
}  # fmt: skip


CLIPPED = {"vmap_tables", "checkpoint", "renormalized_and_used"}


def warned(function, *args, match, wrap=lambda f: f, **options):
    """The gradient by embax, and that it has been announced once."""
    with pytest.warns(DenseGradientWarning, match=match) as record:
        gradient = wrap(embax.grad(function, **options))(*args)
    assert len(record) == 1
    return gradient


def traced(function):
    """The shapes that a function returns."""
    return functools.partial(jax.eval_shape, function)


def by_embax_and_jax(cases):
    """The values and gradients of named cases `(function, table)`, by embax and by JAX, all in one program."""
    grads = functools.partial(embax.value_and_grad, on_dense="allow"), jax.value_and_grad

    @jax.jit
    def both(tables):
        return {name: [grad(cases[name][0])(table) for grad in grads] for name, table in tables.items()}

    return both({name: table for name, (_, table) in cases.items()})


def table_of(name):
    # Rules make a program larger.
    return Table(WEIGHT, padding_idx=2, max_norm=1.5 if name in CLIPPED else None)


@functools.cache
def gradients_of_uses():
    return by_embax_and_jax({name: (function, table_of(name)) for name, (function, _) in USES.items()})


@pytest.mark.parametrize("name", USES)
def test_gradient_is_dense_whole_and_announced(name):
    function, match = USES[name]
    table = table_of(name)
    (value, gradient), (expected_value, expected) = gradients_of_uses()[name]
    assert np.asarray(expected.weight).any()
    np.testing.assert_allclose(value, expected_value, **FLOAT32)
    assert_same_gradient(gradient, expected, **FLOAT32)
    # Once more, now that JAX finds what it has traced before in its caches.
    for again in gradient, warned(function, table, match=match, wrap=traced):
        assert isinstance(again, Table)
        assert repr(again) == repr(table)


def test_other_tables_stay_sparse():
    params = {"a": [Table(WEIGHT), Table(WEIGHT, padding_idx=2)], "b": Table(2 * WEIGHT), "c": jnp.ones(3)}

    def function(params):
        (first, second), third = params["a"], params["b"]
        return (
            energy(first) * jitted(second) * second.weight.sum()
            + energy(third, [1])
            + energy(second) * params["c"].sum()
        )

    match = r"gradient of argument 0\['a'\]\[1\], Table\(float32\[7,3\], padding_idx=2\)"
    both = jax.jit(lambda params: [grad(function)(params) for grad in (embax.grad, jax.grad)])
    with pytest.warns(DenseGradientWarning, match=match) as record:
        gradient, expected = both(params)
    assert len(record) == 1
    assert [isinstance(g, RowGrad) for g in (*gradient["a"], gradient["b"])] == [True, False, True]
    assert_same_gradient(gradient, expected, **FLOAT32)
    updated = jax.eval_shape(embax.apply_updates, params, gradient)
    assert jax.tree.structure(updated) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("argnums", "name"), [(1, "argument 1"), (-1, "argument -1|argument 1"), ((0, 1), "argument 1")], ids=str
)
def test_the_warning_names_the_argument_and_comes_from_the_caller(argnums, name):
    def function(table, params):
        return energy(table) + params["t"][0].weight.sum()

    def of(*args):
        return embax.value_and_grad(function, argnums)(*args)

    with pytest.warns(DenseGradientWarning, match=rf"gradient of ({name})\['t'\]\[0\], .* is dense, 7 rows") as record:
        jax.eval_shape(of, Table(WEIGHT), {"t": (Table(WEIGHT),)})
    assert [warning.filename for warning in record] == [__file__]


def test_warning_names_the_operation_and_its_line():
    def penalty(table):
        return energy(table) + table.weight.sum()  # here

    line = (
        Path(__file__).read_text().splitlines().index("        return energy(table) + table.weight.sum()  # here") + 1
    )
    match = rf"{re.escape(__file__)}:{line}\S* \(.*penalty\)\. Compute with rows that embax\.lookup reads, or expect it"
    warned(penalty, Table(WEIGHT), match=match, wrap=traced)


@pytest.mark.parametrize("name", ["checkpoint", "vmap_tables", "lookup_and_penalty"])
def test_on_dense_chooses(name):
    function, table = USES[name][0], Table(WEIGHT)
    with pytest.raises(ValueError, match=r"gradient of argument 0, Table\(float32\[7,3\]\), is dense"):
        jax.eval_shape(embax.grad(function, on_dense="error"), table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allowed = functools.partial(embax.grad, on_dense="allow")
        gradient, expected = jax.jit(lambda table: [grad(function)(table) for grad in (allowed, jax.grad)])(table)
        jax.eval_shape(embax.grad(energy, on_dense="error"), table)
    assert_same_gradient(gradient, expected, **FLOAT32)
    with pytest.raises(ValueError, match=r"on_dense=.*must be one of 'error', 'warn', 'allow', got 'silent'"):
        embax.grad(function, on_dense="silent")


def test_a_dense_table_keeps_its_aux_and_its_renormalized_values():
    def function(table):
        new = renormalize(table, [6, 1])
        return (new.weight**2).sum() + energy(new), (new, "name")

    @jax.jit
    def both(table):
        (gradient, (new, name)), (expected, (expected_new, _)) = (
            grad(function, has_aux=True)(table) for grad in (embax.grad, jax.grad)
        )
        assert name == "name"
        return (gradient, new), (expected, expected_new)

    with pytest.warns(DenseGradientWarning, match="argument 0"):
        (gradient, new), (expected, expected_new) = both(Table(WEIGHT, max_norm=1.5))
    assert_same_gradient(gradient, expected, **FLOAT32)
    np.testing.assert_array_equal(new.weight, expected_new.weight)


# A check for leaks keeps JAX from using what it has traced before, so that the simplest program takes long.
LEAKS = ("penalty_in_scan",)
MORE_LEAKS = "checkpoint", "attend"


@pytest.mark.parametrize("name", [*LEAKS, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE_LEAKS)])
def test_no_tracer_leaks(name):
    # Which only tracing can do; checked eagerly, every operation would be compiled anew.
    with checking_leaks():
        jax.eval_shape(embax.value_and_grad(USES[name][0], on_dense="allow"), Table(WEIGHT))


def test_no_tracer_leaks_from_a_sparse_gradient():
    def function(table, ids):
        table = renormalize(table, ids)
        return energy(table, ids), (table, ids)

    table = Table(WEIGHT, max_norm=1.5)
    with checking_leaks():
        jax.eval_shape(lambda ids: embax.value_and_grad(function, has_aux=True)(table, ids), IDS)
        jax.eval_shape(embax.value_and_grad(energy), Table(WEIGHT))
