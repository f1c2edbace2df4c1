import bz2
import zipfile

import numpy as np
import pytest

import embax
from embax import files


@pytest.fixture
def contents():
    return files.Contents(embax.Vocabulary(["a", "b"]), np.eye(2, dtype=np.float32))


@pytest.mark.parametrize("name", ["v.txt", "v.bin", "v.safetensors", "v.npy", "v.parquet", "v.arrow", "v.glove", "v"])
def test_identify_names_the_format_that_was_written(tmp_path, contents, name):
    path = tmp_path / name
    files.save(path, contents)
    expected = files.Identity(str(path), None, files.format_to_write(path), None, path.stat().st_size)
    assert files.identify(path) == expected


def test_identify_names_the_compression(tmp_path, contents):
    files.save(tmp_path / "v.txt", contents)
    data = (tmp_path / "v.txt").read_bytes()
    (tmp_path / "v.bz2").write_bytes(bz2.compress(data))
    assert files.identify(tmp_path / "v.bz2").compression == "bz2"
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("one.txt", data)
        archive.writestr("two.txt", data)
    found = files.identify(f"{tmp_path / 'v.zip'}:two.txt")
    assert found[:4] == (str(tmp_path / "v.zip"), "two.txt", "word2vec", "zip")
    assert files.identify(tmp_path / "v.bz2", format="glove").format == "glove"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x00nothing", "v: is of no format that is known here"), (b"\x80\x04]\x94.", "is a Python pickle")],
)
def test_identify_refuses_unknown_formats(tmp_path, content, message):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(files.FormatError, match=message):
        files.identify(tmp_path / "v")


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("v", None, "safetensors"),
        ("V.TXT", None, "word2vec"),
        ("v.bin", None, "word2vec-binary"),
        ("v.fasttext.bin", None, "fasttext"),
        ("v.xyz", "npy", "npy"),
    ],
)
def test_format_to_write(name, format, expected):
    assert files.format_to_write(name, format) == expected


@pytest.mark.parametrize(("name", "format"), [("v.xyz", None), ("v.txt", "excel")])
def test_format_to_write_refuses_unknown_ones(name, format):
    with pytest.raises(ValueError, match=r"`embax.files.save\((path|format)=...\)` must (end in one of|be one of)"):
        files.format_to_write(name, format)


def test_replacing_refuses_a_link_that_leads_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Is a symbolic link that leads to itself"):
        files.check_writable(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()
