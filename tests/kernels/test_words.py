"""The training of word vectors by the native library, against the same in float64 with the same random numbers."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

native = pytest.importorskip("native", reason="the native kernels are not installed")
if not hasattr(native.LIBRARY, "embax_kernels_train_words"):
    pytest.skip("the native library cannot train word vectors", allow_module_level=True)

import word_reference  # noqa: E402

ROWS, BUCKETS = 40, 25
SEED = np.array([7, 2**32 - 5], np.uint32)
RATES = np.array([0.1, 0.02], np.float32)


def vocabulary(rng, rows=ROWS, subwords=False, sample=True):
    weights = 1 / np.arange(1, rows + 1)
    keep = np.minimum(1, 4 * weights[::-1]) if sample else np.ones(rows)
    starts, pieces = native.NOTHING, native.NOTHING
    if subwords:
        lengths = rng.integers(1, 6, rows)
        lengths[3] = 150  # more than are added up at a time
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        pieces = rng.integers(0, rows + BUCKETS, starts[-1]).astype(np.int32)
    keep = (keep * 0xFFFFFFFF).astype(np.uint32)
    return word_reference.Vocabulary(keep, *word_reference.alias_tables(weights**0.75), starts, pieces)


def text(rng, rows=ROWS, lengths=(30, 1, 0, 2, 55, 1, 12)):
    """Sequences of frequent and rare words, some of one word or of none, and breaks that fill up a chunk."""
    parts = [np.append((rows * rng.random(n) ** 2).astype(np.int32), np.int32(-1)) for n in lengths]
    return np.concatenate([*parts, np.full(9, -1, np.int32)])


def tables(rng, dim, input_rows, rows=ROWS):
    stride = -(-dim // 16) * 16
    made = []
    for number in (input_rows, rows):
        table = np.zeros((number, stride), np.float32)
        table[:, :dim] = rng.normal(size=(number, dim)) / np.sqrt(dim)
        made.append(table)
    return made


# Every count of targets in a call, many targets and many contexts; rows of the usual stride, of one line, of some.
CASES = [
    ("skipgram", False, 100, 5, 5),
    ("skipgram", False, 1, 1, 1),
    ("skipgram", False, 19, 20, 7),
    ("skipgram", False, 300, 5, 20),
    ("skipgram", False, 33, 3, 2),
    ("skipgram", False, 64, 100, 3),
    ("cbow", False, 100, 5, 5),
    ("cbow", False, 7, 20, 20),
    ("cbow", True, 50, 5, 7),
    ("skipgram", True, 100, 5, 5),
    ("skipgram", True, 21, 20, 1),
    ("skipgram", True, 16, 1, 20),
]


@pytest.mark.parametrize(("model", "subwords", "dim", "window", "negative"), CASES)
def test_train_words_is_plain_sgd_on_windows(model, subwords, dim, window, negative):
    rng = np.random.default_rng(dim)
    words, ids = vocabulary(rng, subwords=subwords), text(rng)
    before = tables(rng, dim, ROWS + BUCKETS if subwords else ROWS)
    arguments = (*before, words, ids, RATES, SEED, window, negative, model == "cbow")
    inputs, outputs, loss = native.train_words(*arguments)
    expected = word_reference.train(*arguments)
    for got, want, old in zip((inputs, outputs), expected, before, strict=False):
        assert np.abs(want - old).max() > 0.02
        # Some hundred steps round to 24 bits; each sees the errors of those before it.
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-6)
        assert not np.asarray(got)[:, dim:].any()
    np.testing.assert_allclose(np.asarray(loss), expected[2], rtol=1e-5)


def test_train_words_splits_a_text_into_parts_at_breaks():
    """On one thread, parts follow one another, so that the result is known."""
    rng = np.random.default_rng(1)
    words = vocabulary(rng)
    before = tables(rng, 20, ROWS)
    texts = [text(rng, lengths=[7] * 12), text(rng, lengths=[61]), text(rng, lengths=[2])]  # few breaks, or none
    native.LIBRARY.embax_kernels_set_threads(1)
    try:
        for ids, parts in zip(texts, (4, 3, 5), strict=True):
            arguments = (*before, words, ids, RATES, SEED, 5, 5, False)
            expected = word_reference.train(*arguments, parts)
            for got, want in zip(native.train_words(*arguments, threads=parts), expected, strict=True):
                np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=2e-6)
    finally:
        native.LIBRARY.embax_kernels_set_threads(0)


def test_train_words_without_pairs_changes_nothing():
    rng = np.random.default_rng(2)
    before = tables(rng, 20, ROWS)
    for ids in ([], [-1], [3], [3, -1, 4, -1, -1], [-1, -1, 5]):
        inputs, outputs, loss = native.train_words(
            *before, vocabulary(rng, sample=False), np.asarray(ids, np.int32), RATES, SEED, 5, 5, False
        )
        np.testing.assert_array_equal(inputs, before[0])
        np.testing.assert_array_equal(outputs, before[1])
        np.testing.assert_array_equal(loss, [0, 0])


BAD = [
    ("ids", 4, -2, r"`ids` must be in \[-1, 40\), got -2 at position 4"),
    ("ids", 0, ROWS, r"`ids` must be in \[-1, 40\), got 40 at position 0"),
    ("ids", 3, 2**31 - 1, r"`ids` must be in \[-1, 40\), got 2147483647 at position 3"),
    ("alias", 39, ROWS, r"`alias` must be in \[0, 40\), got 40 at position 39"),
    ("alias", 0, -1, r"`alias` must be in \[0, 40\), got -1"),
    ("starts", 5, -1, r"`starts` must be rising positions of the \d+ pieces, got 157 at position 4"),
    ("starts", 6, 2**31 - 1, r"`starts` must be rising positions of the \d+ pieces"),
    ("pieces", -1, ROWS + BUCKETS, r"`pieces` must be in \[0, 65\), got 65"),
    ("pieces", 0, -1, r"`pieces` must be in \[0, 65\), got -1 at position 0"),
]


@pytest.mark.parametrize(("name", "position", "value", "match"), BAD)
def test_train_words_refuses_ids_without_a_row(name, position, value, match):
    rng = np.random.default_rng(3)
    words, ids = vocabulary(rng, subwords=True), np.arange(ROWS, dtype=np.int32)
    arrays = {"ids": ids, **words._asdict()}
    arrays[name] = arrays[name].copy()
    arrays[name][position] = value
    ids = arrays.pop("ids")
    with pytest.raises(ValueError, match=match):
        native.train_words(*tables(rng, 5, 65), word_reference.Vocabulary(**arrays), ids, RATES, SEED, 5, 5, False)


def test_train_words_refuses_numbers_outside_of_their_range():
    rng = np.random.default_rng(4)
    words, ids, fitting = vocabulary(rng), text(rng), tables(rng, 5, ROWS)

    def refused(match, window=5, negative=5, threads=1):
        with pytest.raises(ValueError, match=match):
            native.train_words(*fitting, words, ids, RATES, SEED, window, negative, False, threads)

    refused("`window` must be between 1 and 2147483647, got 0", window=0)
    refused("`negative` must be between 1 and 1000000, got 0", negative=0)
    refused("`threads` must be between 1 and 1024, got 0", threads=0)
    refused("`threads` must be between 1 and 1024, got 1025", threads=1025)


def digest():
    """A hash of what all models learn."""
    rng = np.random.default_rng(5)
    found = hashlib.sha256()
    for subwords in (False, True):
        words, ids = vocabulary(rng, subwords=subwords), text(rng)
        before = tables(rng, 100, ROWS + BUCKETS if subwords else ROWS)
        for cbow in (False, True):
            for array in native.train_words(*before, words, ids, RATES, SEED, 5, 5, cbow):
                found.update(np.asarray(array).tobytes())
    return found.hexdigest()


def test_train_words_gives_the_same_bytes_again():
    assert digest() == digest()


def test_train_words_is_right_with_every_instruction_set():
    """The tests of this file that compare with float64 pass with the code for each instruction set."""
    if "EMBAX_KERNELS_ISA" in os.environ:
        pytest.skip("runs with one instruction set")
    for instructions in ("base", "v3"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "plain_sgd or parts", __file__]
        environment = os.environ | {"EMBAX_KERNELS_ISA": instructions}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
