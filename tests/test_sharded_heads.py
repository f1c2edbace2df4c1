"""attend and the cross-entropies on a mesh: what they are off it, each device seeing to its own rows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import AXES, LAYOUTS, everywhere, mesh_of, split

import embax
from embax import Table, attend, lookup, sampled_softmax, softmax_cross_entropy

ROWS, TOKENS, DIM = 101, 24, 8
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(TOKENS, DIM)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(-ROWS, ROWS, TOKENS).astype(np.int32)
LABELS[3], LABELS[5] = 4, 500  # the padding row, and none
RULES = {"padding_idx": 4, "max_norm": 2.5}


@jax.jit
def everything(table, x, labels):
    def losses(table, x):
        return {
            "plain": softmax_cross_entropy(table, x, labels, chunk=5),
            "masked": softmax_cross_entropy(table, x, labels, mask_padding=True),
            "logits": attend(table, x, mask_padding=True),
        }

    def of_entropy(table, x):
        return sum(jnp.nansum(jnp.sin(losses(table, x)[name])) for name in ("plain", "masked"))

    def of_logits(table, x):
        return jnp.sum(jnp.sin(attend(table, x)))

    return losses(table, x), [jax.grad(loss, (0, 1))(table, x) for loss in (of_entropy, of_logits)]


@pytest.mark.parametrize(
    ("layout", "axes", "put"),
    [
        *[(layout, "explicit", split) for layout in LAYOUTS],
        ("rows-cyclic", "auto", split),
        ("rows and columns", "auto", everywhere),
        ("rows", "explicit", everywhere),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_heads_are_as_off_the_mesh(layout, axes, put):
    sizes, how = LAYOUTS[layout]
    mesh = mesh_of(sizes, axes)
    table = embax.shard(Table(WEIGHT, **RULES), mesh, **how)
    out, gradients = everything(table, put(mesh, X), put(mesh, LABELS))
    expected, of_expected = everything(Table(WEIGHT, **RULES), jnp.asarray(X), jnp.asarray(LABELS))
    for name in expected:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for (of_table, of_x), (of_expected_table, of_expected_x) in zip(gradients, of_expected, strict=True):
        assert of_table.weight.sharding.is_equivalent_to(table.weight.sharding, 2)
        weight = np.asarray(embax.unshard(of_table).weight)
        np.testing.assert_allclose(weight, of_expected_table.weight, rtol=1e-5, atol=1e-5)
        assert not weight[4].any()
        assert np.isclose(np.abs(of_table.weight).sum(), np.abs(weight).sum(), rtol=1e-5) or layout == "replicated"
        np.testing.assert_allclose(of_x, of_expected_x, rtol=1e-5, atol=1e-5)
    if axes == "explicit":
        assert out["plain"].sharding.is_equivalent_to(put(mesh, LABELS).sharding, 1)


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
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(embax.unshard(on).weight, off.weight, rtol=1e-4, atol=1e-5)


def test_candidates_are_looked_up_on_the_mesh():
    mesh = mesh_of({"x": 8})
    args = jnp.asarray(X), jnp.abs(jnp.asarray(LABELS)) % ROWS

    def loss(table, x, labels):
        return sampled_softmax(table, x, labels, key=jax.random.key(0), samples=16)

    on = jax.jit(loss)(embax.shard(Table(WEIGHT), mesh, "x"), *args)
    np.testing.assert_allclose(on, jax.jit(loss)(Table(WEIGHT), *args), rtol=1e-5)


def test_neither_the_table_nor_the_logits_are_on_one_device():
    held = []
    for rows in 4_000, 16_000:
        mesh = mesh_of({"x": 8})
        table = embax.shard(np.zeros((rows, DIM), np.float32), mesh, "x", "rows-cyclic")
        step = jax.jit(
            jax.value_and_grad(lambda t, x, labels: softmax_cross_entropy(t, x, labels, chunk=64).sum(), (0, 1))
        )
        compiled = step.lower(table, split(mesh, X), split(mesh, np.abs(LABELS) % ROWS)).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
        for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text()):
            assert np.prod([int(size) for size in shape.split(",") if size]) <= TOKENS * DIM
    assert held[1] <= 1.05 * held[0]
