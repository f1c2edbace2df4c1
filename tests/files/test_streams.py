"""Streams: pipes, descriptors and devices, read and written where they stand."""

import contextlib
import gzip
import io
import os
import subprocess
import sys
import tempfile
import threading
import zipfile

import numpy as np
import pytest

import embax
from embax import Vectors, files
from embax.files._io.streams import is_stream

TEXT = b"2 3\nking 1 0 0.5\nqueen 0 1 -2\n"
WRITTEN = [name for name in files.FORMATS if name not in ("tensor", "npy")]
CONTENTS = files.Contents(embax.Vocabulary(["king", "größe"]), np.float32([[1, 0, 0.5], [0, 1, -2]]), np.array([3, 2]))


def fed(data, to):
    """Write bytes to a descriptor or a named pipe from a thread, as another program would."""

    def feed():
        with contextlib.suppress(BrokenPipeError), open(to, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    return thread


def from_pipe(data, **options):
    read, write = os.pipe()
    thread = fed(data, write)
    try:
        return files.load_identified(f"/dev/fd/{read}", **options)
    finally:
        os.close(read)
        thread.join()


def through_pipe(path_of, save):
    """What `save` writes to a path that leads to a pipe."""
    read, write = os.pipe()
    got = []
    with open(read, "rb") as file:
        thread = threading.Thread(target=lambda: got.append(file.read()))
        thread.start()
        try:
            save(path_of(write))
        finally:
            os.close(write)
            thread.join()
    return got[0]


def plainly(path, format):
    files.save(path, CONTENTS, format=format)
    return path.read_bytes()


@pytest.mark.parametrize("format", WRITTEN)
def test_every_writer_gives_a_pipe_the_bytes_of_a_file(tmp_path, format):
    link = tmp_path / "link"

    def path_of(fd):
        os.symlink(f"/proc/self/fd/{fd}", link)
        return link

    expected = plainly(tmp_path / "file", format)
    assert through_pipe(lambda fd: f"/dev/fd/{fd}", lambda path: files.save(path, CONTENTS, format=format)) == expected
    assert through_pipe(path_of, lambda path: files.save(path, CONTENTS, format=format)) == expected
    os.mkfifo(tmp_path / "fifo")
    got = []
    thread = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    thread.start()
    files.check_writable(tmp_path / "fifo")  # which does not open it
    files.save(tmp_path / "fifo", CONTENTS, format=format)
    thread.join()
    assert got == [expected]
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "link"]


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_format_is_read_out_of_a_pipe(tmp_path, format, compressed):
    data = plainly(tmp_path / "file", format)
    data = gzip.compress(data) if compressed else data
    identity, contents = from_pipe(data)
    assert contents.vocabulary.tokens() == ["king", "größe"]
    np.testing.assert_array_equal(contents.weight, CONTENTS.weight)
    assert (identity.format, identity.size) == (format, len(data))
    assert identity.compression == ("gzip" if compressed else None)


def test_appended_file_keeps_the_output_of_other_programs(tmp_path):
    path = tmp_path / "out"
    with open(path, "wb", buffering=0) as file:
        file.write(b"before\n")
        files.save(f"/dev/fd/{file.fileno()}", CONTENTS, format="word2vec")
        file.write(b"after\n")
    with open(path, "ab", buffering=0) as file:
        files.save(f"/proc/self/fd/{file.fileno()}", CONTENTS, format="fasttext")
        file.write(b"end\n")
    text = plainly(tmp_path / "text", "word2vec")
    model = plainly(tmp_path / "model", "fasttext")
    assert path.read_bytes() == b"before\n" + text + b"after\n" + model + b"end\n"


def test_file_descriptor_is_read_from_its_position(tmp_path):
    (tmp_path / "in").write_bytes(b"a line of another program\n" + TEXT)
    with open(tmp_path / "in", "rb", buffering=0) as file:
        file.seek(26)
        assert len(files.load(f"/dev/fd/{file.fileno()}").weight) == 2


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_is_read(monkeypatch, name):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT)))
    if name == "-":
        assert Vectors.load(name).vocabulary.tokens() == ["king", "queen"]
        assert Vectors(["a"], [[1.0]])._path is None
    assert is_stream(name)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(files.FormatError, match="standard input: it is closed"):
        files.load("-")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a"))
    with pytest.raises(files.FormatError, match="standard input: it gives no bytes"):
        files.load("-")


def test_a_member_of_an_archive_is_read_out_of_standard_input(monkeypatch):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", TEXT)
        archive.writestr("b.txt", TEXT.replace(b"king", b"duke"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(out.getvalue())))
    assert files.load("-:b.txt").vocabulary.tokens() == ["duke", "queen"]


def test_standard_output_follows_earlier_output_of_the_program(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    print("before")
    files.save("-", CONTENTS, format="glove")
    print("after")
    sys.stdout.flush()
    lines = raw.getvalue().decode().splitlines()
    assert (lines[0], lines[1].split()[0], lines[-1]) == ("before", "king", "after")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(OSError, match="takes text only"):
        files.check_writable("-")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OSError, match="is closed"):
        files.save("-", CONTENTS, format="glove")


@pytest.mark.parametrize("format", WRITTEN)
def test_a_pipe_that_nobody_reads_is_a_broken_pipe(format):
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(BrokenPipeError) as caught:
            files.save(f"/dev/fd/{write}", CONTENTS, format=format)
    finally:
        os.close(write)
    assert caught.value.filename == f"/dev/fd/{write}"


