import contextlib
import os

import pytest

from embax import files


def test_replacing_puts_the_new_file_in_the_place_of_the_old(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path, error):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with contextlib.suppress(error), files.replacing(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_replacing_names_the_destination_in_an_error_of_writing(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, files.replacing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_replacing_follows_a_symbolic_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with files.replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_replacing_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replacing(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_replacing_takes_the_longest_name_that_the_file_system_has(tmp_path):
    path = tmp_path / ("n" * 255)
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("missing/out", FileNotFoundError, "No such directory: '.*missing'"),
        ("", IsADirectoryError, "Is a directory"),
        ("new/", IsADirectoryError, "Is a directory"),
        ("file/out", OSError, "Not a directory: '.*file/out'"),
    ],
)
@pytest.mark.parametrize("call", [files.check_writable, lambda path: files.replacing(path).__enter__()])
def test_replacing_and_check_writable_refuse_bad_paths(tmp_path, call, name, error, match):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(error, match=match):
        call(os.path.join(tmp_path, name))
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_check_writable_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out"
    files.check_writable(path)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    files.check_writable(path)
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_refuses_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="out'"):
        files.check_writable(tmp_path / "out")
