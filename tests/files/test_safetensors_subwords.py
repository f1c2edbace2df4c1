import gzip
import json

import numpy as np
import pytest
import real
import safetensors
from damage import damages, seeds, told
from fasttext_models import model, quantized
from safetensors.numpy import save_file

import embax
from embax import files
from embax.files._formats.fasttext.occurring import OccurringRows, occurring, rows_of
from embax.files._formats.fasttext.subwords import Ngrams, Subwords, means_of

RNG = np.random.default_rng(0)
UNKNOWN = ["kingdoms", "не знаю", "", "a", "ab", "日本語", "🙂🙂", "Größenwahn"]


@pytest.fixture
def saved(tmp_path):
    def save(contents):
        files.write_safetensors(tmp_path / "v", contents)
        return tmp_path / "v"

    return save


@pytest.fixture
def of_fasttext(tmp_path):
    def read(data):
        (tmp_path / "model.bin").write_bytes(data)
        return files.load(tmp_path / "model.bin")

    return read


def contents(dtype=np.float32, tokens=("cat", "größe", "</s>"), buckets=50, used=(3, 4, 17, 49), **options):
    rows = np.zeros((len(tokens) + buckets, 4), np.float32)
    rows[: len(tokens)] = RNG.standard_normal((len(tokens), 4))
    rows[len(tokens) + np.asarray(used, int)] = RNG.standard_normal((len(used), 4))
    subwords = Subwords(
        Ngrams(rows, len(tokens), 2, 4, buckets), embax.Vocabulary(list(tokens)), np.arange(len(tokens)), **options
    )
    weight = np.concatenate([np.zeros((0, 4)), *(mean for *_, mean in _means(subwords))])
    return files.Contents(subwords.vocabulary, weight.astype(dtype), np.arange(len(tokens)), subwords)


def _means(subwords):
    return means_of(subwords.ngrams, subwords.encoded(subwords.vocabulary), subwords.own)


def own_rows(contents):
    found = contents.subwords.own_rows(contents.vocabulary, contents.weight)
    return np.concatenate([np.zeros((0, contents.weight.shape[1])), *found])


def assert_same(found, expected):
    assert found.vocabulary.tokens() == expected.vocabulary.tokens()
    np.testing.assert_array_equal(found.weight, expected.weight)
    np.testing.assert_array_equal(found.subwords.vectors(UNKNOWN), expected.subwords.vectors(UNKNOWN))
    np.testing.assert_array_equal(found.subwords.covers(UNKNOWN), expected.subwords.covers(UNKNOWN))
    np.testing.assert_array_equal(*map(own_rows, (found, expected)))
    assert found.subwords.arguments == expected.subwords.arguments
    assert found.subwords.encoding == expected.subwords.encoding


def test_rows_of_buckets_that_do_not_occur_are_zeros():
    rows = OccurringRows(np.arange(1, 5, dtype=np.float32)[:, None], np.asarray([5, 9]), 12)
    assert rows.shape == (14, 1)
    assert rows.take(np.arange(14), axis=0).ravel().tolist() == [1, 2, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0]


def test_occurring_buckets_have_rows_other_than_zeros():
    ngrams = contents().subwords.ngrams
    assert occurring(ngrams).tolist() == [3, 4, 17, 49]
    (rows,) = rows_of(ngrams, occurring(ngrams))
    np.testing.assert_array_equal(rows, ngrams.rows[3 + np.asarray([3, 4, 17, 49])])


