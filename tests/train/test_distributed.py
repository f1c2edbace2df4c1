import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_runs import assert_one_line, run
from corpora import ids_of

from embax import train
from embax.cli import _processes
from embax.cli._common import UserError
from embax.train._engines import segments as _segments
from embax.train._engines import xla as _xla
from embax.train._engines.engine import Options
from embax.train._engines.segments import Shape, batches
from embax.train._input import corpus as _corpus
from embax.train._input import text as _text
from embax.train._input.corpus import BREAK, encode
from embax.train._parts import WHOLE, Parts, parts_of
from embax.train._subwords import NgramOptions, pieces_of
from embax.vectors import Vectors

# Seconds in which each process has to end, so that one that hangs is a failure.
LIMIT = 180
DEVICES = 4
OPTIONS = {"engine": "xla", "dim": 6, "epochs": 2, "min_count": 1, "seed": 3, "sample": 0.05}
# Processes that wait for each other take long, so what they learn from is short: a call of the program an epoch.
SHORT = 20
WORDS = [f"w{number}" for number in range(50)]


def paragraphs(number=200):
    """Paragraphs in which all words occur, so that one compiled program serves any number of them."""
    rng = np.random.default_rng(0)
    every = [WORDS[first : first + 10] for first in range(0, len(WORDS), 10)]
    return [*every, *([WORDS[word % len(WORDS)] for word in rng.zipf(1.5, size=20)] for _ in range(number))]


def mesh():
    return jax.sharding.Mesh(np.asarray(jax.devices()[:DEVICES]), ("anything",))


def part_of_process(number, own):
    """Parts of a process among others, without these."""
    return Parts(None, number, own)


# --- The parts of a corpus ---


def test_encode_parts_deals_out_the_sequences():
    sequences = [["a", "b"], ["b"], [], ["c", "b"], ["a"], ["rare"]]
    whole = encode(sequences, 2, WHOLE)[0]
    parts = encode(sequences, 2, part_of_process(3, (0, 1, 2)))
    assert [part.tokens for part in parts] == [["b", "a"]] * 3 == [whole.tokens] * 3
    assert [part.counts.tolist() for part in parts] == [[3, 2]] * 3
    a, b = 1, 0
    assert [ids_of(part) for part in parts] == [[a, b, BREAK, b, BREAK], [b, BREAK, a, BREAK], [BREAK, BREAK]]


def test_encode_parts_counts_the_words_of_all_processes(monkeypatch):
    sequences, told = [["a", "b"], ["b", "é\n"], ["b", "only here"], ["a", "a"]], []
    monkeypatch.setattr(Parts, "is_shared", property(lambda self: self.number == 2))
    monkeypatch.setattr(Parts, "gather", lambda self, data: told.append(data) or told)
    first, second = part_of_process(2, (0,)), part_of_process(2, (1,))
    encode(sequences, 1, first)
    (corpus,) = encode(sequences, 1, second)  # it hears of the first one's
    whole = encode(sequences, 1, WHOLE)[0]
    assert (corpus.tokens, corpus.counts.tolist()) == (whole.tokens, whole.counts.tolist())
    assert [corpus.tokens[row] for row in ids_of(corpus) if row != BREAK] == ["b", "é\n", "a", "a"]


@pytest.mark.parametrize("held_out", [None, 4])
def test_encode_drops_the_same_words_with_any_number_of_processes(monkeypatch, held_out):
    monkeypatch.setattr(_corpus, "_CHUNK", 16)
    rng = np.random.default_rng(0)
    sequences = [[f"{word}" for word in rng.zipf(1.4, 8) % 200] for _ in range(120)]
    options = {"max_vocabulary": 20, "held_out": held_out}
    one = encode(sequences, 1, part_of_process(3, (0, 1, 2)), **options)
    told = []
    monkeypatch.setattr(Parts, "is_shared", property(lambda self: True))
    monkeypatch.setattr(Parts, "gather", lambda self, data: told.append(data) or told)
    processes = [part_of_process(3, own) for own in ((0, 1), (2,))]
    for process in processes:  # tells what it has counted
        encode(sequences, 1, process, **options)
    monkeypatch.setattr(Parts, "gather", lambda self, data: told)
    (first, second, *held_out_ids), (third, *same_ids) = (encode(sequences, 1, each, **options) for each in processes)
    assert len(one[0].tokens) == 20
    assert one[0].counts.sum() < 0.9 * 8 * len(sequences)
    for corpus, expected in zip([first, second, third, *held_out_ids], one, strict=True):
        assert (corpus.tokens, corpus.counts.tolist()) == (expected.tokens, expected.counts.tolist())
        assert ids_of(corpus) == ids_of(expected)
    assert [ids_of(corpus) for corpus in same_ids] == [ids_of(corpus) for corpus in held_out_ids]


