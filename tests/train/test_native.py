"""The engine of the native library."""

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
from embax._kernels import words as _kernel
from embax.train import _loop, _parts
from embax.train._engines import native as _native
from embax.train._engines.engine import Known, Options
from embax.train._engines.native import Native, alias_tables
from embax.train._input.corpus import BREAK, encode
from embax.train._subwords import Pieces

kernel = pytest.mark.skipif(
    _native.lacking(None) is not None, reason="the native kernels are not installed, or switched off"
)

DIM = 16


def corpus_of(sequences):
    (corpus,) = encode(sequences, 1, _parts.WHOLE)
    return corpus


def options(**more):
    return Options(**{"dim": DIM, "window": 3, "negative": 5, "model": "skipgram", "sample": np.inf, "seed": 0} | more)


def lines(rng, lengths, words=50):
    return [[str(word) for word in (words * rng.random(length) ** 2).astype(int)] for length in lengths]


@pytest.mark.parametrize("weights", [[3.0], [1, 1], [1, 1, 4], [5, 1, 1, 1, 1, 3], range(1, 200), [1] * 50 + [1000]])
def test_alias_tables_draw_each_row_by_its_weight(weights):
    weights = np.asarray(weights, np.float64)
    cut, alias = alias_tables(weights)
    own = (cut.astype(np.float64) + 1) / 2**32
    drawn = own.copy()
    np.add.at(drawn, alias, 1 - own)
    np.testing.assert_allclose(drawn / len(weights), weights / weights.sum(), rtol=0, atol=1e-9)


@kernel
def test_batches_hold_the_text_and_end_with_sequences(monkeypatch):
    monkeypatch.setattr(_native, "_CHUNK", 100)
    lengths = [30, 0, 1, 55, 60, 99, 250, 7, 7]  # the last but two is cut, as there is no break
    corpus = corpus_of(lines(np.random.default_rng(0), lengths))
    batches = list(Native(corpus, options()).batches(1))
    assert max(len(batch.ids) for batch in batches) <= 100
    assert sum(batch.words for batch in batches) == sum(lengths) == corpus.counts.sum()
    assert [batch.words for batch in batches] == [np.count_nonzero(batch.ids != BREAK) for batch in batches]
    text = np.concatenate(list(corpus.blocks(1 << 20)))
    np.testing.assert_array_equal(np.concatenate([b.ids[b.ids != BREAK] for b in batches]), text[text != BREAK])
    assert [batch.words for batch in batches] == [86, 60, 99, 100, 100, 64]
    seeds = {tuple(batch.seed) for epoch in (1, 2) for batch in Native(corpus, options()).batches(epoch)}
    assert len(seeds) == 2 * len(batches)


@kernel
@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_one_thread_trains_to_the_same_bytes(model):
    corpus = corpus_of(lines(np.random.default_rng(0), [40] * 50))

    def trained(**more):
        engine = Native(corpus, options(model=model, **more))
        return _loop.train(engine, _loop.Run(2, int(corpus.counts.sum()), 0.05))

    (inputs, outputs), again, other, threads = trained(), trained(), trained(seed=1), trained(threads=3)
    assert inputs.shape == outputs.shape == (len(corpus.tokens), DIM)
    assert (inputs.tobytes(), outputs.tobytes()) == (again[0].tobytes(), again[1].tobytes())
    assert np.abs(other[0] - inputs).max() > 0.01
    assert np.abs(outputs).max() > 0.01
    assert np.isfinite(threads[0]).all()
    assert np.abs(threads[1]).max() > 0.01


@kernel
def test_training_continues_from_vectors():
    corpus = corpus_of([["a", "b"]])
    rng = np.random.default_rng(0)
    known = Known(np.asarray([1]), np.asarray([2]), rng.normal(size=(3, DIM)).astype(np.float32))
    engine = Native(corpus, options())
    fresh, _ = engine.finish(engine.start(None))
    inputs, outputs = engine.finish(engine.start(known))
    np.testing.assert_array_equal(inputs, [fresh[0], known.weight[2]])
    np.testing.assert_array_equal(outputs, np.zeros((2, DIM)))


@kernel
@pytest.mark.parametrize("dim", [1, 16, 37])
def test_finish_moves_rows_over_their_padding(dim, monkeypatch):
    monkeypatch.setattr(_native, "_AT_ONCE", 3)
    engine = Native(corpus_of([[str(word) for word in range(20)]]), options(dim=dim))
    state = engine.start(None)
    copied, _ = engine.vectors(state)
    inputs, _ = engine.finish(state)
    np.testing.assert_array_equal(inputs, copied)
    assert np.shares_memory(inputs, state.inputs)
    assert not np.shares_memory(copied, state.inputs)
    assert len(np.unique(inputs)) > 0.9 * inputs.size


