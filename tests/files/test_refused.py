import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from real import GENSIM

from embax import Vectors, files
from embax.files._io.refused import explain

TORCH_2 = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e8002")


def torch_zip(name="archive/data.pkl"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/.format_version", "1")
        archive.writestr(name, pickle.dumps({}, 2))
    return file.getvalue()


PICKLES = [
    pickle.dumps(value, protocol) for protocol in range(2, 6) for value in ([1.0], {"a": 1}, np.eye(2), "a", None)
]


@pytest.mark.parametrize("data", PICKLES)
@pytest.mark.parametrize("compressed", [False, True])
def test_load_refuses_pickles_and_explains_how_to_convert_them(tmp_path, data, compressed):
    (tmp_path / "v.pkl").write_bytes(gzip.compress(data) if compressed else data)
    match = r"v.pkl: is a Python pickle, which can run any program .* never read here(.|\n)*numpy.save"
    with pytest.raises(files.FormatError, match=match):
        Vectors.load(tmp_path / "v.pkl")


@pytest.mark.parametrize("data", [TORCH_2, torch_zip(), torch_zip("data.pkl")])
def test_load_refuses_torch_files(tmp_path, data):
    (tmp_path / "v.pt").write_bytes(data)
    with pytest.raises(
        files.FormatError, match=r"is a torch file, and so a Python pickle(.|\n)*safetensors.torch.save_file"
    ):
        Vectors.load(tmp_path / "v.pt")


@pytest.mark.parametrize("name", ["toy-model-pretrained.bin", "euclidean_vectors.bin", "high_precision.kv.bin"])
def test_explain_lets_other_files_pass(name):
    assert explain(GENSIM / name) is None


def test_load_refuses_gensims_own_files():
    found = [path for path in sorted(GENSIM.iterdir()) if path.is_file() and path.read_bytes()[:1] == b"\x80"]
    models = [path for path in found if b"gensim" in path.read_bytes()[: 1 << 16]]
    assert len(models) > 10
    for path in models:
        with pytest.raises(files.FormatError, match=r"is a pickle of gensim's(.|\n)*KeyedVectors.load\("):
            Vectors.load(path)


def test_load_refuses_hdf5(tmp_path):
    (tmp_path / "v.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(files.FormatError, match="is an HDF5 file, which is not read here"):
        Vectors.load(tmp_path / "v.h5")


@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x0480, 0x0580])
def test_explain_returns_none_for_safetensors_that_begin_like_a_pickle(tmp_path, size):
    entry = {"tokens": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    data = size.to_bytes(8, "little") + json.dumps(entry).encode().ljust(size)
    (tmp_path / "v").write_bytes(data)
    assert data[0] == 0x80
    assert explain(tmp_path / "v") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x01]",
        b"\x80\x06]",
        b"a 1 2\n",
        b"PK\x03\x04",
        torch_zip("vectors.txt"),
        torch_zip()[:-9],
    ],
)
def test_explain_returns_none_for_other_files(tmp_path, data):
    (tmp_path / "v").write_bytes(data)
    assert explain(tmp_path / "v") is None


def test_explain_returns_none_for_missing_files_and_folders(tmp_path):
    assert explain(tmp_path / "v") is None
    assert explain(tmp_path) is None
