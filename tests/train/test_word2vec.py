import itertools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from corpora import half_is_one_item, nine_words
from meshes import usual_and_rest

from embax import train
from embax.train import _loop, _parts
from embax.train._engines import engine as _engine
from embax.train._engines import native as _native
from embax.train._engines import xla as _xla
from embax.train._input.corpus import encode

kernel = pytest.mark.skipif(
    _native.lacking(None) is not None, reason="the native kernels are not installed, or switched off"
)
DIM = 16  # mostly, so that one compiled program serves many tests
TOPICS = [[f"{topic}{number}" for number in range(8)] for topic in "abcdef"]


def topics_corpus(sequences, seed=0):
    """Each sequence has words of one topic, and words that occur with all of them."""
    rng = np.random.default_rng(seed)
    for _ in range(sequences):
        topic = TOPICS[rng.integers(len(TOPICS))]
        yield [topic[i] if i < len(topic) else f"common{i}" for i in rng.integers(len(topic) + 3, size=20)]


@pytest.mark.parametrize("engine", ["xla", pytest.param("native", marks=kernel)])
@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
def test_training_finds_the_words_of_a_topic(learn, engine):
    vectors = learn(topics_corpus(300), dim=DIM, epochs=8, sample=0, learning_rate=0.05, engine=engine)
    assert vectors.metadata["engine"] == engine
    for topic in TOPICS:
        for word in topic:
            nearest = [neighbor for neighbor, _ in vectors.most_similar(word, k=7)]
            assert len(set(nearest) & set(topic)) >= 6, (word, nearest)


def words_of_few_stems():
    rng = np.random.default_rng(0)
    stems = ["walk", "talk", "king"]
    return [[stems[i % 3] + ["s", "ed", "ing"][j] for j in rng.integers(0, 3, 10)] for i in range(400)]


FEW_WORDS = nine_words, half_is_one_item, words_of_few_stems


@pytest.mark.parametrize(
    ("learn", "corpus"),
    usual_and_rest(
        [
            (train.skipgram, half_is_one_item),
            (train.skipgram, words_of_few_stems),
            (train.cbow, nine_words),
            (train.cbow, words_of_few_stems),
        ],
        itertools.product((train.skipgram, train.cbow), FEW_WORDS),
    ),
)
def test_training_stays_bounded_on_few_words_at_a_high_rate(learn, corpus):
    reports, subwords = [], corpus is words_of_few_stems
    options = {"dim": DIM, "epochs": 10, "sample": 0, "learning_rate": 0.1, "engine": "xla", "subwords": subwords}
    vectors = learn(corpus(), **options, progress=reports.append)
    # The text of nine words is learned by heart, so the vectors grow by the logarithm of the number of steps.
    assert np.linalg.norm(vectors.weight, axis=1).max() < 20
    assert reports[-1].loss < reports[0].loss < 6 * np.log(2)  # as with vectors of zero


def test_products_approach_the_shifted_mutual_information():
    """As Levy and Goldberg showed: `v . u = log(pairs x all pairs / (contexts x noise mass)) - log(negative)`."""
    rng = np.random.default_rng(0)
    # A chain of words in which each follows some others more often; window 1, so that a pair is a step.
    chances = rng.dirichlet(np.full(6, 2.0), size=6)
    words = [0]
    for draw in rng.random(40_000):
        words.append(min(int(np.searchsorted(np.cumsum(chances[words[-1]]), draw)), 5))
    text = [[str(word) for word in words]]
    (corpus,) = encode(text, 1, _parts.WHOLE)
    engine = _xla.Xla([corpus], _parts.WHOLE, _engine.Options(DIM, 1, 2, "skipgram", np.inf, 0))
    inputs, outputs = _loop.train(engine, _loop.Run(6, len(words), 0.1))
    rows = np.asarray([corpus.tokens.index(str(word)) for word in words])
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (rows[1:], rows[:-1]), 1)
    pairs += pairs.T
    noise = corpus.counts**0.75 / (corpus.counts**0.75).sum()
    expected = np.log(pairs / (pairs.sum(axis=1, keepdims=True) * noise * 2))
    np.testing.assert_allclose(inputs @ outputs.T, expected, atol=0.15)  # the noise of the last steps
    assert np.ptp(expected) > 1.5


