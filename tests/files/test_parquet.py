import gzip

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from damage import damages, seeds, told

from embax import Vocabulary, files
from embax.files._formats import arrow as _arrow
from embax.files._formats import parquet as _parquet
from embax.files._formats.columns import packed
from embax.files._io.contents import Options
from embax.files._io.open import opened

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
TOKENS = ["a", "", "größe", "x\ny"]
FORMATS = [_parquet.FORMAT, _arrow.FORMAT]
both = pytest.mark.parametrize("format", FORMATS, ids=["parquet", "arrow"])


def read(format, path, max_expansion=100.0, **options):
    with opened(path, max_expansion) as source:
        return format.read(source, Options(**options))


def lists(kind=None, size=-1, table=TABLE):
    return pa.array(table.tolist(), pa.list_(kind or pa.float32(), size))


def written(format, folder, columns, **options):
    path = folder / f"v{format.suffixes[-1]}"
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if format is _parquet.FORMAT:
        pyarrow.parquet.write_table(table, path, **options)
    else:
        pyarrow.feather.write_feather(table, path, **options)
    return path


@both
@pytest.mark.parametrize("counts", [None, np.asarray([9, 5, 5, 1], np.int64)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_read_returns_written_contents(tmp_path, format, rows, dtype, counts):
    counts = None if counts is None else counts[:rows]
    contents = files.Contents(Vocabulary(TOKENS[:rows]), TABLE[:rows].astype(dtype), counts)
    path = tmp_path / f"v{format.suffixes[0]}"
    format.write(path, contents)
    with opened(path, 100.0) as source:
        assert [one.recognises(source) for one in FORMATS] == [one is format for one in FORMATS]
    found = read(format, path)
    assert found.vocabulary == contents.vocabulary
    assert found.weight.dtype == dtype
    assert found.weight.tobytes() == contents.weight.tobytes()
    if counts is None:
        assert found.counts is None
    else:
        assert found.counts.dtype == np.int64
        np.testing.assert_array_equal(found.counts, counts)


@both
def test_write_of_many_blocks(tmp_path, format, monkeypatch):
    monkeypatch.setattr("embax.files._formats.columns._BLOCK", 7 * 12)
    monkeypatch.setattr("embax.files._formats.parquet._BLOCK", 5 * 12)
    table = np.random.default_rng(0).standard_normal((100, 3), np.float32)
    contents = files.Contents(Vocabulary([f"w{row}" for row in range(100)]), np.asfortranarray(table), np.arange(100))
    format.write(tmp_path / "v", contents)
    for limit in (None, 0, 1, 50, 200):
        found = read(format, tmp_path / "v", limit=limit)
        assert found.vocabulary.tokens() == contents.vocabulary.tokens()[:limit]
        np.testing.assert_array_equal(found.weight, table[:limit])
        np.testing.assert_array_equal(found.counts, np.arange(100)[:limit])


@both
def test_write_is_read_by_pyarrow(tmp_path, format):
    contents = files.Contents(Vocabulary(TOKENS), TABLE.astype(ml_dtypes.bfloat16), np.arange(4))
    format.write(tmp_path / "v", contents)
    of_pyarrow = pyarrow.parquet.read_table if format is _parquet.FORMAT else pyarrow.feather.read_table
    expected = {"token": TOKENS, "vector": contents.weight.astype(np.float32).tolist(), "count": [0, 1, 2, 3]}
    assert of_pyarrow(tmp_path / "v").to_pydict() == expected


@both
def test_write_refuses_vectors_without_a_number(tmp_path, format):
    with pytest.raises(ValueError, match="must have vectors of one number or more, got none"):
        format.write(tmp_path / "v", files.Contents(Vocabulary(TOKENS), TABLE[:, :0]))


LAYOUTS = {
    "lists": {"token": TOKENS, "vector": lists()},
    "fixed": {"vector": lists(size=3), "token": TOKENS},
    "large": {
        "token": pa.array(TOKENS, pa.large_string()),
        "vector": pa.array(TABLE.tolist(), pa.large_list(pa.float32())),
    },
    "views": {"token": pa.array(TOKENS, pa.string_view()), "vector": lists()},
    "dictionary": {"token": pa.array(TOKENS).dictionary_encode(), "vector": lists()},
    "named": {"note": ["?"] * 4, "token": TOKENS, "other": lists(), "vector": lists(), "count": [1] * 4},
    "unnamed": {"id": [7] * 4, "word.form": TOKENS, "score": [0.5] * 4, "my.numbers": lists()},
    "wide": {"word": TOKENS, "id": [7] * 4, **{f"c.{place}": TABLE[:, place] for place in range(3)}},
}


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compressed", [False, True])
def test_read_of_each_layout(tmp_path, format, layout, compressed):
    path = written(format, tmp_path, LAYOUTS[layout])
    if compressed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    for options in ({}, {"limit": 2}, {"dtype": np.dtype(np.float64)}):
        rows = options.get("limit", 4)
        found = read(format, path, **options)
        assert found.vocabulary.tokens() == TOKENS[:rows]
        assert found.weight.dtype == options.get("dtype", np.float32)
        np.testing.assert_array_equal(found.weight, TABLE[:rows])


def test_read_of_tensors_of_a_fixed_shape(tmp_path):
    storage = pa.FixedSizeListArray.from_arrays(pa.array(TABLE.reshape(-1)), 3)
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (3,)), storage)
    for format in FORMATS:
        np.testing.assert_array_equal(
            read(format, written(format, tmp_path, {"t": TOKENS, "v": tensors})).weight, TABLE
        )


