"""attend and the cross-entropies on a mesh, where each device reads its own rows, equal those on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close_to_largest
from hlo import collectives, compiled
from jax.sharding import NamedSharding, PartitionSpec
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split, waiting

import embax
from embax import Table, attend, lookup, sampled_softmax, softmax_cross_entropy

ROWS, DIM = 97, 8  # rows that neither four nor eight divide, and 25 of a device that two do not
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(8, 3, DIM)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, ROWS, X.shape[:-1]).astype(np.int32)
LABELS[0, 1], LABELS[2, 0], LABELS[4, 2] = 4, 500, ROWS - 1  # the padding row, none, and the last one
LABELS[3, 0], LABELS[5, 1] = -1, -100  # none, and that of a token that does not count
LABELS[1] = 1, 2, 3  # the first rows of other devices
RULES = {"padding_idx": 4, "max_norm": 2.5}


def along_the_last(mesh, array):
    """Split over the last axis of a mesh only."""
    return jax.device_put(np.asarray(array), NamedSharding(mesh, PartitionSpec(mesh.axis_names[-1])))


def as_it_is(mesh, array):
    return np.asarray(array)


# What is rounded to bfloat16 in the exchange.
BFLOAT16 = 2**-7

PUTS = {"split": split, "everywhere": everywhere, "last": along_the_last, "off": as_it_is}


@functools.partial(jax.jit, static_argnames="names")
def everything(table, x, labels, names):
    """The heads of these names, and the gradients of table and vectors that each of them gives by itself."""
    heads = {
        "in blocks": lambda t, x: softmax_cross_entropy(t, x, labels, chunk=5),
        "at once": lambda t, x: softmax_cross_entropy(t, x, labels, mask_padding=True),
        "sampled": lambda t, x: sampled_softmax(t, x, labels, jax.random.key(0), samples=16),
        "logits": lambda t, x: attend(t, x, mask_padding=True),
    }

    def with_gradient(head):
        out, pull_back = jax.vjp(head, table, x)
        finite = jnp.isfinite(out)
        return out, pull_back(jnp.where(finite, jnp.cos(jnp.where(finite, out, 0)), 0))

    return {name: with_gradient(heads[name]) for name in names}


@functools.cache
def off_the_mesh(name):
    return everything(Table(WEIGHT, **RULES), X, LABELS, (name,))[name]


def rest(*names):
    """A case of the exhaustive run."""
    return pytest.param(*names, marks=pytest.mark.exhaustive)


BLOCKS, ONCE = ("in blocks", "logits"), ("at once", "logits")
ALL = "in blocks", "at once", "sampled", "logits"


@pytest.mark.parametrize(
    ("layout", "axes", "batch", "names"),
    [
        ("rows", "explicit", "split", ("in blocks",)),
        ("columns", "explicit", "split", ("at once",)),
        ("replicated", "auto", "split", ("in blocks",)),
        ("rows and copies", "explicit", "last", BLOCKS),
        ("rows and columns", "explicit", "split", ("logits",)),
        ("rows over two axes", "explicit", "off", ("at once",)),
        *[rest(layout, axes, "split", ALL) for layout in LAYOUTS for axes in AXES],
        rest("rows and columns", "auto", "everywhere", ALL),
        rest("rows and copies", "auto", "last", ALL),
        rest("rows and copies", "explicit", "last", ALL),
        rest("rows over two axes", "explicit", "everywhere", ALL),
        rest("rows-cyclic", "explicit", "off", ALL),
    ],
)
def test_heads_equal_those_without_a_mesh(layout, axes, batch, names):
    sizes, how = LAYOUTS[layout]
    mesh, put = mesh_of(sizes, axes), PUTS[batch]
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    x, labels = put(mesh, X), put(mesh, LABELS)
    filled_up = [k for k in range(table.placement.stored_rows) if is_filled_up(table.placement, k)]
    heads = jax.block_until_ready(everything(table, x, labels, names))
    for name, (out, (of_table, of_x)) in heads.items():
        expected, (of_expected_table, of_expected_x) = off_the_mesh(name)
        assert_close_to_largest(out, expected, name)
        assert of_table.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
        weight = np.asarray(embax.unshard(of_table).weight)
        assert_close_to_largest(weight, of_expected_table.weight, name)
        assert not weight[4].any()
        assert not np.asarray(of_table.weight)[filled_up].any()
        assert_close_to_largest(of_x, of_expected_x, name)
        if axes == "explicit" and batch != "off":
            assert out.sharding.is_equivalent_to(x.sharding, out.ndim)


def is_filled_up(placement, position):
    """Whether a stored row is padding."""
    shard, place = divmod(position, placement.block)
    return (place * placement.shards + shard if placement.cyclic else position) >= ROWS


def batches():
    """No batch axis, no token, and tokens that the copies cannot share out."""
    x, labels = X.reshape(-1, DIM)[:5], np.abs(LABELS.ravel()[3:8]) % ROWS
    return {"one": (x[0], labels[0]), "none": (x[:0], labels[:0]), "five": (x, labels)}


def of_batch(table, x, labels):
    losses, pull_back = jax.vjp(lambda t, x: softmax_cross_entropy(t, x, labels), table, x)
    return attend(table, x), losses, pull_back(jnp.ones_like(losses))


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", ["explicit", rest("auto")])
def test_batches_of_any_shape(axes):
    table, off = embax.shard(Table(WEIGHT, **RULES), mesh_of({"x": 4, "y": 2}, axes), "x"), Table(WEIGHT, **RULES)
    run = jax.jit(lambda table, batches: {name: of_batch(table, *batch) for name, batch in batches.items()})
    out, expected = run(table, batches()), run(off, batches())
    for name, (logits, losses, (of_table, of_x)) in out.items():
        of_logits, of_losses, (of_off, of_x_off) = expected[name]
        assert_close_to_largest(logits, of_logits, name)
        assert_close_to_largest(losses, of_losses, name)
        assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight, name)
        assert_close_to_largest(of_x, of_x_off, name)


def test_calls_outside_of_jit():
    table = embax.shard(Table(WEIGHT, **RULES), mesh_of({"x": 4, "y": 2}, "explicit"), "x")
    x, labels = batches()["five"]
    logits, losses, _ = jax.jit(of_batch)(Table(WEIGHT, **RULES), x, labels)
    assert_close_to_largest(attend(table, x), logits)
    assert_close_to_largest(softmax_cross_entropy(table, x, labels), losses)
    with pytest.raises(IndexError, match="got 500 at position"):
        softmax_cross_entropy(table, X, LABELS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", AXES)
def test_gradients_outside_of_jit(axes):
    mesh = mesh_of({"x": 4, "y": 2}, axes)
    x, labels = batches()["five"]
    with jax.set_mesh(mesh):  # which JAX asks for to pull the sum back
        table = embax.shard(Table(WEIGHT, **RULES), mesh, "x")
        of_table, of_x = jax.grad(lambda t, x: softmax_cross_entropy(t, x, labels).sum(), (0, 1))(table, x)
    _, _, (of_off, of_x_off) = jax.jit(of_batch)(Table(WEIGHT, **RULES), x, labels)
    assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight)
    assert_close_to_largest(of_x, of_x_off)


def test_labels_without_a_row_and_frozen_tables():
    rules = {"zero": {}, "clip": {}, "nan": {"freeze": True}}
    mesh = mesh_of({"x": 4, "y": 2})
    labels = split(mesh, np.tile([-ROWS - 1, 500, 3], (8, 1)))
    off = {name: Table(WEIGHT, out_of_range=name, **others) for name, others in rules.items()}

    @jax.jit
    def run(tables, x):
        def losses(table, x):
            out, pull_back = jax.vjp(lambda t, x: softmax_cross_entropy(t, x, labels), table, x)
            return out, pull_back(jnp.ones_like(out))

        return {name: losses(table, x) for name, table in tables.items()}

    out, expected = run(embax.shard(off, mesh, "x", columns="y"), X), run(off, X)
    for name, (losses, (of_table, of_x)) in out.items():
        of_losses, (of_off, of_x_off) = expected[name]
        assert_close_to_largest(losses, of_losses, name)
        assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight, name)
        assert_close_to_largest(of_x, of_x_off, name)
        assert bool(np.any(of_off.weight)) != rules[name].get("freeze", False), name


@pytest.mark.parametrize(("layout", "axes"), [("rows and copies", "explicit"), rest("rows and columns", "auto")])
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
    assert_close_to_largest(losses, expected)
    assert_close_to_largest(embax.unshard(of_table).weight, of_off.weight, tolerance=BFLOAT16)
    assert_close_to_largest(of_x, of_x_off, tolerance=BFLOAT16)
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
            "hessian": jax.hessian(lambda x: softmax_cross_entropy(table, x, labels).sum())(xs[0]),
            "jvp": jax.jvp(attend, (table, xs[0]), (table, xs[0]))[1],
        }

    placed = run(embax.shard(Table(WEIGHT, max_norm=2.5), mesh, "x", "rows-cyclic", columns="y"), X)
    for name, expected in run(Table(WEIGHT, max_norm=2.5), X).items():
        assert_close_to_largest(placed[name], expected)


def test_padding_has_no_gradient_if_inputs_are_nan():
    x = X.copy()
    x[1, 1] = np.nan
    table = embax.shard(Table(WEIGHT, padding_idx=4), mesh_of({"x": 8}), "x")

    def loss(table):
        return softmax_cross_entropy(table, x, np.abs(LABELS) % ROWS).sum() + attend(table, x).sum()

    weight = np.asarray(jax.jit(jax.grad(loss))(table).weight)
    assert not weight[[4, *range(ROWS, 104)]].any()
    assert np.isnan(weight[:4]).all()


def test_tables_without_rows_or_columns():
    given = {
        "no rows": (Table(WEIGHT[:0]), X[0], np.zeros(0, np.int32)),
        "no columns": (Table(WEIGHT[:, :0]), X[0, :, :0], np.array([0, 1, ROWS - 1], np.int32)),
        "fewer rows than devices": (Table(WEIGHT[:3]), X[0], np.array([2], np.int32)),
    }

    @jax.jit
    def run(given):
        return {
            name: (attend(table, x), softmax_cross_entropy(table, x[: len(labels)], labels))
            for name, (table, x, labels) in given.items()
        }

    expected = run(given)
    for name, (logits, losses) in run(embax.shard(given, mesh_of({"x": 8}), "x")).items():
        assert_close_to_largest(logits, expected[name][0], name)
        assert_close_to_largest(losses, expected[name][1], name)


@pytest.mark.parametrize("axes", ["explicit", rest("auto")])
def test_tied_table_trains_like_without_a_mesh(axes):
    mesh = mesh_of({"x": 4}, axes)
    tx = embax.optim.rowwise_adagrad(0.1)

    @waiting
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
    assert_close_to_largest(value, expected)
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
        losses = [softmax_cross_entropy(table, x, labels)]
        return losses if set_mesh else [*losses, sampled_softmax(table, x, labels, jax.random.key(0), samples=16)]

    expected = run(Table(WEIGHT), X[:, :2], labels)
    with jax.set_mesh(mesh) if set_mesh else np.errstate():
        out = run(table, x, of_labels)
    for losses, of_expected in zip(out, expected, strict=True):
        assert_close_to_largest(losses, of_expected)


def gathered(program):
    """The largest array that devices gather from one another, or sum; its numbers."""
    found = [x.numbers for x in collectives(program, usual=False) if x.kind in {"all-gather", "all-reduce"}]
    return max(found)


@pytest.mark.parametrize(
    ("axes", "layout", "how"),
    [
        ("auto", "rows", {"columns": "y"}),
        rest("auto", "rows-cyclic", {}),
        rest("explicit", "rows-cyclic", {}),
        rest("explicit", "rows", {"columns": "y"}),
    ],
)
def test_neither_the_table_nor_the_logits_are_on_one_device(axes, layout, how):
    mesh = mesh_of({"x": 4, "y": 2}, axes)
    held = []
    for rows in 4_000, 32_000:
        table = embax.shard(np.zeros((rows, DIM), np.float32), mesh, "x", layout, **how)
        x, labels = split(mesh, X), split(mesh, np.abs(LABELS) % ROWS)
        loss = functools.partial(softmax_cross_entropy, chunk=64, label_smoothing=0.1, z_loss=0.1, reduction="mean")
        step = jax.value_and_grad(loss, (0, 1))
        program = compiled(jax.jit(step), table, x, labels)
        held.append(program.memory_analysis().temp_size_in_bytes)
        assert gathered(program) <= max(X.size, 64 * DIM)  # the vectors, or the gradient of a block
    assert held[1] <= 1.05 * held[0]
    program = compiled(jax.jit(attend), table, x)
    assert gathered(program) <= X.size
    # A device has the logits of its own rows, or those of its own tokens; for a moment, both, and what is sent.
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (X.size // DIM * rows // 4) * 4
