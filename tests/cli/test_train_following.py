"""`embax train`: evaluation, logs and interrupts while it trains."""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cli_runs import assert_one_line, command, run

from embax import evaluate, train
from embax.cli import _following
from embax.cli._display import Display
from embax.train import _tensorboard
from embax.vectors import Vectors

TEXT = (
    "The king holds the crown.\n\nThe queen wears the crown.\n\nThe dog eats the bone. The cat eats the bone.\n\n" * 40
)
SMALL = ["--dim", "4", "--epochs", "2"]
QUESTIONS = ": a\nking queen dog cat\nking crown unknown bone\n"
PAIRS = "king\tqueen\t9\ndog\tcat\t8\nking\tbone\t1\n"


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "questions.txt").write_text(QUESTIONS)
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    return "text.txt"


def test_train_evaluates_after_each_epoch(text):
    options = ["--evaluate", "questions.txt", "--evaluate", "pairs.tsv", "--held-out", "--json"]
    status, out, err = run("train", text, "-o", "v", *SMALL, *options)
    assert status == 0
    found = json.loads(out)
    lines = [line for line in err.splitlines() if re.match(r"embax: epoch \d/2: ", line)]
    assert len(lines) == len(found["epochs"]) == 2
    vectors = Vectors.load("v")
    assert found["occurrences"] == vectors.counts.sum() < len(TEXT.split())  # a twentieth is held out
    analogies, pairs = evaluate.analogies(vectors, "questions.txt"), evaluate.word_pairs(vectors, "pairs.tsv")
    for number, (line, epoch) in enumerate(zip(lines, found["epochs"], strict=True), 1):
        assert epoch["epoch"] == number
        assert 0 < epoch["held_out"] < 4.2  # 6 ln 2 at the start
        about_analogies, about_pairs = epoch["evaluations"]
        assert (about_analogies["path"], about_analogies["total"], about_analogies["skipped"]) == (
            "questions.txt",
            1,
            1,
        )
        assert (about_pairs["path"], about_pairs["pairs"], about_pairs["missing"]) == ("pairs.tsv", 3, 0)
        assert f"held-out loss {epoch['held_out']:.4f}, questions.txt {about_analogies['accuracy']:.2%} of 1, " in line
        assert line.endswith(f"pairs.tsv Spearman {about_pairs['spearman']:.4f} of 3 pairs")
    assert about_analogies["correct"] == analogies.correct  # the last epoch's are the file's
    assert about_pairs["spearman"] == pytest.approx(pairs.spearman)
    assert about_pairs["pearson"] == pytest.approx(pairs.pearson)
    assert 0 <= found["waited"] <= 1
    assert found["interrupted"] is False


def test_train_accepts_questions_without_known_words(text, tmp_path):
    (tmp_path / "questions.txt").write_text(": a\nw x y z\n")
    (tmp_path / "pairs.tsv").write_text("w x 3\ny z 4\n")
    status, _, err = run("train", text, "-o", "v", *SMALL, "--evaluate", "questions.txt", "--evaluate", "pairs.tsv")
    assert status == 0
    assert "epoch 2/2: questions.txt has no known words, pairs.tsv has no correlation (0 pairs)" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--evaluate", "missing"], ["missing: No such file or directory."]),
        (["--evaluate", "text.txt"], ["text.txt: line 3 must be two words and a number"]),
        (["--evaluate", "-", "--evaluate", "-"], ["-: standard input can be read only once."]),
        (["--max-vocabulary", "0"], ["--max-vocabulary", "got 0"]),
    ],
)
def test_train_checks_files_to_evaluate_by(text, arguments, parts):
    assert_one_line(*run("train", text, "-o", "v", *SMALL, *arguments), *parts)
    assert not os.path.exists("v")


def test_train_needs_text_to_hold_out(text, tmp_path):
    (tmp_path / text).write_text("a b\n\n" * 19)
    assert_one_line(
        *run("train", text, "-o", "v", "--held-out"), "text.txt: every 20th sequence is held out, but these"
    )


def test_train_keeps_the_most_frequent_words(text):
    assert run("train", text, "-o", "v", *SMALL, "--max-vocabulary", "3")[0] == 0
    assert Vectors.load("v").vocabulary.tokens() == ["the", "bone", "crown"]


def test_train_writes_a_log(text, tmp_path):
    pytest.importorskip("tensorboardX")
    options = ["--log-dir", "log", "--evaluate", "pairs.tsv", "--held-out"]
    assert run("train", text, "-o", "v", *SMALL, *options)[0] == 0
    (events,) = (tmp_path / "log").glob("events.*")
    for name in (b"train/loss", b"held_out/loss", b"evaluate/pairs.tsv"):
        assert name in events.read_bytes()
    np.testing.assert_allclose(np.loadtxt("log/tensors.tsv"), Vectors.load("v").weight, rtol=1e-5)  # six digits


def test_train_names_the_missing_library_for_a_log(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert_one_line(*run("train", text, "-o", "v", "--log-dir", "log"), 'pip install "embax[tensorboard]"')


# --- Interrupts ---

can_interrupt = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="interrupts are ignored here, as in a background job"
)


