"""softmax_cross_entropy against float64 NumPy and against optax on the logits of attend, under every transformation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import MAIN_RULES, ROWS, RULES, WEIGHT
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import RowGrad, Table, attend, lookup, renormalize, softmax_cross_entropy

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
RNG = np.random.default_rng(7)
X = RNG.normal(size=(2, 3, 3)).astype(np.float32)
LABELS = np.array([[2, 0, -1], [1, 2, 5]])
COTANGENT = RNG.normal(size=(2, 3)).astype(np.float32)
BAD = np.array([[2, 7, -8], [1, 100, 0]])

with_masked = pytest.mark.parametrize("mask_padding", [False, True], ids=["", "masked"])


def value_and_gradients(table, x, labels, cotangent, **options):
    """The losses, and the gradients of the weight and of `x`."""

    @jax.jit
    def run(table, x, labels, cotangent):
        loss, pull = jax.vjp(lambda table, x: softmax_cross_entropy(table, x, labels, **options), table, x)
        of_table, of_x = pull(cotangent)
        return loss, of_table.weight, of_x

    return run(table, x, labels, cotangent)


def check(weight, x, labels, cotangent, *, mask_padding=False, chunk=None, **rules):
    table = Table(weight, **rules)
    actual = value_and_gradients(table, x, labels, cotangent, mask_padding=mask_padding, chunk=chunk)
    expected, _ = reference.cross_entropy(weight, x, labels, mask_padding, **rules)
    gradients = reference.cross_entropy_gradient(weight, x, labels, cotangent, mask_padding, **rules)
    for one, other in zip(actual, (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)


def of_optax(table, x, labels, mask_padding=False):
    logits = attend(table, x, mask_padding=mask_padding)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))


@with_masked
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_values_and_gradients_by_every_rule(rules, mask_padding):
    check(WEIGHT, X, LABELS, COTANGENT, mask_padding=mask_padding, **rules)


@with_masked
@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 8, 1000])
def test_every_size_of_a_block(chunk, mask_padding):
    check(WEIGHT, X, LABELS, COTANGENT, chunk=chunk, mask_padding=mask_padding, **RULES["all"])


def test_several_padding_rows():
    check(WEIGHT, X, LABELS, COTANGENT, chunk=2, mask_padding=True, padding_idx=(0, 2, -1))


@with_masked
@pytest.mark.parametrize("policy", ["error", "clip", "nan", "zero"])
def test_traced_labels_without_a_row(policy, mask_padding):
    check(
        WEIGHT, X, BAD, COTANGENT, chunk=2, mask_padding=mask_padding, out_of_range=policy, padding_idx=1, max_norm=1.5
    )


@pytest.mark.parametrize("policy", ["error", "nan"])
def test_nothing_of_a_token_without_a_label_reaches_the_gradient(policy):
    """Not even NaN in its vector, or in its cotangent."""
    x, cotangent = X.copy(), COTANGENT.copy()
    x[0, 1], cotangent[0, 1] = np.nan, np.nan
    loss, of_weight, of_x = value_and_gradients(Table(WEIGHT, out_of_range=policy), x, BAD, cotangent)
    assert np.isnan(loss[0, 1])
    assert np.isfinite(of_weight).all()
    np.testing.assert_array_equal(of_x[0, 1], 0)


def test_nothing_of_a_masked_token_reaches_the_gradient():
    x, cotangent = X.copy(), COTANGENT.copy()
    x[0, 0], cotangent[0, 0] = np.inf, np.nan
    loss, of_weight, of_x = value_and_gradients(Table(WEIGHT, padding_idx=2), x, LABELS, cotangent, mask_padding=True)
    assert loss[0, 0] == 0
    assert np.isfinite(of_weight).all()
    np.testing.assert_array_equal(of_x[0, 0], 0)
    np.testing.assert_array_equal(of_weight[2], 0)


@with_masked
@pytest.mark.parametrize("rows", [1, 300, 1024, 2500])
def test_as_optax_on_the_logits_of_attend(rows, mask_padding):
    rng = np.random.default_rng(rows)
    table = Table(rng.normal(size=(rows, 16)).astype(np.float32), padding_idx=rows // 2, max_norm=3.0)
    x, labels = rng.normal(size=(20, 16)).astype(np.float32), rng.integers(0, rows, 20)
    labels = labels[labels != rows // 2] if mask_padding else labels
    x = x[: len(labels)]

    def mean(loss, table, x):
        return jnp.sum(loss(table, x, labels, mask_padding=mask_padding)) / max(len(labels), 1)

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(mean, loss), argnums=(0, 1)))(table, x)
        for loss in (functools.partial(softmax_cross_entropy, chunk=1024), of_optax)
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)


def test_large_logits_do_not_overflow():
    weight = np.array([[1e4, 0], [-1e4, 0], [0, 1e4], [1e4, 0]], np.float32)
    check(weight, np.eye(2, dtype=np.float32), np.array([0, 1]), np.ones(2, np.float32), chunk=2)
    check(weight, -np.eye(2, dtype=np.float32), np.array([0, 1]), np.ones(2, np.float32), chunk=1)


def test_one_row_has_no_loss():
    weight, x = np.full((1, 2), 3.0, np.float32), np.array([[1e4, 7.0], [0.1, 0.3]], np.float32)
    loss, of_weight, of_x = value_and_gradients(Table(weight), x, np.zeros(2, int), np.ones(2, np.float32))
    for exact in loss, of_weight, of_x:
        np.testing.assert_array_equal(exact, 0)


def test_all_rows_masked():
    table = Table(WEIGHT[:2], padding_idx=(0, 1), out_of_range="zero")
    labels = np.array([0, 1, 2])
    loss, of_weight, of_x = value_and_gradients(table, X[0], labels, np.ones(3, np.float32), mask_padding=True)
    np.testing.assert_array_equal(loss, [0, 0, -np.inf])
    np.testing.assert_array_equal(of_weight, 0)
    np.testing.assert_array_equal(of_x, 0)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(shape):
    x, cotangent = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    loss, of_weight, of_x = value_and_gradients(Table(WEIGHT), x, np.zeros(shape, int), cotangent)
    assert (loss.shape, of_x.shape) == (shape, x.shape)
    np.testing.assert_array_equal(of_weight, np.zeros_like(WEIGHT))


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_rows(tokens):
    table, x = Table(np.zeros((0, 3), np.float32)), np.ones((tokens, 3), np.float32)
    loss, of_weight, of_x = value_and_gradients(table, x, np.zeros(tokens, int), np.ones(tokens, np.float32))
    assert np.isnan(loss).all()
    assert of_weight.shape == (0, 3)
    np.testing.assert_array_equal(of_x, np.zeros((tokens, 3)))


@pytest.mark.parametrize(
    ("dim", "batch"), [((), (4,)), ((0,), (4,)), ((2, 3), (2, 2)), ((3,), ())], ids=["scalars", "zero", "axes", "one"]
)
def test_rows_of_any_axes(dim, batch):
    rng = np.random.default_rng(0)
    weight, x = (rng.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((5,), batch))
    labels, cotangent = rng.integers(0, 5, batch), rng.normal(size=batch).astype(np.float32)
    check(weight, x, labels, cotangent, chunk=2, padding_idx=1, max_norm=1.0)


@pytest.mark.parametrize("labels", [[[2, 0, -1], [1, 2, 5]], LABELS.astype(np.int8), jnp.asarray(LABELS)], ids=type)
def test_labels_of_any_kind_without_jit(labels):
    loss = softmax_cross_entropy(Table(WEIGHT), X.tolist(), labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference.cross_entropy(WEIGHT, X, LABELS)[0], **FLOAT32)


# ---- Dtypes.


@pytest.mark.parametrize(
    ("stored", "given", "tolerance"),
    [
        ("bfloat16", "bfloat16", 1e-2),
        ("float16", "float16", 2e-3),
        ("float32", "bfloat16", 1e-2),
        ("bfloat16", "float32", 1e-2),
        ("float16", "bfloat16", 1e-2),
    ],
)
def test_low_precision_is_rounded_once(stored, given, tolerance):
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=(50, 8))).astype(stored)
    x, labels = jnp.asarray(rng.normal(size=(6, 8))).astype(given), rng.integers(0, 50, 6)
    cotangent = rng.normal(size=6).astype(np.float32)
    loss, of_weight, of_x = value_and_gradients(Table(weight, max_norm=2.0), x, labels, cotangent, chunk=7)
    assert (loss.dtype, of_weight.dtype, of_x.dtype) == (jnp.float32, weight.dtype, x.dtype)
    wide = np.asarray(weight, np.float64), np.asarray(x, np.float64)
    gradients = reference.cross_entropy_gradient(*wide, labels, cotangent, max_norm=2.0)
    np.testing.assert_allclose(loss, reference.cross_entropy(*wide, labels, max_norm=2.0)[0], rtol=tolerance)
    for one, other in zip((of_weight, of_x), gradients, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=tolerance, atol=tolerance)


def test_sums_of_low_precision_run_in_float32():
    """4096 tokens that each add 1 to one row; in bfloat16 they would add up to 256."""
    tokens = 4096
    table, x = Table(jnp.zeros((2, 1), jnp.bfloat16)), jnp.ones((tokens, 1), jnp.bfloat16)
    labels, cotangent = np.zeros(tokens, int), np.full(tokens, 2, np.float32)
    _, of_weight, _ = value_and_gradients(table, x, labels, cotangent)
    np.testing.assert_array_equal(np.asarray(of_weight, np.float32), [[-tokens], [tokens]])


def test_float64_stays_float64():
    with jax.enable_x64(True):
        loss, of_weight, of_x = value_and_gradients(
            Table(WEIGHT.astype(np.float64), max_norm=1.5), X.astype(np.float64), LABELS, COTANGENT.astype(np.float64)
        )
        assert loss.dtype == of_weight.dtype == of_x.dtype == np.float64
        np.testing.assert_allclose(loss, reference.cross_entropy(WEIGHT, X, LABELS, max_norm=1.5)[0], rtol=1e-12)


# ---- Transformations.


def energy(table, x, chunk=2):
    return jnp.sum(jnp.sin(softmax_cross_entropy(table, x, LABELS, chunk=chunk)))


def energy_of_logits(table, x):
    return jnp.sum(jnp.sin(of_optax(table, x, LABELS)))


def assert_equal_trees(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rules", MAIN_RULES.values(), ids=MAIN_RULES)
def test_the_second_derivative_forward_over_reverse(rules, dtype):
    table, x = Table(jnp.asarray(WEIGHT).astype(dtype), **rules), jnp.asarray(X)
    tangents = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype), (table, x)
    )
    ours, theirs = (
        jax.jit(lambda f=f: jax.jvp(jax.grad(f, argnums=(0, 1)), (table, x), tangents))()
        for f in (energy, energy_of_logits)
    )
    tolerance = FLOAT32 if dtype == "float32" else {"rtol": 0.03, "atol": 0.1}
    assert_equal_trees(*(jax.tree.map(lambda a: a.astype(jnp.float32), tree) for tree in (ours, theirs)), **tolerance)


def test_hessian():
    table = Table(WEIGHT, padding_idx=2, max_norm=1.5)
    for argument in 0, 1:
        hessians = (jax.hessian(f, argnums=argument)(table, jnp.asarray(X)) for f in (energy, energy_of_logits))
        assert_equal_trees(*hessians, **FLOAT32)


def test_forward_mode_alone_is_refused():
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: softmax_cross_entropy(Table(WEIGHT), x, LABELS), (X,), (X,))


def test_vmap_over_tokens_over_tables_and_over_both():
    tables = Table(jnp.stack([jnp.asarray(WEIGHT), 2 * jnp.asarray(WEIGHT)]), max_norm=1.5)

    def gradients(table, x, labels):
        return jax.value_and_grad(lambda *args: softmax_cross_entropy(*args, labels, chunk=3).sum(), (0, 1))(table, x)

    for axes in (None, 0, 0), (0, None, None), (0, 0, 0):
        args = [
            arg if axis == 0 else jax.tree.map(lambda leaf: leaf[0], arg)
            for arg, axis in zip((tables, jnp.asarray(X), jnp.asarray(LABELS)), axes, strict=True)
        ]
        lanes = jax.vmap(gradients, axes)(*args)
        for lane in range(2):
            of_lane = [
                jax.tree.map(lambda leaf: leaf[lane], arg) if axis == 0 else arg  # noqa: B023
                for arg, axis in zip(args, axes, strict=True)
            ]
            assert_equal_trees(jax.tree.map(lambda leaf: leaf[lane], lanes), gradients(*of_lane), **FLOAT32)  # noqa: B023


def test_in_scan_and_under_checkpoint():
    table = Table(WEIGHT)

    def scanned(table, x):
        def step(sum_, batch):
            return sum_ + softmax_cross_entropy(table, *batch, chunk=3).sum(), None

        return jax.lax.scan(jax.checkpoint(step), jnp.float32(0), (x, jnp.asarray(LABELS)))[0]

    def plain(table, x):
        return softmax_cross_entropy(table, x, LABELS).sum()

    one, other = (jax.value_and_grad(f, argnums=(0, 1))(table, jnp.asarray(X)) for f in (scanned, plain))
    assert_equal_trees(one, other, **FLOAT32)


def test_checkify_finds_no_error():
    checked = checkify.checkify(jax.grad(energy, argnums=(0, 1)), errors=checkify.all_checks)
    error, _ = jax.jit(checked)(Table(WEIGHT, padding_idx=2, max_norm=1.5), X)
    error.throw()


# ---- The tape.


@pytest.mark.parametrize("rules", MAIN_RULES.values(), ids=MAIN_RULES)
def test_gradient_of_a_tied_table_is_dense_without_a_warning(rules):
    def loss(table, head=softmax_cross_entropy):
        return head(table, jnp.tanh(lookup(table, LABELS[:, ::-1])), LABELS).sum()

    table = Table(WEIGHT, **rules)
    value, gradient = embax.value_and_grad(loss)(table)
    expected_value, expected = jax.value_and_grad(functools.partial(loss, head=of_optax))(table)
    np.testing.assert_allclose(value, expected_value, **FLOAT32)
    assert isinstance(gradient, RowGrad if table.freeze else Table)
    gradient = gradient.to_dense() if table.freeze else gradient.weight
    np.testing.assert_allclose(gradient, expected.weight, **FLOAT32)


def test_gradient_after_renormalize():
    def loss(table, head=softmax_cross_entropy):
        table = renormalize(table, LABELS)
        return head(table, jnp.tanh(lookup(table, LABELS[:, ::-1])), LABELS).sum()

    table = Table(WEIGHT, max_norm=1.0, padding_idx=1)
    gradient = embax.grad(loss)(table)
    assert isinstance(gradient, Table)
    np.testing.assert_allclose(
        gradient.weight, jax.grad(functools.partial(loss, head=of_optax))(table).weight, **FLOAT32
    )


# ---- Meshes.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("weight_spec", [(), ("x",)], ids=str)
@pytest.mark.parametrize("set_mesh", [True, False])
def test_on_a_mesh(axis_type, weight_spec, set_mesh):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), (4, 2, 4)))
    labels, cotangent = rng.integers(0, 8, (4, 2)), rng.normal(size=(4, 2)).astype(np.float32)
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    put = [jax.device_put(array, tokens) for array in (x, labels, cotangent)]
    table = Table(jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*weight_spec))), padding_idx=2, max_norm=1.5)
    if set_mesh:
        with jax.set_mesh(mesh):
            loss, of_weight, of_x = value_and_gradients(table, *put, chunk=3, mask_padding=True)
    else:
        loss, of_weight, of_x = value_and_gradients(table, *put, chunk=3, mask_padding=True)
    rules = {"padding_idx": 2, "max_norm": 1.5}
    gradients = reference.cross_entropy_gradient(weight, x, labels, cotangent, True, **rules)
    np.testing.assert_allclose(loss, reference.cross_entropy(weight, x, labels, True, **rules)[0], **FLOAT32)
    for one, other in zip((of_weight, of_x), gradients, strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)
    assert loss.sharding.is_equivalent_to(tokens, 2)
    assert of_x.sharding.is_equivalent_to(tokens, 3)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma):
    """Over tokens in shards, the gradient of the replicated table is the sum of the shards'."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spec, table = PartitionSpec("x"), Table(WEIGHT, padding_idx=2)

    def of_shard(table, x, labels):
        return softmax_cross_entropy(table, x, labels, chunk=3)

    sharded = jax.shard_map(
        of_shard, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec, check_vma=check_vma
    )
    one, other = (
        jax.value_and_grad(lambda table, x, f=f: jnp.sum(f(table, x, jnp.asarray(LABELS))), (0, 1))(
            table, jnp.asarray(X)
        )
        for f in (jax.jit(sharded), of_shard)
    )
    assert_equal_trees(one, other, **FLOAT32)


