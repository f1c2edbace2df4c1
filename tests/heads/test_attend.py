"""attend against float64 NumPy, under every transformation, on meshes, and on a tape."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import MAIN_RULES, ROWS, RULES, WEIGHT, assert_same_gradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import RowGrad, Table, attend, lookup, renormalize

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
RNG = np.random.default_rng(9)
X = RNG.normal(size=(2, 4, 3)).astype(np.float32)
COTANGENT = RNG.normal(size=(2, 4, ROWS)).astype(np.float32)
IDS = np.array([[2, 0, -1, 2], [1, 2, 5, 6]])

with_masked = pytest.mark.parametrize("mask_padding", [False, True], ids=["", "masked"])
with_rules = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def value_and_gradients(table, x, cotangent, **options):
    @jax.jit
    def run(table, x, cotangent):
        logits, pull = jax.vjp(lambda table, x: attend(table, x, **options), table, x)
        of_table, of_x = pull(cotangent)
        return logits, of_table.weight, of_x

    return run(table, x, cotangent)


def check(weight, x, cotangent, mask_padding=False, **rules):
    actual = value_and_gradients(Table(weight, **rules), x, cotangent, mask_padding=mask_padding)
    expected = reference.attend(weight, x, mask_padding, **rules)
    gradients = reference.attend_gradient(weight, x, cotangent, mask_padding, **rules)
    for one, other in zip(actual, (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)


@with_masked
@with_rules
def test_values_and_gradients_by_every_rule(rules, mask_padding):
    check(WEIGHT, X, COTANGENT, mask_padding, **rules)


@with_masked
def test_several_padding_rows(mask_padding):
    check(WEIGHT, X, COTANGENT, mask_padding, padding_idx=(0, 2, -1))


@with_masked
def test_a_cotangent_that_is_not_a_number_does_not_reach_the_padding_row(mask_padding):
    cotangent = COTANGENT.copy()
    cotangent[..., 2] = np.nan
    _, of_weight, _ = value_and_gradients(Table(WEIGHT, padding_idx=2), X, cotangent, mask_padding=mask_padding)
    np.testing.assert_array_equal(of_weight[2], 0)
    assert np.isfinite(of_weight).all()


@pytest.mark.parametrize(
    ("dim", "batch"),
    [((), (4,)), ((0,), (4,)), ((2, 3), (2, 2)), ((3,), ()), ((3,), (0, 2))],
    ids=["scalars", "zero", "axes", "one", "empty"],
)
def test_rows_of_any_axes(dim, batch):
    weight, x = (RNG.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((5,), batch))
    check(weight, x, RNG.normal(size=(*batch, 5)).astype(np.float32), padding_idx=1, max_norm=1.0)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    check(WEIGHT[:rows], X, COTANGENT[..., :rows], max_norm=1.0)


def test_lists_without_jit():
    table = Table(WEIGHT, padding_idx=2, max_norm=1.5)
    expected = reference.attend(WEIGHT, X, True, padding_idx=2, max_norm=1.5)
    np.testing.assert_allclose(attend(table, X.tolist(), mask_padding=True), expected, **FLOAT32)


# ---- Dtypes.


@pytest.mark.parametrize(
    ("stored", "given", "logits"),
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_dtypes(stored, given, logits):
    table, x = Table(jnp.asarray(WEIGHT).astype(stored)), jnp.asarray(X).astype(given)
    out, of_weight, of_x = value_and_gradients(table, x, jnp.asarray(COTANGENT).astype(logits))
    assert (out.dtype, of_weight.dtype, of_x.dtype) == (jnp.dtype(logits), table.dtype, x.dtype)
    wide = np.asarray(table.weight, np.float64), np.asarray(x, np.float64)
    tolerance = 1e-5 if {stored, given} == {"float32"} else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), reference.attend(*wide), rtol=tolerance, atol=tolerance)
    for one, other in zip((of_weight, of_x), reference.attend_gradient(*wide, COTANGENT), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=tolerance, atol=4 * tolerance)
    assert attend(table, x, dtype="float32").dtype == np.float32


def test_sums_of_low_precision_run_in_float32():
    """4096 products of one; in bfloat16 they would add up to 256."""
    logits = attend(Table(jnp.ones((1, 4096), jnp.bfloat16)), jnp.ones(4096, jnp.bfloat16))
    assert (logits.item(), logits.dtype) == (4096, jnp.bfloat16)


# ---- Transformations.


def energy(table, x):
    return jnp.sum(jnp.sin(attend(table, x)))


def energy_by_hand(table, x):
    """Of the weight itself, for rules that do not change what is read."""
    return jnp.sum(jnp.sin(x @ table.weight.T))


@with_rules
def test_jvp(rules):
    table, tangents = Table(WEIGHT, **rules), (RNG.normal(size=s).astype(np.float32) for s in (WEIGHT.shape, X.shape))
    of_weight, of_x = tangents
    _, pushed = jax.jvp(attend, (table, X), (Table(of_weight, **rules), of_x))
    dropped = np.array(of_weight, np.float64)
    dropped[sorted(reference.padding_rows(rules.get("padding_idx"), ROWS))] = 0
    dropped *= not rules.get("freeze")
    expected = np.asarray(X, np.float64) @ dropped.T + reference.attend(WEIGHT, of_x, **rules)
    np.testing.assert_allclose(pushed, expected, **FLOAT32)


def test_hessian():
    table = Table(WEIGHT)
    for argument in 0, 1:
        one, other = (jax.hessian(f, argnums=argument)(table, jnp.asarray(X)) for f in (energy, energy_by_hand))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, **FLOAT32)


@pytest.mark.parametrize("rules", MAIN_RULES.values(), ids=MAIN_RULES)
def test_vmap_scan_and_checkpoint(rules):
    table, x = Table(WEIGHT, **rules), jnp.asarray(X)

    def scanned(table, x):
        return jax.lax.scan(lambda sum_, x: (sum_ + energy(table, x), None), jnp.float32(0), x)[0]

    expected = jax.grad(energy, argnums=(0, 1))(table, x)
    for other in jax.checkpoint(energy), scanned, lambda table, x: jax.vmap(energy, (None, 0))(table, x).sum():
        gradient = jax.jit(jax.grad(other, argnums=(0, 1)))(table, x)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, **FLOAT32)


# ---- The tape.


def tied(table, renormalized=False):
    """A language model with one table for what it reads and what it predicts."""
    table = renormalize(table, IDS) if renormalized else table
    logits = attend(table, jnp.tanh(lookup(table, IDS)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(IDS[:, ::-1])).sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["", "jit"])
@pytest.mark.parametrize("renormalized", [False, True], ids=["", "renormalized"])
@with_rules
def test_gradient_of_a_tied_table_is_dense_without_a_warning(rules, renormalized, wrap):
    table, loss = Table(WEIGHT, **rules), functools.partial(tied, renormalized=renormalized)
    with jax.numpy_rank_promotion("allow"):
        value, gradient = wrap(embax.value_and_grad(loss))(table)
        expected_value, expected = jax.value_and_grad(loss)(table)
    assert isinstance(gradient, RowGrad if table.freeze else Table)
    np.testing.assert_allclose(value, expected_value, **FLOAT32)
    assert_same_gradient(gradient, expected, **FLOAT32)


def test_a_head_alone_and_beside_a_table_that_is_looked_up():
    tables = {"read": Table(WEIGHT), "head": Table(2 * WEIGHT, padding_idx=1)}

    def loss(tables):
        return jnp.sum(jnp.sin(attend(tables["head"], jnp.tanh(lookup(tables["read"], IDS)), mask_padding=False)))

    gradient = embax.grad(loss)(tables)
    assert isinstance(gradient["read"], RowGrad)
    assert isinstance(gradient["head"], Table)
    assert_same_gradient(gradient, jax.grad(loss)(tables), **FLOAT32)


@pytest.mark.parametrize("where", ["jit", "scan"])
def test_a_head_inside_of_another_transformation_is_announced(where):
    def in_jit(table):
        return jax.jit(energy)(table, X) + lookup(table, IDS).sum()

    def in_scan(table):
        return jax.lax.scan(lambda sum_, x: (sum_ + energy(table, x), None), lookup(table, IDS).sum(), X)[0]

    loss = {"jit": in_jit, "scan": in_scan}[where]
    with pytest.warns(embax.DenseGradientWarning, match="argument 0"):
        gradient = embax.grad(loss)(Table(WEIGHT, padding_idx=2))
    assert_same_gradient(gradient, jax.grad(loss)(Table(WEIGHT, padding_idx=2)), **FLOAT32)


# ---- Meshes.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("set_mesh", [True, False])
def test_on_a_mesh(axis_type, set_mesh):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    rules = {"padding_idx": 2, "max_norm": 1.5}
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), **rules)

    @jax.jit
    def run(table, x):
        def total(table, x):
            logits = attend(table, x)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    if set_mesh:
        with jax.set_mesh(mesh):
            (of_table, of_x), logits = run(table, jax.device_put(X, tokens))
    else:
        (of_table, of_x), logits = run(table, jax.device_put(X, tokens))
    expected = reference.attend(WEIGHT, X, **rules)
    gradients = reference.attend_gradient(WEIGHT, X, np.cos(expected), **rules)
    for one, other in zip((logits, of_table.weight, of_x), (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)
    assert logits.sharding.is_equivalent_to(tokens, 3)


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.attend(")
    with pytest.raises(TypeError, match=name + r"table=...\)` must be of a float dtype, got int32. Cast its weight"):
        attend(Table(jnp.ones((ROWS, 3), jnp.int32)), X)
    with pytest.raises(TypeError, match=name + r"x=...\)` must be of a float dtype, got int"):
        attend(table, IDS)
    with pytest.raises(
        ValueError, match=name + r"x=...\)` must be of the shape \(\*batch, \*\(3,\)\).*, got \(2, 4, 2\)"
    ):
        attend(table, X[..., :2])
    with pytest.raises(ValueError, match=name + r"x=...\)` must be of the shape \(\*batch, \*\(3,\)\).*, got \(\)"):
        attend(table, 1.0)