@both
def test_read_of_slices_and_groups(tmp_path, format):
    table = pa.table(LAYOUTS["lists"] | {"counts": [5, 6, 7, 8]}).slice(1)
    chunks = {"row_group_size": 2} if format is _parquet.FORMAT else {"chunksize": 2, "compression": "zstd"}
    found = read(format, written(format, tmp_path, table, **chunks))
    assert found.vocabulary.tokens() == TOKENS[1:]
    np.testing.assert_array_equal(found.weight, TABLE[1:])
    np.testing.assert_array_equal(found.counts, [6, 7, 8])


@both
def test_read_of_no_rows(tmp_path, format):
    found = read(format, written(format, tmp_path, pa.table(LAYOUTS["lists"]).slice(4)))
    assert (len(found.vocabulary), found.weight.shape) == (0, (0, 0))


MISSING = pa.array([[1.0, 2.0], [1.0, None], None, []], pa.list_(pa.float32()))


@both
@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"vector": lists()}, "must have a column of strings and one of lists of floats, got 'vector' list"),
        ({"token": TOKENS}, "must have a column of strings and one of lists of floats, got 'token' string"),
        ({"token": TOKENS, "ids": pa.array([[1]] * 4)}, "must have a column of strings and one of lists"),
        ({"a": TOKENS, "b": TOKENS, "vector": lists()}, "must have a column of strings and one of lists"),
        ({"token": TOKENS, "a": lists(), "b": lists()}, "must have one column of lists of floats, or name it 'vector'"),
        ({"token": ["a", "b", None, "c"], "vector": lists()}, "row 2: the value of 'token' is missing"),
        ({"token": pa.array(["a", None] * 2).dictionary_encode(), "vector": lists()}, "row 1: the value of 'token'"),
        ({"token": TOKENS, "vector": MISSING.take([0, 2, 0, 0])}, "row 1: the value of 'vector' is missing"),
        ({"token": TOKENS, "vector": MISSING.take([0, 0, 0, 1])}, "row 3: a number is missing"),
        ({"token": TOKENS, "vector": MISSING.take([0, 0, 3, 0])}, "row 2 has 0 numbers, but the rows before it have 2"),
        ({"token": TOKENS, "a": [1.0, None, 2.0, 3.0]}, "row 1: the value of 'a' is missing"),
        ({"token": TOKENS, "vector": lists(), "count": [1, None, 1, 1]}, "row 1: the value of 'count' is missing"),
        ({"token": TOKENS, "vector": lists(), "count": [1, 1, -1, 1]}, "row 2: the count must not be negative"),
        ({"token": TOKENS, "vector": lists(), "count": pa.array([1 << 63] * 4, pa.uint64())}, "the file is damaged"),
    ],
)
def test_read_refuses_columns_that_hold_no_vectors(tmp_path, format, columns, match):
    path = written(format, tmp_path, columns)
    with pytest.raises(files.FormatError, match=f"{path}: .*{match}"):
        read(format, path)


def test_read_names_the_row_of_the_file_and_not_of_the_group(tmp_path):
    path = written(_parquet.FORMAT, tmp_path, {"token": ["a", "b", "c", None], "vector": lists()}, row_group_size=1)
    with pytest.raises(files.FormatError, match="row 3: the value of 'token'"):
        read(_parquet.FORMAT, path)