@pytest.mark.parametrize("used", [(), (0, 49), range(50)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("mmap", [None, False])
def test_read_returns_written_subwords(saved, used, dtype, mmap):
    expected = contents(dtype, used=used)
    found = files.load(saved(expected), mmap=mmap)
    assert_same(found, expected)
    assert found.subwords.ngrams.rows.shape == (53, 4)


@pytest.mark.parametrize("tokens", [(), ("",), ("a", "b" * 99)])
@pytest.mark.parametrize("used", [(), (3, 4)])
def test_read_returns_any_tokens(saved, tmp_path, tokens, used):
    expected = contents(tokens=tokens, used=used)
    found = files.load(saved(expected))
    assert_same(found, expected)
    files.save(tmp_path / "v.bin", found, format="fasttext")
    assert_same(files.load(tmp_path / "v.bin")._replace(subwords=found.subwords), expected)


def test_other_programs_read_the_tensors(saved):
    with safetensors.safe_open(saved(contents()), "numpy") as file:
        assert file.get_tensor("subword_buckets").tolist() == [3, 4, 17, 49]
        assert file.get_tensor("subword_rows").shape == (7, 4)
        assert json.loads(file.metadata()["subwords"]) == {
            "minimum": 2, "maximum": 4, "buckets": 50, "pruned": False, "encoding": "utf-8", "arguments": None,
        }  # fmt: skip


@pytest.mark.parametrize("name", ["lee_fasttext", "crime-and-punishment", "cp852_fasttext"])
def test_models_keep_everything(saved, tmp_path, name):
    encoding = {"cp852_fasttext": "cp852"}.get(name, "utf-8")
    expected = files.load(real.GENSIM / f"{name}.bin", encoding=encoding)
    found = files.load(saved(expected))
    assert_same(found, expected)
    for path, of_model in (("a.bin", expected), ("b.bin", found)):
        files.save(tmp_path / path, of_model, format="fasttext")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.filterwarnings("ignore::embax.files.UndecodedTokensWarning")
def test_tokens_that_are_not_utf8_keep_their_ngrams(saved, of_fasttext):
    expected = of_fasttext(model(["the", b"caf\xe9s"]))
    found = files.load(saved(expected))
    assert found.vocabulary.tokens() == ["the", r"caf\xe9s"]
    np.testing.assert_array_equal(*map(own_rows, (found, expected)))


def test_quantised_and_pruned_models_keep_their_subwords(saved, of_fasttext):
    matrix, _ = quantized(3 + 3, 4, 2)
    expected = of_fasttext(model(pruned=[(1, 0), (5, 2), (6, 1)], matrix=matrix, flags=(1, 0)))
    assert expected.subwords.ngrams.kept is not None
    assert_same(files.load(saved(expected)), expected)


def test_limit_and_compression(saved, tmp_path):
    expected = contents()
    path = tmp_path / "v.gz"
    path.write_bytes(gzip.compress(saved(expected).read_bytes()))
    found = files.load(path, limit=2)
    assert found.vocabulary.tokens() == ["cat", "größe"]
    np.testing.assert_array_equal(found.subwords.vectors(UNKNOWN), expected.subwords.vectors(UNKNOWN))
    np.testing.assert_array_equal(own_rows(found), expected.subwords.ngrams.rows[:2])


def test_changed_vectors_are_kept(saved):
    expected = contents()
    changed = expected._replace(weight=expected.weight * 2)
    found = files.load(saved(changed))
    np.testing.assert_array_equal(found.weight, changed.weight)
    again = np.concatenate([mean for *_, mean in _means(found.subwords)])
    np.testing.assert_allclose(again, changed.weight, rtol=1e-5, atol=1e-6)  # float32


def test_write_refuses_subwords_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="must have sub-words of the size of the vectors, 3, got 4"):
        files.write_safetensors(tmp_path / "v", contents()._replace(weight=np.zeros((3, 3), np.float32)))


@pytest.mark.parametrize(
    ("changes", "said", "match"),
    [
        ({"subword_rows": None}, {}, "tensor `subword_rows` is missing"),
        ({"subword_buckets": None}, {}, "tensor `subword_buckets` is missing"),
        ({"subword_rows": np.zeros((6, 4), np.float32)}, {}, r"`subword_rows` must be F32 \(7, 4\), got F32 \(6, 4\)"),
        ({"subword_rows": np.zeros((7, 4), np.float64)}, {}, "got F64"),
        ({"subword_buckets": np.asarray([3, 17, 4, 49])}, {}, "`subword_buckets` must rise, below 50"),
        ({"subword_buckets": np.asarray([3, 4, 17, 50])}, {}, "`subword_buckets` must rise, below 50"),
        ({"subword_buckets": np.asarray([-1, 4, 17, 49])}, {}, "`subword_buckets` must rise, below 50"),
        ({"subword_buckets": np.zeros(4, np.int32)}, {}, "`subword_buckets` must be I64"),
        ({"subword_token_offsets": np.asarray([0, 1])}, {}, "must rise 3 times from 0 to the 0 bytes"),
        ({}, {"minimum": "2"}, "`subwords` must describe n-grams"),
        ({}, {"maximum": 65}, "`subwords` must describe n-grams"),
        ({}, {"maximum": 1}, "`subwords` must describe n-grams"),
        ({}, {"buckets": 0}, "`subwords` must describe n-grams"),
        ({}, {"pruned": None}, "`subwords` must describe n-grams"),
        ({}, {"encoding": "no-such"}, "`subwords` must describe n-grams"),
        ({}, {"encoding": "zip"}, "`subwords` must describe n-grams"),
        ({}, {"encoding": 1}, "`subwords` must describe n-grams"),
        ({}, {"arguments": ["a"] * 13}, "`subwords` must describe n-grams"),
        ({}, {"arguments": [1] * 14}, "`subwords` must describe n-grams"),
        ({}, {"arguments": [2**31] * 13}, "`subwords` must describe n-grams"),
        ({}, {"arguments": 1}, "`subwords` must describe n-grams"),
    ],
)
def test_read_refuses_subwords_that_contradict_themselves(saved, changes, said, match):
    path = saved(contents())
    with safetensors.safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()} | changes
        metadata = file.metadata()
    metadata["subwords"] = json.dumps(json.loads(metadata["subwords"]) | said)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    with pytest.raises(files.FormatError, match=match):
        files.load(path)


def test_read_refuses_a_description_that_is_no_object(saved):
    path = saved(contents())
    path.write_bytes(path.read_bytes().replace(b'"subwords":"{', b'"subwords":"['))
    with pytest.raises(files.FormatError, match="`subwords` must describe n-grams"):
        files.load(path)


@seeds
@pytest.mark.filterwarnings("ignore::embax.files.DuplicateTokensWarning")
def test_read_of_any_damage_gives_contents_or_a_format_error(saved, seed):
    path = saved(contents(dtype=np.float16))
    whole = path.read_bytes()
    for name, data in damages(whole, 200, seed, head=1200, pieces=[b'"', b"{", b"0", b"9", b"null", b"true"]):
        with told(name):
            path.write_bytes(data)
            try:
                found = files.load(path)
            except files.FormatError:
                continue
            if found.subwords is not None:
                with np.errstate(all="ignore"):
                    assert found.subwords.vectors(UNKNOWN).shape == (len(UNKNOWN), found.subwords.dim)
                    own_rows(found)
