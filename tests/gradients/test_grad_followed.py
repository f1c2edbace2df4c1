"""Reads inside of transformations: the gradient holds the rows that were read, and is that of JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_gradient, dense
from closeness import FLOAT32
from jax.sharding import AxisType, PartitionSpec

import embax
from embax import RowGrad, Table, lookup, renormalize
from embax._core.containers.write_back import clipped_table

# Enough rows that a scan of all ids stacks less than the whole gradient.
ROWS = 40
WEIGHT = np.random.default_rng(0).normal(scale=2, size=(ROWS, 3)).astype(np.float32)
IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])
LAST = IDS.shape[0] - 1


def energy(table, ids=IDS):
    return jnp.sin(lookup(table, ids)).sum()


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
def tripled(table, ids):
    return 3 * energy(table, ids)


tripled.defvjp(
    lambda table, ids: (3 * energy(table, ids), (table, ids)),
    lambda saved, factor: (jax.tree.map(lambda leaf: 3 * factor * leaf, jax.grad(energy)(*saved)), None),
)

jitted = jax.jit(energy)
branches = [lambda table: 2 * energy(table), energy]


def recurrent(table, ids):
    """The lookup in the body, in the carry and in what is stacked."""

    def step(state, x):
        state = jnp.tanh(0.5 * state + lookup(table, x))
        return state, state.sum()

    state, stacked = jax.lax.scan(step, jnp.zeros(3), ids)
    return (state * stacked.sum()).sum()


def scanned(function, start=0.1, **options):
    """A loss whose loop carries a number through `function(table, ids)`."""

    def loss(table):
        def step(number, ids):
            return jnp.tanh(number + function(table, ids)), None

        return jax.lax.scan(step, start, IDS, **options)[0]

    return loss


def nested_scan(table):
    def outer(number, ids):
        return jax.lax.scan(lambda number, k: (jnp.sin(number + energy(table, k)), None), number, ids)[0], None

    return jax.lax.scan(outer, 0.1, IDS)[0]


@functools.cache
def of_shards(check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def of_shard(table, ids):
        return jax.lax.psum(energy(table, ids) * energy(table, ids[:, :1]), "x")

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec()}
    return jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs)


def while_(table):
    def body(state):
        k, sum_ = state
        return k + 1, sum_ + energy(jax.lax.stop_gradient(table), jnp.asarray(IDS)[k])

    return energy(table) * jax.lax.while_loop(lambda state: state[0] < 3, body, (0, 0.0))[1]


def by_fori(table):
    return jax.lax.fori_loop(0, 3, lambda k, sum_: sum_ + energy(table, jnp.asarray(IDS)[k]) * jnp.sin(sum_), 0.5)


def bags(table, **options):
    return lambda ids: jnp.sin(embax.embedding_bag(table, ids, **options)).sum()


def ragged(table, ids):
    return jnp.sin(embax.embedding_bag(table, embax.Ragged(ids, jnp.array([0, 1, 1, 3])))).sum()


def in_a_branch(table, ids):
    return jax.lax.cond(ids[0] > 1, lambda: energy(table, ids), lambda: energy(table, ids[:2]) ** 2)


def returned_by_a_branch(table):
    table, sum_ = jax.lax.cond(IDS[0, 0] > 0, lambda t: (t, energy(t, IDS[0])), lambda t: (t, 0.0), table)
    return energy(table, IDS[1]) * sum_


def halved(table):
    return jax.tree.map(lambda weight: 0.5 * weight, table)


def stored(table, ids):
    """The table of a layer that stores the rows that it clips."""
    return dataclasses.replace(table, weight=clipped_table(table, ids))


FACTORS = np.array([0.5, 1.0, 2.0], np.float32)


def scaled(table, factor):
    return jax.tree.map(lambda weight: factor * weight, table)


# Name: a loss; and how many ids its gradient has.
FOLLOWED = {
    "scan_carry": (lambda t: jax.lax.scan(step, (t, 0.0), IDS)[0][1], 12),
    "scan_closure": (scanned(energy), 12),
    "scan_reverse": (scanned(energy, reverse=True, unroll=2), 12),
    "scan_indexes": (lambda t: jax.lax.scan(lambda c, k: (c + t.weight[k].sum() * c, None), 1.0, IDS[0] + 1)[0], 4),
    "recurrent": (lambda t: recurrent(t, IDS.ravel()), 12),
    "vmap_recurrent": (lambda t: jax.vmap(lambda ids: recurrent(t, ids))(IDS).sum(), 12),
    "nested_scan": (nested_scan, 12),
    "scan_remat": (scanned(jax.checkpoint(energy)), 12),
    "scan_remat_cond": (scanned(jax.checkpoint(in_a_branch)), 12),
    "scan_jit": (scanned(jitted), 12),
    "scan_vmap": (scanned(lambda t, ids: jax.vmap(lambda k: energy(t, k))(ids).sum()), 12),
    "map": (lambda t: jnp.sin(jax.lax.map(lambda ids: lookup(t, ids), IDS)).sum(), 12),
    "map_batched": (lambda t: jax.lax.map(lambda ids: energy(t, ids), IDS, batch_size=2).sum(), 12),
    "fori_loop": (by_fori, 12),
    "while_loop": (while_, 12),
    "in_and_out_of_a_scan": (lambda t: energy(t, IDS[0]) * scanned(energy)(t) + energy(t, [1]), 17),
    "cond": (lambda t: jax.lax.cond(IDS[0, 0] > 0, *branches, t), 12),
    "cond_closure": (lambda t: jax.lax.cond(True, lambda: energy(t), lambda: 0.0), 12),
    "cond_lengths": (lambda t: in_a_branch(t, IDS[1]) + in_a_branch(t, IDS[0]), 8),
    "cond_carries": (returned_by_a_branch, 8),
    "switch": (lambda t: jax.lax.switch(1, [*branches, lambda t: 0.0], t), 12),
    "vmap_ids": (lambda t: jax.vmap(energy, (None, 0))(t, IDS).sum(), 12),
    "vmap_axis": (lambda t: (jax.vmap(lambda k: lookup(t, k), 1, 2)(IDS) ** 3).sum(), 12),
    "vmap_vmap": (lambda t: jax.vmap(jax.vmap(lambda k: energy(t, k)))(IDS).prod(), 12),
    "vmap_cond": (lambda t: jax.vmap(lambda ids: in_a_branch(t, ids))(IDS).sum(), 18),
    "vmap_custom_vjp": (lambda t: jax.vmap(lambda ids: tripled(t, ids))(IDS).sum(), 12),
    "vmap_vmap_custom_vjp": (lambda t: jax.vmap(jax.vmap(lambda k: tripled(t, k)))(IDS).sum(), 12),
    "scan_vmap_custom_vjp": (scanned(lambda t, ids: jax.vmap(lambda k: tripled(t, k))(ids).sum()), 12),
    "jit": (jitted, 12),
    "jit_inline": (jax.jit(energy, inline=True), 12),
    "jit_closure": (lambda t: jax.jit(lambda ids: energy(t, ids))(IDS), 12),
    "jit_of_scan": (jax.jit(scanned(energy)), 12),
    "checkpoint": (jax.checkpoint(energy), 12),
    "checkpoint_policy": (jax.checkpoint(energy, policy=jax.checkpoint_policies.everything_saveable), 12),
    "checkpoint_of_scan": (jax.checkpoint(scanned(energy)), 12),
    "custom_jvp": (doubled, 12),
    "custom_vjp": (lambda t: tripled(t, IDS), 12),
    "inner_grad": (lambda t: jnp.sin(jax.grad(energy)(t).weight).sum(), 12),
    "inner_grad_of_a_number": (lambda t: jax.grad(lambda x: energy(t) * x**3)(2.0), 12),
    "inner_jvp": (lambda t: jax.jvp(energy, (t,), (jax.tree.map(jnp.ones_like, t),))[1], 12),
    "inner_linearize": (lambda t: jax.linearize(energy, t)[0], 12),
    "inner_embax_grad": (lambda t: embax.global_norm(embax.grad(energy)(t)) ** 2, 12),
    "inner_embax_grad_closure": (lambda t: embax.grad(lambda s: s * energy(t))(2.0), 12),
    "shard_map": (lambda t: of_shards(True)(t, IDS[:2, :2]), 6),
    "shard_map_unchecked": (lambda t: of_shards(False)(t, IDS[:2, :2]), 6),
    "scale": (lambda t: energy(halved(t)), 12),
    "scale_in_scan": (scanned(lambda t, ids: energy(halved(t), ids)), 12),
    "slice": (lambda t: energy(Table(t.weight[:5]), [4, 1]), 2),
    "index": (lambda t: t.weight[2].sum(), 1),
    "vmap_index": (lambda t: jax.vmap(jax.vmap(lambda i: jnp.sin(t.weight[i]).sum()))(IDS).sum(), 12),
    "take": (lambda t: jnp.sin(jnp.take(t.weight, IDS, axis=0, mode="clip")).sum(), 12),
    "stop_gradient": (lambda t: energy(t) * energy(jax.lax.stop_gradient(t)), 12),
    "renormalized_in_jit": (lambda t: energy(jax.jit(renormalize)(t, [1, 2])), 12),
    "renormalized_in_vmap": (lambda t: jax.vmap(lambda ids: energy(renormalize(t, ids), ids))(IDS).sum(), 12),
    "renormalized_in_inner_grad": (lambda t: jax.grad(lambda x: energy(renormalize(t, IDS)) * x**3)(2.0), 12),
    "renormalized_in_jit_in_vmap": (
        lambda t: jax.vmap(lambda ids: energy(jax.jit(renormalize)(t, ids), ids))(IDS).sum(), 12,
    ),
    "scaled_in_vmap": (lambda t: jax.vmap(lambda ids, x: energy(scaled(t, x), ids))(IDS, FACTORS).sum(), 12),
    "scaled_in_jit_in_vmap": (
        lambda t: jax.vmap(lambda ids, x: energy(jax.jit(scaled)(t, x), ids))(IDS, FACTORS).sum(), 12,
    ),
    "scaled_in_checkpoint_in_scan": (
        scanned(lambda t, ids: jax.vmap(lambda k, x: energy(jax.checkpoint(scaled)(t, x), k))(ids[:3], FACTORS).sum()),
        9,
    ),
    "stored_in_vmap": (lambda t: jax.vmap(lambda ids: energy(stored(t, ids), ids))(IDS).sum(), 12),
    "renormalized_in_scan": (scanned(lambda t, ids: energy(renormalize(t, ids), ids)), 12),
    "lookup_and_jit": (lambda t: energy(t, [1, 2]) * jitted(t), 14),
    "bags_vmap": (lambda t: jax.vmap(bags(t))(IDS).sum(), 12),
    "bags_max_scan": (scanned(lambda t, ids: bags(t, mode="max")(ids)), 12),
    "bags_weighted_remat": (jax.checkpoint(lambda t: bags(t, weights=jnp.ones(IDS.shape), mode="sqrtn")(IDS)), 12),
    "ragged_scan": (scanned(ragged), 12),
    "ragged_vmap": (lambda t: jax.vmap(lambda ids: ragged(t, ids))(IDS).sum(), 12),
    "another_table": (lambda t: energy(dataclasses.replace(t, max_norm=1.0)) + energy(Table(t.weight)), 24),
    "rebuilt": (lambda t: energy(jax.tree.map(lambda w: w, t)) + energy(jax.tree.map(jnp.asarray, t)), 24),
    "cast_to_its_dtype": (lambda t: energy(jax.tree.map(lambda w: w.astype(jnp.float32), t)), 12),
    "named_scope": (jax.named_scope("scope")(energy), 12),
    "partial": (functools.partial(energy, ids=IDS), 12),
}  # fmt: skip

# Rules make a program larger; a count of ids is a sort, which takes long to compile.
COUNTED = {"vmap_ids", "shard_map"}
CLIPPED = {"scan_carry", "jit", "checkpoint", "custom_vjp", "cond", "bags_vmap"} | {
    name for name in FOLLOWED if "renormalized" in name or "stored" in name
}

# Compositions of others, of which the random programs of test_grad_fuzz are full.
COMPOSED = {
    "scan_closure", "nested_scan", "scan_remat", "scan_remat_cond", "scan_jit", "scan_vmap", "scale_in_scan",
    "ragged_scan", "bags_max_scan", "recurrent", "map", "vmap_vmap", "vmap_custom_vjp", "scan_vmap_custom_vjp",
    "jit_inline", "jit_of_scan", "checkpoint_of_scan", "inner_linearize",
}  # fmt: skip


def table_of(name):
    return Table(WEIGHT, padding_idx=2, max_norm=1.5 if name in CLIPPED else None, scale_grad_by_freq=name in COUNTED)


def part_of(name):
    """The program that a loss is in: one of all losses takes longer to compile, the more so for several devices."""
    return name in COMPOSED, "shard" if "shard" in name else "scan" if "scan" in name else "other"


@functools.cache
def of_followed(part):
    """The values and gradients by embax and by JAX, and those by embax as rows, in one program for each part."""
    grads = functools.partial(embax.value_and_grad, on_dense="error"), jax.value_and_grad
    tables = {name: table_of(name) for name in FOLLOWED if part_of(name) == part}
    # The gradient of a shard_map is compared with that of the program without one.
    unsharded = lambda t: sum(energy(t, ids) * energy(t, ids[:1]) for ids in IDS[:2, :2])  # noqa: E731

    @jax.jit
    def both(tables):
        results = {}
        for name, table in tables.items():
            loss, _ = FOLLOWED[name]
            ours, theirs = grads[0](loss)(table), grads[1](unsharded if "shard" in name else loss)(table)
            results[name] = dense(ours), dense(theirs), ours[1]
        return results

    return both(tables)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in COMPOSED else ()) for name in FOLLOWED]
)
def test_rows_are_followed(name):
    loss, ids = FOLLOWED[name]
    actual, expected, gradient = of_followed(part_of(name))[name]
    assert np.asarray(expected[1]).any()
    assert_same_gradient(actual, expected, **FLOAT32)
    # Once more, now that JAX finds what it has traced before in its caches.
    for again in gradient, jax.eval_shape(embax.grad(loss, on_dense="error"), table_of(name)):
        assert isinstance(again, RowGrad)
        assert len(again.values) == ids
