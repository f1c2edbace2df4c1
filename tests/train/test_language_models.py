"""The language models with a tied head: in each framework the loss falls, and as far as in the others."""

import sys

import jax
import numpy as np
import pytest

from examples import EXAMPLES, load_example

FRAMEWORKS = ("jax", "brainstate", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("nnx", "equinox")))
STEPS, PARAGRAPHS = 25, 150


@pytest.fixture(scope="module")
def shakespeare():
    sys.path.insert(0, str(EXAMPLES / "language_model"))
    yield __import__("shakespeare")
    sys.path.remove(str(EXAMPLES / "language_model"))


@pytest.fixture(scope="module")
def corpus(shakespeare):
    return shakespeare.load(PARAGRAPHS)


def test_contexts_are_the_words_before(shakespeare, corpus):
    vocabulary, contexts, targets = corpus
    assert contexts.shape == (len(targets), shakespeare.CONTEXT)
    assert contexts.max() < len(vocabulary)
    assert (contexts[0] == 0).all()
    assert vocabulary.tokens()[:2] == ["<pad>", "<unk>"]
    inside = np.flatnonzero((contexts[:-1] != 0).all(1) & (contexts[1:] != 0).all(1))  # of one paragraph
    np.testing.assert_array_equal(contexts[inside + 1, -1], targets[inside])
    assert targets.min() >= 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_loss_falls(shakespeare, corpus, framework):
    """No warning of a dense gradient either: warnings are errors here."""
    vocabulary, contexts, targets = corpus
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = load_example(f"language_model/in_{framework}").start(len(vocabulary))
        losses = [float(step(*batch)) for batch in shakespeare.batches(contexts, targets, STEPS)]
    assert losses[0] == pytest.approx(np.log(len(vocabulary)), abs=0.2)  # nothing is known yet
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_a_run_prints_its_loss(shakespeare, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["in_jax.py", "--steps", "3", "--paragraphs", str(PARAGRAPHS)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        losses = shakespeare.train(load_example("language_model/in_jax").start)
    assert len(losses) == 3
    printed = capsys.readouterr().out
    assert "of them different" in printed
    assert f"step    2: {losses[2]:.3f} nats a word" in printed
