"""Candidates drawn from fewer rows than samples: which rows count, and that memory follows the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bag_cases import dense, ids_of

import embax
from embax import Table, sampled_softmax, softmax_cross_entropy
from embax._heads import candidates as _candidates

ROWS = 50
TABLE = Table(np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32), padding_idx=3)
X = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
LABELS = np.arange(10, 16)
KEY = jax.random.key(0)


@pytest.mark.parametrize("samples", [4, ROWS, ROWS + 1, 90])
def test_every_row_that_was_drawn_counts_once(samples):
    candidates = embax.Unigram.from_counts(np.arange(ROWS))
    draw, distinct = (
        jax.jit(functools.partial(f, candidates=candidates, samples=samples, rows=ROWS))
        for f in (_candidates.draw, _candidates.draw_distinct)
    )
    drawn, (ids, counted) = jax.tree.map(np.asarray, (draw(KEY), distinct(KEY)))
    assert ids.shape == counted.shape == (min(samples, ROWS),)
    assert sorted(ids[counted]) == sorted(set(drawn))
    assert set(ids) == set(drawn)


@pytest.mark.parametrize("samples", [6, 8, 11])
def test_blocks_of_draws_add_up_to_all_samples(samples, monkeypatch):
    monkeypatch.setattr(_candidates, "_BLOCK", 4)
    # The first block draws rows 0 to 3, the next one 4 to 7, and so on, so that the rows tell where the samples end.
    of_blocks = jnp.stack([jax.random.key_data(jax.random.fold_in(KEY, block)) for block in range(3)])

    def draw(key, candidates, size, rows):
        block = jnp.argmax((of_blocks == jax.random.key_data(key)[None]).all(axis=1))
        return block * size + jnp.arange(size)

    monkeypatch.setattr(_candidates, "draw", draw)
    was_drawn = _candidates._was_drawn(KEY, "uniform", samples, 12)
    np.testing.assert_array_equal(np.flatnonzero(was_drawn), np.arange(samples))


def test_no_rows_have_no_candidates():
    ids, counted = _candidates.draw_distinct(KEY, "uniform", 5, 0)
    assert ids.shape == counted.shape == (0,)
    assert _candidates.draw(KEY, "uniform", 5, 0).shape == (0,)


def test_very_many_samples_approach_the_full_softmax():
    loss, gradient = jax.jit(
        embax.value_and_grad(lambda t: sampled_softmax(t, X, LABELS, KEY, samples=100_000, candidates="uniform").sum())
    )(TABLE)
    expected, of_expected = jax.jit(
        jax.value_and_grad(lambda t: softmax_cross_entropy(t, X, LABELS, mask_padding=True).sum())
    )(TABLE)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(dense(gradient), of_expected.weight, rtol=1e-5, atol=1e-6)


def test_memory_follows_the_rows_if_there_are_more_samples():
    loss = jax.jit(lambda table: sampled_softmax(table, X, LABELS, KEY, samples=10**12))
    assert loss.lower(TABLE).compile().memory_analysis().temp_size_in_bytes < 4 << 20


def test_rows_that_were_not_drawn_have_no_gradient():
    gradient = jax.jit(embax.grad(lambda t: sampled_softmax(t, X, LABELS, KEY, samples=51).sum()))(TABLE)
    drawn = np.asarray(jax.jit(lambda: _candidates.draw(KEY, "log_uniform", 51, ROWS))())
    assert set(ids_of(gradient).tolist()) <= {*drawn.tolist(), *LABELS.tolist(), ROWS}
    assert len(set(drawn.tolist())) < ROWS
