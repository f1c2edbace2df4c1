"""attend and the cross-entropies on a mesh: what they are off it, each device seeing to its own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import NamedSharding, PartitionSpec
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split

import embax
from embax import Table, attend, lookup, sampled_softmax, softmax_cross_entropy

ROWS, DIM = 97, 8  # rows that neither four nor eight divide, and 25 of a device that two do not
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 3, DIM)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(-ROWS, ROWS, X.shape[:-1]).astype(np.int32)
LABELS[0, 1], LABELS[2, 0], LABELS[4, 2] = 4, 500, -1  # the padding row, none, and the last one
LABELS[1] = 1, 2, 3  # the first rows of other devices
RULES = {"padding_idx": 4, "max_norm": 2.5}


def along_the_last(mesh, array):
    """Split over the last axis of a mesh only."""
    return jax.device_put(np.asarray(array), NamedSharding(mesh, PartitionSpec(mesh.axis_names[-1])))


def as_it_is(mesh, array):
    return np.asarray(array)


PUTS = {"split": split, "everywhere": everywhere, "last": along_the_last, "off": as_it_is}


def assert_close(values, expected, dtype=jnp.float32):
    """Rounding of float32 in another order of sums, and of what is rounded to bfloat16 besides."""
    values, expected = (np.asarray(x, np.float32) for x in (values, expected))
    assert values.shape == expected.shape
    # Of no NaN and no infinity: these must be where they are expected.
    np.testing.assert_array_equal(np.isfinite(values), np.isfinite(expected))
    finite = np.isfinite(expected)
    size = np.max(np.abs(expected[finite]), initial=1)
    error = np.max(np.abs(values[finite] - expected[finite]), initial=0)
    assert error <= (2e-6 if dtype == jnp.float32 else 2**-7) * size


@jax.jit
def everything(table, x, labels):
    def losses(table, x):
        return {
            "in blocks": softmax_cross_entropy(table, x, labels, chunk=5),
            "at once": softmax_cross_entropy(table, x, labels, mask_padding=True),
            "sampled": sampled_softmax(table, x, labels, jax.random.key(0), samples=16),
            "logits": attend(table, x, mask_padding=True),
        }

    def total(table, x, names):
        values = losses(table, x)
        return sum(jnp.sum(jnp.where(jnp.isfinite(values[name]), jnp.sin(values[name]), 0)) for name in names)

    def gradients(*names):
        return jax.grad(total, (0, 1))(table, x, names)

    return losses(table, x), [gradients("in blocks", "at once"), gradients("logits"), gradients("sampled")]


@pytest.mark.parametrize(
    ("layout", "axes", "batch"),
    [
        *[(layout, "explicit", "split") for layout in LAYOUTS],
        *[(layout, "auto", "split") for layout in ("rows", "rows-cyclic", "columns", "replicated")],
        ("rows and columns", "auto", "everywhere"),
        ("rows and copies", "auto", "last"),
        ("rows and copies", "explicit", "last"),
        ("rows over two axes", "explicit", "everywhere"),
        ("rows-cyclic", "explicit", "off"),
    ],
)
def test_heads_are_as_off_the_mesh(layout, axes, batch):
    sizes, how = LAYOUTS[layout]
    mesh, put = mesh_of(sizes, axes), PUTS[batch]
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    x, labels = put(mesh, X), put(mesh, LABELS)
    out, gradients = everything(table, x, labels)
    expected, of_expected = everything(Table(WEIGHT, **RULES), X, LABELS)
    for name in expected:
        assert_close(out[name], expected[name])
    for (of_table, of_x), (of_expected_table, of_expected_x) in zip(gradients, of_expected, strict=True):
        assert of_table.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
        weight = np.asarray(embax.unshard(of_table).weight)
        assert_close(weight, of_expected_table.weight)
        assert not weight[4].any()
        filled_up = np.asarray(table.placement.ids(jnp.arange(table.placement.stored_rows))) == ROWS
        assert not np.asarray(of_table.weight)[filled_up].any()
        assert_close(of_x, of_expected_x)
    if axes == "explicit" and batch != "off":
        assert all(values.sharding.is_equivalent_to(x.sharding, values.ndim) for values in out.values())


@pytest.mark.parametrize("axes", AXES)
def test_batches_of_any_shape_and_calls_outside_of_jit(axes):
    mesh = mesh_of({"x": 4, "y": 2}, axes)
    table, off = embax.shard(Table(WEIGHT, **RULES), mesh, "x"), Table(WEIGHT, **RULES)
    for batch in (), (0,), (5,):  # which the copies cannot share out
        x, labels = X.reshape(-1, DIM)[:5], np.abs(LABELS.ravel()[3:8]) % ROWS
        x, labels = (x[0], labels[0]) if batch == () else (x[: batch[0]], labels[: batch[0]])
        assert_close(attend(table, x), attend(off, x))
        assert_close(softmax_cross_entropy(table, x, labels), softmax_cross_entropy(off, x, labels))
        gradient = jax.grad(lambda t, x, y: softmax_cross_entropy(t, x, y).sum(), (0, 1))
        with jax.set_mesh(mesh):  # which JAX asks for to pull the sum back
            of_table, of_x = gradient(table, x, labels)
        of_off, of_x_off = gradient(off, x, labels)
        assert_close(embax.unshard(of_table).weight, of_off.weight)
        assert_close(of_x, of_x_off)
    with pytest.raises(IndexError, match="got 500 at position"):
        softmax_cross_entropy(table, X, LABELS)


@pytest.mark.parametrize(
    "rules", [{"out_of_range": "zero"}, {"out_of_range": "clip"}, {"out_of_range": "nan", "freeze": True}]
)
def test_labels_without_a_row_and_frozen_tables(rules):
    mesh = mesh_of({"x": 4, "y": 2})
    labels = split(mesh, np.tile([-ROWS - 1, 500, 3], (8, 1)))

    @jax.jit
    def run(table, x):
        losses = softmax_cross_entropy(table, x, labels)
        return losses, jax.grad(lambda *args: softmax_cross_entropy(*args, labels).sum(), (0, 1))(table, x)

    losses, (of_table, of_x) = run(embax.shard(Table(WEIGHT, **rules), mesh, "x", columns="y"), X)
    expected, (of_off, of_x_off) = run(Table(WEIGHT, **rules), X)
    assert_close(losses, expected)
    assert_close(embax.unshard(of_table).weight, of_off.weight)
    assert_close(of_x, of_x_off)
    assert bool(np.any(of_off.weight)) != rules.get("freeze", False)


@pytest.mark.parametrize(("layout", "axes"), [("rows and copies", "explicit"), ("rows and columns", "auto")])
def test_bfloat16_is_summed_in_float32(layout, axes):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)

    @jax.jit
    def run(table, x, ones):
        def loss(table, x):
            losses = softmax_cross_entropy(table, x, np.abs(LABELS) % ROWS)
            return jnp.sum(jnp.sin(losses)) + jnp.sum(attend(table, x, dtype=jnp.float32)), losses

        many = jax.grad(lambda t: jnp.sum(attend(t, ones, dtype=jnp.float32)))(table)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(table, x), many

    x, ones = X.astype(jnp.bfloat16), np.ones((4096, DIM), jnp.bfloat16)
    table = embax.shard(Table(jnp.asarray(WEIGHT, jnp.bfloat16)), mesh, **how)
    ((_, losses), (of_table, of_x)), many = run(table, split(mesh, x), split(mesh, ones))
    ((_, expected), (of_off, of_x_off)), _ = run(Table(jnp.asarray(WEIGHT, jnp.bfloat16)), x, ones)
    assert_close(losses, expected)
    assert_close(embax.unshard(of_table).weight, of_off.weight, jnp.bfloat16)
    assert_close(of_x, of_x_off, jnp.bfloat16)
    assert of_table.weight.dtype == of_x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(embax.unshard(many).weight, np.full((ROWS, DIM), 4096))


def test_under_transformations():
    mesh = mesh_of({"x": 4, "y": 2})
    labels = jnp.arange(3)

    def loss(table, x):
        return softmax_cross_entropy(table, x, labels).sum() + jnp.sum(jnp.sin(attend(table, x)))

    @jax.jit
    def run(table, xs):
        scanned = jax.checkpoint(lambda t, xs: jax.lax.scan(lambda c, x: (c + loss(t, x), None), jnp.zeros(()), xs)[0])
        return {
            "vmap": jax.vmap(loss, (None, 0))(table, xs),
            "scan": jax.grad(scanned, 1)(table, xs),
            "hessian": jax.hessian(loss, 1)(table, xs[0]),
            "jvp": jax.jvp(attend, (table, xs[0]), (table, xs[0]))[1],
        }

    placed = run(embax.shard(Table(WEIGHT, max_norm=2.5), mesh, "x", "rows-cyclic", columns="y"), X)
    for name, expected in run(Table(WEIGHT, max_norm=2.5), X).items():
        assert_close(placed[name], expected)


def test_no_row_has_a_gradient_of_what_is_not_a_number():
    x = X.copy()
    x[1, 1] = np.nan
    table = embax.shard(Table(WEIGHT, padding_idx=4), mesh_of({"x": 8}), "x")

    def loss(table):
        return softmax_cross_entropy(table, x, np.abs(LABELS) % ROWS).sum() + attend(table, x).sum()

    weight = np.asarray(jax.jit(jax.grad(loss))(table).weight)
    assert not weight[[4, *range(ROWS, 104)]].any()
    assert np.isnan(weight[:4]).all()


def test_tables_without_rows_or_columns():
    mesh = mesh_of({"x": 8})
    for weight, x, labels in (
        (WEIGHT[:0], X[0], []),
        (WEIGHT[:, :0], X[0, :, :0], [0, 1, ROWS - 1]),
        (WEIGHT[:3], X[0], [2]),
    ):
        table, x_of_labels = embax.shard(Table(weight), mesh, "x"), x[: len(labels)]
        assert_close(attend(table, x), attend(Table(weight), x))
        losses = softmax_cross_entropy(Table(weight), x_of_labels, labels)
        assert_close(softmax_cross_entropy(table, x_of_labels, labels), losses)


@pytest.mark.parametrize("axes", AXES)
def test_a_tied_table_trains_as_off_the_mesh(axes):
    mesh = mesh_of({"x": 8}, axes)
    tx = embax.optim.rowwise_adagrad(0.1)

    @jax.jit
    def step(table, state, ids, labels):
        def loss(table):
            x = jnp.tanh(lookup(table, ids))
            return softmax_cross_entropy(table, x, labels).mean() + jnp.mean(attend(table, x) ** 2)

        value, gradient = embax.value_and_grad(loss, on_dense="error")(table)
        updates, state = tx.update(gradient, state, table)
        return embax.apply_updates(table, updates), state, value

    ids, labels = np.arange(16, dtype=np.int32), np.arange(1, 17, dtype=np.int32)
    on, off = embax.shard(Table(WEIGHT, padding_idx=4), mesh, "x", "rows-cyclic"), Table(WEIGHT, padding_idx=4)
    state, of_off = tx.init(on), tx.init(off)
    for _ in range(2):
        on, state, value = step(on, state, split(mesh, ids), split(mesh, labels))
        off, of_off, expected = step(off, of_off, ids, labels)
    assert_close(value, expected)
    # Adagrad divides by the root of small gradients, so that their rounding counts for more: float32, 1e-5.
    np.testing.assert_allclose(embax.unshard(on).weight, off.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("set_mesh", [False, True])
def test_labels_of_another_layout_meet_their_vectors(set_mesh):
    mesh = mesh_of({"x": 4, "y": 2}, "explicit")
    table = embax.shard(Table(WEIGHT), mesh, "x")
    x = jax.device_put(X[:, :2], NamedSharding(mesh, PartitionSpec("x", "y")))
    labels = np.abs(LABELS[:, :2]) % ROWS
    of_labels = jax.device_put(labels, NamedSharding(mesh, PartitionSpec("y")))

    @jax.jit
    def run(table, x, labels):
        sampled = sampled_softmax(table, x, labels, jax.random.key(0), samples=16)
        return sampled, softmax_cross_entropy(table, x, labels)

    expected = run(Table(WEIGHT), X[:, :2], labels)
    with jax.set_mesh(mesh) if set_mesh else np.errstate():
        out = run(table, x, of_labels)
    for losses, of_expected in zip(out, expected, strict=True):
        assert_close(losses, of_expected)


def gathered(compiled):
    """The largest array that devices gather from one another, or sum; its numbers."""
    found = [x.numbers for x in collectives(compiled, usual=False) if x.kind in {"all-gather", "all-reduce"}]
    return max(found)


@pytest.mark.parametrize("axes", AXES)
def test_neither_the_table_nor_the_logits_are_on_one_device(axes):
    for layout, how in ("rows-cyclic", {}), ("rows", {"columns": "y"}):
        mesh = mesh_of({"x": 4, "y": 2}, axes)
        held = []
        for rows in 4_000, 32_000:
            table = embax.shard(np.zeros((rows, DIM), np.float32), mesh, "x", layout, **how)
            x, labels = split(mesh, X), split(mesh, np.abs(LABELS) % ROWS)
            step = jax.value_and_grad(lambda t, x, y: softmax_cross_entropy(t, x, y, chunk=64).sum(), (0, 1))
            compiled = jax.jit(step).lower(table, x, labels).compile()
            held.append(compiled.memory_analysis().temp_size_in_bytes)
            assert gathered(compiled) <= max(X.size, 64 * DIM)  # the vectors, or the gradient of a block
        assert held[1] <= 1.05 * held[0]
        compiled = jax.jit(attend).lower(table, x).compile()
        assert gathered(compiled) <= X.size
        # A device has the logits of its own rows, or those of its own tokens; for a moment, both, and what is sent.
        assert compiled.memory_analysis().temp_size_in_bytes <= 4 * (X.size // DIM * rows // 4) * 4