def test_read_refuses_two_columns_of_the_same_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(TOKENS), lists(), pa.array([1] * 4)], ["vector", "vector", "c"])
    with pa.OSFile(str(tmp_path / "v"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(files.FormatError, match="must not name two columns the same, got 'vector' string"):
        read(_arrow.FORMAT, tmp_path / "v")


@pytest.mark.parametrize("ends", [[0, 1, 1, 8, 1 << 40], [0, 1 << 40, 1, 8, 11], [-8, 1, 1, 8, 11], [0, 1, 1, 4, 11]])
def test_read_refuses_strings_outside_of_their_buffer(tmp_path, ends):
    _arrow.FORMAT.write(tmp_path / "v", files.Contents(Vocabulary(TOKENS), TABLE))
    right, wrong = np.asarray([0, 1, 1, 8, 11]).tobytes(), np.asarray(ends).tobytes()
    whole = (tmp_path / "v").read_bytes()
    assert whole.count(right) == 1
    (tmp_path / "v").write_bytes(whole.replace(right, wrong))
    with pytest.raises(files.FormatError, match=r"the file is damaged \(In column 0: Invalid"):
        read(_arrow.FORMAT, tmp_path / "v")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_packed_of_a_slice(tmp_path, kind):
    (tmp_path / "v").write_bytes(b"")
    with opened(tmp_path / "v", 100.0) as source:
        text, lengths = packed(source, pa.array(TOKENS, kind)[2:], 100)
    assert (text.decode(), lengths.tolist()) == ("größex\ny", [7, 3])


@both
def test_read_warns_of_tokens_that_occur_twice(tmp_path, format):
    path = written(format, tmp_path, {"token": ["a", "b", "a", "c"], "vector": lists(), "count": [1, 2, 3, 4]})
    with pytest.warns(files.DuplicateTokensWarning, match="1 rows are left out"):
        found = read(format, path)
    np.testing.assert_array_equal(found.weight, TABLE[[0, 1, 3]])
    np.testing.assert_array_equal(found.counts, [1, 2, 4])


@both
def test_read_cannot_map(tmp_path, format):
    with pytest.raises(files.FormatError, match="cannot be mapped into memory"):
        read(format, written(format, tmp_path, LAYOUTS["lists"]), mmap=True)


@pytest.mark.parametrize("size", [-1, 100])
def test_read_refuses_more_numbers_than_a_file_of_its_size_holds(tmp_path, monkeypatch, size):
    monkeypatch.setattr("embax.files._io.open._HARMLESS", 1 << 16)
    table = np.zeros((20_000, 100), np.float32)
    columns = {"token": [str(row) for row in range(20_000)], "vector": lists(None, size, table)}
    path = written(_parquet.FORMAT, tmp_path, columns, compression="zstd")
    with pytest.raises(files.FormatError, match=r"says that it holds 20,000 rows of 100 numbers.*Raise max_expansion"):
        read(_parquet.FORMAT, path, 2.0)
    assert read(_parquet.FORMAT, path, 1000.0).weight.shape == (20_000, 100)


def test_read_refuses_more_numbers_than_an_arrow_file_of_its_size_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("embax.files._io.open._HARMLESS", 1 << 16)
    columns = {"token": [str(row) for row in range(2000)], "vector": lists(None, 100, np.zeros((2000, 100)))}
    path = written(_arrow.FORMAT, tmp_path, columns, compression="zstd", chunksize=500)
    with pytest.raises(files.FormatError, match=r"holds more than .* bytes. Raise max_expansion"):
        read(_arrow.FORMAT, path, 2.0)
    assert read(_arrow.FORMAT, path, 1000.0).weight.shape == (2000, 100)


@both
def test_read_refuses_dictionaries_that_expand_beyond_the_limit(tmp_path, format, monkeypatch):
    monkeypatch.setattr("embax.files._io.open._HARMLESS", 1 << 16)
    tokens = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), ["x" * 5000])
    path = written(format, tmp_path, {"token": tokens, "vector": lists(table=np.ones((4000, 1)))})
    with pytest.raises(files.FormatError, match=r"its strings take more than .* Raise max_expansion"):
        read(format, path, 2.0)


@both
def test_read_of_a_missing_file_is_file_not_found(tmp_path, format):
    path = written(format, tmp_path, LAYOUTS["lists"])
    with opened(path, 100.0) as source:
        path.unlink()
        with pytest.raises(FileNotFoundError):
            format.read(source, Options())


@both
@pytest.mark.parametrize("end", [4, 6, 12, 100, -1, -4, -8, -9])
def test_read_refuses_truncated_files(tmp_path, format, end):
    path = written(format, tmp_path, LAYOUTS["lists"])
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(files.FormatError, match="the file is damaged"):
        read(format, path)


@both
@seeds
@pytest.mark.parametrize("layout", ["lists", "fixed", "dictionary", "wide"])
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning")
def test_read_of_any_damage_gives_rows_or_a_format_error(tmp_path, format, layout, seed):
    path = written(format, tmp_path, LAYOUTS[layout])
    for name, data in damages(path.read_bytes(), 75, seed):
        path.write_bytes(data)
        with told(name):
            try:
                found = read(format, path)
            except files.FormatError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert len(found.vocabulary) == len(found.weight)


def test_lists_of_a_negative_length_are_a_format_error(tmp_path):
    table = pa.table({"token": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32(), 7777))})
    with pa.OSFile(str(tmp_path / "whole"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    whole, length = (tmp_path / "whole").read_bytes(), (7777).to_bytes(4, "little")
    assert length in whole
    (tmp_path / "v").write_bytes(whole.replace(length, (-7777).to_bytes(4, "little", signed=True)))
    with pytest.raises(files.FormatError, match="lists of floats must not have a negative length, got -7777"):
        files.load(tmp_path / "v", format="arrow")
