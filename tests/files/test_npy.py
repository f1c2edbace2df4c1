import gzip
import io
import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from damage import KINDS, damages, seeds, told
from real import GLOVE, glove

from embax import Vocabulary, files
from embax.files._formats.npy import FORMAT
from embax.files._io.contents import Options
from embax.files._io.open import opened

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)
TOKENS = ["a", "", "größe", "x\ny"]


def read(path, **options):
    with opened(path, 100.0) as source:
        return FORMAT.read(source, Options(**options))


def saved(folder, table=TABLE, **beside):
    np.save(folder / "x.npy", table)
    for name, content in (beside or {"x__json": json.dumps(TOKENS)}).items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder / "x.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (4, 0), (0, 0)])
def test_read_returns_written_contents(tmp_path, shape, dtype):
    contents = files.Contents(Vocabulary(TOKENS[: shape[0]]), np.full(shape, 1.5, dtype))
    FORMAT.write(tmp_path / "v.npy", contents)
    with opened(tmp_path / "v.npy", 100.0) as source:
        assert FORMAT.recognises(source)
    assert sorted(os.listdir(tmp_path)) == ["v.json", "v.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), contents.weight)
    assert json.loads((tmp_path / "v.json").read_text("utf-8")) == TOKENS[: shape[0]]
    for mmap in (None, True, False):
        found = read(tmp_path / "v.npy", mmap=mmap)
        assert found.vocabulary == contents.vocabulary
        assert found.weight.dtype == dtype
        np.testing.assert_array_equal(found.weight, contents.weight)


def test_write_of_bfloat16_is_float32(tmp_path):
    FORMAT.write(tmp_path / "v.npy", files.Contents(Vocabulary(TOKENS), TABLE.astype(ml_dtypes.bfloat16)))
    assert np.load(tmp_path / "v.npy").tobytes() == TABLE.tobytes()


def test_write_is_by_row_whatever_the_layout(tmp_path):
    FORMAT.write(tmp_path / "v.npy", files.Contents(Vocabulary(TOKENS), np.asfortranarray(TABLE)))
    assert np.load(tmp_path / "v.npy").flags.c_contiguous


def test_write_refuses_the_name_of_the_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"must not end in .json, got '.*v.json'"):
        FORMAT.write(tmp_path / "v.json", files.Contents(Vocabulary(TOKENS), TABLE))


def test_write_that_fails_leaves_both_files_unchanged(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    monkeypatch.setattr(np.lib.format, "write_array", lambda file, *_, **__: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        FORMAT.write(path, files.Contents(Vocabulary(["b"]), TABLE[:1]))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("options", [{}, {"mmap": False}, {"dtype": np.dtype(np.float16)}, {"limit": 2}, {"limit": 0}])
def test_read_of_each_layout(tmp_path, dtype, order, options):
    path = saved(tmp_path, np.asarray(TABLE, dtype, order=order))
    (tmp_path / "x.npy.gz").write_bytes(gzip.compress(path.read_bytes()))
    rows = options.get("limit", 4)
    for place in (path, tmp_path / "x.npy.gz"):
        found = read(place, **options)
        assert found.weight.dtype == options.get("dtype", np.dtype(dtype).newbyteorder("="))
        assert found.weight.flags.c_contiguous
        np.testing.assert_array_equal(found.weight, TABLE[:rows])
        assert found.vocabulary.tokens() == TOKENS[:rows]


def test_read_maps_arrays_that_need_no_conversion(tmp_path):
    assert isinstance(read(saved(tmp_path)).weight.base, np.memmap)
    by_column = read(saved(tmp_path, np.asfortranarray(TABLE)), mmap=True).weight
    assert by_column.flags.f_contiguous
    np.testing.assert_array_equal(by_column, TABLE)
    with pytest.raises(files.FormatError, match="their bytes in the order of another machine"):
        read(saved(tmp_path, TABLE.astype(">f4")), mmap=True)


def written_parquet(folder, columns, name="x.parquet"):
    pyarrow.parquet.write_table(pa.table(columns), folder / name)


@pytest.mark.parametrize(
    "beside",
    [
        {"x__json": json.dumps([*TOKENS[:3], "z"])},
        {"x__json": json.dumps({"größe": 2, "a": 0, "z": 3, "": 1})},
        {"x__txt": "a\n\ngröße\nz"},
        {"x__txt": "a\r\n\r\ngröße\r\nz\r\n"},
        {"x__vocab__txt": "a\n\ngröße\nz\n"},
        {"x__vocab": "a\n\ngröße\nz\n"},
        {"x__txt": "a\n\ngröße\nz\n", "x__vocab__txt": "others"},
    ],
)
def test_read_takes_the_vocabulary_of_the_same_name(tmp_path, beside):
    found = read(saved(tmp_path, **beside))
    assert found.vocabulary.tokens() == [*TOKENS[:3], "z"]


@pytest.mark.parametrize(
    "columns",
    [
        {"any": TOKENS},
        {"any": pa.array(TOKENS).dictionary_encode()},
        {"more": TOKENS[::-1], "word": TOKENS, "n": [1] * 4},
    ],
)
def test_read_takes_a_column_of_a_parquet_file(tmp_path, columns):
    path = saved(tmp_path, unrelated__txt="")
    written_parquet(tmp_path, columns)
    assert read(path).vocabulary.tokens() == TOKENS
    os.rename(tmp_path / "x.parquet", tmp_path / "other.parquet")
    assert read(f"{path}:other.parquet").vocabulary.tokens() == TOKENS


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"n": [1] * 4}, "must have one column of strings, or name it 'token', got 'n' int64"),
        ({"a": TOKENS, "b": TOKENS}, "must have one column of strings"),
        ({"token": ["a", None, "b", "c"]}, "row 1: the value of 'token' is missing"),
    ],
)
def test_read_refuses_parquet_files_without_tokens(tmp_path, columns, match):
    path = saved(tmp_path, unrelated__txt="")
    written_parquet(tmp_path, columns)
    with pytest.raises(files.FormatError, match=match):
        read(path)


