"""Tokens that do not count, smoothed labels, the z-loss and means on a mesh equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close_to_largest
from meshes import LAYOUTS, everywhere, mesh_of, split

import embax
from embax import Table, attend, sampled_softmax, softmax_cross_entropy

ROWS, DIM = 29, 8  # rows that four devices do not divide
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 3, DIM)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, ROWS, X.shape[:-1]).astype(np.int32)
LABELS[0] = 4, -100, ROWS - 1  # a padding row, a token that does not count, the last row
LABELS[3] = -100
RULES = {"padding_idx": (4, 9), "max_norm": 2.5}
TERMS = {"label_smoothing": 0.3, "z_loss": 0.1}
HEADS = {
    "mean": functools.partial(softmax_cross_entropy, chunk=3, reduction="mean", **TERMS),
    "mean, masked": functools.partial(softmax_cross_entropy, mask_padding=True, reduction="mean", **TERMS),
    "each": functools.partial(softmax_cross_entropy, chunk=3, **TERMS),
    "sampled": functools.partial(sampled_softmax, key=jax.random.key(0), samples=16, reduction="mean", z_loss=0.1),
}


@functools.partial(jax.jit, static_argnames="names")
def everything(table, x, labels, names):
    """The heads of these names, and the gradients of table and vectors that each of them gives by itself."""

    def with_gradient(head):
        out, pull_back = jax.vjp(lambda t, x: head(t, x, labels), table, x)
        return out, pull_back(jnp.cos(out))

    return {name: with_gradient(HEADS[name]) for name in names}


def rest(*names):
    """A case of the exhaustive run."""
    return pytest.param(*names, marks=pytest.mark.exhaustive)


ALL = tuple(HEADS)


of_cases = pytest.mark.parametrize(
    ("layout", "axes", "put", "names"),
    [
        ("rows and columns", "explicit", split, ("sampled",)),
        ("rows-cyclic", "auto", split, ("mean, masked",)),
        *[rest(layout, axes, split, ALL) for layout in LAYOUTS for axes in ("auto", "explicit")],
        rest("rows and copies", "explicit", everywhere, ALL),
        rest("rows and copies", "auto", everywhere, ALL),
    ],
)


@of_cases
def test_terms_equal_those_without_a_mesh(layout, axes, put, names):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    # What is no number in the vector of a token that does not count reaches nothing.
    x = np.where((LABELS == -100)[..., None], np.nan, X).astype(np.float32)
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    off = everything(Table(WEIGHT, **RULES), x, LABELS, names)
    for name, (out, (of_table, of_x)) in everything(table, put(mesh, x), put(mesh, LABELS), names).items():
        expected, (of_off, of_x_off) = off[name]
        assert np.isfinite(out).all(), name
        assert_close_to_largest(out, expected, name)
        weight = np.asarray(embax.unshard(of_table).weight)
        assert weight.any(), name
        assert not weight[[4, 9]].any(), name
        assert_close_to_largest(weight, of_off.weight, name)
        assert_close_to_largest(of_x, of_x_off, name)
        np.testing.assert_array_equal(np.asarray(of_x)[LABELS == -100], 0, name)


@pytest.mark.parametrize("axes", ["explicit", rest("auto")])
def test_batches_that_the_copies_cannot_share_out(axes):
    table = embax.shard(Table(WEIGHT, **RULES), mesh_of({"x": 2, "y": 2}, axes), "x")
    x, labels = X.reshape(-1, DIM)[:5], LABELS.ravel()[:5]
    out, (of_table, of_x) = everything(table, x, labels, ("each",))["each"]
    expected, (of_off, of_x_off) = everything(Table(WEIGHT, **RULES), x, labels, ("each",))["each"]
    assert_close_to_largest(out, expected)
    assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight)
    assert_close_to_largest(of_x, of_x_off)
    for leaf in jax.tree.leaves(everything(table, x[:0], labels[:0], ("mean",))):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@of_cases
def test_no_token_counts(layout, axes, put, names):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    of_padding = np.where(LABELS % 2, -100, 4)
    for name in names:
        # A padding row is no label where it is masked, and none that is sampled for.
        labels = of_padding if name in ("mean, masked", "sampled") else np.full_like(LABELS, -100)
        for leaf in jax.tree.leaves(everything(table, put(mesh, X), put(mesh, labels), names)[name]):
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape), name)


def test_calls_outside_of_jit():
    mesh = mesh_of({"x": 2, "y": 2}, "explicit")
    table = embax.shard(Table(WEIGHT, **RULES), mesh, "x")
    expected, _ = everything(Table(WEIGHT, **RULES), X, LABELS, ("mean, masked",))["mean, masked"]
    assert_close_to_largest(HEADS["mean, masked"](table, split(mesh, X), split(mesh, LABELS)), expected)
    with pytest.raises(IndexError, match=r"in \[0, 29\), the table having 29 rows, got -100"):
        softmax_cross_entropy(table, X, LABELS, ignore_index=None)


@pytest.mark.parametrize(
    ("layout", "axes", "dtype", "heads"),
    [
        ("rows and copies", "explicit", "float8_e4m3fn", ("logits",)),
        *[
            rest(layout, axes, dtype, ("losses", "logits"))
            for layout in LAYOUTS
            for axes, dtype in (("auto", "float8_e4m3fn"), ("explicit", "float8_e5m2"))
        ],
    ],
)
def test_float8(layout, axes, dtype, heads):
    """The gradient of the table is that off the mesh to one rounding to its dtype; other results are to float32's."""
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)

    @jax.jit
    def run(table, x, labels):
        of_heads = {
            "losses": lambda t, x: softmax_cross_entropy(t, x, labels, chunk=3, reduction="mean", **TERMS),
            "logits": attend,
        }
        out = {}
        for name in heads:
            value, pull_back = jax.vjp(of_heads[name], table, x)
            out[name] = value, pull_back(jnp.cos(value))
        return out

    off = Table(WEIGHT.astype(dtype), **RULES)
    expected = run(off, X, LABELS)
    for name, (value, (of_table, of_x)) in run(
        embax.shard(off, mesh, **how), split(mesh, X), split(mesh, LABELS)
    ).items():
        of_value, (of_off, of_x_off) = expected[name]
        assert of_table.dtype == jnp.dtype(dtype)
        assert_close_to_largest(value, of_value, name)
        assert_close_to_largest(of_x, of_x_off, name)
        coarse = 2 * float(jnp.finfo(dtype).eps)
        assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight, name, coarse)
