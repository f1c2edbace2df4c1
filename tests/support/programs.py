"""Random programs that read tables inside of transformations, drawn by hypothesis.

A program is a tree: its leaves read a table, its nodes are transformations. `built` makes a loss of it, a function
`(tables, ids, x)` of three tables, four ids and a number. All shapes are the same in every program, so that JAX
compiles little that differs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import embax
from embax import Table, embedding_bag, lookup

ROWS = 600  # so that what a scan stacks is less than a gradient
RULES = {}, {"padding_idx": 2}, {"padding_idx": 5, "max_norm": 1.5, "scale_grad_by_freq": True, "out_of_range": "zero"}


def tables():
    rng = np.random.default_rng(0)
    return [Table(jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32), **rules) for rules in RULES]


def squash(x):
    """Keep a number below 1. The derivatives of tanh, 1 - tanh(x)**2 and on, would cancel in float32."""
    return x * lax.rsqrt(1 + x * x)


# ---- Leaves: functions of one table, ids and a number.

READS = {
    "lookup": lambda t, ids, x: jnp.sin(lookup(t, ids) * x).sum(),
    "two lookups": lambda t, ids, x: (lookup(t, ids[:2]) * lookup(t, ids[2:]) * x).sum(),
    "one row": lambda t, ids, x: (lookup(t, ids[0]) * x).sum(),
    "mean": lambda t, ids, x: jnp.cos(embedding_bag(t, ids.reshape(2, 2)) * x).sum(),
    # Not `* x`: the norm of the weights would cancel it, and leave a derivative of rounding errors.
    "weighted": lambda t, ids, x: jnp.cos(embedding_bag(t, ids, jnp.arange(4.0) + x, mode="sqrtn")).sum(),
    "max": lambda t, ids, x: (embedding_bag(t, ids, mode="max") * x).sum(),
    "ragged": lambda t, ids, x: (jnp.sin(embedding_bag(t, embax.Ragged(ids, jnp.array([0, 1, 1, 3])))) * x).sum(),
    "index": lambda t, ids, x: jnp.sin(t.weight[ids] * x).sum(),
    "take": lambda t, ids, x: jnp.sin(jnp.take(t.weight, ids, axis=0, mode="clip") * x).sum(),
    "slice": lambda t, ids, x: jnp.sin(t.weight[3:5] * x).sum(),
    "renormalized": lambda t, ids, x: jnp.sin(lookup(embax.renormalize(t, ids), ids) * x).sum(),
    "stopped": lambda t, ids, x: jnp.sin(lookup(lax.stop_gradient(t), ids) * x).sum(),
    "nothing": lambda t, ids, x: jnp.sin(x) * ids.sum(),
}
HEADS = {
    "attend": lambda t, ids, x: jnp.sin(embax.attend(t, jnp.full(3, x)) * 0.01).sum(),
    "cross entropy": lambda t, ids, x: embax.softmax_cross_entropy(t, lookup(t, ids) * x, ids).sum(),
}
DENSE = {
    "penalty": lambda t, ids, x: (t.weight**2).mean() * x,
    "product": lambda t, ids, x: jnp.sin(t.weight @ jnp.full((3, 1), x)).mean(),
}
LEAVES = READS | HEADS | DENSE


# ---- Nodes: functions of one or two losses.


def of_carried_tables(f, g):
    def step(carry, ids):
        tables, x = carry
        return (tables, squash(x + f(tables, ids, x))), None

    return lambda t, ids, x: lax.scan(step, (t, x), some_ids(ids))[0][1]


def custom_vjp(f, g):
    @jax.custom_vjp
    def function(t, ids, x):
        return f(t, ids, x)

    def forward(t, ids, x):
        return f(t, ids, x), (t, ids, x)

    def backward(saved, cotangent):
        t, ids, x = saved
        of_t, of_x = jax.vjp(lambda t, x: f(t, ids, x), t, x)[1](cotangent)
        return jax.tree.map(lambda w: 2 * w, of_t), None, of_x

    function.defvjp(forward, backward)
    return function


def custom_jvp(f, g):
    @jax.custom_jvp
    def function(t, ids, x):
        return f(t, ids, x)

    @function.defjvp
    def jvp(primals, tangents):
        t, ids, x = primals
        of_t, _, of_x = tangents
        out, tangent = jax.jvp(lambda t, x: f(t, ids, x), (t, x), (of_t, of_x))
        return out, 3 * tangent

    return function


def some_ids(ids, axis=0):
    return jnp.stack([ids, (ids + 1) % ROWS, ids * 2 % ROWS], axis)


def some_numbers(x):
    return jnp.stack([x, x + 1, jnp.sin(x)])


def scan(step, x, ids, **options):
    return lax.scan(step, x, some_ids(ids), **options)


NODES = {
    "sum": lambda f, g: lambda t, i, x: f(t, i, x) + g(t, i, jnp.sin(x)),
    "chain": lambda f, g: lambda t, i, x: f(t, i, squash(g(t, i, x))),
    "jit": lambda f, g: jax.jit(f),
    "checkpoint": lambda f, g: jax.checkpoint(f),
    "checkpoint policy": lambda f, g: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    "scan": lambda f, g: lambda t, i, x: scan(lambda c, j: (squash(c + f(t, j, c + 1)), g(t, j, c)), x, i)[0],
    "scan stacked": lambda f, g: lambda t, i, x: (scan(lambda c, j: (c + 0.1, f(t, j, c)), x, i)[1] ** 2).sum(),
    "scan reverse": lambda f, g: (
        lambda t, i, x: scan(lambda c, j: (squash(c + f(t, j, c)), None), x, i, reverse=True, unroll=2)[0]
    ),
    "scan of carried tables": of_carried_tables,
    "map": lambda f, g: lambda t, i, x: lax.map(lambda j: f(t, j, x), some_ids(i), batch_size=2).sum(),
    "fori_loop": lambda f, g: lambda t, i, x: lax.fori_loop(0, 3, lambda k, c: squash(c + f(t, (i + k) % ROWS, c)), x),
    "vmap": lambda f, g: lambda t, i, x: jax.vmap(lambda j: f(t, j, x))(some_ids(i)).sum(),
    "vmap both": lambda f, g: (
        lambda t, i, x: jax.vmap(lambda j, y: f(t, j, y), (1, 0))(some_ids(i, 1), some_numbers(x)).prod()
    ),
    "vmap numbers": lambda f, g: lambda t, i, x: jax.vmap(lambda y: f(t, i, y))(some_numbers(x)).sum(),
    "cond": lambda f, g: lambda t, i, x: lax.cond(i.sum() % 2 == 0, f, g, t, i, x),
    "cond of a number": lambda f, g: lambda t, i, x: lax.cond(x > 0.5, lambda: f(t, i, x), lambda: g(t, i, x)),
    "switch": lambda f, g: lambda t, i, x: lax.switch(i[0] % 3, [f, lambda t, i, x: x, g], t, i, x),
    "custom_vjp": custom_vjp,
    "custom_jvp": custom_jvp,
    "inner gradient": lambda f, g: lambda t, i, x: squash(jax.grad(f, 2)(t, i, x)),
    "inner value_and_grad": lambda f, g: lambda t, i, x: sum(jax.value_and_grad(f, 2)(t, i, x)),
    "halved": lambda f, g: lambda t, i, x: f(jax.tree.map(lambda w: 0.5 * w, t), i, x),
}


def loop(f, step=lambda x, y: squash(x + y), ids=some_ids):
    """A loop of Python in the place of a scan."""

    def loss(t, i, x):
        for j in ids(i):
            x = step(x, f(t, j, x))
        return x

    return loss


def stacked_loop(f, g):
    return lambda t, i, x: sum(f(t, j, x + 0.1 * k) ** 2 for k, j in enumerate(some_ids(i)))


# Nodes without transformations that loop.
UNROLLED = {
    "scan": lambda f, g: loop(lambda t, i, x: f(t, i, x + 1)),
    "scan stacked": stacked_loop,
    "scan reverse": lambda f, g: loop(f, ids=lambda i: some_ids(i)[::-1]),
    "scan of carried tables": lambda f, g: loop(f),
    "map": lambda f, g: lambda t, i, x: sum(f(t, j, x) for j in some_ids(i)),
    "fori_loop": lambda f, g: loop(f, ids=lambda i: [(i + k) % ROWS for k in range(3)]),
}
WITH_TWO = {"sum", "chain", "scan", "cond", "cond of a number", "switch"}


def programs(depth=4):
    """Draw a program: `(leaf, table)`, or `(node, program)`, or `(node, program, program)`."""
    leaf = st.tuples(st.sampled_from([*READS, *READS, *HEADS, *DENSE]), st.integers(0, 2))
    program = leaf
    for _ in range(depth):
        program = st.one_of(
            program,
            st.tuples(st.sampled_from([name for name in NODES if name not in WITH_TWO]), program),
            st.tuples(st.sampled_from(sorted(WITH_TWO)), program, leaf),
        )
    return program


def built(program, instead=None):
    """Make the loss of a program, with other nodes in the place of some."""
    name, *parts = program
    if name in LEAVES:
        return lambda t, ids, x: LEAVES[name](t[parts[0]], ids, x)
    first, *rest = (built(part, instead) for part in parts)
    return (NODES | (instead or {}))[name](first, rest[0] if rest else None)


def leaves_of(program):
    """The leaves of a program."""
    name, *parts = program
    return [(name, parts[0])] if name in LEAVES else [leaf for part in parts for leaf in leaves_of(part)]


def nodes_of(program):
    """The names of its nodes."""
    name, *parts = program
    return [] if name in LEAVES else [name, *(node for part in parts for node in nodes_of(part))]


def on_two_devices(loss, chooses=False):
    """The sum of a loss of ids and of another one, each on a device; and the same without devices.

    If the ids choose a branch, the tables and the number are first cast to arrays that vary over devices. Otherwise
    JAX's own gradient is wrong, since the result of branches that read replicated arrays counts as
    replicated, even if devices choose different branches; or a branch sums over devices, and those that chose another
    branch never take part.
    """
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(), PartitionSpec("x"), PartitionSpec())

    def of_device(t, ids, x):
        if chooses:
            t, x = jax.tree.map(lambda leaf: lax.pcast(leaf, "x", to="varying"), (t, x))
        return lax.psum(loss(t, ids[0], x), "x")

    sharded = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())

    def with_devices(t, ids, x):
        return sharded(t, some_ids(ids)[:2], x)

    def without(t, ids, x):
        return sum(loss(t, ids, x) for ids in some_ids(ids)[:2])

    return with_devices, without
