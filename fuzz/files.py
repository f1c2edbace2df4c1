"""Fuzz a reader of vector files, guided by coverage: any bytes must give contents or a FormatError."""

import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["embax.files", "embax.vocabulary", "embax._base.text.strings"]):
    import embax.files
    import embax.vocabulary

import embax.vectors

VECTORS = embax.vectors.Vectors(["a", "bc", "日本"], np.asarray([[1, 0.5], [-2, 3e-9], [0, 7]], np.float32), [3, 2, 1])
# What a file of each format is called; some look for others beside it.
NAMES = {"npy": "v.npy", "tensor": "model.safetensors"}
PACKED = "gzip", "bz2", "xz", "zip", "tar", "zstd"


def seeds(kind: str, folder: Path) -> list[bytes]:
    """A whole file of the format to begin with."""
    if kind in PACKED:
        text = b"3 2\na 1 0.5\nbc -2 3e-9\nd 0 7\n"
        return [_packed(kind, text), _packed(kind, text * 50)]
    if kind == "tensor":
        from safetensors.numpy import save

        (folder / "vocab.txt").write_text("a\nbc\nd\n")
        weight = np.asarray(VECTORS.weight)
        return [save({"weight": weight}), save({"x.weight": weight.astype(np.float16), "bias": weight[0]})]
    path = folder / f"seed-{NAMES.get(kind, 'v')}"
    VECTORS.save(path, format=kind)
    if kind == "npy":
        (folder / "v.json").write_text('["a", "bc", "d"]')
    return [path.read_bytes()]


def _packed(kind: str, text: bytes) -> bytes:
    if kind == "zip":
        import io
        import zipfile

        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("v.txt", text)
        return out.getvalue()
    if kind == "tar":
        import io
        import tarfile

        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo("v.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
        return out.getvalue()
    module = {"gzip": "gzip", "bz2": "bz2", "xz": "lzma", "zstd": "backports.zstd"}[kind]
    return __import__(module, fromlist=["compress"]).compress(text)


def main() -> None:
    """Run libFuzzer on the reader that the first argument names; the others are its own."""
    kind, *arguments = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(kind, folder)):
        (corpus / str(number)).write_bytes(seed)
    path = folder / NAMES.get(kind, "v")
    format = None if kind in PACKED else kind
    warnings.simplefilter("ignore")

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(embax.files.FormatError):
            contents = embax.files.load(path, format=format)
            if len(contents.vocabulary) != len(contents.weight):
                raise AssertionError("a token a row")
            contents.vocabulary.tokens()

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