def test_encode_parts_looks_for_the_words_of_its_own_parts_only(monkeypatch):
    seen, words_of = [], _text.words_of
    monkeypatch.setattr(_text, "words_of", lambda text: seen.append(text) or words_of(text))
    encode(train.paragraphs(["a\n\nb\n\na c\n\nd"]), 1, part_of_process(2, (1,)))
    assert seen == ["b", "d"]


def split_into(number, sequences):
    parts = part_of_process(number, tuple(range(number)))
    corpora = encode(sequences, 1, parts)
    return parts, corpora, np.ones(len(corpora[0].tokens))


def test_batches_of_parts_take_every_word_once():
    sequences = [[f"{number}"] * (1 + 7 * (number % 3)) for number in range(500)]
    parts, corpora, kept = split_into(3, sequences)
    found = list(batches(corpora, parts, kept, Shape(4, 2, 10), 0, 1))
    tokens = np.stack([batch.tokens for batch in found])
    tokens = np.where(tokens < 0, ~tokens, tokens)
    assert tokens.shape[1:] == (4, 6, 10)
    assert np.bincount(tokens.ravel(), minlength=501)[:500].tolist() == corpora[0].counts.tolist()
    assert sum(batch.words for batch in found) == corpora[0].counts.sum()
    of_part = [
        {int(corpora[0].tokens[row]) % 3 for row in part.ravel() if row < 500} for part in np.split(tokens, 3, axis=2)
    ]
    assert of_part == [{0}, {1}, {2}]


def test_batches_of_processes_equal_those_of_one(monkeypatch):
    """With blocks of different sizes, and none for one of the processes at the end."""
    monkeypatch.setattr(_segments, "_BLOCK", 40)
    sequences = [[f"{number}"] * (1 + 20 * (number % 2)) for number in range(10)]
    parts, corpora, kept = split_into(2, sequences)
    whole = list(batches(corpora, parts, kept, Shape(2, 1, 8), 0, 1))
    barrier, told = threading.Barrier(2, timeout=LIMIT), {}

    class Half(Parts):
        """The parts of one of two processes, which are threads here."""

        is_shared = property(lambda self: True)

        def gather(self, data):
            told[self.own] = data
            barrier.wait()
            found = [told[key] for key in sorted(told)]
            barrier.wait()
            return found

    def half(number):
        return list(batches([corpora[number]], Half(None, 2, (number,)), kept, Shape(2, 1, 8), 0, 1))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        halves = zip(*threads.map(half, range(2)), strict=True)
    count = 0
    for both, (one, other) in zip(whole, halves, strict=True):
        count += 1
        assert both.words == one.words == other.words
        assert both.steps == one.steps == other.steps
        np.testing.assert_array_equal(both.tokens, np.concatenate([one.tokens, other.tokens], axis=1))
    assert count > 5


@pytest.mark.parametrize(
    ("mesh", "error", "match"), [("x", TypeError, r"skipgram\(mesh=\.\.\.\)` must be a jax.sharding.Mesh, got str")]
)
def test_skipgram_refuses_other_meshes(mesh, error, match):
    with pytest.raises(error, match=match):
        train.skipgram([["a"]], mesh=mesh)


# --- A step on a mesh ---


