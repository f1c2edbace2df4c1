import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word2vec_reference import reference_steps

from embax._heads.candidates import pieces
from embax.train._engines import steps as _steps
from embax.train._engines import xla as _xla
from embax.train._engines.engine import noise_weights
from embax.train._input.pool import on_device, scratch_of
from embax.train._subwords import Pieces

ROWS, DIM = 12, 5
PLANS = {
    "skipgram": _steps.Plan("skipgram", window=2, negative=3, length=6, noise=4),
    "cbow": _steps.Plan("cbow", window=2, negative=3, length=6, noise=4),
}
KEY = np.asarray([1, 2], np.uint32)
NOISE = jnp.asarray(pieces(noise_weights(np.arange(1, ROWS + 1))))


def random_tokens(rng, steps=3, segments=4, length=6):
    """Segments with sequences that begin inside, a row that is in all of them, and padding at both ends."""
    tokens = rng.integers(0, ROWS, (steps, segments, length)).astype(np.int32)
    tokens[:, :, 3] = 0
    tokens = np.where(rng.random(tokens.shape) < 0.3, ~tokens, tokens)
    tokens[:, 0, :2], tokens[:, 1, 4:] = ROWS, ROWS
    return tokens


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_train_equals_the_reference_pair_by_pair(model):
    plan, rng = PLANS[model], np.random.default_rng(0)
    tokens = random_tokens(rng)
    weights = [rng.normal(size=(ROWS, DIM)).astype(np.float32) for _ in range(2)]
    drawn = jax.tree.map(np.asarray, _steps.draw(plan, jax.random.wrap_key_data(KEY), NOISE, jnp.asarray(tokens)))
    # With the second rate, most rows reach their limit.
    for first, last in ((0.025, 0.02), (2.0, 1.0)):
        state = _xla.State(*(_xla.Table(jnp.asarray(weight), out_of_range="zero") for weight in weights))
        state, loss = _xla.train(state, NOISE, None, tokens, np.int32(2), KEY, np.float32((first, last)), plan)
        rates = first, (first + last) / 2
        *expected, expected_loss, limited = reference_steps(plan, *weights, tokens[:2], drawn, rates)
        assert limited > 15 if first == 2 else limited < 9
        np.testing.assert_allclose(state.inputs.weight, expected[0], rtol=1e-4, atol=1e-5)  # float32
        np.testing.assert_allclose(state.outputs.weight, expected[1], rtol=1e-4, atol=1e-5)  # float32
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)  # float32


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_descend_by_slots_equals_descend_by_the_storage(model):
    plan, rng = PLANS[model], np.random.default_rng(1)
    tokens = random_tokens(rng)
    weights = [rng.normal(size=(ROWS, DIM)).astype(np.float32) for _ in range(2)]

    @jax.jit
    def both(weights):
        state = _xla.State(*(_xla.Table(weight, out_of_range="zero") for weight in weights))
        drawn = _steps.draw(plan, jax.random.wrap_key_data(KEY), NOISE, jnp.asarray(tokens[0]))
        slots, rest = (jnp.zeros(ROWS, jnp.int32),) * 2, (drawn, lambda curvature: 1 / (2 + curvature))
        by_slots = _xla._descend_by_slots(plan, None, state, slots, *rest)
        return by_slots[::2], _xla._descend(plan, None, state, None, *rest)[::2]

    one, other = both(weights)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_steps_with_pieces_equal_the_reference(model):
    rng = np.random.default_rng(2)
    # Words of 1 to 7 pieces; the rows behind those of the words are shared, and one word has a row twice.
    of_words = [[word, *rng.integers(ROWS, ROWS + 5, word % 7).tolist()] for word in range(ROWS)]
    of_words[3] = [3, ROWS, ROWS]
    starts = np.cumsum([0, *map(len, of_words)])
    pieces = Pieces(starts, np.concatenate(of_words).astype(np.int32), np.arange(5))
    # Steps have about 80 pieces, so there are several rounds.
    plan, tokens = PLANS[model]._replace(longest=7, width=32), random_tokens(rng)[:1]
    weights = [rng.normal(size=(rows, DIM)).astype(np.float32) for rows in (ROWS + 5, ROWS)]
    pooling = on_device(pieces)

    @jax.jit
    def both(weights, rate):
        state = _xla.State(*(_xla.Table(weight, out_of_range="zero") for weight in weights))
        drawn = _steps.draw(plan, jax.random.wrap_key_data(KEY), NOISE, jnp.asarray(tokens[0]))
        rest = drawn, lambda curvature: jnp.minimum(rate, 1 / (curvature + 1e-20))
        scratch = scratch_of(ROWS + 5, ROWS, 24, 7, 32), jnp.zeros(ROWS, jnp.int32)
        by_slots, (after, _), loss = _xla._descend_by_slots(plan, pooling, state, scratch, *rest)
        by_storage, _, same_loss = _xla._descend(plan, pooling, state, None, *rest)
        return by_slots, by_storage, (loss, same_loss), after.totals, drawn

    for rate in (0.025, 2.0):
        by_slots, by_storage, losses, totals, drawn = both(weights, jnp.float32(rate))
        drawn = jax.tree.map(lambda x: np.asarray(x)[None], drawn)
        *expected, loss, _ = reference_steps(plan, *weights, tokens, drawn, [rate], of_words)
        for state in (by_slots, by_storage):
            np.testing.assert_allclose(state.inputs.weight, expected[0], rtol=1e-4, atol=1e-5)  # float32
            np.testing.assert_allclose(state.outputs.weight, expected[1], rtol=1e-4, atol=1e-5)  # float32
        np.testing.assert_allclose(losses, [loss, loss], rtol=1e-5)  # float32
        np.testing.assert_array_equal(totals, np.zeros(ROWS + 5))


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_train_on_padding_changes_nothing(model):
    plan = PLANS[model]
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(ROWS, DIM)).astype(np.float32) for _ in range(2)]
    state = _xla.State(*(_xla.Table(jnp.asarray(weight), out_of_range="zero") for weight in weights))
    tokens = np.full((3, 4, 6), ROWS, np.int32)
    state, loss = _xla.train(state, NOISE, None, tokens, np.int32(3), KEY, np.ones(2, np.float32), plan)
    for table, before in zip(state, weights, strict=True):
        np.testing.assert_array_equal(table.weight, before)
    np.testing.assert_array_equal(loss, [0, 0])