def test_read_of_glove():
    found = read(f"{GLOVE / 'glove_6B_50d_emb.npy'}:glove_6B_index.parquet")
    assert (
        found.vocabulary.tokens() == pyarrow.parquet.read_table(GLOVE / "glove_6B_index.parquet")["index"].to_pylist()
    )
    assert found.weight.flags.c_contiguous  # the file is not, so that each row of it would be spread over all of it
    assert np.array_equal(found.weight, np.load(GLOVE / "glove_6B_50d_emb.npy", mmap_mode="r"))
    np.testing.assert_array_equal(glove()["king"], found.weight[found.vocabulary.ids("king")])


def test_read_out_of_an_archive_of_numpys(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(TOKENS))
    np.savez(tmp_path / "x.npz", table=TABLE)
    assert read(tmp_path / "x.npz").vocabulary.tokens() == TOKENS
    np.savez_compressed(tmp_path / "x.npz", ids=np.arange(3), table=TABLE)
    np.testing.assert_array_equal(read(f"{tmp_path / 'x.npz'}:table.npy").weight, TABLE)


def npy(header, data=b"", version=1):
    header = header.encode() if isinstance(header, str) else repr(header).encode()
    header += b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2 if version == 1 else 4, "little") + header + data


def of(**changes):
    return {"descr": "<f4", "fortran_order": False, "shape": (4, 3)} | changes


def test_read_of_the_second_version_and_of_old_headers(tmp_path):
    path = saved(tmp_path)
    for data in (
        npy(of(), TABLE.tobytes(), 2),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 3L)}", TABLE.tobytes()),
    ):
        path.write_bytes(data)
        assert read(path).weight.tobytes() == TABLE.tobytes()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (npy(of())[:9], "header of the .npy file is damaged"),
        (npy(of())[:20], "header of the .npy file is damaged"),
        (npy(of(), version=3), "is for records only"),
        (npy(of(), version=9), "header of the .npy file is damaged"),
        (npy("(" * 9000), "header of the .npy file is damaged"),
        (npy("{" * 300), "header of the .npy file is damaged"),
        (npy("__import__('os')"), "header of the .npy file is damaged"),
        (npy(" " * 20_000 + "{}"), "header of the .npy file is damaged"),
        (npy({}), "header of the .npy file is damaged"),
        (npy(of(descr="nonsense")), "header of the .npy file is damaged"),
        (npy(of(shape=(4, "3"))), "header of the .npy file is damaged"),
        (npy(of(descr="|O"), b"x" * 96), "must hold a table of 16, 32 or 64 bit floats, got object"),
        (npy(of(descr="<i4"), b"x" * 48), "must hold a table of 16, 32 or 64 bit floats, got int32"),
        (npy(of(descr="<f16"), b"x" * 192), "must hold a table"),
        (npy(of(descr=[("a", "<f4")]), b"x" * 48), "must hold a table"),
        (npy(of(shape=(12,)), b"x" * 48), r"must hold a table .* got float32 \(12,\)"),
        (npy(of(shape=(-4, -3)), b"x" * 48), "must hold a table"),
        (npy(of(), b"x" * 47), r"the file ends at byte .*, within a table of float32 \(4, 3\)"),
        (npy(of(), b"x" * 49), "the table ends at byte .*, the file at byte"),
        (npy(of(shape=(1 << 50, 1 << 50)), b"x" * 48), "the file ends at byte"),
        (npy(of(shape=(1 << 62, 0))), "has 4,611,686,018,427,387,904 rows, and .*x.json 4 tokens for rows up to 3"),
    ],
)
def test_read_refuses_wrong_headers(tmp_path, data, match):
    path = saved(tmp_path)
    path.write_bytes(data)
    with pytest.raises(files.FormatError, match=match):
        read(path)
    if "file ends" not in match and "table ends" not in match:
        (tmp_path / "x.npy.gz").write_bytes(gzip.compress(data))
        with pytest.raises(files.FormatError, match=match):
            read(tmp_path / "x.npy.gz")


