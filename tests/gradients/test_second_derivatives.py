"""Derivatives of gradients through scans: those of plain JAX, where every rule of a table is written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import embax
from embax import Table, embedding_bag, lookup

FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}
ROWS = 40  # enough that a scan of all ids stacks less than the whole gradient
_RNG = np.random.default_rng(0)
WEIGHT, ALONG = (_RNG.normal(size=(ROWS, 3)).astype(np.float32) for _ in range(2))
IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 1], [6, 6, -1, 6]])
RULES = {"padding_idx": 2, "max_norm": 1.2, "scale_grad_by_freq": True}
stop = lax.stop_gradient


# ---- What embax reads, and the same by hand.


def rows(table, ids):
    """The rows of ids. What they are multiplied by, or what is left out, is no part of a derivative."""
    ids = jnp.where(ids < 0, ids + ROWS, ids)
    read = table.weight[ids]
    held = read = stop(read) + _by_count(table, ids, read - stop(read))
    if table.max_norm is not None:
        norm = jnp.linalg.norm(stop(read), axis=-1, keepdims=True)
        held = stop(jnp.where(norm > table.max_norm, read * table.max_norm / norm, read))
    if table.padding_idx is None:
        return held + read - stop(read)
    return jnp.where((ids == table.padding_idx)[..., None], stop(read), held + read - stop(read))


def _by_count(table, ids, difference):
    if not table.scale_grad_by_freq:
        return difference
    flat = jnp.ravel(ids)
    count = (flat[:, None] == flat[None]).sum(1).reshape(ids.shape)
    return difference / count[..., None].astype(np.float32)


def counted(table, ids):
    return jnp.ones(ids.shape, bool) if table.padding_idx is None else ids != table.padding_idx


def pooled(table, ids, mode, weights=None):
    """Bags of one length."""
    counts, read = counted(table, ids)[..., None], rows(table, ids)
    if mode == "max":
        largest = jnp.where(counts, read, -jnp.inf).max(-2)
        return jnp.where(counts.any(-2), largest, 0.0)
    weights = jnp.where(counts, jnp.ones(counts.shape) if weights is None else weights[..., None], 0.0)
    by = {"sum": 1.0, "mean": weights.sum(-2), "sqrtn": jnp.sqrt((weights**2).sum(-2))}[mode]
    return (read * weights).sum(-2) / jnp.where(counts.any(-2), by, 1.0)


def all_rows(table):
    return rows(Table(table.weight, padding_idx=table.padding_idx, max_norm=table.max_norm), np.arange(ROWS))


def cross_entropy(table, x, labels):
    logits = x @ all_rows(table).T
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return normalizer - 0.9 * chosen - 0.1 * logits.mean(-1) + 0.01 * normalizer**2


def of_bags(mode):
    return (
        lambda t, ids, x: embedding_bag(t, ids.reshape(2, 2), mode=mode) * x,
        lambda t, ids, x: pooled(t, ids.reshape(2, 2), mode) * x,
    )


def numbers(x):
    return jnp.cos(x * jnp.arange(1.0, 5.0))


def vectors(x):
    return jnp.cos(x * jnp.arange(12.0)).reshape(4, 3)


_OFFSETS = np.array([0, 1, 1, 4])
_BAGS = slice(0, 1), slice(1, 1), slice(1, 4)


def ragged(mode):
    return (
        lambda t, ids, x: embedding_bag(t, embax.Ragged(ids, _OFFSETS), mode=mode) * x,
        # Each bag is of one lookup.
        lambda t, ids, x: (
            jnp.stack([_of_part(t, ids, rows(t, jnp.where(counted(t, ids), ids, 2)), part, mode) for part in _BAGS]) * x
        ),
    )


def _of_part(table, ids, read, part, mode):
    counts = counted(table, ids)[part][:, None]
    if part.start == part.stop:
        return jnp.zeros(3)
    if mode == "sum":
        return jnp.where(counts, read[part], 0.0).sum(0)
    return jnp.where(counts.any(), jnp.where(counts, read[part], -jnp.inf).max(0), 0.0)


# Name: what embax reads of a table, ids and a number; and the same by hand.
READS = {
    "lookup": (lambda t, ids, x: lookup(t, ids) * x, lambda t, ids, x: rows(t, ids) * x),
    "renormalized": (
        lambda t, ids, x: lookup(embax.renormalize(t, ids), ids) * x,
        lambda t, ids, x: rows(t, ids) * x,
    ),
    "mean": of_bags("mean"),
    "max": of_bags("max"),
    "weighted": (
        lambda t, ids, x: embedding_bag(t, ids.reshape(2, 2), mode="sqrtn", weights=numbers(x).reshape(2, 2)),
        lambda t, ids, x: pooled(t, ids.reshape(2, 2), "sqrtn", numbers(x).reshape(2, 2)),
    ),
    "ragged": ragged("sum"),
    "ragged_max": ragged("max"),
    "attend": (lambda t, ids, x: embax.attend(t, vectors(x)), lambda t, ids, x: vectors(x) @ all_rows(t).T),
    "cross_entropy": (
        lambda t, ids, x: embax.softmax_cross_entropy(
            t, vectors(x), ids % ROWS, label_smoothing=0.1, z_loss=0.01, chunk=16
        ),
        lambda t, ids, x: cross_entropy(t, vectors(x), ids % ROWS),
    ),
}


# ---- Loops around them, and the same unrolled.


def step(read, table, ids, x):
    return jnp.tanh(x + 0.3 * jnp.sin(read(table, ids, x)).mean())


def scan(read, table, ids=IDS, x=0.3):
    return lax.scan(lambda x, ids: (step(read, table, ids, x), None), x, ids)[0]


def loop(read, table, ids=IDS, x=0.3):
    for of_step in ids:
        x = step(read, table, of_step, x)
    return x


def nested(inner):
    def outer(read, table):
        return lax.scan(lambda x, k: (inner(read, table, jnp.asarray(IDS) + k, x), None), 0.3, np.arange(2))[0]

    return outer


def nested_loop(read, table):
    return loop(read, table, IDS + 1, loop(read, table))


def branched(read, table):
    def body(x, ids):
        return lax.cond(ids[0] > 1, lambda: step(read, table, ids, x), lambda: step(read, table, ids[::-1], 2 * x)), x

    return lax.scan(body, 0.3, IDS)[0]


def branched_loop(read, table):
    x = 0.3
    for ids in IDS:
        x = step(read, table, ids, x) if ids[0] > 1 else step(read, table, ids[::-1], 2 * x)
    return x


def around(transform):
    """A scan whose body calls a transformed function."""

    def loss(read, table):
        function = transform(lambda table, ids, x: read(table, ids, x))
        return scan(function, table)

    return loss


def lanes(read, table):
    return jax.vmap(lambda shift, x: scan(read, table, jnp.asarray(IDS) + shift, x))(
        np.arange(2), jnp.array([0.3, 0.5])
    )


# Name: a loss; the same without transformations.
LOOPS = {
    "scan": (scan, loop),
    "nested_scan": (nested(scan), nested_loop),
    "vmap_of_scan": (
        lambda *args: lanes(*args).prod(),
        lambda read, table: loop(read, table) * loop(read, table, IDS + 1, 0.5),
    ),
    "scan_of_vmap": (
        around(lambda f: lambda t, ids, x: jax.vmap(f, (None, 0, None))(t, ids.reshape(2, 2), x)),
        lambda read, table: loop(lambda t, ids, x: jnp.stack([read(t, k, x) for k in (ids[:2], ids[2:])]), table),
    ),
    "checkpoint_of_scan": (lambda read, table: jax.checkpoint(lambda t: scan(read, t))(table), loop),
    "scan_of_checkpoint": (around(jax.checkpoint), loop),
    "scan_of_jit": (around(jax.jit), loop),
    "scan_of_cond": (branched, branched_loop),
}


def derivatives(loss, table):
    """The gradient, its derivative along a direction, and the gradient of a number that is made of it."""
    along = jax.tree.map(lambda _: jnp.asarray(ALONG), table)

    def gradient(table):
        return jax.grad(loss)(table)

    def number(table):
        return jnp.vdot(gradient(table).weight, ALONG)

    first, forward = jax.jvp(gradient, (table,), (along,))
    return {
        "gradient": first.weight,
        "forward over reverse": forward.weight,
        "reverse over reverse": dense(embax.grad(number, on_dense="allow")(table)),
    }


def dense(gradient):
    return gradient.to_dense() if isinstance(gradient, embax.RowGrad) else gradient.weight


def check(ours, by_hand, rules):
    """Compare all derivatives of two losses in one program."""

    @jax.jit
    def both(table):
        return derivatives(ours, table), derivatives(by_hand, table)

    actual, expected = both(Table(WEIGHT, **rules))
    for name, one in expected.items():
        assert np.abs(one).max() > 1e-4, name
        np.testing.assert_allclose(actual[name], one, err_msg=name, **FLOAT32)


FEW = ("weighted",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.exhaustive) for name in READS]
)
def test_second_derivatives_of_a_scan_obey_the_rules(name):
    ours, by_hand = READS[name]
    check(functools.partial(scan, ours), functools.partial(loop, by_hand), RULES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "vmap_of_scan" else pytest.mark.exhaustive) for name in LOOPS],
)
def test_second_derivatives_of_nested_transformations_obey_the_rules(name):
    ours, by_hand = LOOPS[name]
    check(functools.partial(ours, READS["lookup"][0]), functools.partial(by_hand, READS["lookup"][1]), RULES)
