"""Several padding rows: everything that knows of padding, against loops over the rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import embax
from embax import RowGrad, Table

ROWS = 6
PADDING = (2, 5)
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
IDS = np.array([[0, 2, 2, 5], [-1, 1, 1, 3], [2, 5, 2, -4]])
FLAT = IDS.ravel() % ROWS


def padded(**rules):
    return Table(WEIGHT, padding_idx=(2, -1, 2), **rules)


def test_rows_are_kept_sorted_and_once():
    table = padded()
    assert table.padding_idx == PADDING
    assert repr(table) == "Table(float32[6,3], padding_idx=(2, 5))"
    same = jax.tree.structure(Table(jnp.asarray(WEIGHT), padding_idx=(5, 2)))
    assert jax.tree.structure(table) == same
    assert hash(jax.tree.structure(table)) == hash(same)
    assert same != jax.tree.structure(Table(jnp.asarray(WEIGHT), padding_idx=(2, 4)))
    assert dataclasses.replace(table).padding_idx == PADDING


@pytest.mark.parametrize(("given", "kept"), [((), None), ((3,), 3), ((-1,), 5), ((4, -2), 4), (np.int64(2), 2)])
def test_padding_idx_of_one_or_no_row_is_an_int_or_none(given, kept):
    table = Table(jnp.asarray(WEIGHT), padding_idx=given)
    assert table.padding_idx == kept
    assert type(table.padding_idx) is type(kept)


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        ((0, 6), ValueError, r"padding_idx=...\)` must be a row of the table, in \[-6, 6\), got 6"),
        ((-7, 0), ValueError, "got -7"),
        ((0, 1.5), TypeError, "must be a whole number, got 1.5"),
        ([0, 1], TypeError, "must be a whole number"),
        (((0, 1),), TypeError, "must be a whole number"),
    ],
)
def test_bad_rows_are_errors(rows, error, match):
    with pytest.raises(error, match=match):
        Table(jnp.asarray(WEIGHT), padding_idx=rows)


def test_create_makes_all_of_them_zero():
    weight = Table.create(jax.random.key(0), ROWS, 3, padding_idx=(0, -1, 3)).weight
    assert [row for row in range(ROWS) if not np.any(weight[row])] == [0, 3, 5]


def test_resize_keeps_them():
    with pytest.raises(ValueError, match=r"must keep the padding row \(2, 5\), got 5"):
        embax.resize(padded(), 5)
    assert embax.resize(padded(), 8, jax.random.key(0)).padding_idx == PADDING
    assert embax.resize(Table(jnp.asarray(WEIGHT), padding_idx=(0, 2)), 3).padding_idx == (0, 2)


def test_gradient_of_padding_rows_is_zero_for_nan_cotangents():
    cotangent = np.random.default_rng(1).normal(size=(FLAT.size, 3)).astype(np.float32)
    cotangent[np.isin(FLAT, PADDING)] = np.nan

    def loss(table):
        return (embax.lookup(table, IDS) * cotangent.reshape(*IDS.shape, 3)).sum()

    @jax.jit
    def gradients(table):
        rows = embax.grad(loss)(table)
        return rows.ids, rows.to_dense(), jax.grad(loss)(table).weight

    for by_frequency in False, True:
        expected = np.zeros((ROWS, 3))
        for row, values in zip(FLAT, cotangent, strict=True):
            if row not in PADDING:
                expected[row] += values / ((row == FLAT).sum() if by_frequency else 1)
        ids, *found = gradients(padded(scale_grad_by_freq=by_frequency))
        assert not set(np.asarray(ids)) & set(PADDING)
        for gradient in found:
            np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)  # float32


def test_max_norm_does_not_clip_padding_rows():
    table, expected = padded(max_norm=0.5), WEIGHT.astype(np.float64)
    for row in range(ROWS):
        if row not in PADDING:
            expected[row] *= min(1, 0.5 / np.linalg.norm(expected[row]))
    np.testing.assert_allclose(embax.lookup(table, IDS), expected[IDS], rtol=1e-6)  # float32
    after = np.asarray(embax.renormalize(table, np.arange(ROWS)).weight)
    np.testing.assert_allclose(after, expected, rtol=1e-6)  # float32
    assert after[[2, 5]].tobytes() == WEIGHT[[2, 5]].tobytes()


def expected_bags(mode):
    """The bags, and the gradient of their sum."""
    expected, of_rows = np.zeros((len(IDS), 3)), np.zeros((ROWS, 3))
    for bag, ids in enumerate(IDS):
        counted = [row for row in ids % ROWS if row not in PADDING]
        if not counted:
            continue
        number = {"sum": 1, "mean": len(counted), "sqrtn": np.sqrt(len(counted)), "max": 1}[mode]
        rows = WEIGHT[counted]
        expected[bag] = rows.max(axis=0) if mode == "max" else rows.sum(axis=0) / number
        for place, row in enumerate(counted):
            of_rows[row] += rows.argmax(axis=0) == place if mode == "max" else 1 / number
    return expected, of_rows


MODES = "sum", "mean", "sqrtn", "max"


@pytest.mark.parametrize(
    ("is_ragged", "modes"),
    [
        (False, ("mean", "max")),
        (True, ("sum", "sqrtn")),
        *(pytest.param(is_ragged, MODES, marks=pytest.mark.exhaustive) for is_ragged in (False, True)),
    ],
    ids=str,
)
def test_bags_do_not_count_them(is_ragged, modes):
    bags = embax.Ragged.from_lists(IDS.tolist()) if is_ragged else IDS

    @jax.jit
    def pooled_and_gradients(table):
        results = {}
        for mode in modes:

            def total(table, mode=mode):
                pooled = embax.embedding_bag(table, bags, mode=mode)
                return pooled.sum(), pooled

            dense, pooled = jax.grad(total, has_aux=True)(table)
            results[mode] = pooled, dense.weight, embax.grad(total, has_aux=True)(table)[0].to_dense()
        return results

    for mode, (pooled, *gradients) in pooled_and_gradients(padded()).items():
        expected, of_rows = expected_bags(mode)
        np.testing.assert_allclose(pooled, expected, rtol=1e-6, err_msg=mode)  # float32
        for gradient in gradients:
            np.testing.assert_allclose(gradient, of_rows, rtol=1e-6, err_msg=mode)  # float32


ODD = np.array([[-0.0, np.nan, 1e-45], [np.inf, -0.0, 3e38]], np.float32)


def odd():
    """A table whose padding rows show every touch."""
    weight = WEIGHT.copy()
    weight[list(PADDING)] = ODD
    return Table(weight, padding_idx=PADDING)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("is_dense", [False, True])
def test_apply_updates_keeps_their_bits(is_dense, wrap):
    ids, values = np.array([0, 2, 5, 0, 4, 2]), np.full((6, 3), 0.5, np.float32)
    update = Table(np.full((ROWS, 3), 0.5, np.float32)) if is_dense else RowGrad(ids, values, rows=ROWS)
    before = odd()
    expected = np.array(before.weight)
    for row in range(ROWS) if is_dense else ids:
        if row not in PADDING:
            expected[row] += 0.5
    after = np.asarray(wrap(embax.apply_updates)(before, update).weight)
    assert after.tobytes() == expected.tobytes()


def test_lifted_steps_keep_their_bits():
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        before, tx = odd(), embax.optim.lift(optax.adamw(0.1))

        @jax.jit
        def first_step(table, gradient):
            updates, state = tx.update(gradient, tx.init(table), table)
            return updates.ids, embax.apply_updates(table, updates).weight, state

        ids, after, state = first_step(before, RowGrad([0, 2, 5, 4, 2], np.ones((5, 3), np.float32), rows=ROWS))
    assert not set(np.asarray(ids)) & set(PADDING)
    after = np.asarray(after)
    assert after[[2, 5, 1, 3]].tobytes() == np.asarray(before.weight)[[2, 5, 1, 3]].tobytes()
    # The first step of Adam is one of the learning rate, and the decay 1e-4 of it.
    np.testing.assert_allclose(
        after[[0, 4]], WEIGHT[[0, 4]] - 0.1 - 1e-5 * WEIGHT[[0, 4]], rtol=1e-5, atol=2e-6
    )  # float32
    assert not np.any(np.asarray(jax.tree.leaves(state.inner[0].mu)[0])[[2, 5]])
