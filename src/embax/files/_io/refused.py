"""Files that are never read, with advice: pickles, torch files, HDF5, and Git LFS pointers."""

import os
import re
import shlex
import struct
import zipfile

from .error import FormatError

# Enough bytes to recognise gensim's pickles.
_START = 1 << 16
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
# torch's older files begin with this number, pickled.
_TORCH = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
# The third byte of a pickle: the opcode of a frame or of a value. A safetensors header of 640 bytes also begins with
# the first two bytes of a pickle, but then a zero follows.
_OPCODES = b"\x95(])}cNKMJGXUT\x8a\x8b\x8c\x8d\x8e\x88\x89\x80Ij.BC"

# A repository holds such a pointer in place of a large file that has not been fetched. "hawser" is Git LFS's old name.
_POINTER = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/v[0-9]+\r?\n")
_SIZE = re.compile(rb"^size ([0-9]{1,18})\r?$", re.MULTILINE)

_CONVERSIONS = {
    "pickle of gensim's": (
        "  from gensim.models import KeyedVectors\n"
        '  KeyedVectors.load({path!r}).save_word2vec_format("vectors.bin", binary=True)\n'
        "(of a whole model, that of its `.wv`)"
    ),
    "torch file, and so a Python pickle": (
        "  import safetensors.torch, torch\n"
        '  safetensors.torch.save_file(torch.load({path!r}, weights_only=True), "model.safetensors")'
    ),
    "Python pickle": (
        "  import numpy, pickle\n"
        '  numpy.save("vectors.npy", pickle.load(open({path!r}, "rb")))  # and the tokens, one a line, as vectors.txt'
    ),
}


def explain(path: str | os.PathLike[str], start: bytes | None = None, plain: str | None = None) -> FormatError | None:
    """Return the error for a file that is never read, with advice how to convert it; None for any other file.

    Call it before a zip archive is opened, because torch's files are zip archives, and again with the first
    uncompressed bytes of a compressed file.

    Args:
      path: The file, for messages.
      start: The first bytes, uncompressed. Default: they are read from the file.
      plain: The path from which the file is read, if it is not `path`.

    Returns:
      The error to raise, or None. Also None if there is no such file.
    """
    path = os.fspath(path)
    if start is None:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            start = file.read(_START)
    if (error := explain_pointer(path, start)) is not None:
        return error
    if start.startswith(_HDF5):
        return FormatError(
            path,
            "is an HDF5 file, which is not read here. Convert the table in it:\n"
            "  import h5py, numpy\n"
            f'  numpy.save("vectors.npy", h5py.File({path!r})["NAME"][:])  # and the tokens as vectors.txt',
        )
    kind = _kind_of_pickle(path if plain is None else plain, start)
    if kind is None:
        return None
    return FormatError(
        path,
        f"is a {kind}, which can run any program when it is read; it is never read here. Convert it where you trust "
        f"it:\n{_CONVERSIONS[kind].format(path=path)}",
    )


def explain_pointer(path: str, start: bytes) -> FormatError | None:
    """Return the error for a Git LFS pointer, with advice how to fetch the file; None for any other file.

    Args:
      path: The file, for messages.
      start: The first bytes of the file.
    """
    if not _POINTER.match(start):
        return None
    size = _SIZE.search(start)
    of = "" if size is None else f" of {int(size[1]):,} bytes"
    return FormatError(
        path,
        f"is a Git LFS pointer: the file{of} that it stands for has not been fetched. In its repository, run:\n"
        "  git lfs install\n"
        f"  git lfs pull --include={shlex.quote(os.path.basename(path))}\n"
        "or download the file itself, from Hugging Face by:\n"
        f"  hf download OWNER/REPOSITORY {shlex.quote(os.path.basename(path))}",
    )


def _kind_of_pickle(path: str, start: bytes) -> str | None:
    if start.startswith(_ZIP):
        return "torch file, and so a Python pickle" if _has_pickle(path) else None
    if len(start) < 3 or start[0] != 0x80 or not 2 <= start[1] <= 5:
        return None
    if start[2] not in _OPCODES:
        return None
    if start[2:].startswith(_TORCH):
        return "torch file, and so a Python pickle"
    return "pickle of gensim's" if b"gensim" in start else "Python pickle"


def _has_pickle(path: str) -> bool:
    """Return whether a zip archive was written by torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, OverflowError, struct.error):
        return False  # opening it as an archive will raise the right error
