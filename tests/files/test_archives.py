"""Archives, folders of models, and Git LFS pointers."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from damage import damages, seeds, told
from safetensors.numpy import save

from embax import Vectors, files

TEXT = b"2 3\nking 1 0 0.5\nqueen 0 1 -2\n"
TABLE = np.arange(6, dtype=np.float32).reshape(2, 3)
TOKENS = b"king\nqueen\n"


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(members, format=tarfile.PAX_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


PACKED = {
    "zip": zipped,
    "tar": tarred,
    "tar and gzip": lambda members: gzip.compress(tarred(members)),
    "tar and bz2": lambda members: bz2.compress(tarred(members, tarfile.USTAR_FORMAT)),
    "tar and xz": lambda members: lzma.compress(tarred(members, tarfile.GNU_FORMAT)),
}
MODEL = {"m/README.md": b"", "m/model.safetensors": save({"embeddings": TABLE, "other": TABLE}), "m/vocab.txt": TOKENS}


@pytest.mark.parametrize("kind", PACKED)
def test_the_only_file_of_vectors_in_an_archive_is_read(tmp_path, kind):
    path = tmp_path / "v"
    for beside in ({}, {"LICENSE": b"free", "./docs/README.md": b"", "._v.txt": b"", "__MACOSX/v.txt": b""}):
        path.write_bytes(PACKED[kind]({**beside, "./vectors/v.txt": TEXT}))
        identity, contents = files.load_identified(path)
        assert contents.vocabulary.tokens() == ["king", "queen"]
        assert (identity.compression, identity.format, identity.size) == (kind, "word2vec", path.stat().st_size)


@pytest.mark.parametrize("kind", PACKED)
def test_a_model_in_an_archive_is_read_with_its_vocabulary(tmp_path, kind):
    path = tmp_path / "v"
    path.write_bytes(PACKED[kind](MODEL))
    for name in ("m:other", "m/model.safetensors:other", "other"):
        contents = files.load(f"{path}:{name}")
        assert contents.vocabulary.tokens() == ["king", "queen"]
        np.testing.assert_array_equal(contents.weight, TABLE)
    with pytest.raises(files.FormatError, match=r"so that one has to be named, as .*/v:m/model\.safetensors:NAME"):
        files.load(path)
    table = io.BytesIO()
    np.save(table, TABLE)
    path.write_bytes(PACKED[kind]({"x.npy": table.getvalue(), "x.json": json.dumps(["a", "b"]).encode()}))
    assert files.load(path).vocabulary.tokens() == ["a", "b"]


@pytest.mark.parametrize("kind", PACKED)
def test_of_several_files_one_has_to_be_named(tmp_path, kind):
    path = tmp_path / "v"
    path.write_bytes(PACKED[kind]({"a/v.txt": TEXT, "b.txt": TEXT.replace(b"king", b"duke")}))
    assert files.load(f"{path}:b.txt").vocabulary.tokens() == ["duke", "queen"]
    assert files.load(f"{path}:a").vocabulary.tokens() == ["king", "queen"]
    with pytest.raises(
        files.FormatError, match=r"v: holds 2 files, of which one has to be named, as .*v:NAME.*'a/v\.txt'"
    ):
        files.load(path)
    with pytest.raises(files.FormatError, match=r"v: holds no file 'c'\. It has \['a/v\.txt', 'b\.txt'\]"):
        files.load(f"{path}:c")
    path.write_bytes(PACKED[kind]({}))
    with pytest.raises(files.FormatError, match="v: "):
        files.load(path)


def test_read_of_a_tar_archive_skips_links_and_folders(tmp_path):
    path = tmp_path / "v.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("passwd", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../v.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    assert len(files.load(path).weight) == 2
    with pytest.raises(files.FormatError, match="holds no file 'passwd'"):
        files.load(f"{path}:passwd")


def test_size_of_extracted_tar_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("embax.files._io.open._HARMLESS", 1 << 12)
    path = tmp_path / "v"
    path.write_bytes(
        gzip.compress(tarred({"v.txt": b"20000 3\n" + b"".join(b"%d 0 0 0\n" % row for row in range(20000))}))
    )
    with pytest.raises(files.FormatError, match="more than 2 times as much"):
        files.load(path, max_expansion=2)
    assert len(files.load(path).weight) == 20_000


@seeds
@pytest.mark.parametrize("kind", ["tar", "tar and gzip"])
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning")
@pytest.mark.filterwarnings("ignore::embax.files.UndecodedTokensWarning")
def test_any_damage_of_an_archive_gives_vectors_or_a_format_error(tmp_path, kind, seed):
    for name, data in damages(PACKED[kind]({"LICENSE": b"", "v.txt": TEXT}), 60, seed, head=2000):
        (tmp_path / "v").write_bytes(data)
        with told(name), contextlib.suppress(files.FormatError):
            files.load(tmp_path / "v")


@pytest.mark.parametrize("name", ["model.safetensors", "0_StaticEmbedding/model.safetensors", "vectors.safetensors"])
def test_the_folder_of_a_model_is_read(tmp_path, name):
    path = tmp_path / "m" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(save({"embedding.weight": TABLE, "other": TABLE}))
    (path.parent / "vocab.txt").write_bytes(TOKENS)
    np.testing.assert_array_equal(Vectors.load(f"{tmp_path / 'm'}:other").weight, TABLE)
    (tmp_path / "m" / "a.safetensors").write_bytes(b"")
    if name == "vectors.safetensors":
        with pytest.raises(IsADirectoryError):
            Vectors.load(tmp_path / "m")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438000000\n"


@pytest.mark.parametrize("name", ["model.safetensors", "v.txt", "v", "v.bin", "v.npy", "v.parquet"])
@pytest.mark.parametrize("pointer", [POINTER, POINTER.replace(b"\n", b"\r\n"), POINTER.replace(b"git-lfs", b"hawser")])
def test_error_names_a_git_lfs_pointer(tmp_path, name, pointer):
    (tmp_path / name).write_bytes(pointer)
    match = (
        rf"{name}: is a Git LFS pointer: the file of 438,000,000 bytes(.|\n)*pull --include={name}(.|\n)*hf download"
    )
    with pytest.raises(files.FormatError, match=match):
        Vectors.load(tmp_path / name)
    with pytest.raises(files.FormatError, match=match):
        "".join(files.read_text(tmp_path / name))
    with pytest.raises(files.FormatError, match="LFS"):
        files.load(tmp_path / name, format="glove")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "special_tokens_map.json"])
def test_error_names_a_git_lfs_pointer_beside_a_table(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(save({"t": TABLE}))
    (tmp_path / "vocab.txt").write_bytes(TOKENS)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(files.FormatError, match=f"{name}: is a Git LFS pointer"):
        files.load(tmp_path)
