import functools
import os
import sys

import numpy as np
import pytest
from damage import damages, seeds, told

from embax import Vectors
from embax.files import FormatError
from embax.vectors import _approximate
from embax.vectors import _nearest as _queries
from embax.vectors._approximate import Approximate, StaleIndexError


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@functools.cache
def made():
    weight = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    unit = _queries.unit_rows(weight)
    return weight, unit, Approximate.build(unit)


@pytest.fixture
def saved(tmp_path):
    weight, _, index = made()
    path = tmp_path / "vectors.bin"
    index.save(path, weight)
    return path, weight


def test_search_finds_nearly_all_nearest_rows_with_exact_products():
    _, unit, index = made()
    exclude = np.arange(200)[:, None]
    rows, products = index.search(unit, unit[:200], 10, exclude)
    wanted, exact = _queries.nearest(unit, unit[:200], 10, exclude)
    # Threads build it, in an order that differs from run to run: 0.9975 to 1 on a quiet machine, less on a busy one.
    assert np.mean([np.isin(a, b).mean() for a, b in zip(rows, wanted, strict=True)]) > 0.98
    same = (rows == wanted).all(axis=1)
    assert same.sum() > 150
    np.testing.assert_array_equal(products[same], exact[same])


def test_search_leaves_out_nan_rows_and_fills_with_minus_one():
    unit = _queries.unit_rows(np.asarray([[1.0, 0], [np.nan, 1], [0, 1], [0, 0]]))
    index = Approximate.build(unit)
    queries = np.asarray([[0.0, 2.0], [np.nan, 1.0]])
    rows, products = index.search(unit, queries, 5, np.asarray([[0], [-1]]))
    np.testing.assert_array_equal(rows, [[2, 3, -1, -1, -1], [-1] * 5])
    np.testing.assert_array_equal(products[0], [2, 0, np.nan, np.nan, np.nan])
    assert np.isnan(products[1]).all()


@pytest.mark.parametrize(("rows", "number", "k"), [(0, 2, 3), (5, 0, 3), (5, 2, 0)])
def test_search_of_nothing(rows, number, k):
    unit = np.zeros((rows, 2), np.float32)
    found, products = Approximate.build(unit).search(unit, np.ones((number, 2)), k)
    assert found.shape == products.shape == (number, k)
    assert (found == -1).all()


def test_search_for_more_than_the_index_usually_looks_at():
    _, unit, index = made()
    rows, _ = index.search(unit, unit[:1], 700)
    assert (rows >= 0).all()
    assert len(set(rows[0])) == 700


def test_load_returns_the_saved_index(saved):
    path, weight = saved
    _, unit, index = made()
    loaded = Approximate.load(path, weight)
    for found, wanted in zip(loaded.search(unit, unit[:50], 5), index.search(unit, unit[:50], 5), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (path.parent / "vectors.bin.usearch").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.reshape(1500, -1),
        lambda w: w[:-1],
        lambda w: w[:, :-1],
        lambda w: w[::-1],
        lambda w: w.astype(np.float64),
        lambda w: w * 2,
    ],
)
def test_load_refuses_an_index_of_other_vectors(saved, change):
    path, weight = saved
    with pytest.raises(StaleIndexError, match=r"vectors\.bin\.usearch: was made of other vectors\. Build it again"):
        Approximate.load(path, change(weight))


LINE = b'{"bytes": 2, "index": "0", "weight": "0"}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an index that embax wrote"),
        (b"usearch" * 9, "is not an index that embax wrote"),
        (_approximate._MAGIC, "is not an index that embax wrote"),
        (_approximate._MAGIC + b"x" * 9000, "is not an index that embax wrote"),
        (_approximate._MAGIC + b"{}\n", r"line 2 does not describe an index \(KeyError"),
        (_approximate._MAGIC + b"[" * 4000 + b"\n", "line 2 does not describe an index"),
        (_approximate._MAGIC + b"\xff\n", "line 2 does not describe an index"),
        (_approximate._MAGIC + b"[]\n", r"line 2 does not describe an index \(TypeError"),
        (_approximate._MAGIC + LINE + b"a", r"1 bytes follow line 2, which announces 2\. Is it whole"),
        (_approximate._MAGIC + LINE + b"ab", "the checksum does not hold: it is damaged, or another user's"),
        (_approximate._MAGIC + '{"bytes": 2, "index": "é", "weight": "w"}\nab'.encode(), "the checksum does not hold"),
    ],
)
def test_load_of_another_file_is_a_format_error(tmp_path, data, message):
    path = tmp_path / "v"
    (tmp_path / "v.usearch").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        Approximate.load(path, np.ones((2, 2)))


