import gzip
import io
import lzma
import sys

import pytest
import traced
from damage import damages, seeds, told

from embax import files

TEXT = "Zwölf Boxkämpfer jagen Viktor\nquer über den Sylter Deich. 東京 🜁\r\n" * 50_000
PACKERS = {"txt": bytes, "gz": gzip.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("text", ["", "x", "one word", TEXT], ids=["empty", "one", "short", "long"])
def test_read_text_gives_the_text_of_every_kind_of_file(tmp_path, packer, text):
    path = tmp_path / "corpus"  # the name says nothing of the kind
    path.write_bytes(PACKERS[packer](text.encode()))
    assert "".join(files.read_text(path)) == text


@pytest.mark.parametrize("packer", PACKERS)
def test_read_text_reads_standard_input(monkeypatch, packer):
    packed = PACKERS[packer](TEXT.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed), encoding="ascii"))
    assert "".join(files.read_text("-")) == TEXT


def test_read_text_joins_the_members_of_a_gzip_file(tmp_path):
    path = tmp_path / "corpus.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert "".join(files.read_text(path)) == "one two"


@pytest.mark.parametrize(
    ("data", "byte"),
    [
        (b"abc\xff", "3"),
        (b"\xff\xfea\x00", "0"),
        (b"x" * ((1 << 20) + 5) + b"\x80", "1,048,581"),
        (b"x" * ((1 << 20) - 1) + "ä".encode()[:1] + b"y", "1,048,575"),  # half a character at the end of a piece
        (b"end" + "東".encode()[:2], "3"),
    ],
)
@pytest.mark.parametrize("packer", PACKERS)
def test_read_text_names_the_byte_that_is_not_utf8(tmp_path, data, byte, packer):
    path = tmp_path / "bad"
    path.write_bytes(PACKERS[packer](data))
    with pytest.raises(files.FormatError, match=rf"bad: byte {byte} of the text is not UTF-8"):
        list(files.read_text(path))


@pytest.mark.parametrize("packer", ["gz", "xz"])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_read_text_refuses_damaged_compressed_files(tmp_path, packer, damage):
    data = bytearray(PACKERS[packer](TEXT.encode()))
    if damage == "truncated":
        del data[-20:]
    else:
        data[len(data) // 2] ^= 0xFF
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(files.FormatError, match=r"bad: (the compressed data|byte [\d,]+ of the text)"):
        list(files.read_text(path))


@pytest.mark.parametrize("packer", ["gz", "xz"])
@seeds
def test_read_text_of_any_damage_gives_text_or_a_format_error(tmp_path, packer, seed):
    path = tmp_path / f"damaged.{packer}"
    for name, data in damages(PACKERS[packer](TEXT[:200].encode()), 100, seed):
        path.write_bytes(data)
        with told(name):
            try:
                assert all(isinstance(piece, str) for piece in files.read_text(path))
            except files.FormatError as error:
                assert str(path) in str(error)  # noqa: PT017


def test_read_text_holds_a_small_part_of_a_large_file(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"a" * 50_000_000, 1))
    peak, length = traced.traced(
        """
        from embax import files

        lengths = []
        found = [peak(lambda: lengths.append(sum(map(len, files.read_text(sys.argv[1]))))), *lengths]
        """,
        path,
    )
    assert length == 50_000_000
    assert peak < 20_000_000


def test_read_text_of_a_missing_file_and_of_a_directory_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        list(files.read_text(tmp_path / "missing"))
    with pytest.raises(IsADirectoryError):
        list(files.read_text(tmp_path))
