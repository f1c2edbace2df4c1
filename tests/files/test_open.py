import bz2
import contextlib
import gzip
import io
import lzma
import sys
import zipfile

import numpy as np
import pytest
from damage import damages, seeds, told

from embax import Vectors, files
from embax.files._io import open as _open

TEXT = b"2 3\nking 1 0 0.5\nqueen 0 1 -2\n"


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def zstandard(data):
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.compress(data)


PACKED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda data: zipped(vectors=data),
    "zstd": zstandard,
}


@pytest.mark.parametrize("how", PACKED)
def test_plain_files_are_read_unchanged(tmp_path, how):
    path = tmp_path / "v"
    path.write_bytes(PACKED[how](TEXT))
    vectors = Vectors.load(path)
    assert vectors.vocabulary.tokens() == ["king", "queen"]
    assert vectors.weight.tolist() == [[1, 0, 0.5], [0, 1, -2]]


@pytest.mark.parametrize("how", [how for how in PACKED if how != "plain"])
def test_size_of_decompressed_files_is_limited(tmp_path, how, monkeypatch):
    monkeypatch.setattr(_open, "_HARMLESS", 1 << 16)
    path, rows = tmp_path / "bomb", 20_000
    path.write_bytes(PACKED[how](f"{rows} 3\n".encode() + b"".join(b"%d 0 0 0\n" % row for row in range(rows))))
    with pytest.raises(files.FormatError, match=r"bomb: more than 2 times as much .* Raise max_expansion"):
        Vectors.load(path, max_expansion=2)
    assert len(Vectors.load(path, max_expansion=1_000)) == rows


@pytest.mark.parametrize("how", [how for how in PACKED if how != "plain"])
@pytest.mark.parametrize("cut", ["end", "middle", "flip"])
def test_damaged_compression_is_a_format_error(tmp_path, how, cut):
    numbers = np.random.default_rng(0).normal(size=(1_000, 4))
    text = b"1000 4\n" + b"".join(b"w%d %.4f %.4f %.4f %.4f\n" % (row, *four) for row, four in enumerate(numbers))
    data = bytearray(PACKED[how](text))
    if cut == "flip":
        data[len(data) // 2] ^= 0xFF
    else:
        del data[len(data) // 2 if cut == "middle" else -4 :]
    path = tmp_path / "v"
    path.write_bytes(data)
    with pytest.raises(files.FormatError, match=r"v: .*(truncated or corrupt|damaged|header|line|ends|truncated)"):
        Vectors.load(path)


def test_of_an_archive_of_several_files_one_has_to_be_named(tmp_path):
    path = tmp_path / "glove.zip"
    path.write_bytes(zipped(a=TEXT, b=TEXT.replace(b"king", b"duke")))
    assert Vectors.load(f"{path}:b").vocabulary.tokens() == ["duke", "queen"]
    with pytest.raises(files.FormatError, match=r"holds 2 files, of which one has to be named, .*\['a', 'b'\]"):
        Vectors.load(path)
    with pytest.raises(files.FormatError, match=r"holds no file 'c'\. It has \['a', 'b'\]"):
        Vectors.load(f"{path}:c")


def test_error_names_the_missing_library_for_zstd(tmp_path, monkeypatch):
    path = tmp_path / "v"
    path.write_bytes(zstandard(TEXT))
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(files.FormatError, match=r'a library is missing\. pip install "embax\[files\]"'):
        Vectors.load(path)


def test_a_colon_in_a_name_is_part_of_the_name(tmp_path):
    (tmp_path / "a:b").write_bytes(TEXT)
    assert len(Vectors.load(tmp_path / "a:b")) == 2
    with pytest.raises(FileNotFoundError):
        Vectors.load(tmp_path / "c:b")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"without model\.safetensors or model\.safetensors\.index\.json"):
        Vectors.load(tmp_path)


@seeds
@pytest.mark.parametrize("how", PACKED)
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning", "ignore::embax.files.UndecodedTokensWarning")
def test_any_damage_gives_vectors_or_a_format_error(tmp_path, how, seed):
    for name, data in damages(PACKED[how](TEXT), 120, seed):
        (tmp_path / "v").write_bytes(data)
        with told(name), contextlib.suppress(files.FormatError):
            assert len(files.load(tmp_path / "v").weight) <= 27  # lines: three times, 8 new bytes may end 8 more


def test_zip_archive_with_a_wrong_offset_is_a_format_error(tmp_path):
    data = bytearray(zipped(vectors=TEXT))
    end = data.rindex(b"PK\x05\x06")
    data[end + 16 : end + 20] = (len(data) * 4).to_bytes(4, "little")  # where the list of files begins
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(files.FormatError, match=r"v: the zip archive is damaged .*(Invalid argument|start dir|offset)"):
        files.load(tmp_path / "v")


def test_a_zip_archive_of_a_file_without_a_name_is_read(tmp_path):
    (tmp_path / "v").write_bytes(zipped(nameless=TEXT).replace(b"nameless", b"\0ameless"))  # which ends a name
    assert len(Vectors.load(tmp_path / "v")) == 2