def forged(path, weight, data):
    record = {"bytes": len(data), "index": _approximate._signature(data, _approximate._made_key())}
    record["weight"] = _approximate._hash(weight)
    line = _approximate.json.dumps(record).encode() + b"\n"
    (path.parent / f"{path.name}.usearch").write_bytes(_approximate._MAGIC + line + data)


def test_load_of_a_malformed_index_is_a_format_error(tmp_path):
    path, weight = tmp_path / "v", np.ones((2, 2), np.float32)
    forged(path, weight, b"nothing")
    with pytest.raises(FormatError, match="usearch cannot read it"):
        Approximate.load(path, weight)


def test_load_of_an_index_of_more_rows_or_another_width_is_a_format_error(tmp_path):
    path, weight = tmp_path / "v", np.ones((2, 2), np.float32)
    forged(path, weight, bytes(made()[2]._index.save()))
    with pytest.raises(FormatError, match=r"holds 3000 rows of 64 numbers, for \(2, 2\)"):
        Approximate.load(path, weight)


def test_load_of_no_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Approximate.load(tmp_path / "v", np.ones((2, 2)))


@seeds
def test_load_of_a_damaged_file_is_a_format_error(saved, seed):
    path, weight = saved
    file = path.parent / f"{path.name}.usearch"
    whole = file.read_bytes()
    # Half of the damage is in the two lines before the index.
    for name, data in damages(whole, 200, seed, head=200):
        if data.replace(b" ", b"") == whole.replace(b" ", b""):  # blanks of JSON say nothing
            continue
        file.write_bytes(data)
        with told(name), pytest.raises((FormatError, StaleIndexError)):
            Approximate.load(path, weight)


def test_build_without_usearch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ImportError, match=r'pip install "embax\[approximate\]"'):
        Approximate.build(np.ones((2, 2), np.float32))


def test_an_index_of_another_user_is_not_trusted(saved, tmp_path, monkeypatch):
    path, weight = saved
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(FormatError, match="damaged, or another user's"):
        Approximate.load(path, weight)
    assert not (tmp_path / "other").exists()  # which only saving makes
    made()[2].save(tmp_path / "own", weight)
    assert (tmp_path / "other" / "embax" / "index.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FormatError, match="damaged, or another user's"):
        Approximate.load(path, weight)


def test_vectors_keep_an_index_beside_their_file_when_they_are_asked_to(tmp_path, monkeypatch):
    weight, _, _ = made()
    path = tmp_path / "v.bin"
    Vectors([f"t{row}" for row in range(len(weight))], weight).save(path)
    vectors = Vectors.load(path)
    # An index is built by several threads, and may miss a neighbour; which one is not the same each time.
    found = vectors.most_similar_batch(["t1", ["t2", "t3"]], k=5, approx=True)
    for near, exact in zip(found, vectors.most_similar_batch(["t1", ["t2", "t3"]], k=len(weight)), strict=True):
        assert set(near) <= set(exact)
        assert len(set(near) & set(exact[:5])) >= 3
    assert os.listdir(tmp_path) == ["v.bin"]
    assert vectors.save_index() == _approximate.beside(path) == f"{path}.usearch"
    assert sorted(os.listdir(tmp_path)) == ["v.bin", "v.bin.usearch"]
    monkeypatch.setattr(Approximate, "build", lambda unit: pytest.fail("made again"))
    assert Vectors.load(path).most_similar("t1", k=5, approx=True) == found[0]
    monkeypatch.undo()
    Vectors([f"t{row}" for row in range(len(weight))], -weight[::-1]).save(path)  # the index is of others now
    changed = Vectors.load(path)
    exact = changed.most_similar("t1", k=len(weight))
    near = changed.most_similar("t1", k=5, approx=True)
    assert set(near) <= set(exact)
    assert len(set(near) & set(exact[:5])) >= 3
    new = Vectors(["a", "b"], np.eye(2))
    assert new.most_similar("a", approx=True) == [("b", 0.0)]
    with pytest.raises(ValueError, match=r"path=\.\.\.\)` must name the file of the vectors"):
        new.save_index()
    new.save(tmp_path / "new")
    assert new.save_index(tmp_path / "new") == f"{tmp_path / 'new'}.usearch"
    monkeypatch.setattr(Approximate, "build", lambda unit: pytest.fail("made again"))
    assert Vectors.load(tmp_path / "new").most_similar("a", approx=True) == [("b", 0.0)]