def test_devices_are_written_to_and_stay(tmp_path):
    files.save("/dev/null", CONTENTS, format="parquet")
    os.symlink("/dev/null", tmp_path / "v.txt")
    files.save(tmp_path / "v.txt", CONTENTS)  # its suffix tells the format
    assert not os.path.isfile("/dev/null")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        files.save("/dev/full", CONTENTS, format="word2vec")


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "/dev/null", "/dev/fd/1"])
def test_a_stream_needs_the_name_of_a_format(path):
    with pytest.raises(
        ValueError, match=r"format=\.\.\.\)` must name a format for a stream.*got None for '.*safetensors"
    ):
        files.save(path, CONTENTS)
    with pytest.raises(ValueError, match="must have a folder for the format 'npy'"):
        files.save(path, CONTENTS, format="npy")


def test_npy_is_written_to_a_named_pipe_with_the_tokens_beside_it(tmp_path):
    path = tmp_path / "v.npy"
    os.mkfifo(path)
    got = []
    thread = threading.Thread(target=lambda: got.append(path.read_bytes()))
    thread.start()
    files.save(path, CONTENTS)
    thread.join()
    np.testing.assert_array_equal(np.load(io.BytesIO(got[0])), CONTENTS.weight)
    thread = fed(got[0], path)  # which waits for a reader
    assert files.load(path).vocabulary.tokens() == ["king", "größe"]
    thread.join()


def test_error_names_a_descriptor_that_cannot_be_written_to(tmp_path):
    (tmp_path / "v").write_bytes(TEXT)
    with open(tmp_path / "v", "rb") as file:
        path = f"/dev/fd/{file.fileno()}"
        with pytest.raises(OSError, match=f"open for reading only: '{path}'"):
            files.check_writable(path)
        with pytest.raises(OSError, match=f"Bad file descriptor: '{path}'"):
            files.save(path, CONTENTS, format="glove")
    with pytest.raises(OSError, match="Bad file descriptor: '/dev/fd/1000000'"):
        files.save("/dev/fd/1000000", CONTENTS, format="glove")
    assert (tmp_path / "v").read_bytes() == TEXT


def test_sockets_and_files_of_another_process_are_refused(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)  # as its path must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s")
        for call in (files.check_writable, lambda path: files.save(path, CONTENTS, format="glove")):
            with pytest.raises(OSError, match="no pipe and no device"):
                call("s")
    with open("out", "wb") as file:
        other = subprocess.Popen(["sleep", "60"], stdout=file)
        path = f"/proc/{other.pid}/fd/1"
        try:
            for call in (files.check_writable, lambda path: files.save(path, CONTENTS, format="glove")):
                with pytest.raises(OSError, match=f"no pipe and no device that can be written to as it is: '{path}'"):
                    call(path)
        finally:
            other.kill()
            other.wait()
    assert os.path.getsize("out") == 0


def test_copies_of_streams_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = plainly(tmp_path / "file", "parquet")
    os.unlink(tmp_path / "file")
    from_pipe(data)
    with pytest.raises(files.FormatError):
        from_pipe(data[:-9])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "data", [b"", TEXT[:-1][:12], b"\x1f\x8bdamaged", b"PAR1", b"ARROW1\0\0", b"\x93NUMPY", b"PK\x03\x04", bytes(600)]
)
def test_damaged_streams_are_format_errors(data):
    with pytest.raises(files.FormatError, match=r"/dev/fd/\d+: "):
        from_pipe(data)


def test_a_stream_cannot_be_mapped_and_has_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # which is not the stream's
    (tmp_path / "tokens.txt").write_text("a\nb\n")
    with pytest.raises(files.FormatError, match="cannot be mapped into memory, as it is a stream"):
        from_pipe(plainly(tmp_path / "file", "safetensors"), mmap=True)
    table = io.BytesIO()
    np.save(table, np.eye(2, dtype=np.float32))
    with pytest.raises(files.FormatError, match=r"has no vocabulary beside it\. Name the file of the tokens, as /dev"):
        from_pipe(table.getvalue())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table.getvalue())))
    assert files.load("-:tokens.txt").vocabulary.tokens() == ["a", "b"]


def test_stream_does_not_allocate_by_its_header():
    header = b'{"weight":{"dtype":"F32","shape":[1000000000,100],"data_offsets":[0,400000000000]}}'
    with pytest.raises(files.FormatError):
        from_pipe(len(header).to_bytes(8, "little") + header, format="safetensors")
    with pytest.raises(files.FormatError, match="ends"):
        from_pipe(b"1000000000000 1000000\na \x01\x02\x03\x04", format="word2vec-binary")


def test_standard_output_is_known_by_all_its_names(tmp_path):
    os.symlink("/dev/stdout", tmp_path / "link")
    for path in ("-", "/dev/stdout", "/dev/fd/1", tmp_path / "link"):
        assert files.is_standard_output(path)
        assert files.is_stream(path)
    for path in ("/dev/zero", "/dev/fd/0", tmp_path, tmp_path / "missing", "a\0b"):
        assert not files.is_standard_output(path)
    assert not any(map(files.is_stream, (tmp_path, tmp_path / "missing", "a\0b", "")))


def test_a_corpus_is_read_out_of_a_pipe():
    read, write = os.pipe()
    thread = fed(gzip.compress(b"In the beginning"), write)
    assert "".join(files.read_text(f"/dev/fd/{read}")) == "In the beginning"
    os.close(read)
    thread.join()