@can_interrupt
def test_the_first_interrupt_ends_the_run_and_writes_the_vectors(text, monkeypatch):
    monkeypatch.setattr(_following.Following, "progress", interrupting(_following.Following.progress, at=2))
    before = signal.getsignal(signal.SIGINT)
    status, out, err = run("train", text, "-o", "v", "--dim", 4, "--epochs", 9, "--json")
    assert status == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads(out)["interrupted"] is True
    assert re.search(r"embax: interrupted in epoch \d/9, after \d+%\nembax: wrote v: 10 words", err)
    assert len(Vectors.load("v")) == 10


def interrupting(progress, at):
    """A method that has an interrupt in its call number `at`."""
    calls = []

    def call(self, report):
        calls.append(report)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return progress(self, report)

    return call


@can_interrupt
def test_interrupted_run_saves_a_checkpoint_and_continues(text, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    options = ["--dim", 4, "--epochs", 9]
    assert run("train", text, "-o", "whole", *options)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(_following.Following, "progress", interrupting(_following.Following.progress, at=3))
        assert run("train", text, "-o", "v", *options, "--checkpoint", "saved")[0] == 130
    assert not np.array_equal(Vectors.load("v").weight, Vectors.load("whole").weight)
    assert run("train", text, "-o", "v", *options, "--checkpoint", "saved")[0] == 0
    np.testing.assert_array_equal(Vectors.load("v").weight, Vectors.load("whole").weight)


@can_interrupt
def test_the_second_interrupt_ends_at_once():
    with _following.Following(Display(), [], None, may_end_early=True) as following:
        following.progress(train.Progress(1, 2, 3, 9, np.float32([1, 1]), 1.0))
        signal.raise_signal(signal.SIGINT)
        assert following.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@can_interrupt
def test_an_interrupt_before_the_first_step_or_among_processes_ends_at_once():
    for may_end_early in (True, False):
        with _following.Following(Display(), [], None, may_end_early) as following:
            if not may_end_early:
                following.progress(train.Progress(1, 2, 3, 9, np.float32([1, 1]), 1.0))
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert not following.interrupted


# --- Ends that leave files whole ---


def environment():
    # Of as many devices as here, for which the program is already compiled.
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.local_device_count())}


def test_a_full_disk_keeps_the_old_file(text):
    with open("v", "w") as file:
        file.write("old")
    full = "import resource, embax.cli; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); embax.cli.main()"
    arguments = ["train", text, "-o", "v", *SMALL, "--engine", "xla"]
    # Without the cache of compiled programs, which would be cut, too.
    clean = {name: value for name, value in environment().items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", full, *arguments], capture_output=True, text=True, env=clean, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "embax: error: v: File too large."
    assert "Traceback" not in done.stderr
    with open("v") as file:
        assert file.read() == "old"
    assert sorted(os.listdir(".")) == ["pairs.tsv", "questions.txt", "text.txt", "v"]


@pytest.mark.parametrize(
    "error", [ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device"), OSError(28, "No space", "x")]
)
def test_a_full_disk_for_a_checkpoint_is_said_in_one_line(text, monkeypatch, error):
    pytest.importorskip("orbax.checkpoint")
    from embax import checkpoint

    def save(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "save", save)
    status, out, err = run("train", text, "-o", "v", *SMALL, "--checkpoint", "saved", "--checkpoint-every", "1")
    assert (status, out) == (2, "")
    assert (
        err
        == "embax: error: saved: No space left on device for a checkpoint. Make space, and resume from the last one.\n"
    )


def test_train_ends_the_log_and_keeps_the_vectors_on_a_full_disk(text, monkeypatch):
    tensorboardX = pytest.importorskip("tensorboardX")
    write, written = tensorboardX.RecordWriter.write, []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_some(self, data):
        written.append(data)
        write(self, data) if len(written) < 4 else full()

    assert run("train", text, "-o", "expected", *SMALL)[0] == 0
    monkeypatch.setattr(tensorboardX.RecordWriter, "write", write_some)
    monkeypatch.setattr(_tensorboard, "replacing", full)
    status, out, err = run("train", text, "-o", "v", *SMALL, "--log-dir", "log")
    assert (status, out) == (0, "")
    notes = [line for line in err.splitlines() if "note" in line]
    assert notes[0] == "embax: note: the log ends here: log: No space left on device"
    assert len(notes) == 2  # the other one is of the projector
    assert len(written) == 4
    np.testing.assert_array_equal(Vectors.load("v").weight, Vectors.load("expected").weight)


def test_killed_run_continues_from_its_last_checkpoint(text):
    pytest.importorskip("orbax.checkpoint")
    options = [
        "train",
        text,
        "-o",
        "v",
        "--dim",
        "4",
        "--epochs",
        "9",
        "--checkpoint",
        "saved",
        "--checkpoint-every",
        "1",
    ]
    assert run(*options[:8])[0] == 0
    whole = Vectors.load("v").weight
    os.unlink("v")
    child = subprocess.Popen(command(*options), env=environment(), stderr=subprocess.DEVNULL)
    while not os.path.isdir("saved") or not any(name.isdecimal() for name in os.listdir("saved")):
        assert child.poll() is None
    child.kill()
    child.wait()
    assert not os.path.exists("v")
    assert run(*options)[0] == 0
    np.testing.assert_array_equal(Vectors.load("v").weight, whole)
