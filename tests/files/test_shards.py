"""Files of the Hugging Face world: shards, model2vec's tables, Arrow streams; and numbers of the other byte order."""

import json

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from damage import damages, seeds, told
from safetensors.numpy import save

import embax
from embax import Vectors, files
from embax.files import UnnamedRowsWarning

TABLE = np.arange(6, dtype=np.float32).reshape(2, 3)
TOKENS = ["king", "queen"]


def sharded(folder, shards=None, tokens=TOKENS, **index):
    """Write a model in shards, and return the path of its index."""
    if shards is None:
        shards = {"model-00001-of-00002.safetensors": {"embed.weight": TABLE, "small": TABLE[:1]}}
        shards["model-00002-of-00002.safetensors"] = {"lm_head.weight": TABLE + 6, "bias": TABLE[0]}
    for name, tensors in shards.items():
        (folder / name).write_bytes(save({key: np.ascontiguousarray(one) for key, one in tensors.items()}))
    names = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    found = {"metadata": {"total_size": 1}, "weight_map": names} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {t: row for row, t in enumerate(tokens)}}}))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_tensor_in_shards_is_read_by_the_index_or_the_folder(tmp_path, by_folder):
    index = sharded(tmp_path)
    path = tmp_path if by_folder else index
    identity, contents = files.load_identified(f"{path}:lm_head.weight", dtype=np.float16)
    assert (identity.format, contents.vocabulary.tokens()) == ("tensor", TOKENS)
    np.testing.assert_array_equal(contents.weight, np.float16(TABLE + 6))
    np.testing.assert_array_equal(files.load(f"{path}:embed.weight", mmap=True).weight, TABLE)
    match = r"2 of its tensors have a row for each of 2 .*index\.json:NAME\. It has 'embed\.weight' \(2, 3\), 'lm_head"
    with pytest.raises(files.FormatError, match=match):
        files.load(path)
    with pytest.raises(files.FormatError, match=r"there is no such tensor\. It has 'embed\.weight', 'small'"):
        files.load(f"{path}:embed")


def test_the_only_fitting_tensor_in_shards_needs_no_name(tmp_path):
    index = sharded(tmp_path, {"a.safetensors": {"x": TABLE[:1]}, "b.safetensors": {"y": TABLE, "ids": TABLE[0]}})
    np.testing.assert_array_equal(Vectors.load(index).weight, TABLE)


def test_a_missing_shard_is_named(tmp_path):
    index = sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    for path in (index, tmp_path, f"{tmp_path}:lm_head.weight"):
        with pytest.raises(
            files.FormatError, match=r"names the shard 'model-00002-of-00002\.safetensors', which is not"
        ):
            files.load(path)
    assert len(files.load(f"{index}:embed.weight").weight) == 2  # which needs the other one only
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
    )
    with pytest.raises(files.FormatError, match=r"model-00002-of-00002\.safetensors.*: is a Git LFS pointer"):
        files.load(index)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(save({"bias": TABLE[0].copy()}))
    with pytest.raises(files.FormatError, match=r"00002\.safetensors: has no tensor 'lm_head\.weight', which .*index"):
        files.load(index)


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ([], "is no index of shards"),
        ({"t": 3}, "is no index of shards"),
        ({"t": "../a.safetensors"}, r"must name files in its own folder, got '\.\./a\.safetensors' for tensor 't'"),
        ({"t": "/etc/passwd"}, "must name files in its own folder"),
        ({"t": "a/../../b"}, "must name files in its own folder"),
        ({"t": "a\0b"}, "must name files in its own folder"),
        ({}, "0 of its tensors"),
    ],
)
def test_read_refuses_files_that_are_no_index(tmp_path, weight_map, match):
    index = sharded(tmp_path, {}, weight_map=weight_map)
    with pytest.raises(files.FormatError, match=match):
        files.load(index)


@seeds
def test_any_damage_of_an_index_gives_rows_or_a_format_error(tmp_path, seed):
    index = sharded(tmp_path, {"a.safetensors": {"y": TABLE}})
    for name, data in damages(index.read_bytes(), 40, seed):
        index.write_bytes(data)
        with told(name):
            try:
                assert len(files.load(index).weight) == 2
            except files.FormatError:
                pass


def model2vec(folder, tokens=4, **tensors):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(save({name: np.ascontiguousarray(one) for name, one in tensors.items()}))
    vocabulary = {f"t{row}": row for row in range(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocabulary}}))
    (folder / "config.json").write_text("{}")
    return folder


SMALL = np.array([[-127, 5, 0], [127, -1, 2], [3, 3, 3]], np.int8)
MAPPING = np.array([2, 0, 1, 0])
WEIGHTS = np.array([0.5, 2.0, 1.5, 0.25])