def test_skipgram_lowers_its_learning_rate_linearly(monkeypatch):
    rates, run = [], _xla.Xla.run
    monkeypatch.setattr(_xla.Xla, "run", lambda self, state, batch, of: rates.append(of) or run(self, state, batch, of))
    reports = []
    options = {"dim": DIM, "epochs": 4, "sample": 0, "learning_rate": 0.5, "engine": "xla"}
    train.skipgram(topics_corpus(100), **options, progress=reports.append)
    words = np.asarray([0, *(report.words for report in reports)])
    expected = 0.5 * np.maximum(1 - words / 8000, 1e-4)
    np.testing.assert_allclose(rates, np.stack([expected[:-1], expected[1:]], axis=1))
    assert rates[0][0] == 0.5


def test_skipgram_reports_progress():
    reports = []
    train.skipgram(topics_corpus(100), dim=DIM, epochs=3, engine="xla", progress=reports.append)
    assert [report.epoch for report in reports] == sorted(report.epoch for report in reports)
    assert {report.epoch for report in reports} == {1, 2, 3}
    last = reports[-1]
    assert last.words == last.total_words == 3 * 100 * 20
    assert last.seconds_left == 0
    assert last.words_per_second == pytest.approx(last.words / last.seconds)
    assert reports[0].seconds_left > 0
    assert all(0 < report.loss < 4.3 for report in reports)  # 6 ln 2 = 4.2 at the start
    assert {report.engine for report in reports} == {"xla"}


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


def test_xla_trains_alike_with_and_without_the_options_for_a_cpu(monkeypatch, options_of_users):
    options = {"dim": DIM, "epochs": 1, "engine": "xla"}
    expected = train.skipgram(topics_corpus(100), **options)
    monkeypatch.setattr(_xla, "train", options_of_users)
    vectors = train.skipgram(topics_corpus(100), **options)
    np.testing.assert_allclose(vectors.weight, expected.weight, rtol=1e-4, atol=1e-6)  # float32


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


def test_skipgram_gives_the_same_bytes_in_every_process(tmp_path, monkeypatch, options_of_users):
    monkeypatch.setattr(_xla, "train", options_of_users)  # as in the other process
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "argv", ["script", str(here)])
    exec(SCRIPT, {})
    # The order of a set of strings is another one there, whatever it is here.
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    # With as many devices as here, it finds the programs that are compiled here.
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    subprocess.run([sys.executable, "-c", SCRIPT, there], env=environment, timeout=120, check=True)
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("learn", [train.skipgram, train.cbow])
def test_training_depends_on_its_seed(learn):
    same, again, other = (learn(topics_corpus(100), dim=DIM, epochs=1, seed=seed).weight for seed in (0, 0, 1))
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
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": 2, "engine": "xla"}, ValueError, r"threads=\.\.\.\)` must be 1 for the engine 'xla'"),
        ({"engine": "gensim"}, ValueError, r"skipgram\(engine=\.\.\.\)` must be .*'gensim'"),
    ],
)
def test_skipgram_refuses_arguments_before_it_reads(arguments, error, match):
    def sequences():
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(error, match=match):
        train.skipgram(sequences(), **arguments)


def test_training_is_the_same_with_64_bit_types():
    options = {"dim": DIM, "epochs": 1, "engine": "xla", "subwords": True, "buckets": 50}
    expected = train.cbow(topics_corpus(50), **options)
    with jax.enable_x64():
        vectors = train.cbow(topics_corpus(50), **options)
    np.testing.assert_array_equal(vectors.weight, expected.weight)