def test_draw_draws_noise_by_the_power_of_the_counts_and_widths_evenly():
    counts, plan = np.asarray([1000, 100, 10, 1]), _steps.Plan("cbow", 3, 5, 64, 64)
    ends, tokens = jnp.asarray(pieces(noise_weights(counts))), jnp.zeros((50, 40, 64), jnp.int32)
    drawn = _steps.draw(plan, jax.random.key(0), ends, tokens)
    share = np.bincount(np.ravel(drawn.noise), minlength=4) / drawn.noise.size
    np.testing.assert_allclose(share, counts**0.75 / (counts**0.75).sum(), atol=0.006)  # 4 standard deviations
    widths = np.bincount(np.ravel(drawn.widths)) / drawn.widths.size
    np.testing.assert_allclose(widths, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.006)  # 4 standard deviations


@pytest.mark.parametrize("counts", [[1], [1, 1], [10**12, 1], np.ones(1_000_003, np.int64)])
def test_noise_covers_all_of_uint32(counts):
    ends = pieces(noise_weights(np.asarray(counts))).astype(np.int64)
    assert ends[-1] == 2**32 - 1
    assert (np.diff(ends) > 0).all()


@pytest.mark.parametrize(
    ("model", "window", "negative", "length", "noise"),
    [
        ("skipgram", 1, 5, 16, 16),
        ("skipgram", 5, 5, 16, 16),
        ("skipgram", 10, 20, 32, 32),
        ("skipgram", 20, 100, 64, 100),
        ("skipgram", 5, 1000, 16, 256),
        ("cbow", 1, 5, 16, 16),
        ("cbow", 5, 5, 40, 40),
        ("cbow", 20, 5, 160, 160),
    ],
)
def test_plan_of_makes_longer_segments_for_wider_windows(model, window, negative, length, noise):
    assert _steps.plan_of(model, window, negative)[3:5] == (length, noise)
