import gzip
import io

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from embax import files
from embax.files._formats.sequences import has_columns


def written(folder, columns, suffix=".parquet", **options):
    path = folder / f"rows{suffix}"
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **options)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(table, path, **options)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


ROWS = {
    "text": (["to be", "größe", None, ""] * 200, pa.string()),
    "large": (["to be", None, "be"], pa.large_string()),
    "repeated": (["to be", "to be", None], pa.dictionary(pa.int32(), pa.string())),
    "words": ([["to", "be"], [], None, ["be"]] * 200, pa.list_(pa.string())),
    "ids": ([[1, 2], None, [-3]], pa.large_list(pa.int64())),
    "small": ([[1, 2], [255, 0]], pa.list_(pa.uint8(), 2)),
}


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".stream"])
@pytest.mark.parametrize("name", ROWS)
def test_read_column_gives_the_values(tmp_path, name, suffix):
    values, kind = ROWS[name]
    table = pa.table({name: pa.array(values, kind), "number": pa.array(np.arange(len(values)))})
    path = written(tmp_path, table, suffix)
    empty = [] if name in ("words", "ids", "small") else ""
    expected = [empty if value is None else value for value in values]
    assert list(files.read_column(path)) == list(files.read_column(path, name)) == expected
    assert has_columns(path)


@pytest.mark.parametrize("group", [1, 300, 1000])
def test_read_column_reads_all_row_groups_of_compressed_files(tmp_path, group, monkeypatch):
    values = [f"row {number}" for number in range(1000)]
    path = written(tmp_path, {"a": values, "b": [[1]] * 1000}, row_group_size=group)
    assert list(files.read_column(path, "a")) == values
    packed = tmp_path / "rows.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(files.read_column(packed, "b")) == [[1]] * 1000
    assert not has_columns(packed)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert list(files.read_column("-", "a")) == values


@pytest.mark.parametrize(
    ("columns", "column", "match"),
    [
        ({"a": ["x"], "b": ["y"]}, None, "must have one column of strings, or of lists .* got 'a' string, 'b' string"),
        ({"a": [1.5]}, None, "must have one column of strings, or of lists"),
        ({"a": ["x"]}, "b", "must have one column 'b', got 'a' string"),
        ({"a": [1]}, "a", "the column 'a' must be of strings, or of lists of strings or integers, got int64"),
        ({"a": [[1.5]]}, "a", "got list<element: double>"),
        ({"a": [["x"], ["y", None]]}, "a", "row 1: an item of 'a' is missing"),
    ],
)
def test_read_column_refuses_columns_of_other_types(tmp_path, columns, column, match):
    path = written(tmp_path, columns)
    with pytest.raises(files.FormatError, match=match):
        list(files.read_column(path, column))


def test_read_column_prefers_names_of_texts(tmp_path):
    assert list(files.read_column(written(tmp_path, {"title": ["t"], "text": ["x"]}))) == ["x"]


@pytest.mark.parametrize("suffix", [".parquet", ".feather"])
def test_read_column_of_a_damaged_file_is_an_error(tmp_path, suffix):
    path = written(tmp_path, {"a": [f"row {number}" for number in range(100)]}, suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(files.FormatError, match="damaged"):
        list(files.read_column(path, "a"))
    path.write_bytes(b"a text")
    with pytest.raises(files.FormatError, match="must be a parquet or Arrow file"):
        list(files.read_column(path, "a"))


def test_read_column_refuses_strings_that_expand(tmp_path):
    path = written(tmp_path, {"a": ["x" * 1_000_000] * 20})
    with pytest.raises(files.FormatError, match="some strings take more than 16,777,216 bytes"):
        list(files.read_column(path, "a"))
    assert sum(map(len, files.read_column(path, "a", max_expansion=1e5))) == 20_000_000