# ---- What it compiles to.


def compiled(function, rows, dtype, tokens=256, dim=64, **rules):
    table = Table(jax.ShapeDtypeStruct((rows, dim), dtype), **rules)
    x, labels = jax.ShapeDtypeStruct((tokens, dim), dtype), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return jax.jit(function).lower(table, x, labels).compile()


def forward(table, x, labels):
    return softmax_cross_entropy(table, x, labels, chunk=512)


def with_gradient(table, x, labels):
    return jax.value_and_grad(lambda table, x: forward(table, x, labels).sum(), argnums=(0, 1))(table, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("function", [forward, with_gradient])
@pytest.mark.parametrize("rules", [{}, {"padding_idx": 3, "max_norm": 1.0}], ids=str)
def test_temporary_memory_follows_the_block_and_not_the_rows(function, dtype, rules):
    few, many = (compiled(function, rows, dtype, **rules).memory_analysis() for rows in (8192, 65536))
    assert few.temp_size_in_bytes == many.temp_size_in_bytes
    assert many.temp_size_in_bytes < 8 * 512 * 256 * 4  # blocks of logits; all of them are 128
    few, many = (compiled(function, rows, dtype, **rules).memory_analysis() for rows in (8192 + 77, 65536 + 77))
    assert few.temp_size_in_bytes == many.temp_size_in_bytes < 8 * 512 * 256 * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_step_copies_the_table(dtype):
    text = compiled(with_gradient, 65536 + 77, dtype, padding_idx=3, max_norm=1.0).as_text()
    assert "[65613,64]" in text
    assert not re.findall(
        r"\[65613,64\][^ ]* (?:copy|convert|bitcast-convert|concatenate|pad)\(", outside_fusions(text)
    )


def outside_fusions(text):
    """The computations of a program that hold what is written to memory."""
    parts = re.split(r"\n(?=%|ENTRY )", text)
    return "\n".join(part for part in parts if "fused_computation" not in part.split("(")[0])


def test_the_gradient_of_a_frozen_table_costs_nothing():
    frozen, trained = (compiled(with_gradient, 4096, jnp.float32, freeze=freeze) for freeze in (True, False))
    assert frozen.as_text().count(" dot(") == trained.as_text().count(" dot(") - 1 == 3


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.softmax_cross_entropy(")
    with pytest.raises(IndexError, match=name + r"labels=...\)` must be in \[-7, 7\).* got 7 at position \(0, 1\)"):
        softmax_cross_entropy(table, X, BAD)
    with pytest.raises(TypeError, match=name + r"labels=...\)` must be of an integer dtype, got float32"):
        softmax_cross_entropy(table, X, np.zeros((2, 3), np.float32))
    with pytest.raises(
        ValueError, match=name + r"labels=...\)` must be one a vector, of the shape \(2, 3\), got \(3,\)"
    ):
        softmax_cross_entropy(table, X, [0, 1, 2])
    with pytest.raises(ValueError, match=name + r"x=...\)` must be of the shape"):
        softmax_cross_entropy(table, X[..., :2], LABELS)
    with pytest.raises(TypeError, match=name + r"x=...\)` must be of a float dtype, got int"):
        softmax_cross_entropy(table, LABELS, LABELS)
    with pytest.raises(TypeError, match=name + r"table=...\)` must be of a float dtype, got int"):
        softmax_cross_entropy(Table(jnp.ones((ROWS, 3), jnp.int32)), X, LABELS)
    with pytest.raises(ValueError, match=name + r"chunk=...\)` must be at least 1, got 0"):
        softmax_cross_entropy(table, X, LABELS, chunk=0)
    with pytest.raises(TypeError, match=name + r"chunk=...\)` must be a whole number, got 1.5"):
        softmax_cross_entropy(table, X, LABELS, chunk=1.5)
    with pytest.raises(TypeError, match=name + r"mask_padding=...\)` must be a bool, got 1"):
        softmax_cross_entropy(table, X, LABELS, mask_padding=1)
