"""Uses of a weight that no tape can follow: the gradient is dense, whole, and announced."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WEIGHT, assert_same_gradient
from jax.sharding import AxisType, PartitionSpec
from leaks import checking_leaks

import embax
from embax import DenseGradientWarning, RowGrad, Table, _tape, lookup, renormalize

FLOAT32 = {"rtol": 5e-6, "atol": 5e-6}
IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


def energy(table, ids=IDS):
    return jnp.sin(lookup(table, ids)).sum()


# ---- Functions made once, so that JAX finds what it has traced and compiled of them in its caches the second time.


def step(carry, ids):
    table, sum_ = carry
    return (table, sum_ + energy(table, ids)), lookup(table, ids[0])


@jax.custom_jvp
def doubled(table):
    return 2 * energy(table)


@doubled.defjvp
def doubled_jvp(primals, tangents):
    return jax.jvp(lambda table: 2 * energy(table), primals, tangents)


@jax.custom_vjp
def tripled(table):
    return 3 * energy(table)


tripled.defvjp(
    lambda table: (3 * energy(table), table),
    lambda table, factor: (jax.tree.map(lambda leaf: 3 * factor * leaf, jax.grad(energy)(table)),),
)

jitted = jax.jit(energy)
inlined = jax.jit(energy, inline=True)
rematerialized = jax.checkpoint(energy)
lanes_of_ids = jax.vmap(energy, (None, 0))
lanes_of_tables = jax.vmap(energy)
branches = [lambda table: 2 * energy(table), energy]
mesh_spec = PartitionSpec("x"), PartitionSpec()


def sum_of_squares(table, on_dense="error"):
    """A loss of the gradient of another."""
    return embax.global_norm(embax.grad(energy, on_dense=on_dense)(table)) ** 2


@functools.cache
def of_shards(check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def of_shard(table, ids):
        return jax.lax.psum(energy(table, ids), "x")

    specs = {"in_specs": mesh_spec[::-1], "out_specs": mesh_spec[1]}
    return jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs)


def closed_over_by_jit(table):
    return jax.jit(lambda ids: energy(table, ids))(IDS)


def while_(table):
    def body(state):
        k, sum_ = state
        return k + 1, sum_ + energy(jax.lax.stop_gradient(table), jnp.asarray(IDS)[k])

    return energy(table) * jax.lax.while_loop(lambda state: state[0] < 3, body, (0, 0.0))[1]


def in_loop(table):
    return jax.lax.fori_loop(0, 3, lambda k, sum_: sum_ + energy(table, jnp.asarray(IDS)[k]), 0.0)


def twice(weight):
    return jnp.stack([weight, 2 * weight])


def rounded(weight):
    return weight.astype(jnp.bfloat16).astype(jnp.float32)


# Name: a loss; and a word that the warning has to hold.
USES = {
    "scan_carry": (lambda t: jax.lax.scan(step, (t, 0.0), IDS)[0][1], "`scan`|transformation"),
    "scan_closure": (lambda t: jax.lax.scan(lambda c, ids: (c + energy(t, ids), None), 0.0, IDS)[0], "transformation"),
    "scan_indexes": (lambda t: jax.lax.scan(lambda c, k: (c + t.weight[k].sum(), None), 0.0, IDS[0])[0], "`scan`"),
    "map": (lambda t: jax.lax.map(lambda ids: energy(t, ids), IDS).sum(), "transformation"),
    "fori_loop": (in_loop, "transformation"),
    "while_loop": (while_, "."),
    "cond": (lambda t: jax.lax.cond(IDS[0, 0] > 0, *branches, t), "cond|transformation"),
    "cond_closure": (lambda t: jax.lax.cond(True, lambda: energy(t), lambda: 0.0), "transformation"),
    "switch": (lambda t: jax.lax.switch(1, branches, t), "cond|transformation"),
    "vmap_ids": (lambda t: lanes_of_ids(t, IDS).sum(), "transformation"),
    "vmap_tables": (lambda t: lanes_of_tables(jax.tree.map(twice, t), IDS[:2]).sum(), "weight by"),
    "jit": (jitted, "`jit`|transformation"),
    "jit_inline": (inlined, "`jit`|transformation|custom_jvp_call"),
    "jit_closure": (closed_over_by_jit, "transformation"),
    "checkpoint": (rematerialized, "checkpoint|remat|transformation"),
    "custom_jvp": (doubled, "custom_jvp_call|transformation"),
    "custom_vjp": (tripled, "custom_vjp_call|transformation"),
    "inner_grad": (lambda t: jnp.sin(jax.grad(energy)(t).weight).sum(), "."),
    "inner_jvp": (lambda t: jax.jvp(energy, (t,), (jax.tree.map(jnp.ones_like, t),))[1], "."),
    "inner_linearize": (lambda t: jax.linearize(energy, t)[0], "."),
    "inner_embax_grad": (sum_of_squares, "."),
    "inner_embax_grad_closure": (lambda t: embax.grad(lambda s: s * energy(t))(2.0), "."),
    "shard_map": (lambda t: of_shards(True)(t, IDS[:2, :2]), "shard_map|transformation"),
    "shard_map_unchecked": (lambda t: of_shards(False)(t, IDS[:2, :2]), "shard_map|transformation"),
    "cast": (lambda t: energy(jax.tree.map(rounded, t)), "`convert_element_type`"),
    "scale": (lambda t: energy(jax.tree.map(lambda w: 2 * w, t)), "`mul`, which is no lookup"),
    "slice": (lambda t: energy(Table(t.weight[:5]), [4, 1]), "`slice`|`dynamic_slice`|`gather`"),
    "arithmetic": (lambda t: (t.weight**2).sum(), "by `.*`, which is no lookup"),
    "index": (lambda t: t.weight[2].sum(), "which is no lookup"),
    "attend": (lambda t: (lookup(t, [1, 2]) @ t.weight.T).max(), "`transpose`|`dot_general`"),
    "stop_gradient": (lambda t: energy(t) * energy(jax.lax.stop_gradient(t)), "."),
    "renormalized_in_jit": (lambda t: energy(jax.jit(renormalize)(t, [1, 2])), "."),
    "renormalized_and_used": (lambda t: renormalize(t, [1, 2]).weight.sum() + energy(t), "."),
    "lookup_and_jit": (lambda t: energy(t, [1, 2]) * jitted(t), "."),
    "lookup_and_penalty": (lambda t: energy(t, [1, 1, 2]) + 0.1 * (t.weight**2).sum(), "which is no lookup"),
}  # fmt: skip


COUNTED = {"scan_carry", "vmap_ids", "vmap_tables", "jit", "checkpoint", "lookup_and_jit"}


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
    # Rules make a program larger; a count of ids is a sort, which takes long to compile.
    max_norm = 1.5 if name in COUNTED or "renormalized" in name else None
    return Table(WEIGHT, padding_idx=2, max_norm=max_norm, scale_grad_by_freq=name in COUNTED)


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


SPARSE = {
    "another_table_of_the_weight": lambda t: energy(dataclasses.replace(t, max_norm=1.0)) + energy(Table(t.weight)),
    "rebuilt": lambda t: energy(jax.tree.map(lambda w: w, t)) + energy(jax.tree.map(jnp.asarray, t)),
    "cast_to_its_dtype": lambda t: energy(jax.tree.map(lambda w: w.astype(jnp.float32), t)),
    "named_scope": jax.named_scope("scope")(energy),
    "partial": functools.partial(energy, ids=IDS),
}


def test_what_leaves_the_weight_as_it_is_stays_sparse():
    table = Table(WEIGHT)
    grads = embax.grad, jax.grad
    both = jax.jit(lambda table: {name: [grad(function)(table) for grad in grads] for name, function in SPARSE.items()})
    for name, (gradient, expected) in both(table).items():
        assert_same_gradient(gradient, expected, **FLOAT32, err_msg=name)
        for again in gradient, jax.eval_shape(embax.grad(SPARSE[name]), table):
            assert isinstance(again, RowGrad), name


def test_other_tables_stay_sparse():
    params = {"a": [Table(WEIGHT), Table(WEIGHT, padding_idx=2)], "b": Table(2 * WEIGHT), "c": jnp.ones(3)}

    def function(params):
        (first, second), third = params["a"], params["b"]
        return energy(first) * jitted(second) + energy(third, [1]) + energy(second) * params["c"].sum()

    match = r"gradient of argument 0\['a'\]\[1\], Table\(float32\[7,3\], padding_idx=2\)"
    gradient = warned(function, params, match=match, wrap=jax.jit)
    assert [isinstance(g, RowGrad) for g in (*gradient["a"], gradient["b"])] == [True, False, True]
    assert_same_gradient(gradient, jax.jit(jax.grad(function))(params), **FLOAT32)
    updated = embax.apply_updates(params, gradient)
    assert jax.tree.structure(updated) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("argnums", "name"), [(1, "argument 1"), (-1, "argument -1|argument 1"), ((0, 1), "argument 1")], ids=str
)
def test_the_warning_names_the_argument_and_comes_from_the_caller(argnums, name):
    def function(table, params):
        return energy(table) + params["t"][0].weight.sum()

    with pytest.warns(DenseGradientWarning, match=rf"gradient of ({name})\['t'\]\[0\], .* is dense, 7 rows") as record:
        embax.value_and_grad(function, argnums)(Table(WEIGHT), {"t": (Table(WEIGHT),)})
    assert [warning.filename for warning in record] == [__file__]


def test_the_warning_says_what_to_move():
    look_up, compute = r"Look up outside and pass the rows in, or", r"Compute with rows that embax\.lookup reads, or"
    warned(jitted, Table(WEIGHT), match=rf"{look_up} expect it with on_dense='allow'", wrap=traced)
    warned(lambda t: t.weight.sum(), Table(WEIGHT), match=f"{compute} expect it", wrap=traced)


@pytest.mark.parametrize("name", ["jit", "vmap_ids", "lookup_and_penalty"])
def test_on_dense_chooses(name):
    function, table = USES[name][0], Table(WEIGHT)
    with pytest.raises(ValueError, match=r"gradient of argument 0, Table\(float32\[7,3\]\), is dense"):
        embax.grad(function, on_dense="error")(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient = embax.grad(function, on_dense="allow")(table)
        embax.grad(energy, on_dense="error")(table)
    assert_same_gradient(gradient, jax.grad(function)(table), **FLOAT32)
    with pytest.raises(ValueError, match=r"on_dense=.*must be one of 'error', 'warn', 'allow', got 'silent'"):
        embax.grad(function, on_dense="silent")


def test_a_dense_table_keeps_its_aux_and_its_renormalized_values():
    def function(table):
        new = renormalize(table, [6, 1])
        return (new.weight**2).sum() + energy(new), (new, "name")

    table = Table(WEIGHT, max_norm=1.5)
    gradient, (new, name) = warned(function, table, match="argument 0", has_aux=True)
    expected, (expected_new, _) = jax.grad(function, has_aux=True)(table)
    assert_same_gradient(gradient, expected, **FLOAT32)
    np.testing.assert_array_equal(new.weight, expected_new.weight)
    assert name == "name"


# A check for leaks keeps JAX from using what it has traced before, so that the simplest program takes long.
LEAKS = "scan_carry", "jit_closure"
MORE_LEAKS = "vmap_ids", "custom_vjp", "inner_grad", "attend"


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


def test_what_fails_inside_leaves_no_tape_behind():
    def fails(table):
        energy(table)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        embax.grad(fails)(Table(WEIGHT))
    assert not _tape._STACK.tapes
    table = Table(WEIGHT)
    assert_same_gradient(embax.grad(energy)(table), jax.grad(energy)(table), **FLOAT32)