@kernel
def test_a_resumed_run_gives_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setattr(_native, "_CHUNK", 64)
    text = lines(np.random.default_rng(0), [40] * 10)
    given = {"dim": DIM, "min_count": 1, "epochs": 2, "engine": "native"}

    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.epoch == 2:
            raise Stopped

    saved = {"checkpoint": tmp_path / "saved", "checkpoint_every": 1}
    with pytest.raises(Stopped):
        train.skipgram(text, **given, **saved, progress=stop)
    reports = []
    resumed = train.skipgram(text, **given, **saved, progress=reports.append)
    assert reports[0].words_before > 0
    assert resumed.weight.tobytes() == train.skipgram(text, **given).weight.tobytes()
    with pytest.raises(train.CheckpointError, match=r"of the engine 'native', and this run is of 'xla'\. Choose"):
        train.skipgram(text, **(given | {"engine": "xla"}), **saved)


@kernel
@pytest.mark.parametrize(("words", "steps"), [(100, 100), (1000, 500), (30_000, 30_000 / 32)])
def test_native_counts_as_many_steps_an_epoch_as_documented(words, steps, monkeypatch):
    monkeypatch.setattr(_native, "_CHUNK", 300)
    engine = Native(corpus_of([["a", "b"] * (words // 4), ["a", "b"] * (words // 4)]), options())
    batches = len(list(engine.batches(1)))
    assert engine.steps_a_batch * batches == pytest.approx(steps, rel=0.02)  # breaks take places, too
    subsampled = Native(corpus_of([["a", "b"] * (words // 2)]), options(sample=0.1))
    assert subsampled.steps_a_batch * batches < 1000


@kernel
def test_skipgram_counts_steps_between_checkpoints(tmp_path, monkeypatch):
    checkpoint = pytest.importorskip("embax.checkpoint")
    monkeypatch.setattr(_native, "_CHUNK", 1024)
    monkeypatch.setattr(checkpoint, "save", lambda path, tree, step: saved.append(step))
    saved, text = [], lines(np.random.default_rng(0), [31] * 640)  # 20 calls an epoch, of 620 steps with 32 words each
    train.skipgram(
        text, dim=DIM, min_count=1, sample=0, epochs=2, engine="native", checkpoint=tmp_path, checkpoint_every=310
    )
    assert saved == [10, 20, 30, 40]


PEAK = """
import re
from embax import train
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
def kilobytes(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
text = (map(str, range(first, first + 50)) for first in range(0, 20_000, 50) for _ in range(5))
vectors = train.skipgram(text, dim=400, epochs=2, engine="native", after_epoch=lambda epoch: epoch.epoch == 2)
assert vectors.weight.shape == (20_000, 400)
print(kilobytes("VmHWM") - before)
"""


@kernel
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure memory")
def test_native_holds_two_tables_and_one_copy_for_a_callback():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    table = 20_000 * 400 * 4 / 1024  # kB
    assert 2 * table < int(done.stdout) < 3.7 * table  # the rest: counting, and JAX's start


def test_native_is_refused_where_it_cannot_run(monkeypatch):
    mesh = jax.make_mesh((1,), ("devices",), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"skipgram\(engine=\.\.\.\)` must be 'auto' or 'xla' here.* not on a mesh"):
        train.skipgram([["a", "b"]], engine="native", mesh=mesh)
    monkeypatch.setattr(_native._kernel, "available", lambda: False)
    with pytest.raises(ValueError, match=r"cbow\(engine=\.\.\.\)` must be .* it needs embax-kernels"):
        train.cbow([["a", "b"]], engine="native")
    assert train.cbow([["a", "b"] * 5], dim=1, epochs=1).metadata["engine"] == "xla"


@kernel
@pytest.mark.parametrize(
    ("model", "window", "negative", "text", "subwords"),
    usual_and_rest(
        [
            ("skipgram", 5, 5, half_is_one_item, False),
            ("skipgram", 100, 20, nine_words, True),
            ("cbow", 5, 5, half_is_one_item, True),
            ("cbow", 5, 5, nine_words, False),
            ("cbow", 100, 20, nine_words, False),
        ],
        itertools.product(("skipgram", "cbow"), (5, 100), (5, 20), (nine_words, half_is_one_item), (False, True)),
    ),
)
def test_training_stays_bounded_on_few_words_at_a_high_rate(model, window, negative, text, subwords):
    corpus = corpus_of(text())
    rows, reports = len(corpus.tokens), []
    pieces = None
    if subwords:  # each word has a row of its own and some of 20 rows
        ids = np.random.default_rng(0).integers(rows, rows + 20, (rows, 5))
        ids[:, 0] = np.arange(rows)
        pieces = Pieces(np.arange(0, 5 * rows + 1, 5), ids.ravel().astype(np.int32), np.arange(20))
    engine = Native(corpus, options(model=model, window=window, negative=negative), pieces)
    run = _loop.Run(10, int(corpus.counts.sum()), 0.1, reports.append)
    inputs, outputs = _loop.train(engine, run)
    assert inputs.shape[0] == (rows + 20 if subwords else rows)
    # CBOW learns the text of nine words by heart, so its vectors grow as long as the loss falls.
    most = 20 if model == "skipgram" else 200
    assert max(np.linalg.norm(table, axis=1).max() for table in (inputs, outputs)) < most
    assert reports[-1].loss < (1 + negative) * 0.6 * np.log(2)  # with vectors of zero, it would be 1 / 0.6 of this


@kernel
def test_products_approach_the_shifted_mutual_information():
    """As Levy and Goldberg showed: `v . u = log(pairs / (negative x pairs with other centres x share of noise))`."""
    rng = np.random.default_rng(0)
    # A chain of words in which each follows some others more often; window 1.
    chances = rng.dirichlet(np.full(6, 2.0), size=6)
    words = [0]
    for draw in rng.random(40_000):
        words.append(min(int(np.searchsorted(np.cumsum(chances[words[-1]]), draw)), 5))
    corpus = corpus_of([[str(word) for word in words]])
    engine = Native(corpus, options(window=1, negative=2))
    inputs, outputs = _loop.train(engine, _loop.Run(6, len(words), 0.1))
    rows = np.asarray([corpus.tokens.index(str(word)) for word in words])
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (rows[1:], rows[:-1]), 1)
    pairs += pairs.T
    noise = corpus.counts**0.75 / (corpus.counts**0.75).sum()
    # A noise word that is the centre does not count, so a word is noise for the windows of other centres.
    expected = np.log(pairs / ((pairs.sum(axis=1, keepdims=True) - pairs) * noise * 2))
    np.testing.assert_allclose(inputs @ outputs.T, expected, atol=0.15)  # the noise of the last steps
    assert np.ptp(expected) > 1.5


@kernel
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("outputs", np.zeros((40, 5), np.float32), "`outputs` must have rows of a multiple of 16 numbers, got 5"),
        ("inputs", np.zeros((30, 16), np.float32), r"`inputs` must be .* float32\[40, 16\], got float32\[30, 16\]"),
        ("inputs", np.zeros((40, 32), np.float32)[:, ::2], "`inputs` must be a contiguous writable array"),
        ("inputs", np.broadcast_to(np.float32(0), (40, 16)), "`inputs` must be a contiguous writable array"),
        ("keep", np.zeros(40, np.int32), r"`keep` must be .* uint32\[40\], got int32\[40\]"),
        ("cut", np.zeros(39, np.uint32), r"`cut` must be .* uint32\[40\], got uint32\[39\]"),
        ("starts", np.zeros(3, np.int32), r"`starts` must be .* int32\[41\], got int32\[3\]"),
        ("ids", np.zeros(4, np.int32)[::2], r"`ids` must be a contiguous array, int32\[2\]"),
        ("ids", np.asarray([7, 40], np.int32), r"`ids` must be in \[-1, 40\), got 40 at position 1"),
    ],
)
def test_train_words_refuses_arrays_that_do_not_fit(name, value, match):
    numbers, nothing = np.zeros(40, np.uint32), np.zeros(0, np.int32)
    given = {"inputs": np.zeros((40, 16), np.float32), "outputs": np.zeros((40, 16), np.float32)}
    given |= {"keep": numbers, "cut": numbers, "alias": numbers.astype(np.int32), "starts": nothing, "pieces": nothing}
    given |= {"ids": nothing} | {name: value}
    made = [kind(*(given[field] for field in kind._fields)) for kind in (_kernel.Tables, _kernel.Words)]
    options = {"window": 5, "negative": 5, "model": "skipgram", "threads": 1}
    with pytest.raises(ValueError, match=match):
        _kernel.train_words(*made, given["ids"], (0.1, 0.1), np.zeros(2, np.uint32), **options)
