import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embax import train
from embax.train import _skipgram

DIM = 16  # mostly, so that one compiled program serves many tests
TOPICS = [[f"{topic}{number}" for number in range(8)] for topic in "abcdef"]


def topics_corpus(sequences, seed=0):
    """Each sequence has words of one topic, and words that occur with all of them."""
    rng = np.random.default_rng(seed)
    for _ in range(sequences):
        topic = TOPICS[rng.integers(len(TOPICS))]
        yield [topic[i] if i < len(topic) else f"common{i}" for i in rng.integers(len(topic) + 3, size=20)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_step(inputs, outputs, targets, contexts, rate):
    """One step, pair by pair, in float64: the gradient of each pair, and each row's rate by how often it was used."""
    rows = len(inputs)
    down = np.zeros_like(inputs), np.zeros_like(outputs)
    uses = np.zeros(rows), np.zeros(rows)
    loss, pairs = 0.0, 0
    for row_targets, row_contexts in zip(targets, contexts, strict=True):
        for context in row_contexts[row_contexts < rows]:
            pairs += 1
            uses[0][context] += 1
            for place, target in enumerate(row_targets):
                if target == rows:
                    continue
                uses[1][target] += 1
                label = 1.0 if place == 0 else 0.0
                probability = sigmoid(inputs[context] @ outputs[target])
                loss -= np.log(probability if label else 1 - probability)
                down[0][context] += (label - probability) * outputs[target]
                down[1][target] += (label - probability) * inputs[context]
    rates = [np.minimum(rate, 0.8 / np.maximum(use, 1))[:, None] for use in uses]
    return inputs + rates[0] * down[0], outputs + rates[1] * down[1], loss / max(pairs, 1)


@functools.partial(jax.jit, static_argnums=3)
def split_and_draw(key, noise, centres, negative):
    key, key_now = jax.random.split(key)
    return key, _skipgram._targets(key_now, noise, centres, negative)


SIZES = 12, 5, 3, 16, 4, 3  # of rows and vectors, steps and batches, contexts and noise


@pytest.mark.parametrize("rate", [0.025, 0.5])  # with the second one, rows reach the limit
def test_train_equals_the_pairwise_reference(rate):
    rows, dim, steps, batch, slots, negative = SIZES
    rng = np.random.default_rng(0)
    centres = rng.integers(0, rows + 1, (steps, batch)).astype(np.int32)
    contexts = np.where(centres[..., None] < rows, rng.integers(0, rows + 3, (steps, batch, slots)), rows)
    contexts = np.minimum(contexts, rows).astype(np.int32)
    weights = [rng.normal(size=(rows, dim)).astype(np.float32) for _ in range(2)]
    noise = _skipgram._noise(np.arange(1, rows + 1))
    state = _skipgram._start(jax.random.key(1), rows, dim)
    key = state.key
    state = state._replace(
        inputs=jax.tree.map(lambda _: jnp.asarray(weights[0]), state.inputs),
        outputs=jax.tree.map(lambda _: jnp.asarray(weights[1]), state.outputs),
    )
    expected, losses, pairs = [weight.astype(np.float64) for weight in weights], 0.0, 0
    for step in range(steps):
        key, targets = split_and_draw(key, noise, centres[step], negative)
        count = int((contexts[step] < rows).sum())
        *expected, loss = reference_step(*expected, np.asarray(targets), contexts[step], rate)
        losses, pairs = losses + loss * count, pairs + count
    state, loss = _skipgram._train(state, noise, centres, contexts, jnp.float32(rate), negative)
    np.testing.assert_allclose(state.inputs.weight, expected[0], rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(state.outputs.weight, expected[1], rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(loss, losses / pairs, rtol=1e-5)  # float32


def test_train_on_windows_of_no_words_changes_nothing():
    rows, dim, steps, batch, slots, negative = SIZES
    state = _skipgram._start(jax.random.key(0), rows, dim)
    before = np.asarray(state.inputs.weight)
    centres, contexts = (np.full(shape, rows, np.int32) for shape in ((steps, batch), (steps, batch, slots)))
    state, loss = _skipgram._train(state, _skipgram._noise(np.ones(rows)), centres, contexts, jnp.float32(1), negative)
    np.testing.assert_array_equal(state.inputs.weight, before)
    np.testing.assert_array_equal(state.outputs.weight, np.zeros((rows, dim)))
    assert float(loss) == 0


def test_targets_draw_noise_by_the_power_of_the_counts_and_never_the_centre():
    counts = np.asarray([1000, 100, 10, 1])
    centres = np.repeat(np.arange(5, dtype=np.int32), 20_000)
    _, targets = split_and_draw(jax.random.key(0), _skipgram._noise(counts), centres, 5)
    targets = np.asarray(targets)
    np.testing.assert_array_equal(targets[:, 0], centres)
    assert (targets[80_000:] == 4).all()  # no noise where there is no centre
    share = counts**0.75 / (counts**0.75).sum()
    for centre in range(4):
        found = np.bincount(targets[centre * 20_000 : (centre + 1) * 20_000, 1:].ravel(), minlength=5) / 100_000
        expected = np.append(np.where(np.arange(4) == centre, 0, share), share[centre])
        np.testing.assert_allclose(found, expected, atol=0.006)  # 4 standard deviations


@pytest.mark.parametrize("counts", [[1], [1, 1], [10**12, 1], np.ones(1_000_003)])
def test_noise_covers_all_of_uint32(counts):
    ends = np.asarray(_skipgram._noise(np.asarray(counts))).astype(np.int64)
    assert ends[-1] == 2**32 - 1
    assert (np.diff(ends) > 0).all()


def test_skipgram_finds_the_words_of_a_topic():
    vectors = train.skipgram(topics_corpus(300), dim=DIM, epochs=8, sample=0, learning_rate=0.05)
    for topic in TOPICS:
        for word in topic:
            nearest = [neighbor for neighbor, _ in vectors.most_similar(word, k=7)]
            assert len(set(nearest) & set(topic)) >= 6, (word, nearest)


@pytest.mark.parametrize("learning_rate", [0.025, 1.0])
def test_skipgram_does_not_diverge(learning_rate):
    losses = []
    train.skipgram(
        topics_corpus(100),
        dim=DIM,
        epochs=6,
        sample=0,
        learning_rate=learning_rate,
        progress=lambda progress: losses.append(float(progress.loss)),
    )
    assert max(losses) < 20  # 6 ln 2 = 4.2 at the start
    assert losses[-1] < losses[0]


def test_skipgram_lowers_its_learning_rate_linearly(monkeypatch):
    rates = []

    def train_without_training(state, noise, centres, contexts, rate, negative):
        rates.append(float(rate))
        return state, jnp.float32(0)

    monkeypatch.setattr(_skipgram, "_train", train_without_training)
    reports = []
    train.skipgram(topics_corpus(100), dim=DIM, epochs=4, sample=0, learning_rate=0.5, progress=reports.append)
    words = np.asarray([0, *(report.words for report in reports[:-1])])
    np.testing.assert_allclose(rates, 0.5 * (1 - words / 8000), rtol=1e-6)  # float32
    assert rates[0] == 0.5


def test_skipgram_reports_progress():
    reports = []
    train.skipgram(topics_corpus(100), dim=DIM, epochs=3, progress=reports.append)
    assert [report.epoch for report in reports] == sorted(report.epoch for report in reports)
    assert {report.epoch for report in reports} == {1, 2, 3}
    last = reports[-1]
    assert last.words == last.total_words == 3 * 100 * 20
    assert last.seconds_left == 0
    assert last.words_per_second == pytest.approx(last.words / last.seconds)
    assert reports[0].seconds_left > 0
    assert all(isinstance(report.loss, jax.Array) for report in reports)


def test_skipgram_keeps_counts_and_leaves_out_rare_words():
    topics = [[word] * 5 for topic in TOPICS for word in topic]
    vectors = train.skipgram([["a", "b", "a"] * 5, ["d"] * 6, ["c"] * 4, *topics], dim=DIM, epochs=1)
    assert vectors.vocabulary.tokens()[:3] == ["a", "d", "a0"]
    assert "c" not in vectors.vocabulary
    assert vectors.counts.tolist() == [10, 6, *[5] * 49]
    assert vectors.weight.shape == (51, DIM)


def test_skipgram_takes_a_corpus_of_one_word():
    vectors = train.skipgram([["alone"] * 9], dim=3)
    assert vectors.vocabulary.tokens() == ["alone"]
    assert np.isfinite(vectors.weight).all()


def test_skipgram_compiles_its_step_once():
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    train.skipgram(topics_corpus(100), dim=DIM, epochs=1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train.skipgram(topics_corpus(100), dim=DIM, epochs=4, learning_rate=0.1, seed=3)
        again = len(compiled)
        jax.jit(lambda x: x + 1)(0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (again, len(compiled)) == (0, 1)


SCRIPT = """
import sys
from embax import train
corpus = [[f"w{i * j % 51}" for i in range(20)] for j in range(100)]
train.skipgram(corpus, dim=16, epochs=2, seed=7).save(sys.argv[1])
"""


def test_skipgram_gives_the_same_bytes_in_every_process(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["script", str(here)])
    exec(SCRIPT, {})
    # The order of a set of strings is another one there, whatever it is here.
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    # With as many devices as here, it finds the programs that are compiled here.
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    subprocess.run([sys.executable, "-c", SCRIPT, there], env=environment, timeout=120, check=True)
    assert here.read_bytes() == there.read_bytes()


def test_skipgram_depends_on_its_seed():
    same, again, other = (train.skipgram(topics_corpus(100), dim=DIM, epochs=1, seed=seed).weight for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, other)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"dim": 0}, ValueError, r"skipgram\(dim=\.\.\.\)` must be at least 1 .* got 0"),
        ({"window": -1}, ValueError, r"window=\.\.\.\)` must be at least 1"),
        ({"window": 2**31}, ValueError, r"window=.* below 2\*\*31"),
        ({"negative": 0}, ValueError, "negative"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"min_count": 0}, ValueError, "min_count"),
        ({"dim": 2.5}, TypeError, "dim"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate=.* must be at most 1"),
        ({"learning_rate": 0}, ValueError, "learning_rate"),
        ({"learning_rate": 25}, ValueError, "learning_rate=.* must be at most 1, got 25"),
        ({"sample": 1.5}, ValueError, "sample=.* must be at most 1, got 1.5"),
        ({"sample": -1e-3}, ValueError, "sample"),
        ({"sample": float("nan")}, ValueError, "sample"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_skipgram_refuses_arguments_before_it_reads(arguments, error, match):
    def sequences():
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(error, match=match):
        train.skipgram(sequences(), **arguments)