@pytest.mark.parametrize("by_column", [False, True])
def test_read_does_not_allocate_by_the_header_of_a_compressed_file(tmp_path, by_column):
    saved(tmp_path)
    data = npy(of(shape=(4, 1 << 50), fortran_order=by_column), bytes(1000))
    (tmp_path / "x.npy.gz").write_bytes(gzip.compress(data))
    with pytest.raises(files.FormatError, match=r"within (row 0|the table)"):
        read(tmp_path / "x.npy.gz")


@pytest.mark.parametrize(
    ("beside", "name", "match"),
    [
        ({"y__txt": "a"}, "", "has no vocabulary beside it. .* The folder has y.txt"),
        ({"y__md": "a"}, "", "The folder has none"),
        ({"x__txt": "a\nb\n"}, "", r"has 4 rows, and .*x.txt 2 tokens for rows up to 1\."),
        ({"x__txt": ""}, "", r"has 4 rows, and .*x.txt 0 tokens for no row\."),
        ({"x__json": json.dumps({"a": 0, "b": 1, "c": 2, "d": 4})}, "", "4 tokens for rows up to 4"),
        ({"x__txt": "a"}, ":y.txt", "there is no file 'y.txt' in the folder"),
        ({"x__parquet": "a"}, "", r"x.parquet: the file is damaged"),
    ],
)
def test_read_refuses_tables_without_their_tokens(tmp_path, beside, name, match):
    with pytest.raises(files.FormatError, match=match):
        read(str(saved(tmp_path, **beside)) + name)


def test_read_of_a_name_without_a_folder(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert read("x.npy").vocabulary.tokens() == TOKENS
    os.remove("x.json")
    with pytest.raises(files.FormatError, match="The folder has none"):
        read("x.npy")


def test_read_warns_of_tokens_that_occur_twice(tmp_path):
    with pytest.warns(files.DuplicateTokensWarning, match="1 rows are left out"):
        found = read(saved(tmp_path, x__txt="a\nb\na\nc"))
    np.testing.assert_array_equal(found.weight, TABLE[[0, 1, 3]])


@seeds
@pytest.mark.parametrize("table", [TABLE, np.asfortranarray(TABLE, ">f8")], ids=["by_row", "by_column"])
@pytest.mark.parametrize(("which", "number"), [("x.npy", 75), ("x.json", 25)])
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning", "ignore::embax.files.UndecodedTokensWarning")
def test_read_of_any_damage_gives_rows_or_a_format_error(tmp_path, which, number, table, seed):
    whole = saved(tmp_path, table)
    for case, (name, data) in enumerate(damages((tmp_path / which).read_bytes(), number, seed)):
        (tmp_path / which).write_bytes(data)
        path = tmp_path / f"x.npy{'.gz' * (case // len(KINDS) % 2)}"
        if path != whole:
            path.write_bytes(gzip.compress(whole.read_bytes(), 1))
        with told(name):
            try:
                found = read(path)
            except files.FormatError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017
            else:
                assert len(found.vocabulary) == len(found.weight)


def test_nothing_of_an_archive_is_taken_for_another(tmp_path):
    saved(tmp_path)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy(of(), TABLE.tobytes()))
        archive.writestr("b.npy", npy(of(), (TABLE + 1).tobytes()))
    (tmp_path / "x.npz").write_bytes(file.getvalue())
    np.testing.assert_array_equal(read(f"{tmp_path / 'x.npz'}:b.npy").weight, TABLE + 1)