@pytest.mark.parametrize("dtype", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("mapping", [None, np.int32, np.int64])
@pytest.mark.parametrize("weights", [None, np.float32, np.float64])
def test_tables_of_model2vec_give_the_vectors_of_its_tokens(tmp_path, dtype, mapping, weights):
    table = (SMALL if mapping else np.concatenate([SMALL, SMALL[:1]])).astype(dtype)
    tensors, expected = {"embeddings": table}, table.astype(np.float64)
    if mapping:
        tensors["mapping"], expected = MAPPING.astype(mapping), expected[MAPPING]
    if weights:
        tensors["weights"] = WEIGHTS.astype(weights)
        expected = expected * WEIGHTS[:, None]
    folder = model2vec(tmp_path / "m", **tensors)
    vectors = Vectors.load(folder)
    np.testing.assert_array_equal(vectors.weight, expected)  # all of these are exact in float32
    assert vectors.vocabulary.tokens() == ["t0", "t1", "t2", "t3"]
    kept = dtype != np.int8 and not weights
    assert vectors.weight.dtype == (dtype if kept or dtype == np.float64 else np.float32)
    np.testing.assert_array_equal(Vectors.load(f"{folder}:embeddings", limit=2, dtype=np.float16).weight, expected[:2])


def test_tables_of_model2vec_leave_out_rows_without_a_token(tmp_path):
    folder = model2vec(tmp_path / "m", tokens=3, embeddings=SMALL, mapping=MAPPING, weights=WEIGHTS[:, None])
    with pytest.warns(UnnamedRowsWarning, match="1 of 4 rows"):
        np.testing.assert_array_equal(files.load(folder).weight, SMALL[MAPPING[:3]] * WEIGHTS[:3, None])


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"mapping": MAPPING + 1}, r"`mapping` must be rows in \[0, 3\), got 1 to 3"),
        ({"mapping": MAPPING - 1}, r"`mapping` must be rows in \[0, 3\), got -1 to 1"),
        ({"mapping": MAPPING[:3]}, "has 3 rows, fewer than the 4"),
        ({"mapping": MAPPING.astype(np.float32)}, "`mapping` must be I32, I64"),
        (
            {"mapping": MAPPING, "weights": WEIGHTS[:3]},
            r"`weights` must be F16.* one for each of 4 tokens, got F64 \(3,\)",
        ),
        ({"mapping": MAPPING, "weights": MAPPING}, r"`weights` must be F16.* got I64 \(4,\)"),
        ({"mapping": MAPPING[:, None]}, "has 3 rows, fewer than the 4"),
    ],
)
def test_tables_of_model2vec_that_do_not_fit_are_format_errors(tmp_path, tensors, match):
    with pytest.raises(files.FormatError, match=match):
        files.load(model2vec(tmp_path / "m", embeddings=SMALL, **tensors))


def test_model2vec_tables_cannot_be_mapped_and_integers_are_refused(tmp_path):
    with pytest.raises(files.FormatError, match="cannot be mapped into memory, as its rows are computed"):
        files.load(model2vec(tmp_path / "m", embeddings=SMALL, mapping=MAPPING), mmap=True)
    with pytest.raises(files.FormatError, match=r"is I8 \(4, 3\), which is no table"):
        files.load(f"{model2vec(tmp_path / 'm', other=SMALL[MAPPING])}:other")


def arrow_stream(**options):
    weight = pa.FixedSizeListArray.from_arrays(pa.array(TABLE.reshape(-1)), 3)
    batch = pa.record_batch([pa.array(TOKENS), weight, pa.array(["x", "y"])], ["token", "vector", "other"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch.slice(0, 0))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_an_arrow_stream_is_read(tmp_path, options):
    path = tmp_path / "data-00000-of-00001.arrow"
    path.write_bytes(arrow_stream(**options))
    identity, contents = files.load_identified(path)
    assert (identity.format, contents.vocabulary.tokens()) == ("arrow", TOKENS)
    np.testing.assert_array_equal(contents.weight, TABLE)


def test_an_arrow_stream_of_the_oldest_form_is_read_by_its_name(tmp_path):
    (tmp_path / "v").write_bytes(arrow_stream(use_legacy_format=True))
    np.testing.assert_array_equal(files.load(tmp_path / "v", format="arrow").weight, TABLE)


@seeds
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning")
def test_any_damage_of_an_arrow_stream_gives_rows_or_a_format_error(tmp_path, seed):
    for name, data in damages(arrow_stream(), 100, seed):
        (tmp_path / "v").write_bytes(data)
        with told(name):
            try:
                files.load(tmp_path / "v")
            except files.FormatError:
                pass


@pytest.mark.parametrize("format", [name for name in files.FORMATS if name != "tensor"])
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_numbers_of_the_other_byte_order_are_written_right(tmp_path, format, dtype):
    weight = TABLE.astype(dtype)
    assert Vectors(TOKENS, weight).weight.dtype.isnative
    contents = files.Contents(embax.Vocabulary(TOKENS), weight, np.array([2, 1], ">i8"))
    suffix = ".npy" if format == "npy" else ""
    for number, save_it in enumerate(
        [files.save, lambda path, made, format: Vectors(TOKENS, made.weight).save(path, format)]
    ):
        path = tmp_path / f"{number}{suffix}"
        save_it(path, contents, format=format)
        found = files.load(path)
        np.testing.assert_array_equal(found.weight, TABLE)
        assert found.weight.dtype.isnative
        if found.counts is not None and number == 0:
            assert found.counts.tolist() == [2, 1]
