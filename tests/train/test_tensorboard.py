import errno
import struct
import sys

import numpy as np
import pytest

from embax import train
from embax.train import _tensorboard
from embax.vectors import Vectors

# One shape, as in other tests of this folder, so that they share a compiled program.
CORPUS = [[f"{topic}{number % 7}" for number in range(start, start + 9)] for start in range(40) for topic in "abc"]
OPTIONS = {"dim": 8, "window": 2, "epochs": 3, "min_count": 1, "sample": 0, "learning_rate": 0.1}


@pytest.fixture
def log(tmp_path):
    pytest.importorskip("tensorboardX")
    with train.TensorBoard(tmp_path / "deep" / "runs") as log:
        yield log


def events(folder):
    """The points of each curve: TFRecords of `Event`s, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    curves = {}
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])  # a checksum of 4 bytes follows, and one follows the record
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def test_tensorboard_writes_curves_over_the_words(log, tmp_path, monkeypatch):
    monkeypatch.setattr(_tensorboard, "_EVERY", 0.0)
    reports, epochs = [], []
    train.skipgram(
        CORPUS,
        **OPTIONS,
        held_out=True,
        progress=lambda report: reports.append(report) or log.progress(report),
        after_epoch=lambda epoch: epochs.append(epoch) or log.after_epoch(epoch),
    )
    log.close()
    curves = events(tmp_path / "deep" / "runs")
    assert set(curves) == {"train/loss", "train/learning_rate", "train/words_per_second", "held_out/loss"}
    for name, of in (("loss", "loss"), ("learning_rate", "learning_rate"), ("words_per_second", "words_per_second")):
        expected = [(report.words, np.float32(getattr(report, of))) for report in reports]
        if name != "words_per_second":
            assert curves[f"train/{name}"] == expected
        assert [step for step, _ in curves[f"train/{name}"]] == [step for step, _ in expected]
    words = reports[-1].total_words // 3
    assert curves["held_out/loss"] == [(words * epoch.epoch, np.float32(epoch.held_out)) for epoch in epochs]


def test_tensorboard_writes_seldom(log, tmp_path):
    for words in range(10):
        log.progress(train.Progress(1, 1, words, 9, np.float32([1, 1]), 1.0))
    log.close()
    assert [step for step, _ in events(tmp_path / "deep" / "runs")["train/loss"]] == [0, 9]


def test_projector_writes_rows_and_words(log, tmp_path):
    weight = np.asarray([[1, 2.5], [-1e-9, 3]], np.float32)
    log.projector(Vectors(["a\tb", "größe"], weight, [5, 4]))
    folder = tmp_path / "deep" / "runs"
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), weight, rtol=1e-5)  # six digits
    lines = (folder / "metadata.tsv").read_text().splitlines()
    assert lines == ["word\tcount", "a\\tb\t5", "größe\t4"]
    config = (folder / "projector_config.pbtxt").read_text()
    assert 'tensor_path: "tensors.tsv"' in config
    assert 'metadata_path: "metadata.tsv"' in config


def test_projector_writes_the_first_rows(log, tmp_path, monkeypatch):
    monkeypatch.setattr(_tensorboard, "_PROJECTED", 2)
    log.projector(Vectors(["a", "b", "c"], np.eye(3, dtype=np.float32)))
    folder = tmp_path / "deep" / "runs"
    assert len((folder / "tensors.tsv").read_text().splitlines()) == 2
    assert (folder / "metadata.tsv").read_text() == "word\tcount\na\t0\nb\t0\n"


def test_tensorboard_names_the_missing_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "embax\[tensorboard\]"'):
        train.TensorBoard(tmp_path / "log")


@pytest.fixture
def full_disk():
    """No file can grow beyond 2,000 bytes, as Linux says by an error where a disk is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensorboard_ends_the_log_once_on_a_full_disk(tmp_path, full_disk):
    pytest.importorskip("tensorboardX")
    errors = []
    with train.TensorBoard(tmp_path, on_error=errors.append) as log:
        for words in range(1000):
            log.progress(train.Progress(1, 1, words, 0, np.float32([1, 1]), 1.0))
        log.after_epoch(train.Epoch(1, 1, Vectors(["a"], [[1.0]]), 2.0))
    (error,) = errors
    assert (error.errno, error.filename) == (errno.EFBIG, str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert 1000 < file.stat().st_size <= 2000
    with pytest.raises(OSError, match="too large") as raised:
        log.projector(Vectors([f"{number}" for number in range(1000)], np.eye(1000, 2, dtype=np.float32)))
    assert raised.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_tensorboard_warns_of_a_full_disk(tmp_path, full_disk):
    pytest.importorskip("tensorboardX")

    def write():
        with train.TensorBoard(tmp_path) as log:
            for number in range(1000):
                log.scalar("a", number)

    with pytest.warns(RuntimeWarning, match=r"^The log '.*' ends here: File too large\.$") as caught:
        write()
    assert len(caught) == 1
