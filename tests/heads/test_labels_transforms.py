"""Tokens that do not count, smoothing, the z-loss and reductions under transformations, by dtype, and on a tape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from bag_cases import dense, ids_of
from cases import ROWS, WEIGHT
from closeness import assert_close
from head_cases import FLOAT32, IGNORING, SAMPLED, TERMS, X, in_one_program
from jax.experimental import checkify

import embax
from embax import RowGrad, Table, attend, softmax_cross_entropy

LABELS = IGNORING


# ---- Transformations and dtypes.


def plain(table, x, labels, label_smoothing=0.3, z_loss=0.1):
    """The mean by optax, of the logits of `attend`."""
    logits = attend(table, x).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, table.rows), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets) + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    counts = labels != -100
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)


def ours(table, x, labels):
    return softmax_cross_entropy(table, x, labels, chunk=3, reduction="mean", **TERMS)


def under_transformations(loss, ways, table, x, labels):
    gradient = jax.grad(loss, (0, 1))

    def scanned(table, x):
        step = jax.checkpoint(lambda sum_, batch: (sum_ + loss(table, *batch), None))
        return jax.lax.scan(step, jnp.float32(0), (x, labels))[0]

    of = {
        "value and gradient": lambda: jax.value_and_grad(loss, (0, 1))(table, x, labels),
        "vmap over tokens": lambda: jax.vmap(gradient, (None, 0, 0))(table, x, labels),
        "vmap over labels": lambda: jax.vmap(gradient, (None, None, 0))(table, x[0], labels),
        "scan": lambda: jax.grad(scanned, (0, 1))(table, x),
        "hessian": lambda: jax.hessian(loss, (0, 1))(table, x[0], labels[0]),
    }
    return {way: of[way]() for way in ways}


WAYS = ["value and gradient", "vmap over tokens", "vmap over labels", "scan", "hessian"]
DTYPES = [("float32", ["vmap over labels", "hessian"]), ("bfloat16", ["value and gradient"])]
DTYPES_TOO = [(dtype, [way for way in WAYS if way not in ways]) for dtype, ways in DTYPES]


@pytest.mark.parametrize(
    ("dtype", "ways"), [*DTYPES, *(pytest.param(*too, marks=pytest.mark.exhaustive) for too in DTYPES_TOO)]
)
def test_transformations_and_dtypes_equal_optax(dtype, ways):
    # All lanes but the last have another number of tokens that count, and this one none.
    labels = np.array([[2, -100, 6], [1, 2, 3], [-100, -100, -100]])
    x = np.concatenate([X, X[:1]])
    given = Table(WEIGHT.astype(dtype), padding_idx=2), x.astype(dtype), labels
    calls = {loss.__name__: (functools.partial(under_transformations, loss, ways), *given) for loss in (plain, ours)}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        actual = in_one_program(calls)
    if "value and gradient" in ways:
        assert actual["ours"]["value and gradient"][0].dtype == np.float32
    tolerance = FLOAT32 if dtype == "float32" else {"rtol": 0.03, "atol": 0.03}
    for way in ways:
        mine, other = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), actual[loss][way]) for loss in ("ours", "plain")
        )
        assert_close(mine, other, way, **tolerance)


def test_float64():
    options = {"reduction": "mean", **TERMS, "z_loss": 0.01}
    with jax.enable_x64(True):
        args = Table(WEIGHT.astype(np.float64)), X.astype(np.float64), LABELS
        whole = jax.jit(functools.partial(softmax_cross_entropy, **options))(*args)
        sampled = jax.jit(lambda *args: SAMPLED(*args, reduction="mean", z_loss=0.01))(*args)
    assert whole.dtype == sampled.dtype == np.float64
    losses, _ = reference.cross_entropy(WEIGHT, X, LABELS, **TERMS | {"z_loss": 0.01})
    np.testing.assert_allclose(whole, reference.reduce(losses, LABELS, "mean"), rtol=1e-13)


def test_large_logits_keep_their_digits():
    weight = np.array([[3e4, 0], [-3e4, 0], [0, 3e4], [3e4, 1]], np.float32)
    x, labels = np.eye(2, dtype=np.float32), np.array([0, 3])
    losses = jax.jit(functools.partial(softmax_cross_entropy, chunk=2, label_smoothing=0.1))(Table(weight), x, labels)
    np.testing.assert_allclose(losses, reference.cross_entropy(weight, x, labels, label_smoothing=0.1)[0], rtol=1e-6)


# ---- The tape, checkify.


def test_ignored_tokens_name_no_row_in_the_gradient():
    tables = {policy: Table(WEIGHT, padding_idx=1, out_of_range=policy) for policy in ("error", "clip")}
    tables["frequency"] = Table(WEIGHT, padding_idx=1, scale_grad_by_freq=True, out_of_range="zero")
    sampled = in_one_program(
        {
            name: (embax.grad(lambda table: SAMPLED(table, X, LABELS, reduction="mean")), table)
            for name, table in tables.items()
        }
    )
    for name, ids in ids_of(sampled).items():
        assert isinstance(sampled[name], RowGrad)
        of_labels = ids[: LABELS.size]
        np.testing.assert_array_equal(of_labels, [2, ROWS, 6, ROWS, 2, ROWS], name)  # the padding row 1, too
    whole = dense(sampled)
    np.testing.assert_allclose(whole["clip"], whole["error"], **FLOAT32)


def test_checkify_finds_no_error_in_ignored_tokens():
    def loss(table, x, labels):
        return softmax_cross_entropy(table, x, labels, chunk=4, reduction="mean", **TERMS)

    checked = jax.jit(checkify.checkify(jax.grad(loss, (0, 1)), errors=checkify.all_checks))
    error, _ = checked(Table(WEIGHT, padding_idx=2, max_norm=1.5), X, LABELS)
    error.throw()
    head = functools.partial(SAMPLED, reduction="mean")
    checked = jax.jit(checkify.checkify(head, errors=checkify.index_checks))
    checked(Table(WEIGHT), X, LABELS)[0].throw()
    error, _ = checked(Table(WEIGHT), X, np.where(LABELS == -100, -1, LABELS))
    with pytest.raises(checkify.JaxRuntimeError, match="out-of-bounds"):
        error.throw()