@pytest.mark.parametrize(("model", "subwords"), [("skipgram", False), ("cbow", True)])
def test_train_on_a_mesh_equals_train_without_one(model, subwords):
    parts = parts_of("test", mesh())
    assert (parts.number, parts.own) == (4, (0, 1, 2, 3))
    corpora = encode(paragraphs(SHORT), 1, parts)
    options = Options(dim=6, window=5, negative=5, model=model, sample=np.inf, seed=0)
    pieces = pieces_of(corpora[0].vocabulary, NgramOptions(2, 3, 20)) if subwords else None
    engine, alone = _xla.Xla(corpora, parts, options, pieces), _xla.Xla(corpora[:1], WHOLE, options, pieces)
    rows = pieces.rows if pieces else len(WORDS)
    state, expected = engine.start(None), alone.start(None)
    assert {shard.data.shape for shard in state.inputs.weight.addressable_shards} == {(-(-rows // DEVICES), 6)}
    (batch,) = engine.batches(1)
    assert batch.words == corpora[0].counts.sum() < batch.tokens.size  # the rest is padding
    for _ in range(2):
        state, same_loss = engine.run(state, batch, (0.5, 0.1))
        expected, loss = alone.run(expected, batch, (0.5, 0.1))
    for one, other in zip(engine.vectors(state), alone.vectors(expected), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)  # float32


# --- Checkpoints ---


class Stopped(Exception):
    pass


def stop_after(calls):
    reports = []

    def progress(report):
        reports.append(report)
        if len(reports) == calls:
            raise Stopped

    return progress


def test_skipgram_continues_from_a_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    expected = train.skipgram(paragraphs(), **OPTIONS)
    saved = {"checkpoint": tmp_path / "saved", "checkpoint_every": 65}
    with pytest.raises(Stopped):
        train.skipgram(paragraphs(), **OPTIONS, **saved, progress=stop_after(10))
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["9"]  # of 32 steps each, in the second epoch
    reports = []
    resumed = train.skipgram(paragraphs(), **OPTIONS, **saved, progress=reports.append)
    np.testing.assert_array_equal(resumed.weight, expected.weight)
    assert 0 < reports[0].words_before < reports[0].words
    assert reports[-1].words_per_second * reports[-1].seconds < reports[-1].words
    again = train.skipgram(paragraphs(), **OPTIONS, **saved)  # from its last checkpoint
    np.testing.assert_array_equal(again.weight, expected.weight)
    for other in ({"dim": 7}, {"seed": 4}, {"epochs": 3}, {"mesh": mesh()}):
        with pytest.raises(train.CheckpointError, match=r"must fit the run, got .*saved.*other options"):
            train.skipgram(paragraphs(), **(OPTIONS | other), **saved)
    with pytest.raises(train.CheckpointError, match="another text"):
        train.skipgram(paragraphs(201), **OPTIONS, **saved)
    monkeypatch.setattr(_xla.Xla, "name", "native")
    with pytest.raises(train.CheckpointError, match=r"of the engine 'xla', and this run is of 'native'\. Choose"):
        train.skipgram(paragraphs(), **OPTIONS, **saved)


def test_skipgram_refuses_checkpoints_of_something_else(tmp_path):
    checkpoint = pytest.importorskip("embax.checkpoint")
    checkpoint.save(tmp_path, {"other": jnp.zeros(3)})
    with pytest.raises(train.CheckpointError, match=r"must fit the run, got .*not a checkpoint of training .*'other'"):
        train.skipgram([["a"] * 9], checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint_every=\.\.\.\)` must be at least 1"):
        train.skipgram([["a"] * 9], checkpoint=tmp_path, checkpoint_every=0)


# --- Processes ---

# The command line. A process may be told to end itself by a signal, in a call of the compiled program or, for call 0,
# as soon as it has joined the others.
PROGRAM = """
import os, sys
from embax import cli
end, call = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def save_or_end(self, state, at):
    if at.calls == call:
        os.kill(os.getpid(), end)
    save(self, state, at)
if end and call:
    from embax.train import _resume
    save, _resume.Checkpoints.save = _resume.Checkpoints.save, save_or_end
elif end:
    cli._train._train = lambda *_: os.kill(os.getpid(), end)
cli.main()
"""
GO_ON = "Start again with the same --checkpoint to go on."
NOTE = f"embax: note: if another process is lost, this one ends within 30 seconds. {GO_ON}"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def begun(text, output, *options, ends=((0, 0), (0, 0))):
    """Train in two processes of two devices each; a process ends itself by a signal that is not 0, in a call."""
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    where = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, (end, call) in enumerate(ends):
            arguments = ["train", text, "-o", output, *flags, *options, *where, str(number)]
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(int(end)), str(call), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(words) for words in paragraphs(SHORT)))
    return str(path)


def lose(number, end, call, text, *saved):
    """Run until a signal ends or stops one of the processes, and see the other one end in time, with a word of help."""
    output = f"{text}-{number}-{int(end)}.safetensors"
    ends = [(end, call) if each == number else (0, 0) for each in range(2)]
    with begun(text, output, *saved, ends=ends) as processes:
        os.waitid(os.P_PID, processes[number].pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        _, err = processes[1 - number].communicate(timeout=30)
        status = processes[1 - number].returncode
        processes[number].terminate()  # a process that was stopped is, before it runs on
        processes[number].send_signal(signal.SIGCONT)
        assert processes[number].wait(timeout=30) in (-signal.SIGKILL, -signal.SIGTERM)
    assert status != 0
    assert err.startswith(NOTE + "\n"), err
    assert "Traceback" not in err
    assert not os.path.exists(output)


def test_two_processes_continue_a_run_of_one_with_the_same_result(text, tmp_path, monkeypatch, options_of_users):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setattr(_xla, "train", options_of_users)  # as in the other processes
    calls, options = [], OPTIONS | {"mesh": mesh()}
    saved = {"checkpoint": tmp_path / "saved", "checkpoint_every": 32}
    expected = train.skipgram(paragraphs(SHORT), **options, progress=calls.append)
    assert len(calls) == 2
    with pytest.raises(Stopped):
        train.skipgram(paragraphs(SHORT), **options, **saved, progress=stop_after(1))
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["1"]
    output, flags = str(tmp_path / "v"), ["--checkpoint", str(tmp_path / "saved"), "--checkpoint-every", "32", "--json"]
    with begun(text, output, *flags) as processes:
        (out, err), other = (process.communicate(timeout=LIMIT) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert other == ("", NOTE + "\n")
    assert json.loads(out)["words"] == len(expected) == len(WORDS)
    assert err.splitlines()[-1].startswith(f"embax: wrote {output}: 50 words, 6 dimensions, trained by xla at ")
    vectors = Vectors.load(output)
    assert vectors.vocabulary.tokens() == expected.vocabulary.tokens()
    np.testing.assert_array_equal(vectors.counts, expected.counts)
    np.testing.assert_array_equal(vectors.weight, expected.weight)
    again = train.skipgram(paragraphs(SHORT), **options, **saved)  # from the last checkpoint of the two
    np.testing.assert_array_equal(again.weight, expected.weight)


# A process that is stopped keeps its connections, like one behind a network that is cut.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "cases",
    [
        [(1, signal.SIGKILL), (0, signal.SIGSTOP)],
        pytest.param([(0, signal.SIGKILL), (1, signal.SIGSTOP)], marks=pytest.mark.exhaustive),
    ],
    ids=["usual", "rest"],
)
def test_the_loss_of_a_process_ends_the_others(text, tmp_path, cases):
    def lose_at_once(case):
        lose(*case, 0, text, "--checkpoint", str(tmp_path / "saved"))

    # Together, as those that wait for heartbeats do nothing.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(lose_at_once, cases))


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer"), True),
        (RuntimeError("Unable to initialize backend 'cpu': UNAVAILABLE: Socket closed (set JAX_PLATFORMS='')"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (RuntimeError("no connection"), False),
        (OSError("INTERNAL: Socket closed"), False),
    ],
)
def test_errors_of_jax_for_a_lost_process_are_recognised(monkeypatch, error, is_lost):
    monkeypatch.setattr(_processes, "_join", lambda where: None)
    monkeypatch.setattr(_processes.atexit, "register", lambda *_: None)
    expected = (UserError, rf"another process was lost\. {GO_ON}") if is_lost else (type(error), re.escape(str(error)))
    with pytest.raises(expected[0], match=expected[1]), _processes.together(_processes.Address("h:1", 2, 0), GO_ON):
        raise error


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [0, 1])
def test_training_continues_after_the_loss_of_a_process(text, tmp_path, number, monkeypatch, options_of_users):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setattr(_xla, "train", options_of_users)  # as in the other processes
    saved = {"checkpoint": str(tmp_path / "saved"), "checkpoint_every": 32}
    lose(number, signal.SIGKILL, 2, text, "--checkpoint", saved["checkpoint"], "--checkpoint-every", "32")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["1"]
    expected = train.skipgram(paragraphs(SHORT), **OPTIONS, mesh=mesh())
    vectors = train.skipgram(paragraphs(SHORT), **OPTIONS, **saved, mesh=mesh())
    np.testing.assert_array_equal(vectors.weight, expected.weight)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--coordinator", "h:1"], "--coordinator, --num-processes and --process-id need --distributed"),
        (["--process-id", "0"], "need --distributed"),
        (["--distributed", "--num-processes", "2"], "must be given together, or none"),
        (["--distributed", "--coordinator", "h:1", "--process-id", "0"], "must be given together, or none"),
        (
            ["--distributed", "--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be less than the 2 of --num-processes, got 2",
        ),
        (["--distributed", "--coordinator", "host"], "a host and a port such as 10.0.0.1:1234, got 'host'"),
        (["--num-processes", "0"], "at least 1"),
        (["--checkpoint-every", "0"], "at least 1"),
    ],
)
def test_train_refuses_conflicting_options(text, tmp_path, options, part):
    assert_one_line(*run("train", text, "-o", tmp_path / "v", *options), part)


def test_train_reports_missing_processes(text, tmp_path):
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "0"]
    program = f"""
import contextlib
from embax.cli import _processes, main
_processes._JOIN = 1
arguments = {["train", text, "-o", str(tmp_path / "v"), "--distributed"]}
with contextlib.suppress(SystemExit):
    main(arguments)
main([*arguments, *{where}])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    without_cluster, alone = found.stderr.splitlines(keepends=True)
    assert_one_line(found.returncode, found.stdout, without_cluster, "--distributed finds no cluster", "--process-id")
    assert_one_line(found.returncode, found.stdout, alone, "the other processes have not come within 1 seconds")


def test_train_names_checkpoints_of_another_run(text, tmp_path):
    checkpoint = pytest.importorskip("embax.checkpoint")
    checkpoint.save(tmp_path / "saved", {"other": jnp.zeros(3)})
    result = run("train", text, "-o", tmp_path / "v", "--checkpoint", tmp_path / "saved")
    assert_one_line(*result, f"{tmp_path / 'saved'}: it is damaged, or not a checkpoint of training")
