"""The benchmarks: what runs on any machine, in small, and that the page shows what was measured."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import embax

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Import a script of the folder of benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_page_shows_the_measured_figures(script):
    page = script("page")
    texts = [path.read_text("utf-8") for path in page.PAGES]
    assert [page.rewritten(text, page.read()) for text in texts] == texts
    assert {f"<!-- measured: {name} -->" for name in page.SECTIONS} <= set("\n".join(texts).splitlines())


def test_the_accelerator_is_measured(script, tmp_path, monkeypatch, capsys):
    accelerator = script("accelerator")
    monkeypatch.setattr(accelerator, "SMALL", (script("workload").Case(50, 4, 32),))
    with jax.numpy_dtype_promotion("standard"):  # as users have it; optax needs it
        accelerator.main(["--turns", "3", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [line["work"] for line in found["lines"]] == list(accelerator.works())
    assert all(0 < line["seconds"][1] <= line["seconds"][0] <= line["seconds"][2] for line in found["lines"])
    assert found["machine"]["device"] == "cpu"
    assert "Nothing left out." in capsys.readouterr().out


def test_main_leaves_out_cases_beyond_memory_or_time(script, tmp_path, monkeypatch, capsys):
    accelerator = script("accelerator")
    monkeypatch.setattr(accelerator, "fits", lambda work, _: work == "lookup")
    monkeypatch.setattr(accelerator, "SMALL", (script("workload").Case(50, 4, 32),))
    accelerator.main(["--turns", "3", "--output", str(tmp_path / "found.json")])
    assert len(json.loads((tmp_path / "found.json").read_text())["lines"]) == 1
    assert "Left out: bag: 50 x 4, 32 ids, Zipf" in capsys.readouterr().out


def test_ratios_and_their_spread(script):
    turns = script("turns")
    line = turns.summary("work", "case", {"embax": [1.0, 2.0, 9.0], "XLA": [2.0, 2.0, 3.0]}, {"XLA": 0.5})
    assert line.turns == 3
    assert line.seconds["embax"] == turns.Time(2.0, 1.2, 7.6)
    assert line.ratios["XLA"] == pytest.approx((1.0, 0.6, 2.6))
    assert line.more["XLA"] == pytest.approx((0.0, -0.8, 4.8))
    assert turns.from_json(json.loads(json.dumps(turns.as_json([line])))) == [line]
    (row,) = script("page")._rows_of(line)
    assert row == ("work", "XLA", "**1.00**", "0.60 to 2.60", "0.5", "2e+03 ms", "2e+03 ms")


def test_functions_that_compile_while_timed_are_refused(script):
    turns = script("turns")

    class Process:
        programs = 0

        def send(self, **_):
            pass

        def receive(self):
            return {}

        def ask(self, do, runs=0, **_):
            self.programs += do == "run"
            return {"seconds": [1.0] * runs, "programs": self.programs}

    way = turns.Way("embax", "embax", "lookup", script("workload").Case())
    with pytest.raises(RuntimeError, match="lookup: other must not compile in its turns"):
        turns.measure({"embax": Process()}, "lookup", [way, way._replace(name="other")], 0.0)


@pytest.mark.exhaustive  # compiles C++ and starts two processes
def test_ways_take_turns_in_processes(script):
    """Ours by XLA, and the memory's limit where there is a compiler."""
    processes, turns, workload = script("processes"), script("turns"), script("workload")
    names = {"XLA": "ours.py", "limit": "limit.py"} if script("limit").compiler() else {"XLA": "ours.py"}
    running = {name: processes.Process(script, environment={"EMBAX_KERNELS": "0"}) for name, script in names.items()}
    assert running["XLA"].ask(do="about") == {"jax": jax.__version__, "embax": embax.__version__, "kernels": ""}
    case = workload.Case(1_000, 8, 64)
    for work in ("bag", "SGD"):
        ways = [turns.Way(name, name, work, case) for name in (*names, "peers")]
        line = turns.measure(running, work, ways, 0.0)
        assert line.turns == turns.FEWEST
        assert list(line.seconds) == list(names)
        assert all(0 < time.low <= time.median <= time.high for time in line.seconds.values())
    with pytest.raises(RuntimeError, match="KeyError: 'unknown'"):
        running["XLA"].ask(do="build", way="x", work="unknown", size=case)
    for process in running.values():
        process.close()


def test_steps_of_the_benchmarks_train_the_rows_that_are_read(script):
    """By the gradient that is given, whatever the rows are."""
    ours, workload = script("ours"), script("workload")
    case = workload.Case(20, 4, 32)
    table = ours._table(case.rows, case.dim)
    ids, gradient = workload.batches_of(case)[0], workload.gradient_of(case)
    found = embax.grad(lambda table: ours.first_number(embax.lookup(table, ids), gradient))(table)
    assert (found.to_dense() != 0).any(axis=1).tolist() == [row in ids for row in range(20)]
    for row in set(ids.tolist()):
        assert found.to_dense()[row].tolist() == pytest.approx(gradient[ids == row].sum(0).tolist(), rel=1e-5)


def test_quality_is_measured(script, tmp_path):
    quality = script("quality")
    words = ["a", "b", "c", "d"] * 30
    counts = quality.counted([words])
    rng, eye = np.random.default_rng(0), np.eye(4, 3, dtype=np.float32)
    held_out = quality.HeldOut(counts, [words] * 3)
    zeros = quality.Learned(sorted(counts), 0 * eye, eye, eye)
    assert held_out.loss(zeros) == pytest.approx(6 * 0.6931, rel=1e-3)  # each of six products is 0
    assert quality.similarity({"a": eye[0], "b": eye[1], "c": eye[0] + eye[1]}, [("a", "b", 0), ("a", "c", 1)]) > 0.9
    many = [f"w{number}" for number in range(100)]
    of_many = dict.fromkeys(many, 10)
    learned = quality.Learned(many, rng.normal(size=(100, 3)), eye, eye)
    turned = learned._replace(inputs=learned.inputs @ [[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
    assert quality.overlap(learned, [turned], of_many) == 1
    assert quality.overlap(learned, [learned._replace(inputs=rng.normal(size=(100, 3)))], of_many) < 0.5
    assert quality.genre_share(learned, {word: {"all"} for word in many}, of_many) == 1
